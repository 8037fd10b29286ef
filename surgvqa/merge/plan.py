"""The plan of a merge: what is read, what is computed, what is written where."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgvqa.checkpoint.architecture import expected_tensors
from surgvqa.checkpoint.config_json import output_config, quantisation, side_files, stale_quantisation
from surgvqa.checkpoint.folder import Checkpoint, open_checkpoint, parse_size
from surgvqa.checkpoint.headers import FLOAT_DTYPES, TensorInfo
from surgvqa.checkpoint.shards import Copy, Files, Source, plan_shards
from surgvqa.checkpoint.writer import NewCheckpoint, file_identity
from surgvqa.config.options import MergeOptions
from surgvqa.errors import UsageError
from surgvqa.files import free_bytes
from surgvqa.merge.adapter import Adapter, is_tied, read_adapter, require_float
from surgvqa.merge.promises import require_promised

REPORT_FILE = "merge_report.json"
ARITHMETIC = 2  # raise it when a change of the arithmetic changes bits, so that an interrupted merge starts again


@dataclass
class Plan:
    """The output of a merge and its inputs."""

    base: Checkpoint
    adapter: Adapter
    checkpoint: NewCheckpoint
    kinds: dict[str, str]
    """{output tensor: "copied", "cast", "merged" or "replaced"}."""
    device: str
    files: Files
    warnings: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Figures of the plan, for --dry_run and the panel."""
        kinds = Counter(self.kinds.values())
        return {
            "output": str(self.checkpoint.output),
            "modules_merged": len(self.adapter.modules),
            "tensors_copied": kinds["copied"],
            "tensors_cast": kinds["cast"],
            "tensors_replaced": kinds["replaced"],
            "base_bytes": self.base.nbytes,
            "adapter_bytes": self.adapter.weights.stat().st_size,
            "output_bytes": self.checkpoint.nbytes,
            "free_bytes": free_bytes(self.checkpoint.output),
            "shards": [{"file": s.file, "bytes": s.nbytes, "tensors": len(s.sources)} for s in self.checkpoint.shards],
            "device": self.device,
        }


def make_plan(options: MergeOptions) -> Plan:
    """Reads the headers of base and adapter and plans every tensor of the output. Raises UsageError for bad input."""
    base = open_checkpoint(options.stage1_model_path)
    quantised = quantisation(base)
    if quantised:
        raise UsageError(f"{base.folder}: {quantised}; merge onto the BF16 original")
    base.require_sound()
    before = [*base.warnings, *filter(None, [stale_quantisation(base), _size_problem(base)])]
    adapter = read_adapter(options.stage2_adapter_path, base)
    overlay = _projector(Path(options.projector), base) if options.projector else {}
    require_promised(adapter, base, overlay)
    device = _device(options.device)
    output = Path(options.output_path)
    for folder in (base.folder, adapter.folder):
        if output.resolve() == folder.resolve():
            raise UsageError(f"--output_path {output}: is an input of the merge; name another folder")
    files, warnings = Files(), [*before, *adapter.warnings]
    config = output_config(base)
    sources, kinds = _sources(base, adapter, overlay, files, device)
    if _untie(base, adapter, sources, kinds, files, warnings):
        config["tie_word_embeddings"] = False
    checkpoint = NewCheckpoint(
        output=output,
        shards=plan_shards(sources, parse_size(options.max_shard_size)),
        inputs=_inputs(options, base, adapter, device),
        report_file=REPORT_FILE,
        side_files=side_files(base, config, adapter.folder),
    )
    return Plan(base, adapter, checkpoint, kinds, device, files, warnings)


def _size_problem(base: Checkpoint) -> str | None:
    """A size that config.json lacks or has wrong. Loading the result needs it, the merge itself does not."""
    try:
        expected_tensors(base)
    except UsageError as error:
        return str(error)
    return None


def _projector(file: Path, base: Checkpoint) -> dict[str, TensorInfo]:
    """The author's audio_projector.pt as {base tensor: tensor}."""
    from surgvqa.checkpoint.torch_tensors import read_torch_file

    found = {}
    for name, info in read_torch_file(file).items():
        target = "audio_projector." + re.sub(r"^(.*\.)?audio_projector\.", "", name)
        if target not in base.tensors:
            raise UsageError(f"{file}: {name}: the base has no {target}")
        if base.tensors[target].shape != info.shape:
            wanted = list(base.tensors[target].shape)
            raise UsageError(f"{file}: {name} is {list(info.shape)}, the base's {target} is {wanted}")
        require_float(info)
        found[target] = info
    if not found:
        raise UsageError(f"{file}: has no tensors")
    return found


