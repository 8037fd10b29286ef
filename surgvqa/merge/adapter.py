"""A PEFT LoRA adapter folder: its config, and which of its tensors changes which tensor of the base. Headers only.

Key forms, after the prefix `base_model.model.`:

    <module>.lora_A.weight [r, in], <module>.lora_B.weight [out, r], <module>.lora_B.bias [out] (lora_bias)
    <module>.lora_embedding_A [r, tokens], <module>.lora_embedding_B [width, r]
    <module>.lora_magnitude_vector [out] (DoRA; `.weight` in some versions)
    <module>.<parameter>: trained in full (modules_to_save, bias="lora_only" or "all"); replaces the base's

Scale of a module: alpha / r, with rsLoRA alpha / sqrt(r) (Kalajdzievski 2023). rank_pattern and alpha_pattern: the
first key whose regex `(.*\\.)?key` matches the whole module path wins.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgvqa.checkpoint.folder import Checkpoint
from surgvqa.checkpoint.headers import TensorInfo, read_header
from surgvqa.checkpoint.names import to_old_name
from surgvqa.errors import UsageError
from surgvqa.files import read_json

PREFIX = "base_model.model."
CONFIG_FILE = "adapter_config.json"
_PART = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?:\.(?P<parameter>weight|bias))?$"
)
_SAVED = re.compile(r"\.(modules_to_save|base_layer)(\.default)?(?=\.)")

# What changes the base weights themselves or has no single merged weight, and why it is refused.
_REFUSED = {
    "use_qalora": "QA-LoRA folds into a quantised base, there is no merged BF16 weight; PEFT refuses it too",
    "layer_replication": "layer replication makes new layers; PEFT refuses to merge it too",
    "alora_invocation_tokens": "an activated LoRA (aLoRA) is on for part of the tokens, no one weight equals it",
    "arrow_config": "Arrow routes each token to another adapter, no one weight equals it",
    "megatron_config": "Megatron-parallel adapters are sharded; gather them first",
    "use_bdlora": "BD-LoRA is not supported",
    "velora_config": "VeLoRA is not supported",
    "monteclora_config": "MonteCLoRA is not supported",
    "kasa_config": "KaSA is not supported",
    "target_parameters": "LoRA on bare parameters (target_parameters) is not supported",
    "trainable_token_indices": "trainable_token_indices is not supported; train the embedding with modules_to_save",
}
_REFUSED_INIT = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


@dataclass
class LoraModule:
    """What an adapter holds for one module."""

    module: str
    """Its old name in the base, e.g. model.layers.0.self_attn.q_proj."""
    a: TensorInfo
    b: TensorInfo
    scale: float
    rank: int
    embedding: bool = False
    """lora_embedding_A/B: the delta is (B A)^T, as the table is stored [tokens, width]."""
    magnitude: TensorInfo | None = None
    b_bias: TensorInfo | None = None


@dataclass
class Adapter:
    """An adapter folder, resolved against a base."""

    folder: Path
    config: dict[str, Any]
    modules: dict[str, LoraModule]
    """By the base tensor that each one changes: <module>.weight."""
    replaced: dict[str, TensorInfo]
    """Base tensor -> the tensor that was trained in its place."""
    weights: Path
    warnings: list[str] = field(default_factory=list)

    @property
    def transposed(self) -> bool:
        """fan_in_fan_out: the base stores linear weights [in, out]."""
        return bool(self.config.get("fan_in_fan_out"))


def read_adapter(folder: Path | str, base: Checkpoint) -> Adapter:
    """Reads an adapter's headers and says what it changes in `base`.

    UsageError, naming file and tensor: no adapter, a kind that cannot be merged, a rank that contradicts the config, a
    module or shape that the base has not, a tensor of unknown use.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such adapter folder")
    config = read_json(folder / CONFIG_FILE)
    _refuse(folder / CONFIG_FILE, config)
    weights, tensors = _adapter_tensors(folder)
    adapter = Adapter(folder, config, {}, {}, weights)
    parts: dict[str, dict[str, TensorInfo]] = {}
    raw_names: dict[str, str] = {}
    for key, info in tensors.items():
        name = key.removeprefix(PREFIX)
        match = _PART.match(name)
        if match:
            part = match["part"] + (".bias" if match["parameter"] == "bias" else "")
            parts.setdefault(match["module"], {})[part] = info
        elif ".original_module." in name:
            continue  # bias="all" also saves the untrained original beside a module of modules_to_save
        elif "lora_" in name or "trainable_tokens" in name:
            raise UsageError(f"{weights}: {key}: no known LoRA tensor; this adapter cannot be merged here")
        else:
            saved = to_old_name(_SAVED.sub("", name))
            adapter.replaced[saved] = info
    for raw_name, found in parts.items():
        module = _base_module(to_old_name(raw_name), base)
        raw_names[module] = raw_name
        lora = _module(adapter, raw_name, module, found, base)
        if f"{module}.weight" in adapter.modules:
            raise UsageError(f"{weights}: two LoRA modules for the tied weight {module}; this cannot be merged here")
        adapter.modules[f"{module}.weight"] = lora
    if not adapter.modules and not adapter.replaced:
        raise UsageError(f"{weights}: no tensor in it")
    for name, info in adapter.replaced.items():
        there = base.tensors.get(name)
        if there and there.shape != info.shape:
            raise UsageError(f"{weights}: {info.name} is {list(info.shape)}, the base has {list(there.shape)}")
    _check_targets(adapter, base)
    return adapter


