"""The names and shapes of the tensors of an audio-grafted Qwen2-VL, and those that a config.json calls for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from surgvqa.checkpoint.config_json import flat_config
from surgvqa.checkpoint.folder import Checkpoint
from surgvqa.checkpoint.headers import TensorInfo
from surgvqa.errors import UsageError

Shape = tuple[int, ...]

# --- the table -------------------------------------------------------------------------------------------------------


def language_shapes(
    *,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    vocab_size: int,
) -> dict[str, Shape]:
    """{old name: shape} of the language model and its head. The arguments have transformers' names."""
    layer = layer_shapes(hidden_size, intermediate_size, hidden_size // num_attention_heads * num_key_value_heads)
    return {
        "model.embed_tokens.weight": (vocab_size, hidden_size),
        "model.norm.weight": (hidden_size,),
        "lm_head.weight": (vocab_size, hidden_size),
        **{f"model.layers.{i}.{name}": shape for i in range(num_hidden_layers) for name, shape in layer.items()},
    }


def layer_shapes(hidden: int, inner: int, key_value: int) -> dict[str, Shape]:
    """{name inside a layer: shape} of Qwen2's decoder layer; `key_value` is the width of key and value projections."""
    return {
        **_linear("self_attn.q_proj", hidden, hidden),
        **_linear("self_attn.k_proj", key_value, hidden),
        **_linear("self_attn.v_proj", key_value, hidden),
        **_linear("self_attn.o_proj", hidden, hidden, bias=False),
        **_linear("mlp.gate_proj", inner, hidden, bias=False),
        **_linear("mlp.up_proj", inner, hidden, bias=False),
        **_linear("mlp.down_proj", hidden, inner, bias=False),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }


def vision_shapes(
    *,
    embed_dim: int,
    depth: int,
    mlp_dim: int,
    in_channels: int,
    patch_size: int,
    temporal_patch_size: int,
    spatial_merge_size: int,
    hidden_size: int,
) -> dict[str, Shape]:
    """{old name: shape} of the vision tower and its merger; `hidden_size` is the language model's."""
    merged = embed_dim * spatial_merge_size**2
    block = {
        **_norm("norm1", embed_dim),
        **_norm("norm2", embed_dim),
        **_linear("attn.qkv", 3 * embed_dim, embed_dim),
        **_linear("attn.proj", embed_dim, embed_dim),
        **_linear("mlp.fc1", mlp_dim, embed_dim),
        **_linear("mlp.fc2", embed_dim, mlp_dim),
    }
    return {
        "visual.patch_embed.proj.weight": (embed_dim, in_channels, temporal_patch_size, patch_size, patch_size),
        **{f"visual.blocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()},
        **_norm("visual.merger.ln_q", embed_dim),
        **_linear("visual.merger.mlp.0", merged, merged),
        **_linear("visual.merger.mlp.2", hidden_size, merged),
    }


def audio_shapes(
    *, d_model: int, encoder_layers: int, encoder_ffn_dim: int, num_mel_bins: int, max_source_positions: int
) -> dict[str, Shape]:
    """{old name: shape} of Whisper's encoder. The arguments have transformers' names."""
    layer = {
        **_linear("self_attn.q_proj", d_model, d_model),
        **_linear("self_attn.k_proj", d_model, d_model, bias=False),  # Whisper's key projection has no bias
        **_linear("self_attn.v_proj", d_model, d_model),
        **_linear("self_attn.out_proj", d_model, d_model),
        **_norm("self_attn_layer_norm", d_model),
        **_norm("final_layer_norm", d_model),
        **_linear("fc1", encoder_ffn_dim, d_model),
        **_linear("fc2", d_model, encoder_ffn_dim),
    }
    found: dict[str, Shape] = {
        "conv1.weight": (d_model, num_mel_bins, 3),
        "conv1.bias": (d_model,),
        "conv2.weight": (d_model, d_model, 3),
        "conv2.bias": (d_model,),
        "embed_positions.weight": (max_source_positions, d_model),
        **_norm("layer_norm", d_model),
        **{f"layers.{i}.{name}": shape for i in range(encoder_layers) for name, shape in layer.items()},
    }
    return {f"audio_encoder.{name}": shape for name, shape in found.items()}


def projector_shapes(*, hidden_size: int, d_model: int, bias: bool = False) -> dict[str, Shape]:
    """{name: shape} of the projector from the audio encoder to the language model."""
    return _linear("audio_projector", hidden_size, d_model, bias=bias)


def _linear(name: str, outputs: int, inputs: int, bias: bool = True) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {f"{name}.weight": (outputs, inputs)}
    return {**shapes, f"{name}.bias": (outputs,)} if bias else shapes


def _norm(name: str, size: int) -> dict[str, Shape]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


# --- what config.json calls for --------------------------------------------------------------------------------------

LANGUAGE_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
)  # fmt: skip
VISION_DEFAULTS: dict[str, Any] = {  # Qwen2VLVisionConfig's
    "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}  # fmt: skip
AUDIO_SIZES = ("d_model", "encoder_layers", "encoder_ffn_dim", "num_mel_bins", "max_source_positions")
MOST, MOST_LAYERS = 1 << 24, 1000
"""No real size is larger. A config.json with a larger one would fill the memory with tensor names."""


def expected_tensors(checkpoint: Checkpoint) -> dict[str, Shape]:
    """{old name: shape} of the audio-grafted Qwen2-VL that config.json describes; {} for another architecture.

    An old config.json lacks the audio encoder's sizes, so its width and depth are taken from its tensors. Raises
    UsageError, which names the first size that is missing or invalid.
    """
    config, tensors = flat_config(checkpoint.config), checkpoint.tensors
    if not config:
        return {}
    file = checkpoint.folder / "config.json"
    if "model_type" not in config:
        raise UsageError(f"{file}: model_type is missing, expected qwen2_vl (or this checkpoint's own type)")
    if config["model_type"] != "qwen2_vl":
        return {}
    sizes = {name: _size(config, name, f"{file}: ") for name in LANGUAGE_SIZES}
    language = language_shapes(**sizes)
    if config.get("tie_word_embeddings") and "lm_head.weight" not in tensors:
        del language["lm_head.weight"]
    vision = _vision_shapes(checkpoint, config.get("vision_config") or {}, sizes["hidden_size"])
    return {**language, **vision, **_audio_shapes(checkpoint, config, sizes["hidden_size"])}


def _size(values: Mapping[str, Any], name: str, where: str, fraction: bool = False) -> Any:
    """A size from config.json. Raises UsageError when it is missing or not a number from 1 to its upper limit."""
    value = values.get(name)
    most = MOST_LAYERS if name in ("num_hidden_layers", "depth", "encoder_layers") else MOST
    kinds = (int, float) if fraction else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 1 <= value <= most:
        expected = f"expected a {'number' if fraction else 'whole number'} from 1 to {most}"
        found = "missing" if name not in values else f"{repr(value)[:60]}, {expected}"
        raise UsageError(f"{where}{name} is {found}")
    return value


def _vision_shapes(checkpoint: Checkpoint, given: Mapping[str, Any], hidden_size: int) -> dict[str, Shape]:
    """{old name: shape} of the vision tower. Sizes missing from vision_config are transformers' defaults for Qwen2-VL.

    Raises UsageError when such a default contradicts the tensors.
    """
    file, tensors = checkpoint.folder / "config.json", checkpoint.tensors
    vision = {**VISION_DEFAULTS, **given}
    sizes = {name: _size(vision, name, f"{file}: vision_config.", name == "mlp_ratio") for name in VISION_DEFAULTS}
    patches = tensors.get("visual.patch_embed.proj.weight")
    observed = {
        "embed_dim": patches.shape[0] if patches and patches.shape else None,
        "depth": len({m[1] for name in tensors if (m := re.match(r"visual\.blocks\.(\d+)\.", name))}) or None,
    }
    for name, found in observed.items():
        if name not in given and found not in (None, sizes[name]):
            raise UsageError(
                f"{file}: vision_config.{name} is missing: the default is {sizes[name]}, the tensors have {found}"
            )
    mlp_dim = int(sizes["embed_dim"] * sizes.pop("mlp_ratio"))
    return vision_shapes(**sizes, mlp_dim=mlp_dim, hidden_size=hidden_size)


def _audio_shapes(checkpoint: Checkpoint, config: Mapping[str, Any], hidden_size: int) -> dict[str, Shape]:
    """{old name: shape} of Whisper's encoder and the projector. Sizes come from config.json, else from the tensors."""
    file, tensors = checkpoint.folder / "config.json", checkpoint.tensors
    found_shapes = {n: t.shape for n, t in tensors.items() if n.startswith(("audio_encoder.", "audio_projector."))}
    if not found_shapes and not config.get("use_audio_encoder"):
        return {}
    given = {k: v for k, v in (config.get("audio_encoder_config") or {}).items() if v is not None}
    if "d_model" not in given and config.get("audio_hidden_size") is not None:
        given["d_model"] = _size(config, "audio_hidden_size", f"{file}: ")
    conv1 = found_shapes.get("audio_encoder.conv1.weight", ())
    positions = found_shapes.get("audio_encoder.embed_positions.weight", ())
    layers = [int(m[1]) for name in found_shapes if (m := re.match(r"audio_encoder\.layers\.(\d{1,4})\.", name))]
    inner = [shape[0] for name, shape in found_shapes.items() if name.endswith(".fc1.weight") and shape]
    from_tensors = {
        "d_model": conv1[0] if conv1 else 1280,
        "encoder_layers": max(layers, default=0) + 1,
        "num_mel_bins": conv1[1] if len(conv1) > 1 else 128,
        "max_source_positions": positions[0] if positions else 1500,
    }
    sizes = {**from_tensors, **given}
    sizes = {"encoder_ffn_dim": inner[0] if inner else 4 * _size(sizes, "d_model", f"{file}: "), **sizes}
    sizes = {name: _size(sizes, name, f"{file}: audio_encoder_config.") for name in AUDIO_SIZES}
    bias = "audio_projector.bias" in found_shapes
    return {**audio_shapes(**sizes), **projector_shapes(hidden_size=hidden_size, d_model=sizes["d_model"], bias=bias)}


def compare(expected: Mapping[str, Shape], tensors: Mapping[str, TensorInfo]) -> list[str]:
    """One line for each missing, extra or wrongly shaped tensor; [] when `expected` is empty."""
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
