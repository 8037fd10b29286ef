"""LoRA adapters + checkpoint -> one full BF16 checkpoint, tensor by tensor.

A plan is made from the headers alone: for each tensor of the output, where its bytes come from (copied, cast, merged,
replaced). `checkpoint_writer` then streams it to disk; `lora_math` has the arithmetic. Memory does not grow with the
checkpoint: a few blocks of 4 MB and the factors of the modules at hand.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgvqa.checkpoint.folder import (
    CARRIED_FILES,
    FLOAT_DTYPES,
    Checkpoint,
    TensorInfo,
    flat_config,
    open_checkpoint,
    parse_size,
    quantisation,
    whisper_config,
)
from surgvqa.checkpoint.shards import Copy, Files, Source, plan_shards
from surgvqa.checkpoint.writer import Job, Writer, file_identity, free_bytes
from surgvqa.config.options import MergeOptions
from surgvqa.errors import UsageError
from surgvqa.merge.adapter import Adapter, read_adapter
from surgvqa.merge.report import make_report, show_report
from surgvqa.outcome import Outcome
from surgvqa.runs.folder import Run
from surgvqa.terminal.job_view import counted, human_bytes

REPORT_FILE = "merge_report.json"
ARITHMETIC = 1  # counts up when a change of the arithmetic changes bits: a half-made merge then starts again


@dataclass
class Plan:
    """What a merge will write, and from what."""

    base: Checkpoint
    adapter: Adapter
    job: Job
    kinds: dict[str, str]
    """Output tensor -> copied, cast, merged, replaced."""
    device: str
    files: Files
    warnings: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """The plan in figures, for --dry_run and the panel."""
        kinds = Counter(self.kinds.values())
        return {
            "output": str(self.job.output),
            "modules_merged": len(self.adapter.modules),
            "tensors_copied": kinds["copied"],
            "tensors_cast": kinds["cast"],
            "tensors_replaced": kinds["replaced"],
            "base_bytes": self.base.nbytes,
            "adapter_bytes": self.adapter.weights.stat().st_size,
            "output_bytes": self.job.nbytes,
            "free_bytes": free_bytes(self.job.output),
            "shards": [{"file": s.file, "bytes": s.nbytes, "tensors": len(s.sources)} for s in self.job.shards],
            "device": self.device,
        }


def check(options: MergeOptions) -> None:
    """Looks at the folders and the shard size before a run folder is made."""
    parse_size(options.max_shard_size)
    for name in ("stage1_model_path", "stage2_adapter_path"):
        if not Path(getattr(options, name)).is_dir():
            raise UsageError(f"--{name} {getattr(options, name)}: no such folder")
    if options.projector and not Path(options.projector).is_file():
        raise UsageError(f"--projector {options.projector}: no such file")


def run(options: MergeOptions, run: Run) -> Outcome:
    """Merges; see the module. With --dry_run only the plan."""
    began = time.monotonic()
    run.phase("plan", f"{options.stage1_model_path} + {options.stage2_adapter_path}")
    plan = make_plan(options)
    run.emit("plan", **plan.summary())
    for warning in plan.warnings:
        run.warning(warning)
    if options.dry_run:
        return _dry_run(plan)

    import torch

    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)  # the parallelism is over blocks: each worker thread computes alone
    torch.set_float32_matmul_precision("highest")  # no TF32: its 10 bits of mantissa would show after the rounding
    seconds = {"plan": time.monotonic() - began}
    try:
        with Writer(plan.job, run) as writer:
            seconds["verify"] = time.monotonic() - began - sum(seconds.values())
            if writer.finished:
                return _already_there(plan, writer, time.monotonic() - began)
            size = f"{counted(len(plan.job.shards), 'shard')}, {human_bytes(plan.job.nbytes)}"
            run.phase("merge", f"{size} on {plan.device}")
            writer.write_shards()
            seconds["merge"] = time.monotonic() - began - sum(seconds.values())
            run.phase("publish", str(plan.job.output))
            report = make_report(plan, writer, seconds, peak_rss_bytes())
            for text in report["warnings"][len(plan.warnings) :]:
                run.warning(text)
            writer.publish(report)
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        plan.files.close()
    return _done(plan, report, time.monotonic() - began)


# --- plan ------------------------------------------------------------------------------------------------------------


def make_plan(options: MergeOptions) -> Plan:
    """Reads the headers of base and adapter and settles every tensor of the output. UsageError for bad input."""
    base = open_checkpoint(options.stage1_model_path)
    quantised = quantisation(base)
    if quantised:
        raise UsageError(f"{base.folder}: {quantised}; merge onto the BF16 original")
    base.require_sound()
    if not base.config:
        raise UsageError(f"{base.folder / 'config.json'}: missing")
    adapter = read_adapter(options.stage2_adapter_path, base)
    overlay = _projector(Path(options.projector), base) if options.projector else {}
    device = _device(options.device)
    output = Path(options.output_path)
    for folder in (base.folder, adapter.folder):
        if output.resolve() == folder.resolve():
            raise UsageError(f"--output_path {output}: is an input of the merge; name another folder")
    files, warnings = Files(), list(adapter.warnings)
    config = output_config(base)
    sources, kinds = _sources(base, adapter, overlay, files, device)
    if _untie(base, adapter, sources, kinds, files, warnings):
        config["tie_word_embeddings"] = False
    job = Job(
        output=output,
        shards=plan_shards(sources, parse_size(options.max_shard_size)),
        inputs=_inputs(options, base, adapter, device),
        report_file=REPORT_FILE,
        side_files=side_files(base, config, adapter.folder),
    )
    return Plan(base, adapter, job, kinds, device, files, warnings)


def _projector(file: Path, base: Checkpoint) -> dict[str, TensorInfo]:
    """The author's audio_projector.pt as {base tensor: tensor}."""
    from surgvqa.merge.arithmetic import read_torch_file

    found = {}
    for name, info in read_torch_file(file).items():
        target = "audio_projector." + re.sub(r"^(.*\.)?audio_projector\.", "", name)
        if target not in base.tensors:
            raise UsageError(f"{file}: {name}: the base has no {target}")
        if base.tensors[target].shape != info.shape:
            wanted = list(base.tensors[target].shape)
            raise UsageError(f"{file}: {name} is {list(info.shape)}, the base's {target} is {wanted}")
        found[target] = info
    if not found:
        raise UsageError(f"{file}: no tensor in it")
    return found