def _refuse(file: Path, config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UsageError(f"{file}: peft_type is {kind!r}, expected LORA")
    for key, why in _REFUSED.items():
        if config.get(key):
            raise UsageError(f"{file}: {key}: {why}")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict):
            raise UsageError(f"{file}: {key} is {pattern!r}, expected an object of regular expressions and numbers")
        for part in pattern:
            try:
                re.compile(part)
            except re.error:
                raise UsageError(f"{file}: {key} has {part!r}, which is no regular expression") from None
    start = str(config.get("init_lora_weights") or "").lower()
    if start.startswith(_REFUSED_INIT):
        raise UsageError(
            f"{file}: init_lora_weights={start} changed the base weights in training; save the adapter with "
            "path_initial_model_for_weight_conversion first"
        )


def _adapter_tensors(folder: Path) -> tuple[Path, dict[str, TensorInfo]]:
    file = folder / "adapter_model.safetensors"
    if file.is_file():
        tensors, problems = read_header(file)
        if problems:
            raise UsageError(problems[0])
        return file, tensors
    if (folder / "adapter_model.bin").is_file():
        from surgvqa.checkpoint.torch_tensors import read_torch_file  # needs torch

        return folder / "adapter_model.bin", read_torch_file(folder / "adapter_model.bin")
    raise UsageError(f"{folder}: no adapter_model.safetensors in it")


def _base_module(module: str, base: Checkpoint) -> str:
    """The module whose weight the base stores: tied weights are stored once, as the embedding."""
    tied = base.config.get("tie_word_embeddings") or (base.config.get("text_config") or {}).get("tie_word_embeddings")
    if tied and module == "lm_head" and "lm_head.weight" not in base.tensors:
        return "model.embed_tokens"
    return module


def _pattern_value(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _module(adapter: Adapter, raw_name: str, module: str, found: dict[str, TensorInfo], base: Checkpoint) -> LoraModule:
    config, file = adapter.config, adapter.weights
    embedding = "lora_embedding_A" in found or "lora_embedding_B" in found
    a_name, b_name = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    for part in (a_name, b_name):
        if part not in found:
            raise UsageError(f"{file}: {raw_name} has no {part}; is the file whole?")
    a, b = found[a_name], found[b_name]
    weight = base.tensors.get(f"{module}.weight")
    if weight is None:
        raise UsageError(f"{file}: {raw_name}: the base {base.folder} has no {module}.weight; is this its Stage 1?")
    if weight.dtype not in ("BF16", "F16", "F32"):
        raise UsageError(f"{weight.file}: {weight.name} is {weight.dtype}; merge onto a BF16, F16 or F32 base")
    rank = _pattern_value(config.get("rank_pattern"), raw_name, config.get("r"))
    alpha = _pattern_value(config.get("alpha_pattern"), raw_name, config.get("lora_alpha"))
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise UsageError(f"{adapter.folder / CONFIG_FILE}: r={rank!r}, lora_alpha={alpha!r}; expected numbers")
    if a.shape[0] != rank or len(b.shape) < 2 or b.shape[1] != rank:
        rows = a.shape[0]
        raise UsageError(
            f"{adapter.folder / CONFIG_FILE}: r={rank} but lora_A has {rows} rows in {raw_name}; "
            "is this the adapter's own config?"
        )
    wanted = (a.shape[1], b.shape[0]) if embedding or adapter.transposed else (b.shape[0], *a.shape[1:])
    if len(weight.shape) != 2:
        raise UsageError(f"{file}: {raw_name}: LoRA on a convolution {list(weight.shape)} is not supported")
    if weight.shape != wanted:
        raise UsageError(
            f"{file}: {raw_name}: the adapter is for a weight of {list(wanted)}, the base has {list(weight.shape)}"
        )
    magnitude, bias = found.get("lora_magnitude_vector"), found.get("lora_B.bias")
    if bool(config.get("use_dora")) != (magnitude is not None):
        raise UsageError(
            f"{adapter.folder / CONFIG_FILE}: use_dora={config.get('use_dora')}, but {raw_name} "
            + ("has a" if magnitude else "has no")
            + " lora_magnitude_vector"
        )
    if bias is not None and f"{module}.bias" not in base.tensors:
        raise UsageError(f"{file}: {raw_name}: lora_bias, but the base has no {module}.bias to add it to")
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LoraModule(module, a, b, scale, rank, embedding, magnitude, bias)


def _check_targets(adapter: Adapter, base: Checkpoint) -> None:
    """Warns when the config's regex means modules that the file holds nothing for."""
    target = adapter.config.get("target_modules")
    if not isinstance(target, str) or target == "all-linear":
        return
    try:
        pattern = re.compile(target)
    except re.error:
        return
    modules = [
        n.removesuffix(".weight") for n, t in base.tensors.items() if n.endswith(".weight") and len(t.shape) == 2
    ]
    missing = [m for m in modules if pattern.fullmatch(m) and f"{m}.weight" not in adapter.modules]
    if missing:
        adapter.warnings.append(
            f"{adapter.weights.name}: no LoRA weights for {len(missing)} modules that target_modules means, "
            f"first {missing[0]}"
        )
