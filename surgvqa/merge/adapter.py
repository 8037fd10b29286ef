"""A PEFT LoRA adapter folder: its config, and which of its tensors changes which base tensor. Reads headers only.

Key forms, after the prefix `base_model.model.`:

    <module>.lora_A.weight [r, in], <module>.lora_B.weight [out, r], <module>.lora_B.bias [out] (lora_bias)
    <module>.lora_embedding_A [r, tokens], <module>.lora_embedding_B [width, r]
    <module>.lora_magnitude_vector [out] (DoRA; `.weight` in some versions)
    <module>.<parameter>: trained in full (modules_to_save, bias="lora_only" or "all"); replaces the base's
    <module>.base_layer.weight: the base that LoRA was trained on (PEFT saves it for the head and the embedding)

The adapter's name may follow lora_A, … and modules_to_save; PEFT leaves it out when it saves.

The scale of a module is alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023). In rank_pattern and
alpha_pattern, the first key whose regex `(.*\\.)?key` matches the whole module path applies.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgvqa.checkpoint.config_json import flat_config
from surgvqa.checkpoint.folder import Checkpoint, as_on_disk, read_object
from surgvqa.checkpoint.headers import FLOAT_DTYPES, TensorInfo, read_header
from surgvqa.checkpoint.names import to_old_name
from surgvqa.errors import UsageError
from surgvqa.merge.patterns import matching
from surgvqa.untrusted import is_kind

PREFIX = "base_model.model."
CONFIG_FILE = "adapter_config.json"
_PART = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?!(?:weight|bias)$)(?P<adapter>[^.]+))?(?:\.(?P<parameter>weight|bias))?$"
)
_SAVED = re.compile(r"^(?P<module>.+)\.modules_to_save\.(?P<rest>.+)$")
NEW_TENSORS = ("lm_head.weight", "audio_projector.weight", "audio_projector.bias")
"""Tensors that an adapter may add to its base: the head if the base is tied, the projector if it has no audio."""

# Fields of adapters that change the base weights themselves or have no single merged weight, and why we refuse them.
REFUSED = {
    "use_qalora": "QA-LoRA merges into a quantised base, so there is no merged BF16 weight; PEFT refuses it too",
    "layer_replication": "layer replication adds layers; PEFT refuses to merge it too",
    "alora_invocation_tokens": "an activated LoRA (aLoRA) applies to some tokens only, so no single weight equals it",
    "arrow_config": "Arrow chooses an adapter for each token, so no single weight equals it",
    "megatron_config": "Megatron-parallel adapters are sharded; gather them first",
    "use_bdlora": "BD-LoRA is not supported",
    "velora_config": "VeLoRA is not supported",
    "monteclora_config": "MonteCLoRA is not supported",
    "kasa_config": "KaSA is not supported",
    "target_parameters": "LoRA on bare parameters (target_parameters) is not supported",
    "trainable_token_indices": "trainable_token_indices is not supported; train the embedding with modules_to_save",
}
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "rank_pattern": ((dict,), "an object of regular expressions and numbers"),
    "alpha_pattern": ((dict,), "an object of regular expressions and numbers"),
    "target_modules": ((str, list), "a regular expression or a list of names"),
    "exclude_modules": ((str, list), "a regular expression or a list of names"),
    "modules_to_save": ((list,), "a list of names"),
    "layers_to_transform": ((int, list), "a layer or a list of layers"),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"), ((bool,), "true or false")),
}
"""{field: (allowed types, their description)}."""
_BIASES = ("none", "all", "lora_only")
KNOWN = frozenset((
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "bias",
    "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "target_parameters", "task_type", "trainable_token_indices", "use_dora", "use_qalora",
    "use_rslora",
))  # fmt: skip
"""Fields that we handle, and fields that change no weight."""
_REFUSED_INIT = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


@dataclass
class LoraModule:
    """The LoRA tensors of one module."""

    module: str
    """Its old name in the base, e.g. model.layers.0.self_attn.q_proj."""
    a: TensorInfo
    b: TensorInfo
    scale: float
    rank: int
    embedding: bool = False
    """lora_embedding_A/B: the delta is (B A)^T, because the table is stored as [tokens, width]."""
    magnitude: TensorInfo | None = None
    b_bias: TensorInfo | None = None


@dataclass
class Adapter:
    """An adapter folder, matched with its base."""

    folder: Path
    config: dict[str, Any]
    modules: dict[str, LoraModule]
    """{base tensor that it changes, <module>.weight: LoRA}."""
    replaced: dict[str, TensorInfo]
    """{base tensor: the tensor that was trained in its place}."""
    weights: Path
    own_base: dict[str, TensorInfo] = field(default_factory=dict)
    """{base tensor: the adapter's own copy of it}; LoRA is added to that copy."""
    named: set[str] = field(default_factory=set)
    """The modules with LoRA weights, as named in the file: a tied head by its own name."""
    warnings: list[str] = field(default_factory=list)


def read_adapter(folder: Path | str, base: Checkpoint) -> Adapter:
    """Reads an adapter's headers and matches its tensors with those of `base`.

    Raises UsageError, which names file and tensor, if this is not an adapter, is of a kind that cannot be merged, has a
    rank that contradicts its config, a module or shape that the base lacks, or a tensor of unknown purpose.
    """
    folder = as_on_disk(Path(folder))
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such adapter folder")
    if not (folder / CONFIG_FILE).is_file():
        inside = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG_FILE}"))
        hint = f"; is {folder / inside[0]} meant?" if inside else "; is this the adapter's folder?"
        raise UsageError(f"{folder}: no {CONFIG_FILE} in it{hint}")
    config = read_object(folder / CONFIG_FILE)
    _check_config(folder / CONFIG_FILE, config)
    weights, tensors = _adapter_tensors(folder)
    adapter = Adapter(folder, config, {}, {}, weights)
    parts: dict[str, dict[str, TensorInfo]] = {}
    names: dict[str, str] = {}
    for key, info in tensors.items():
        name = key.removeprefix(PREFIX)
        match = _PART.match(name)
        if match:
            part = match["part"] + (".bias" if match["parameter"] == "bias" else "")
            known = parts.setdefault(match["module"], {})
            if part in known:
                raise UsageError(f"{weights}: {key} and {known[part].name}: two adapters in one file; save one of them")
            known[part] = info
            names.setdefault(match["adapter"] or "", key)
        elif ".original_module." in name:
            continue  # bias="all" also saves the untrained original beside a module of modules_to_save
        elif "lora_" in name or "trainable_tokens" in name:
            raise UsageError(f"{weights}: {key}: unknown kind of LoRA tensor; this adapter cannot be merged here")
        elif ".base_layer." in name:
            target = _stored_tensor(to_old_name(name.replace(".base_layer.", ".")), base)
            _require_new(weights, target, info, adapter.own_base)
            adapter.own_base[target] = info
        else:
            saved = _replaced_tensor(weights, key, name, base)
            if config.get("bias") == "all" and key.replace(".modules_to_save.", ".") in tensors.keys() - {key}:
                continue  # bias="all" saves the biases of modules_to_save twice
            _require_new(weights, saved, info, adapter.replaced)
            adapter.replaced[saved] = info
    if len(names) > 1:
        raise UsageError(
            f"{weights}: {' and '.join(list(names.values())[:2])} belong to different adapters; save one of them"
        )
    ranks = _pattern_values(adapter, "rank_pattern", parts, config.get("r"))
    alphas = _pattern_values(adapter, "alpha_pattern", parts, config.get("lora_alpha"))
    for raw_name, found in parts.items():
        module = _base_module(to_old_name(raw_name), base)
        lora = _module(adapter, raw_name, module, found, base, ranks[raw_name], alphas[raw_name])
        if f"{module}.weight" in adapter.modules:
            raise UsageError(f"{weights}: two LoRA modules for the tied weight {module}; this cannot be merged here")
        adapter.modules[f"{module}.weight"] = lora
    for name in list(adapter.own_base):
        _require_new(weights, name, adapter.own_base[name], adapter.replaced)
        if f"{name.rpartition('.')[0]}.weight" not in adapter.modules:  # no LoRA on it: trained in full
            adapter.replaced[name] = adapter.own_base.pop(name)
    if not adapter.modules and not adapter.replaced:
        raise UsageError(f"{weights}: has no tensors")
    for name, info in [*adapter.replaced.items(), *adapter.own_base.items()]:
        there = base.tensors.get(name)
        if there is None and name not in NEW_TENSORS:
            raise UsageError(f"{weights}: {info.name}: the base {base.folder} has no {name}; is this its Stage 1?")
        if there and there.shape != info.shape:
            raise UsageError(f"{weights}: {info.name} is {list(info.shape)}, the base has {list(there.shape)}")
        require_float(info)
    unknown = sorted(key for key, value in config.items() if value and key not in KNOWN and key not in REFUSED)
    if unknown:
        adapter.warnings.append(
            f"{CONFIG_FILE}: {', '.join(unknown)[:200]}: unknown to this program (an adapter of a newer PEFT?) and "
            "ignored by the merge"
        )
    if config.get("fan_in_fan_out"):
        adapter.warnings.append(
            f"{CONFIG_FILE}: fan_in_fan_out is set, but every module of this model is an nn.Linear; ignored, as in PEFT"
        )
    adapter.named = {to_old_name(name) for name in parts}
    return adapter


