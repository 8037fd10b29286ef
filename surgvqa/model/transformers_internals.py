"""transformers' undocumented names that the model relies on.

tests/surgvqa/model/test_internals.py asserts that each exists with the signature used here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AttentionInterface, PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb
from transformers.utils.generic import is_flash_attention_requested
from transformers.vision_utils import get_vision_position_ids

__all__ = [
    "apply_rotary_pos_emb",
    "attention_of",
    "get_vision_position_ids",
    "is_flash_attention_requested",
    "register_attention",
    "set_attention",
    "share_weight_names",
    "vision_rotary",
]


def attention_of(config: PreTrainedConfig) -> str:
    """The attention kernel of a (sub)model with this config: sdpa, eager or flash_attention_2."""
    return config._attn_implementation or ""


def set_attention(config: Any, attention: str) -> None:
    """Sets the attention kernel of a config that transformers does not recognise as a sub-config."""
    config._attn_implementation = attention


def register_attention(name: str, function: Any) -> None:
    """Registers `function`, with the signature of transformers' own, as the attention kernel called `name`."""
    AttentionInterface.register(name, function)


@contextmanager
def vision_rotary(wrapped: Callable[[Any], Any]) -> Iterator[None]:
    """Inside the context, the vision tower applies rotary positions with what `wrapped` makes of its function."""
    before = modeling_qwen2_vl.apply_rotary_pos_emb_vision
    modeling_qwen2_vl.apply_rotary_pos_emb_vision = wrapped(before)
    try:
        yield
    finally:
        modeling_qwen2_vl.apply_rotary_pos_emb_vision = before


def share_weight_names(upstream: str, ours: type) -> None:
    """Makes our class load and save checkpoints with the tensor names of upstream's class.

    A subclass does not inherit the mapping from the checkpoint's names (visual.*, model.layers.*) to the module's, and
    its tensors would silently not be loaded.
    """
    register_checkpoint_conversion_mapping(ours.__name__, get_checkpoint_conversion_mapping(upstream), overwrite=True)
