"""The tensors that an audio-grafted Qwen2-VL must have, from its config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from surgvqa.checkpoint.config_json import flat_config
from surgvqa.checkpoint.folder import Checkpoint
from surgvqa.checkpoint.headers import TensorInfo
from surgvqa.errors import UsageError

Shape = tuple[int, ...]


def expected_tensors(checkpoint: Checkpoint) -> dict[str, Shape]:
    """{old name: shape} of the audio-grafted Qwen2-VL that config.json describes; {} for another architecture.

    The audio encoder's sizes are not in an old config.json: its width and depth are read off its own headers. Raises
    UsageError that names the first size that is missing or cannot be one.
    """
    config = flat_config(checkpoint.config)
    if config.get("model_type") != "qwen2_vl":
        return {}
    _require_sizes(checkpoint, config)
    language = _language_tensors(config)
    vision = _vision_tensors(config)
    if config.get("tie_word_embeddings") and "lm_head.weight" not in checkpoint.tensors:
        del language["lm_head.weight"]
    audio = _audio_tensors(config, checkpoint.tensors)
    return {**language, **vision, **audio}


SIZES = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"),
    "num_hidden_layers",
)
VISION_SIZES = ("depth", "embed_dim", "mlp_ratio", "in_channels", "patch_size", "spatial_merge_size")
AUDIO_SIZES = ("d_model", "encoder_layers", "encoder_ffn_dim", "num_mel_bins", "max_source_positions")
MOST = 1 << 24
"""No size of a model is larger; a config.json that says so would fill the memory with names."""
MOST_LAYERS = 1000


def _require_sizes(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    file = checkpoint.folder / "config.json"

    def check(values: Any, names: tuple[str, ...], where: str, needed: bool) -> None:
        if not isinstance(values, Mapping):
            raise UsageError(f"{file}: {where.strip('.') or 'it'} is {str(values)[:60]!r}, expected an object")
        for name in names:
            value = values.get(name)
            if value is None and not needed:
                continue
            most = MOST_LAYERS if name in ("num_hidden_layers", "depth", "encoder_layers") else MOST
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value <= most:
                found = "missing" if name not in values else f"{str(value)[:60]}, expected a number from 1 to {most}"
                raise UsageError(f"{file}: {where}{name} is {found}")

    check(config, SIZES, "", needed=True)
    check(config.get("vision_config") or {}, VISION_SIZES, "vision_config.", needed=False)
    check(config.get("audio_encoder_config") or {}, AUDIO_SIZES, "audio_encoder_config.", needed=False)


def _language_tensors(config: Mapping[str, Any]) -> dict[str, Shape]:
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    width = hidden // heads * config["num_key_value_heads"]
    found: dict[str, Shape] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config["vocab_size"], hidden),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for projection, out in (("q_proj", hidden), ("k_proj", width), ("v_proj", width)):
            found[f"{layer}self_attn.{projection}.weight"] = (out, hidden)
            found[f"{layer}self_attn.{projection}.bias"] = (out,)
        found[f"{layer}self_attn.o_proj.weight"] = (hidden, hidden)
        found[f"{layer}mlp.gate_proj.weight"] = found[f"{layer}mlp.up_proj.weight"] = (inner, hidden)
        found[f"{layer}mlp.down_proj.weight"] = (hidden, inner)
        found[f"{layer}input_layernorm.weight"] = found[f"{layer}post_attention_layernorm.weight"] = (hidden,)
    return found


def _vision_tensors(config: Mapping[str, Any]) -> dict[str, Shape]:
    vision = {  # Qwen2VLVisionConfig's defaults
        "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2,
        "temporal_patch_size": 2, **(config.get("vision_config") or {}),
    }  # fmt: skip
    width, patch = vision["embed_dim"], vision["patch_size"]
    inner = int(width * vision["mlp_ratio"])
    merged = width * vision["spatial_merge_size"] ** 2
    found: dict[str, Shape] = {
        "visual.patch_embed.proj.weight": (width, vision["in_channels"], vision["temporal_patch_size"], patch, patch)
    }

    def linear(name: str, out: int, size: int) -> None:
        found[f"visual.{name}.weight"], found[f"visual.{name}.bias"] = (out, size), (out,)

    def norm(name: str) -> None:
        found[f"visual.{name}.weight"] = found[f"visual.{name}.bias"] = (width,)

    for i in range(vision["depth"]):
        norm(f"blocks.{i}.norm1")
        norm(f"blocks.{i}.norm2")
        linear(f"blocks.{i}.attn.qkv", 3 * width, width)
        linear(f"blocks.{i}.attn.proj", width, width)
        linear(f"blocks.{i}.mlp.fc1", inner, width)
        linear(f"blocks.{i}.mlp.fc2", width, inner)
    norm("merger.ln_q")
    linear("merger.mlp.0", merged, merged)
    linear("merger.mlp.2", config["hidden_size"], merged)
    return found


def _audio_tensors(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Shape]:
    """Whisper's encoder and the projector. Sizes from config.json where it has them, else from the tensors."""
    held = {n: t.shape for n, t in tensors.items() if n.startswith(("audio_encoder.", "audio_projector."))}
    if not held and not config.get("use_audio_encoder"):
        return {}
    sizes = config.get("audio_encoder_config") or {}
    known_conv1 = held.get("audio_encoder.conv1.weight", (0, 128, 3))
    width = sizes.get("d_model") or config.get("audio_hidden_size") or known_conv1[0]
    mels = sizes.get("num_mel_bins") or known_conv1[1]
    positions = sizes.get("max_source_positions") or held.get("audio_encoder.embed_positions.weight", (1500,))[0]
    inner = sizes.get("encoder_ffn_dim") or next(
        (shape[0] for name, shape in held.items() if name.endswith(".fc1.weight") and shape), 4 * width
    )
    layers = [int(m[1]) for name in held if (m := re.match(r"audio_encoder\.layers\.(\d+)\.", name))]
    found: dict[str, Shape] = {
        "conv1.weight": (width, mels, 3),
        "conv1.bias": (width,),
        "conv2.weight": (width, width, 3),
        "conv2.bias": (width,),
        "embed_positions.weight": (positions, width),
        "layer_norm.weight": (width,),
        "layer_norm.bias": (width,),
    }
    for i in range(sizes.get("encoder_layers") or max(layers, default=0) + 1):
        layer = f"layers.{i}."
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found[f"{layer}self_attn.{projection}.weight"] = (width, width)
            if projection != "k_proj":  # Whisper's keys have no bias
                found[f"{layer}self_attn.{projection}.bias"] = (width,)
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            found[f"{layer}{norm}.weight"] = found[f"{layer}{norm}.bias"] = (width,)
        found[f"{layer}fc1.weight"], found[f"{layer}fc1.bias"] = (inner, width), (inner,)
        found[f"{layer}fc2.weight"], found[f"{layer}fc2.bias"] = (width, inner), (width,)
    found = {f"audio_encoder.{name}": shape for name, shape in found.items()}
    found["audio_projector.weight"] = (config["hidden_size"], width)
    if "audio_projector.bias" in held:
        found["audio_projector.bias"] = (config["hidden_size"],)
    return found


def compare(expected: Mapping[str, Shape], tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Missing, extra and wrongly shaped tensors, a line each; nothing when there is nothing to compare with."""
    if not expected:
        return []
    lines = [
        f"{name}: missing, config.json calls for {list(shape)}"
        for name, shape in expected.items()
        if name not in tensors
    ]
    lines += [f"{name}: not a tensor of this architecture" for name in tensors if name not in expected]
    lines += [
        f"{name}: is {list(tensors[name].shape)}, config.json calls for {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    return lines
