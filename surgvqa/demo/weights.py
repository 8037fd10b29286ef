"""A small checkpoint of the real architecture, and adapters for it, in the author's own on-disk format.

Nothing here has seen data: every weight is drawn from a seeded generator. But a frozen encoder of white noise would
tell the language model little, so the encoders' random weights are *shaped* as a trained encoder's come out: smooth
filters over neighbouring pixels and mel bands, attention that looks around itself in time, residual branches that are
small beside the stream. That makes them random features that carry colour, texture and sound, and no more.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgvqa.checkpoint.architecture import (
    Shape,
    audio_shapes,
    language_shapes,
    layer_shapes,
    projector_shapes,
    vision_shapes,
)
from surgvqa.checkpoint.folder import open_checkpoint
from surgvqa.checkpoint.headers import header_bytes
from surgvqa.config.options import LORA_TARGETS
from surgvqa.demo.heads import END_MARK, ENDED, marks, shape_heads

if TYPE_CHECKING:
    import numpy as np

    Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class DemoSizes:
    """DemoSizes of the demo model; names as in config.json where it has them."""

    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    intermediate_size: int = 256
    mrope_section: tuple[int, int, int] = (0, 2, 6)
    """Rotary pairs that turn with time, rows and columns. A still frame's time is that of its first row, so rows and
    columns tell frames apart as well."""
    rope_theta: float = 1000.0
    """The real model's is 1,000,000: its positions run into the thousands, these into the hundreds."""
    vision_embed_dim: int = 128
    vision_depth: int = 2
    vision_heads: int = 2
    audio_hidden_size: int = 512
    """Whisper's d_model; its heads are always 64 wide."""
    audio_layers: int = 2
    audio_ffn: int = 1024
    audio_positions: int = 160
    """3.2 s of sound; the real encoder has 1,500 for 30 s."""
    mel_bins: int = 128

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def shapes(self, vocab_size: int) -> dict[str, Shape]:
        """{tensor: shape} of the whole model."""
        return {
            **language_shapes(
                hidden_size=self.hidden_size,
                intermediate_size=self.intermediate_size,
                num_hidden_layers=self.num_hidden_layers,
                num_attention_heads=self.num_attention_heads,
                num_key_value_heads=self.num_key_value_heads,
                vocab_size=vocab_size,
            ),
            **vision_shapes(
                embed_dim=self.vision_embed_dim,
                depth=self.vision_depth,
                mlp_dim=4 * self.vision_embed_dim,
                in_channels=3,
                patch_size=PATCH,
                temporal_patch_size=2,
                spatial_merge_size=MERGE,
                hidden_size=self.hidden_size,
            ),
            **audio_shapes(
                d_model=self.audio_hidden_size,
                encoder_layers=self.audio_layers,
                encoder_ffn_dim=self.audio_ffn,
                num_mel_bins=self.mel_bins,
                max_source_positions=self.audio_positions,
            ),
            **projector_shapes(hidden_size=self.hidden_size, d_model=self.audio_hidden_size),
        }


PATCH, MERGE = 14, 2
LORA_R, LORA_ALPHA = 64, 16
WHISPER_HEAD = 64
PLACE = 32
"""Channels of the audio encoder that hold the position."""
EMBED, POOL = 0.5, 1.2
"""Scale of the token embeddings, and gain of what attention brings to them."""
LOOK = 2.4
"""Gain of queries and keys: how sharply a head looks where it looks."""


