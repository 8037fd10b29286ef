"""LoRA adapters of the audio-grafted Qwen2-VL: creates, loads and saves them.

Adapter files use the checkpoint's old names (`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`, and the
author's regular expression), so that the fork, our merge and PEFT's tools can read them. Upstream's modules have other
names (`model.language_model.layers…`), so PEFT by itself would match no module and load no tensor.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from surgvqa.checkpoint.names import to_old_name
from surgvqa.config.options import LoraOptions
from surgvqa.errors import UsageError
from surgvqa.files import read_json
from surgvqa.model import peft_internals

WEIGHTS, CONFIG, SETTINGS = "adapter_model.safetensors", "adapter_config.json", "surgvqa.json"
PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that do not change the base weights (PiSSA, OLoRA, LoftQ and CorDA do)."""


def add_lora(model: PreTrainedModel, options: LoraOptions, *, dtype: torch.dtype = torch.float32) -> PeftModel:
    """Adds a new trainable adapter: LoRA on the modules that `lora_target_modules` matches, a copy of the projector.

    `dtype` is the adapter's own: float32 even on a bf16 model, because bf16 loses small updates. Raises UsageError when
    the regular expression is invalid or matches no linear module by its old or new name.
    """
    on_disk: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name_or_path,
        "r": options.lora_r,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": options.lora_dropout,
        "target_modules": options.lora_target_modules,
        "modules_to_save": ["audio_projector"],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    return _wrap(model, on_disk, dtype, "lora_target_modules")


def load_adapter(
    model: PreTrainedModel, folder: str | Path, trainable: bool = False, *, dtype: torch.dtype = torch.float32
) -> PeftModel:
    """Adds the adapter of a PEFT folder, which may use old or new names.

    Raises UsageError, which names the first wrong tensor, unless every tensor of the file is used exactly once and
    every parameter of the adapter is loaded. A partly loaded adapter would answer, but wrongly.
    """
    folder = Path(folder)
    on_disk = _read_config(folder / CONFIG) | {"base_model_name_or_path": model.name_or_path}
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; expected a PEFT adapter folder") from None
    except SafetensorError as error:
        raise UsageError(f"{path}: not a complete safetensors file ({error}); copy it again") from None
    given = {old_name(name): name for name in tensors}
    if len(given) != len(tensors):
        raise UsageError(f"{path}: has the same tensors under old and new names; keep one set")

    peft_model = _wrap(model, on_disk, dtype, f"{folder / CONFIG}: target_modules")
    slots = adapter_parameters(peft_model)
    for name, slot in slots.items():
        if name not in given:
            raise UsageError(
                f"{path}: no tensor {name}, which {CONFIG} and the model require; do the two files belong together?"
            )
        found, expected = list(tensors[given[name]].shape), list(slot.shape)
        if found != expected:
            raise UsageError(
                f"{path}: {given[name]} is {found}, but the model and r in {CONFIG} require {expected}; "
                "is it an adapter of this model, and do the two files belong together?"
            )
    if extra := sorted(set(given) - set(slots)):
        raise UsageError(
            f"{path}: {given[extra[0]]} is not in the model ({len(extra)} such tensors, {len(slots)} others are); "
            "is it an adapter of this model?"
        )
    with torch.no_grad():
        for name, slot in slots.items():
            slot.copy_(tensors[given[name]])
    if not trainable:
        peft_model.requires_grad_(False).eval()
    return peft_model


def save_adapter(peft_model: PeftModel, folder: str | Path, extra_config: dict[str, Any] | None = None) -> None:
    """Writes a PEFT folder with old names and, if `extra_config` is given, surgvqa.json.

    `extra_config` tells evaluation how the adapter was trained. Each file appears only when it is complete,
    adapter_config.json last.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: slot.detach().cpu().contiguous() for name, slot in adapter_parameters(peft_model).items()}
    texts = {CONFIG: peft_model.adapter_config_on_disk}
    if extra_config is not None:
        texts = {SETTINGS: extra_config, **texts}
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        for name, content in texts.items():
            Path(temporary, name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, Path(temporary, WEIGHTS), metadata={"format": "pt"})
        Path(temporary, WEIGHTS).chmod(Path(temporary, CONFIG).stat().st_mode)  # safetensors creates it with mode 0600
        for name in (WEIGHTS, *texts):
            os.replace(Path(temporary, name), folder / name)


def adapter_parameters(peft_model: PeftModel) -> dict[str, nn.Parameter]:
    """{name in the file: parameter} of the adapter: LoRA matrices and the copies of modules_to_save."""
    return peft_internals.adapter_parameters(peft_model, old_name)


def old_name(name: str) -> str:
    """The checkpoint's name of a module or of an adapter's tensor (with PEFT's prefix), given its old or new name."""
    bare = name.removeprefix(peft_internals.PREFIX)
    return name[: len(name) - len(bare)] + to_old_name(bare)


def _wrap(model: PreTrainedModel, on_disk: dict[str, Any], dtype: torch.dtype, where: str) -> PeftModel:
    """PEFT's model for an adapter_config.json with old or new names. `where` says in errors where the pattern is."""
    modules = _matching(model, on_disk["target_modules"], where)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules="|".join(re.escape(name) for name in modules),
        rank_pattern=_pattern_of_each(modules, on_disk.get("rank_pattern")),
        alpha_pattern=_pattern_of_each(modules, on_disk.get("alpha_pattern")),
        **{
            key: on_disk[key]
            for key in ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "lora_bias", "modules_to_save")
            if key in on_disk
        },
    )
    with warnings.catch_warnings():  # PEFT reads a property that transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        peft_model = get_peft_model(model, config, adapter_name=peft_internals.ADAPTER, autocast_adapter_dtype=False)
    for parameter in adapter_parameters(peft_model).values():
        parameter.data = parameter.data.to(dtype)
    vars(peft_model)["adapter_config_on_disk"] = on_disk
    return peft_model


def _matching(model: PreTrainedModel, target: str | list[str], where: str) -> list[str]:
    """The linear modules that PEFT's `target_modules` matches by their old or new names.

    It is a regular expression for the whole name, or a list of names or endings. Raises UsageError if none matches.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if isinstance(target, str):
        try:
            means = re.compile(target).fullmatch
        except re.error as error:
            raise UsageError(f"{where} {target!r} is not a regular expression ({error})") from None
    else:
        means = re.compile(rf"(.*\.)?({'|'.join(map(re.escape, target))})").fullmatch
    modules = [name for name in linear if means(name) or means(old_name(name))]
    if not modules:
        examples = ", ".join(old_name(name) for name in linear if ".layers.0." in name and "language" in name)
        raise UsageError(f"{where} {target!r} matches none of the model's linear modules, such as {examples}")
    return modules


def _pattern_of_each(modules: list[str], patterns: dict[str, Any] | None) -> dict[str, Any]:
    """{module: value} from PEFT's rank_pattern or alpha_pattern; the first key that matches a name's end applies."""
    spelt = {}
    for name in modules:
        for pattern, value in (patterns or {}).items():
            if any(re.match(rf"(.*\.)?({pattern})$", n) for n in (name, old_name(name))):
                spelt[re.escape(name)] = value
                break
    return spelt


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    expected = {"peft_type": ("LORA",), "bias": (None, "none"), "init_lora_weights": PLAIN_INITS}
    for key, values in expected.items():
        if config.get(key) not in values:
            raise UsageError(f"{path}: {key} is {config.get(key)!r}, expected one of {values}")
    if not config.get("target_modules") or not config.get("r"):
        raise UsageError(f"{path}: no target_modules or no r; is this a LoRA adapter's config?")
    return config
