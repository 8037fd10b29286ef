"""config.json: the sizes and quantisation in it, and the config.json of a new checkpoint."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgvqa.checkpoint.folder import Checkpoint
from surgvqa.checkpoint.headers import FLOAT_DTYPES, TensorInfo, no_file
from surgvqa.checkpoint.names import CARRIED_FILES
from surgvqa.errors import UsageError


def whisper_config(tensors: Mapping[str, TensorInfo], prefix: str = "audio_encoder.") -> dict[str, Any] | None:
    """The audio encoder's sizes under WhisperConfig's field names, from the tensor shapes; None without an encoder.

    No shape shows the number of heads, but Whisper's heads are 64 wide in every size (Radford et al. 2022, table 1).
    """

    def shape(name: str) -> tuple[int, ...] | None:
        info = tensors.get(prefix + name)
        return info.shape if info else None

    conv1, positions, fc1 = shape("conv1.weight"), shape("embed_positions.weight"), shape("layers.0.fc1.weight")
    if not (conv1 and positions and fc1 and len(conv1) == 3 and len(positions) == 2):
        return None
    layers = {int(m[1]) for name in tensors if (m := re.match(re.escape(prefix) + r"layers\.(\d+)\.", name))}
    return {
        "model_type": "whisper",
        "d_model": conv1[0],
        "encoder_layers": len(layers),
        "encoder_attention_heads": max(1, conv1[0] // 64),
        "encoder_ffn_dim": fc1[0],
        "num_mel_bins": conv1[1],
        "max_source_positions": positions[0],
    }


FOUR_BIT = (".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
PACKED = (".SCB", ".qweight", ".qzeros", ".g_idx", ".weight_scale", ".weight_packed")
"""Suffixes of tensor names that only a quantised checkpoint has."""


def quantisation(checkpoint: Checkpoint) -> str | None:
    """How the weights are quantised, as a message, from the tensors alone; None for plain weights."""
    if marked := next((name for name in checkpoint.tensors if name.endswith(FOUR_BIT)), None):
        return f"this checkpoint is 4-bit ({marked})"
    stated = _stated_quantisation(checkpoint)
    integers = [n for n, t in checkpoint.tensors.items() if t.dtype not in FLOAT_DTYPES and (stated or ".weight" in n)]
    found = next((name for name in checkpoint.tensors if name.endswith(PACKED)), None) or next(iter(integers), None)
    if not found:
        return None
    if stated.get("load_in_4bit") or stated.get("_load_in_4bit"):
        return f"this checkpoint is 4-bit ({found})"
    return f"this checkpoint is quantised ({stated.get('quant_method') or 'packed weights'}, {found})"


def stale_quantisation(checkpoint: Checkpoint) -> str | None:
    """A line about a quantization_config that a dequantised checkpoint still has; None if there is none."""
    stated = _stated_quantisation(checkpoint)
    if not stated or quantisation(checkpoint):
        return None
    method = stated.get("quant_method") or ("4-bit" if stated.get("load_in_4bit") else "quantised")
    return (
        f"{checkpoint.folder / 'config.json'}: quantization_config says {method}, but no tensor is quantised: the "
        "key has no effect and can be removed"
    )


def _stated_quantisation(checkpoint: Checkpoint) -> dict[str, Any]:
    stated = checkpoint.config.get("quantization_config") or flat_config(checkpoint.config).get("quantization_config")
    return stated if isinstance(stated, dict) else {}


def flat_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as the old fork reads it: the language model's keys at the top level, under their old names.

    transformers 5 nests them in `text_config` and moves rope_theta into `rope_parameters`.
    """
    flat = {k: v for k, v in config.items() if k != "text_config"}
    for key, value in (config.get("text_config") or {}).items():
        if key not in ("model_type", "architectures", "transformers_version"):
            flat.setdefault(key, value)
    rope = flat.pop("rope_parameters", None)
    if rope:
        flat.setdefault("rope_theta", rope.get("rope_theta"))
        flat.setdefault("rope_scaling", {k: v for k, v in rope.items() if k != "rope_theta"})
    dtype = flat.pop("dtype", None)
    if dtype:
        flat.setdefault("torch_dtype", dtype)
    return flat


def output_config(base: Checkpoint) -> dict[str, Any]:
    """config.json of a BF16 copy: flat, so that the old fork can read it; the audio encoder's sizes have a new key."""
    config = flat_config(base.config)
    config["torch_dtype"] = "bfloat16"
    config.pop("quantization_config", None)
    sizes = whisper_config(base.tensors)
    if sizes:
        known = config.get("audio_encoder_config") or {}
        config["audio_encoder_config"] = {**known, **sizes}
        if known.get("encoder_attention_heads"):  # the only size that no tensor shape shows
            config["audio_encoder_config"]["encoder_attention_heads"] = known["encoder_attention_heads"]
    return config


def side_files(base: Checkpoint, config: dict[str, Any], also: Path | None = None) -> dict[str, bytes]:
    """{name: content} of config.json and the base's tokenizer, preprocessor, … files; those it lacks come from `also`.

    Raises UsageError for one that exists and cannot be read, such as a broken link or a folder.
    """
    found = {"config.json": (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}
    for folder in [base.folder] + ([also] if also else []):
        for name in CARRIED_FILES:
            if name in found or not os.path.lexists(folder / name):
                continue
            if not (folder / name).is_file():
                raise UsageError(f"{folder / name}: {no_file(folder / name)}; repair it, or move it away")
            found[name] = (folder / name).read_bytes()
    return found
