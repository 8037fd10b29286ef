"""Sizes of the audio-grafted Qwen2-VL, from a checkpoint's headers or those of the real model.

Torch-free, so that `surgvqa budget` is fast and runs on a laptop.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgvqa.checkpoint.architecture import audio_shapes, language_shapes, layer_shapes, projector_shapes, vision_shapes
from surgvqa.checkpoint.config_json import flat_config, whisper_config
from surgvqa.checkpoint.folder import Checkpoint, open_checkpoint
from surgvqa.errors import UsageError

BF16 = 2


@dataclass(frozen=True)
class Sizes:
    """The sizes that a run's memory depends on, with transformers' names. Defaults: the real model, 8.93 B."""

    hidden_size: int = 3584
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    intermediate_size: int = 18944
    vocab_size: int = 152064
    tie_word_embeddings: bool = False

    vision_embed_dim: int = 1280
    vision_depth: int = 32
    vision_mlp_ratio: float = 4.0
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2

    d_model: int = 1280
    encoder_layers: int = 32
    encoder_ffn_dim: int = 5120
    num_mel_bins: int = 128
    max_source_positions: int = 1500
    """Audio tokens of a whole 30 s window."""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_size(self) -> int:
        """Width of the key projection and of the value projection."""
        return self.num_key_value_heads * self.head_dim

    @property
    def patch_values(self) -> int:
        """Numbers in one patch: 3 colours × 2 frames × 14 × 14 = 1176."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    def projections(self) -> dict[str, tuple[int, int]]:
        """{module name inside a layer: (inputs, outputs)} of a layer's linear modules."""
        shapes = layer_shapes(self.hidden_size, self.intermediate_size, self.kv_size)
        return {n.removesuffix(".weight"): (s[1], s[0]) for n, s in shapes.items() if len(s) == 2}

    def lora_targets(self, pattern: str) -> dict[str, list[int]]:
        """{module name inside a layer: layers in which `pattern` matches it}; as in add_lora, the whole old name.

        Raises UsageError when the pattern is not a regular expression or matches nothing.
        """
        try:
            means = re.compile(pattern).fullmatch
        except re.error as error:
            raise UsageError(f"lora_target_modules {pattern!r} is not a regular expression ({error})") from None

        def matches(layer: int, module: str) -> bool:
            names = (f"model.layers.{layer}.{module}", f"model.language_model.layers.{layer}.{module}")
            return any(means(name) for name in names)

        layers = range(self.num_hidden_layers)
        targets = {module: [n for n in layers if matches(n, module)] for module in self.projections()}
        if not any(targets.values()):
            raise UsageError(
                f"lora_target_modules {pattern!r} matches none of the model's linear modules, such as "
                "model.layers.0.self_attn.q_proj"
            )
        return targets

    def weights(self) -> dict[str, list[int]]:
        """{part: parameters of each tensor} of the architecture.

        Parts: lm, head, embeddings (none if tied to the head), vision, audio, projector.
        """
        shapes = {
            **language_shapes(
                hidden_size=self.hidden_size,
                intermediate_size=self.intermediate_size,
                num_hidden_layers=self.num_hidden_layers,
                num_attention_heads=self.num_attention_heads,
                num_key_value_heads=self.num_key_value_heads,
                vocab_size=self.vocab_size,
            ),
            **vision_shapes(
                embed_dim=self.vision_embed_dim,
                depth=self.vision_depth,
                mlp_dim=round(self.vision_embed_dim * self.vision_mlp_ratio),
                in_channels=3,
                patch_size=self.patch_size,
                temporal_patch_size=self.temporal_patch_size,
                spatial_merge_size=self.spatial_merge_size,
                hidden_size=self.hidden_size,
            ),
            **audio_shapes(
                d_model=self.d_model,
                encoder_layers=self.encoder_layers,
                encoder_ffn_dim=self.encoder_ffn_dim,
                num_mel_bins=self.num_mel_bins,
                max_source_positions=self.max_source_positions,
            ),
            **projector_shapes(hidden_size=self.hidden_size, d_model=self.d_model),
        }
        weights: dict[str, list[int]] = {part: [] for _, part in PART_OF}
        for name, shape in shapes.items():
            weights[_part_of(name)].append(math.prod(shape))
        if self.tie_word_embeddings:
            weights["embeddings"] = []
        return weights