def _device(asked: str) -> str:
    """The device for the arithmetic.

    `auto` is the CPU: disk and hashing limit a merge, a CUDA context alone takes more memory than the whole merge, and
    the GPU may be training. Raises UsageError when CUDA was asked for and is missing.
    """
    if asked != "cuda":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA GPU here")
    return "cuda"


def _sources(
    base: Checkpoint, adapter: Adapter, overlay: dict[str, TensorInfo], files: Files, device: str
) -> tuple[list[Source], dict[str, str]]:
    """The sources and kinds of all output tensors, in the base's order, new ones at the end."""
    from surgvqa.checkpoint.torch_tensors import Cast
    from surgvqa.merge.arithmetic import AddedBias, Merged, Replaced

    sources: list[Source] = []
    kinds: dict[str, str] = {}
    biases = {f"{m.module}.bias": m for m in adapter.modules.values() if m.b_bias}
    for name, info in base.tensors.items():
        trained = adapter.replaced.get(name)
        under = trained or adapter.own_base.get(name) or overlay.get(name) or info
        if name in adapter.modules:
            if trained:
                raise UsageError(f"{adapter.weights}: {trained.name}: trained in full and with LoRA; which one counts?")
            lora = adapter.modules[name]
            sources.append(Merged(name, under, lora, files, device, info.dtype))
            kinds[name] = "merged"
        elif name in biases:
            sources.append(AddedBias(name, under, biases[name], files, info.dtype))
            kinds[name] = "merged"
        elif under is not info:
            origin = "projector" if under is overlay.get(name) else "adapter"
            sources.append(Replaced(name, under, info if info.dtype in FLOAT_DTYPES else None, files, origin))
            kinds[name] = "replaced"
        elif info.dtype in FLOAT_DTYPES and info.dtype != "BF16":
            sources.append(Cast(name, info, files))
            kinds[name] = "cast"
        else:
            sources.append(Copy(name, info, files))
            kinds[name] = "copied"
    for name, info in adapter.replaced.items():
        if name not in base.tensors:
            sources.append(Replaced(name, info, None, files, "adapter"))
            kinds[name] = "replaced"
    return sources, kinds


def _untie(
    base: Checkpoint,
    adapter: Adapter,
    sources: list[Source],
    kinds: dict[str, str],
    files: Files,
    warnings: list[str],
) -> bool:
    """Whether tied embeddings must be written untied, because one of the two was trained in full without the other.

    PEFT trains modules_to_save on a copy, which breaks the tie. If written as tied, the other side would change too.
    """
    if not is_tied(base):
        return False
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if embedding in adapter.modules and head not in adapter.replaced:
        warnings.append("the embedding is tied to lm_head: the merged LoRA changes both, as in PEFT")
    if head in adapter.replaced and embedding in adapter.replaced and adapter.config.get("ensure_weight_tying"):
        sources[:] = [source for source in sources if source.name != head]  # PEFT saves the same tensor twice
        del kinds[head]
        return False
    if head in adapter.replaced and embedding in adapter.replaced:
        warnings.append("embedding and lm_head were trained separately: written untied (tie_word_embeddings false)")
        return True
    if head in adapter.replaced:
        warnings.append("lm_head was trained without the embedding: written untied (tie_word_embeddings false)")
        return True
    if embedding in adapter.replaced and not adapter.config.get("ensure_weight_tying"):
        warnings.append("the embedding was trained without lm_head: written untied (tie_word_embeddings false)")
        info = base.tensors[embedding]
        from surgvqa.checkpoint.torch_tensors import Cast

        sources.append(Copy(head, info, files) if info.dtype == "BF16" else Cast(head, info, files))
        kinds[head] = "copied" if info.dtype == "BF16" else "cast"
        return True
    return False


def _inputs(options: MergeOptions, base: Checkpoint, adapter: Adapter, device: str) -> dict[str, Any]:
    files = {f"base/{f.name}": f for f in [*base.files, base.folder / "config.json"]}
    files |= {f"adapter/{f.name}": f for f in (adapter.weights, adapter.folder / "adapter_config.json")}
    if options.projector:
        files["projector"] = Path(options.projector)
    identities = {name: file_identity(file) for name, file in files.items()}
    return {**identities, "arithmetic": ARITHMETIC, "device": device}