def write_stage1(folder: Path, sizes: DemoSizes, special_ids: dict[str, int], seed: int) -> None:
    """Weights in several bf16 shards with their index, config.json, generation_config.json, preprocessor_config.json.

    `special_ids`: as `write_tokenizer` returns them; the vocabulary is padded to a multiple of 64, as usual.
    """
    import numpy as np

    vocab_size = -(-(max(special_ids.values()) + 1) // 64) * 64
    rng = np.random.default_rng([seed, 1])
    shapes = sizes.shapes(vocab_size)
    tensors = {
        **_vision(rng, sizes, shapes),
        **_language(rng, sizes, shapes, special_ids["<|vision_end|>"]),
        **_audio(rng, sizes, shapes),
        "audio_projector.weight": _matrix(rng, shapes["audio_projector.weight"]),
    }
    _write_shards(folder, tensors)
    ids = {"bos_token_id": special_ids["<|endoftext|>"], "eos_token_id": special_ids["<|im_end|>"]}
    _write_json(
        folder / "config.json",
        {
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "attention_dropout": 0.0,
            "audio_hidden_size": sizes.audio_hidden_size,
            "audio_token_id": special_ids["<|audio_pad|>"],
            **ids,
            "hidden_act": "silu",
            "hidden_size": sizes.hidden_size,
            "image_token_id": special_ids["<|image_pad|>"],
            "initializer_range": 0.02,
            "intermediate_size": sizes.intermediate_size,
            "max_position_embeddings": 4096,
            "max_window_layers": 28,
            "model_type": "qwen2_vl",
            "num_attention_heads": sizes.num_attention_heads,
            "num_hidden_layers": sizes.num_hidden_layers,
            "num_key_value_heads": sizes.num_key_value_heads,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_section": list(sizes.mrope_section), "rope_type": "default", "type": "default"},
            "rope_theta": sizes.rope_theta,
            "sliding_window": 32768,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.47.0",
            "use_audio_encoder": True,
            "use_cache": True,
            "use_sliding_window": False,
            "video_token_id": special_ids["<|video_pad|>"],
            "vision_config": {
                "depth": sizes.vision_depth,
                "embed_dim": sizes.vision_embed_dim,
                "hidden_size": sizes.hidden_size,
                "model_type": "qwen2_vl",
                "num_heads": sizes.vision_heads,
            },
            "vision_end_token_id": special_ids["<|vision_end|>"],
            "vision_start_token_id": special_ids["<|vision_start|>"],
            "vision_token_id": special_ids["<|vision_pad|>"],
            "vocab_size": vocab_size,
        },
    )
    _write_json(
        folder / "generation_config.json", {"_from_model_config": True, **ids, "transformers_version": "4.47.0"}
    )
    _write_json(
        folder / "preprocessor_config.json",
        {
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": PATCH,
            "temporal_patch_size": 2,
            "merge_size": MERGE,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
        },
    )


def write_adapter(folder: Path, sizes: DemoSizes, projector: np.ndarray, seed: int) -> None:
    """Stage-2 PEFT adapters as the author's LoraConfig saves them: small lora_B, Stage 1's `projector` changed."""
    import numpy as np

    rng = np.random.default_rng([seed, 2])
    key_value = sizes.num_key_value_heads * sizes.head_dim
    layer_of = layer_shapes(sizes.hidden_size, sizes.intermediate_size, key_value)
    shapes = {name.removesuffix(".weight"): shape for name, shape in layer_of.items() if len(shape) == 2}
    tensors: Tensors = {}
    for layer in range(sizes.num_hidden_layers):
        for module, (rows, columns) in shapes.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            bound = 1 / math.sqrt(columns)
            tensors[f"{name}.lora_A.weight"] = rng.uniform(-bound, bound, (LORA_R, columns))
            tensors[f"{name}.lora_B.weight"] = rng.normal(0, 0.01, (rows, LORA_R))
    moved = rng.normal(0, 0.02 * projector.std(), projector.shape)
    tensors["base_model.model.audio_projector.weight"] = projector + moved
    _write_tensors(folder / "adapter_model.safetensors", tensors)
    _write_json(
        folder / "adapter_config.json",
        {
            "alpha_pattern": {},
            "auto_mapping": None,
            "base_model_name_or_path": "stage1",
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "layer_replication": None,
            "layers_pattern": None,
            "layers_to_transform": None,
            "loftq_config": {},
            "lora_alpha": LORA_ALPHA,
            "lora_bias": False,
            "lora_dropout": 0.05,
            "megatron_config": None,
            "megatron_core": "megatron.core",
            "modules_to_save": ["audio_projector"],
            "peft_type": "LORA",
            "r": LORA_R,
            "rank_pattern": {},
            "revision": None,
            "target_modules": LORA_TARGETS,
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": False,
        },
    )


# --- the three parts -------------------------------------------------------------------------------------------------


def _matrix(rng: np.random.Generator, shape: Shape, gain: float = 1.0) -> np.ndarray:
    """Random [rows, columns] that keeps the scale of what it is given, times `gain`."""
    return rng.standard_normal(shape) * (gain / math.sqrt(shape[1]))


def _cosines(length: int, count: int) -> np.ndarray:
    """[count, length]: the first cosines of the discrete cosine transform, each of mean square 1."""
    import numpy as np

    waves = np.cos(np.pi / length * (np.arange(length) + 0.5) * np.arange(count)[:, None])
    waves[1:] *= math.sqrt(2)
    return waves


def _norm(shapes: dict[str, Shape], name: str) -> Tensors:
    import numpy as np

    return {f"{name}.weight": np.ones(shapes[f"{name}.weight"]), f"{name}.bias": np.zeros(shapes[f"{name}.bias"])}


def _linear(rng: np.random.Generator, shapes: dict[str, Shape], name: str, gain: float = 1.0) -> Tensors:
    import numpy as np

    weight, bias = f"{name}.weight", f"{name}.bias"
    made = {weight: _matrix(rng, shapes[weight], gain)}
    return {**made, bias: np.zeros(shapes[bias])} if bias in shapes else made


def _vision(rng: np.random.Generator, sizes: DemoSizes, shapes: dict[str, Shape]) -> Tensors:
    """The vision tower. A patch filter is a random colour times a random smooth pattern, the same for both of the two
    (equal) pictures that a frame is made into."""
    import numpy as np

    wide = sizes.vision_embed_dim
    waves = _cosines(PATCH, 3)
    fading = 1 / (1 + np.arange(3)[:, None] + np.arange(3)[None])
    pattern = np.einsum("eij,iy,jx->eyx", rng.standard_normal((wide, 3, 3)) * fading, waves, waves)
    colour = rng.standard_normal((wide, 3))
    patch = np.repeat((colour[:, :, None, None] * pattern[:, None])[:, :, None], 2, axis=2)
    tensors = {"visual.patch_embed.proj.weight": patch / (2 * PATCH**2)}
    for block in range(sizes.vision_depth):
        name = f"visual.blocks.{block}"
        tensors |= _norm(shapes, f"{name}.norm1") | _norm(shapes, f"{name}.norm2")
        for linear, gain in (("attn.qkv", 1.0), ("attn.proj", 0.5), ("mlp.fc1", 2.0), ("mlp.fc2", 0.75)):
            tensors |= _linear(rng, shapes, f"{name}.{linear}", gain)
    tensors |= _norm(shapes, "visual.merger.ln_q")
    tensors |= _linear(rng, shapes, "visual.merger.mlp.0")
    tensors |= _linear(rng, shapes, "visual.merger.mlp.2", 1.5)
    return tensors


def _language(rng: np.random.Generator, sizes: DemoSizes, shapes: dict[str, Shape], frame_end: int) -> Tensors:
    """The language model: Qwen2's decoder with biases on q, k and v, and an output matrix of its own. Some heads are
    not left to chance (demo/heads.py). `frame_end`: id of the token after a frame."""
    import numpy as np

    wide = sizes.hidden_size
    tensors = {
        "model.embed_tokens.weight": EMBED * rng.standard_normal(shapes["model.embed_tokens.weight"]),
        "model.norm.weight": np.ones(wide),
        "lm_head.weight": _matrix(rng, shapes["lm_head.weight"], 1.5),
    }
    tensors["model.embed_tokens.weight"][frame_end] = END_MARK * marks(wide)[ENDED]
    for layer in range(sizes.num_hidden_layers):
        name = f"model.layers.{layer}"
        tensors[f"{name}.input_layernorm.weight"] = np.ones(wide)
        tensors[f"{name}.post_attention_layernorm.weight"] = np.ones(wide)
        for part, gain in (("q", 1.0), ("k", 1.0), ("v", POOL), ("o", POOL)):
            tensors |= _linear(rng, shapes, f"{name}.self_attn.{part}_proj", gain)
        for part, gain in (("gate", 1.0), ("up", 1.0), ("down", 0.5)):
            tensors |= _linear(rng, shapes, f"{name}.mlp.{part}_proj", gain)
    shape_heads(tensors, sizes)
    return tensors


def _audio(rng: np.random.Generator, sizes: DemoSizes, shapes: dict[str, Shape]) -> Tensors:
    """Whisper's encoder. The first convolution mixes smooth patterns over the mel bands (the beginnings of a cepstrum).
    A band of channels holds the position and nothing else; by it each attention head looks a fixed way back or ahead,
    so that layer by layer a position comes to know its neighbourhood, up to the length of a syllable or two."""
    import numpy as np

    wide, bands, heads = sizes.audio_hidden_size, 24, sizes.audio_hidden_size // WHISPER_HEAD
    smooth = rng.standard_normal((wide, bands, 3)) / (1 + 0.15 * np.arange(bands))[None, :, None]
    second = rng.standard_normal((wide, wide, 3)) * (2.5 / math.sqrt(3 * wide))
    second[:PLACE] = 0
    bias = rng.normal(0, 0.1, wide)
    bias[:PLACE] = 0
    periods = np.geomspace(8, 160, PLACE // 2)
    angles = 2 * np.pi * np.arange(sizes.audio_positions)[:, None] / periods
    places = np.zeros((sizes.audio_positions, wide))
    places[:, :PLACE] = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    tensors = {
        "audio_encoder.conv1.weight": np.einsum("dbt,bm->dmt", smooth, _cosines(sizes.mel_bins, bands))
        * (4.0 / (sizes.mel_bins * math.sqrt(3))),
        "audio_encoder.conv1.bias": rng.normal(0, 0.3, wide),
        "audio_encoder.conv2.weight": second,
        "audio_encoder.conv2.bias": bias,
        "audio_encoder.embed_positions.weight": places,
    }
    for layer in range(sizes.audio_layers):
        name = f"audio_encoder.layers.{layer}"
        tensors |= _norm(shapes, f"{name}.self_attn_layer_norm") | _norm(shapes, f"{name}.final_layer_norm")
        query, key = np.zeros((2, wide, wide))
        for head in range(heads):
            # sin and cos of (t + shift) from those of t: the score is highest where the key is `shift` away.
            shift = (3 + 5 * layer) * (head - (heads - 1) / 2)
            turn = np.diag(np.cos(2 * np.pi * shift / periods)), np.diag(np.sin(2 * np.pi * shift / periods))
            of_head = slice(head * WHISPER_HEAD, head * WHISPER_HEAD + PLACE)
            query[of_head, :PLACE] = LOOK * np.block([[turn[0], turn[1]], [-turn[1], turn[0]]])
            key[of_head, :PLACE] = LOOK * np.eye(PLACE)
        tensors[f"{name}.self_attn.q_proj.weight"], tensors[f"{name}.self_attn.q_proj.bias"] = query, np.zeros(wide)
        tensors[f"{name}.self_attn.k_proj.weight"] = key
        for linear, gain in (("self_attn.v_proj", 1.2), ("self_attn.out_proj", 1.2), ("fc1", 1.4), ("fc2", 1.0)):
            tensors |= _linear(rng, shapes, f"{name}.{linear}", gain)
            if linear in ("self_attn.out_proj", "fc2"):
                tensors[f"{name}.{linear}.weight"][:PLACE] = 0
    tensors |= _norm(shapes, "audio_encoder.layer_norm")
    tensors["audio_encoder.layer_norm.weight"][:PLACE] = 0.1  # where it was said is not what was said
    return tensors


# --- files -----------------------------------------------------------------------------------------------------------


def _write_shards(folder: Path, tensors: Tensors, largest_bytes: int = 800_000) -> None:
    """model-0000i-of-0000n.safetensors and the index; a new shard begins where the next tensor would overfill one."""
    shards: list[Tensors] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if filled and filled + 2 * tensor.size > largest_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += 2 * tensor.size
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_tensors(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(2 * tensor.size for tensor in tensors.values())
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )


def overwrite(folder: Path, changed: Tensors) -> None:
    """Puts tensors in the place of a checkpoint's tensors of the same names."""
    for info in (open_checkpoint(folder).tensors[name] for name in changed):
        with open(info.file, "r+b") as file:
            file.seek(info.offset)
            file.write(bfloat16_bits(changed[info.name].reshape(info.shape)).tobytes())


def _write_tensors(path: Path, tensors: Tensors) -> None:
    """One bf16 safetensors file."""
    entries = [(name, "BF16", tensor.shape, 2 * tensor.size) for name, tensor in tensors.items()]
    data = b"".join(bfloat16_bits(tensor).tobytes() for tensor in tensors.values())
    path.write_bytes(header_bytes(entries) + data)


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """uint16 bits of the nearest bfloat16 (ties to even) of finite values: the upper half of float32's bits."""
    import numpy as np

    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