def require_float(info: TensorInfo) -> None:
    """Raises UsageError for a tensor of integers, booleans or complex numbers."""
    if info.dtype not in FLOAT_DTYPES:
        raise UsageError(f"{info.file}: {info.name} is {info.dtype}, expected a float type; is it quantised?")


def _require_new(weights: Path, target: str, info: TensorInfo, known: Mapping[str, TensorInfo]) -> None:
    """Raises UsageError when another tensor of the file already stands for `target`."""
    if target in known:
        raise UsageError(f"{weights}: {info.name} and {known[target].name} both stand for {target}; which one counts?")


def _replaced_tensor(weights: Path, key: str, name: str, base: Checkpoint) -> str:
    """The base tensor that a tensor trained in full replaces. Raises UsageError if there is none."""
    match = _SAVED.match(name)
    if not match:
        return to_old_name(name)
    # PEFT leaves the adapter's name out; torch.save(model.state_dict()) keeps it: <module>.modules_to_save.NAME.<rest>
    candidates = [match["rest"], match["rest"].partition(".")[2]]
    for rest in filter(None, candidates):
        target = to_old_name(f"{match['module']}.{rest}")
        if target in base.tensors:
            return target
    raise UsageError(
        f"{weights}: {key}: the base {base.folder} has no tensor of that name, with or without "
        f"{match['rest'].partition('.')[0]!r} as the adapter's name"
    )


