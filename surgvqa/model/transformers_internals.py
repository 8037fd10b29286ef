"""What the model relies on in transformers beyond its documented interface. tests/surgvqa/model/test_internals.py
asserts that each name exists with the signature used here."""

from __future__ import annotations

from typing import Any

from transformers import AttentionInterface, PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils.generic import is_flash_attention_requested
from transformers.vision_utils import get_vision_position_ids

__all__ = [
    "attention_of",
    "get_vision_position_ids",
    "is_flash_attention_requested",
    "register_attention",
    "set_attention",
    "take_names_of",
]


def attention_of(config: PreTrainedConfig) -> str:
    """The attention kernel that a (sub)model with this config runs: sdpa, eager, flash_attention_2."""
    return config._attn_implementation or ""


def set_attention(config: Any, attention: str) -> None:
    """Sets the kernel of a sub-config that transformers does not know to be one."""
    config._attn_implementation = attention


def register_attention(name: str, function: Any) -> None:
    """Lets layers whose config names `name` attend by `function`, called as transformers' own are."""
    AttentionInterface.register(name, function)


def take_names_of(upstream: str, ours: type) -> None:
    """Lets our class load and save checkpoints under the names of upstream's class.

    A subclass gets no built-in mapping from the checkpoint's names (visual.*, model.layers.*) to the module's, and its
    tensors would go missing without an error.
    """
    register_checkpoint_conversion_mapping(ours.__name__, get_checkpoint_conversion_mapping(upstream), overwrite=True)