PART_OF = (
    ("lm_head", "head"),
    ("model.embed_tokens", "embeddings"),
    ("visual.", "vision"),
    ("audio_encoder.", "audio"),
    ("audio_projector", "projector"),
    ("model.", "lm"),
)
"""(beginning of a tensor's old name, its part); the first match applies."""


def _part_of(name: str) -> str:
    return next((part for prefix, part in PART_OF if name.startswith(prefix)), "")


def require_layers(count: int | None, layers: int) -> None:
    """Raises UsageError unless `count` is None or from 0 to `layers`, the number of the language model's layers."""
    if count is not None and not 0 <= count <= layers:
        raise UsageError(f"checkpointed_layers is {count}, expected 0 to {layers} (the language model's layers)")


def checkpoint_sizes(folder: str | Path) -> tuple[Sizes, dict[str, list[int]]]:
    """Sizes and weights ({part: parameters of each tensor}) of a checkpoint, from its headers and config.json.

    Raises UsageError when it is damaged or not an audio-grafted Qwen2-VL.
    """
    checkpoint = open_checkpoint(folder).require_sound()
    weights: dict[str, list[int]] = {part: [] for _, part in PART_OF}
    for name, tensor in checkpoint.tensors.items():
        if part := _part_of(name):
            weights[part].append(tensor.numel)
    if not weights["head"]:  # tied
        weights["head"], weights["embeddings"] = weights["embeddings"], []
    return _sizes(checkpoint), weights


def _sizes(checkpoint: Checkpoint) -> Sizes:
    config, tensors = flat_config(checkpoint.config), checkpoint.tensors
    whisper = whisper_config(tensors)
    if whisper is None:
        raise UsageError(f"{checkpoint.folder}: no audio_encoder in it, expected an audio-grafted Qwen2-VL checkpoint")

    def number(table: Mapping[str, Any], key: str, default: float | None = None) -> Any:
        value = table.get(key, default)
        if not isinstance(value, (int, float)) or value <= 0:
            raise UsageError(f"{checkpoint.folder / 'config.json'}: {key} is {value!r}, expected a positive number")
        return value

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise UsageError(f"{checkpoint.folder}: no tensor {name}, expected an audio-grafted Qwen2-VL checkpoint")
        return tensors[name].shape

    def count(pattern: str) -> int:
        return len({m[1] for name in tensors if (m := re.match(pattern, name))})

    vision = config.get("vision_config") or {}
    vocab, hidden = shape("model.embed_tokens.weight")
    patch = shape("visual.patch_embed.proj.weight")
    embed = patch[0]
    return Sizes(
        hidden_size=hidden,
        num_hidden_layers=count(r"model\.layers\.(\d+)\."),
        num_attention_heads=int(number(config, "num_attention_heads")),
        num_key_value_heads=int(number(config, "num_key_value_heads")),
        intermediate_size=shape("model.layers.0.mlp.up_proj.weight")[0],
        vocab_size=vocab,
        tie_word_embeddings="lm_head.weight" not in tensors,
        vision_embed_dim=embed,
        vision_depth=count(r"visual\.blocks\.(\d+)\."),
        vision_mlp_ratio=shape("visual.blocks.0.mlp.fc1.weight")[0] / embed,
        patch_size=patch[-1],
        temporal_patch_size=patch[2],
        spatial_merge_size=int(number(vision, "spatial_merge_size", 2)),
        d_model=whisper["d_model"],
        encoder_layers=whisper["encoder_layers"],
        encoder_ffn_dim=whisper["encoder_ffn_dim"],
        num_mel_bins=whisper["num_mel_bins"],
        max_source_positions=whisper["max_source_positions"],
    )