def _device(asked: str) -> str:
    """`auto` is the CPU: the disk and the hashing bound a merge, a CUDA context alone takes more memory than all of it,
    and the card may be training."""
    if asked != "cuda":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA GPU here")
    return "cuda"


def _sources(
    base: Checkpoint, adapter: Adapter, overlay: dict[str, TensorInfo], files: Files, device: str
) -> tuple[list[Source], dict[str, str]]:
    """A source for each tensor of the output, in the base's order, new ones at the end."""
    from surgvqa.merge.arithmetic import AddedBias, Cast, Merged, Replaced

    sources: list[Source] = []
    kinds: dict[str, str] = {}
    biases = {f"{m.module}.bias": m for m in adapter.modules.values() if m.b_bias}
    for name, info in base.tensors.items():
        trained = adapter.replaced.get(name)
        under = trained or overlay.get(name) or info
        if name in adapter.modules:
            if trained:
                raise UsageError(f"{adapter.weights}: {trained.name}: trained in full and with LoRA; which one counts?")
            lora = adapter.modules[name]
            sources.append(Merged(name, under, lora, files, adapter.transposed, device))
            kinds[name] = "merged"
        elif name in biases:
            sources.append(AddedBias(name, under, biases[name], files))
            kinds[name] = "merged"
        elif under is not info:
            origin = "adapter" if trained else "projector"
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
    """Whether tied embeddings must come apart, because one of the two was trained in full without the other.

    PEFT trains modules_to_save on a copy, which breaks the tie; written as tied, the other side would change too.
    """
    if not base.config.get("tie_word_embeddings") or "lm_head.weight" in base.tensors:
        return False
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if embedding in adapter.modules:
        warnings.append("the embedding is tied to lm_head: the merged LoRA changes both, as PEFT's merge does")
    if head in adapter.replaced and embedding in adapter.replaced:
        warnings.append("embedding and lm_head were trained apart: written untied (tie_word_embeddings false)")
        return True
    if head in adapter.replaced:
        warnings.append("lm_head was trained apart from the embedding: written untied (tie_word_embeddings false)")
        return True
    if embedding in adapter.replaced and not adapter.config.get("ensure_weight_tying"):
        warnings.append("the embedding was trained apart from lm_head: written untied (tie_word_embeddings false)")
        info = base.tensors[embedding]
        from surgvqa.merge.arithmetic import Cast

        sources.append(Copy(head, info, files) if info.dtype == "BF16" else Cast(head, info, files))
        kinds[head] = "copied" if info.dtype == "BF16" else "cast"
        return True
    return False