def _stored_tensor(name: str, base: Checkpoint) -> str:
    """The base tensor that stores `name`; for a tied head this is the embedding."""
    module, _, parameter = name.rpartition(".")
    return f"{_base_module(module, base)}.{parameter}"


def _check_config(file: Path, config: dict[str, Any]) -> None:
    """Raises UsageError for a config that is not LoRA, cannot be merged, or has a field of the wrong type."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UsageError(f"{file}: peft_type is {kind!r}, expected LORA")
    for key, why in REFUSED.items():
        if config.get(key):
            raise UsageError(f"{file}: {key}: {why}")
    for key, (kinds, expected) in _KINDS.items():
        value = config.get(key)
        if value is None:
            continue
        parts = value if isinstance(value, list) else []
        fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if not fits or not all(isinstance(v, (str, int)) for v in parts):
            raise UsageError(f"{file}: {key} is {repr(value)[:80]}, expected {expected}")
    if config.get("bias", "none") not in _BIASES:
        raise UsageError(f"{file}: bias is {repr(config['bias'])[:80]}, expected {', '.join(_BIASES)}")
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
    """The module under which the base stores a weight. Tied weights are stored once, as the embedding."""
    return "model.embed_tokens" if module == "lm_head" and is_tied(base) else module


def is_tied(base: Checkpoint) -> bool:
    """Whether the base stores one matrix for both embedding and head."""
    return bool(flat_config(base.config).get("tie_word_embeddings")) and "lm_head.weight" not in base.tensors


def _pattern_values(adapter: Adapter, key: str, modules: Collection[str], default: Any) -> dict[str, Any]:
    """{module: its value in rank_pattern or alpha_pattern (`key`), else `default`}; the first match applies."""
    values = dict.fromkeys(modules, default)
    table = adapter.config.get(key) or {}
    found = matching(list(table), modules, f"{adapter.folder / CONFIG_FILE}: {key} has", at_end=True)
    for value, meant in reversed(list(zip(table.values(), found))):
        values |= dict.fromkeys(meant, value)
    return values


def _module(
    adapter: Adapter,
    raw_name: str,
    module: str,
    found: dict[str, TensorInfo],
    base: Checkpoint,
    rank: Any,
    alpha: Any,
) -> LoraModule:
    config, file = adapter.config, adapter.weights
    embedding = "lora_embedding_A" in found or "lora_embedding_B" in found
    a_name, b_name = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    for part in (a_name, b_name):
        if part not in found:
            raise UsageError(f"{file}: {raw_name} has no {part}; is the file complete?")
    a, b = found[a_name], found[b_name]
    for info in found.values():
        require_float(info)
    weight = base.tensors.get(f"{module}.weight")
    if weight is None:
        raise UsageError(f"{file}: {raw_name}: the base {base.folder} has no {module}.weight; is this its Stage 1?")
    if weight.dtype not in ("BF16", "F16", "F32"):
        raise UsageError(f"{weight.file}: {weight.name} is {weight.dtype}; merge onto a BF16, F16 or F32 base")
    if not is_kind(rank, "a whole number") or rank < 1 or not is_kind(alpha, "a number"):
        raise UsageError(
            f"{adapter.folder / CONFIG_FILE}: r={repr(rank)[:40]}, lora_alpha={repr(alpha)[:40]} for {raw_name}; "
            "expected a whole number from 1 and a number"
        )
    if len(weight.shape) != 2:
        raise UsageError(f"{file}: {raw_name}: LoRA on a convolution {list(weight.shape)} is not supported")
    for info in (a, b):
        if len(info.shape) != 2:
            raise UsageError(
                f"{file}: {info.name} is {list(info.shape)}, expected two dimensions; is the file complete?"
            )
    if a.shape[0] != rank or b.shape[1] != rank:
        rows = a.shape[0]
        raise UsageError(
            f"{adapter.folder / CONFIG_FILE}: r={rank} but lora_A has {rows} rows in {raw_name}; "
            "is this the adapter's own config?"
        )
    wanted = (a.shape[1], b.shape[0]) if embedding else (b.shape[0], a.shape[1])
    if weight.shape != wanted:
        raise UsageError(
            f"{file}: {raw_name}: the adapter is for a weight of {list(wanted)}, the base has {list(weight.shape)}"
        )
    magnitude, bias = found.get("lora_magnitude_vector"), found.get("lora_B.bias")
    outputs = b.shape[0]
    for vector in (magnitude, bias):
        if vector is not None and (vector.numel != outputs or max(vector.shape, default=0) != outputs):
            raise UsageError(f"{file}: {vector.name} is {list(vector.shape)}, expected [{outputs}]")
    for option, part, there in (("use_dora", "lora_magnitude_vector", magnitude), ("lora_bias", "lora_B.bias", bias)):
        if bool(config.get(option)) != (there is not None):
            has = "has a" if there else "has no"
            raise UsageError(
                f"{adapter.folder / CONFIG_FILE}: {option}={config.get(option)}, but {raw_name} {has} {part}; "
                "is this the adapter's own config, and the file complete?"
            )
    if bias is not None and f"{module}.bias" not in base.tensors:
        raise UsageError(f"{file}: {raw_name}: lora_bias, but the base has no {module}.bias to add it to")
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LoraModule(module, a, b, scale, rank, embedding, magnitude, bias)