def output_config(base: Checkpoint) -> dict[str, Any]:
    """config.json of a BF16 copy: flat, for the old fork too; the audio encoder's sizes in a key that it ignores."""
    config = flat_config(base.config)
    config["torch_dtype"] = "bfloat16"
    sizes = whisper_config(base.tensors)
    if sizes:
        known = config.get("audio_encoder_config") or {}
        config["audio_encoder_config"] = {**known, **sizes}
        if known.get("encoder_attention_heads"):  # the one size that no tensor shape tells
            config["audio_encoder_config"]["encoder_attention_heads"] = known["encoder_attention_heads"]
    return config


def side_files(base: Checkpoint, config: dict[str, Any], also: Path | None = None) -> dict[str, bytes]:
    """config.json and the tokenizer, preprocessor, … files of the base, or of `also` where the base has none."""
    found = {"config.json": (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}
    for folder in [base.folder] + ([also] if also else []):
        for name in CARRIED_FILES:
            if name not in found and (folder / name).is_file():
                found[name] = (folder / name).read_bytes()
    return found


def _inputs(options: MergeOptions, base: Checkpoint, adapter: Adapter, device: str) -> dict[str, Any]:
    files = {f"base/{f.name}": f for f in [*base.files, base.folder / "config.json"]}
    files |= {f"adapter/{f.name}": f for f in (adapter.weights, adapter.folder / "adapter_config.json")}
    if options.projector:
        files["projector"] = Path(options.projector)
    identities = {name: file_identity(file) for name, file in files.items()}
    return {**identities, "arithmetic": ARITHMETIC, "device": device}


# --- what is told ----------------------------------------------------------------------------------------------------


def peak_rss_bytes() -> int:
    """The most memory this process has held, file pages included."""
    if sys.platform == "linux":
        text = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _dry_run(plan: Plan) -> Outcome:
    data = {**plan.summary(), "dry_run": True, "warnings": plan.warnings}
    fits = data["output_bytes"] <= data["free_bytes"]

    def show(console: Any) -> None:
        from rich.text import Text

        console.print(f"{data['output']}: {counted(len(data['shards']), 'shard')}, {human_bytes(data['output_bytes'])}")
        for shard in data["shards"]:
            tensors = counted(shard["tensors"], "tensor")
            console.print(f"  {shard['file']}  {human_bytes(shard['bytes'])}  {tensors}")
        console.print(
            f"{counted(data['modules_merged'], 'module')} merged, {counted(data['tensors_replaced'], 'tensor')} "
            f"replaced, {data['tensors_cast']} cast, {data['tensors_copied']} copied, on {plan.device}"
        )
        console.print(f"free disk {human_bytes(data['free_bytes'])}: {'enough' if fits else 'not enough'}")
        for text in plan.warnings:
            console.print(Text.assemble(("warning:", "yellow"), f" {text}"))

    return Outcome(data, ok=fits, show=show)


def _already_there(plan: Plan, writer: Writer, seconds: float) -> Outcome:
    report = writer.record
    data = {**_data(plan, report, seconds), "already_there": True}
    return Outcome(
        data, show=lambda console: console.print(f"{plan.job.output}: already merged from these inputs; verified")
    )


def _data(plan: Plan, report: dict[str, Any], seconds: float) -> dict[str, Any]:
    return {
        "output": str(plan.job.output),
        "modules_merged": report["modules_merged"],
        "tensors_copied": report["tensors_copied"],
        "seconds": round(seconds, 3),
        "peak_rss_bytes": peak_rss_bytes(),
        "warnings": report["warnings"],
        "shards": len(plan.job.shards),
        "bytes": plan.job.nbytes,
        "report": str(plan.job.output / REPORT_FILE),
    }


def _done(plan: Plan, report: dict[str, Any], seconds: float) -> Outcome:
    data = _data(plan, report, seconds)
    return Outcome(data, ok=not report["not_finite"], show=lambda console: show_report(console, data, report))
