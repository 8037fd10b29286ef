"""The language model's last layer, computed only at the positions whose logits anyone reads.

In training those are the answer's tokens, and in the pass over prompts the last token of each: some ten of 3,900. Only
the layer's keys and values are needed at all positions. Its queries, attention and feed-forward network, which are most
of its work and memory, are left out elsewhere. This changes results only by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from surgvqa.model.grouped_attention import attend_grouped
from surgvqa.model.transformers_internals import apply_rotary_pos_emb

FEW = 4
"""Positions are few if they are at most this fraction of all: 1/FEW."""


class _LastLayer:
    """In place of the last layer's `forward`, for one call of the model."""

    def __init__(self, layer: nn.Module, read_at: Tensor):
        self.layer: Any = layer
        self.read_at = read_at

    def __call__(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any = None,
        **_kwargs: Any,
    ) -> Tensor:
        """The layer's output [B, S / B, hidden] at the S positions."""
        layer, attention, read_at = self.layer, self.layer.self_attn, self.read_at
        batch, length, _ = hidden_states.shape
        cos, sin = position_embeddings

        def there(x: Tensor) -> Tensor:
            return x.flatten(0, 1)[read_at].unflatten(0, (batch, -1))

        def by_head(x: Tensor) -> Tensor:
            return x.unflatten(2, (-1, attention.head_dim)).transpose(1, 2)

        normed = layer.input_layernorm(hidden_states)
        keys, values = by_head(attention.k_proj(normed)), by_head(attention.v_proj(normed))
        queries = by_head(attention.q_proj(there(normed)))
        keys = apply_rotary_pos_emb(keys, keys, cos, sin)[1]
        queries = apply_rotary_pos_emb(queries, queries, there(cos), there(sin))[0]
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, attention.layer_idx)
        seen = torch.arange(length, device=keys.device) <= (read_at % length).view(batch, 1, -1, 1)
        found = attend_grouped(queries, keys, values, seen, attention.scaling)
        hidden = there(hidden_states) + attention.o_proj(found.flatten(2))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


@contextmanager
def reading_at(layers: nn.ModuleList, read_at: Tensor | None) -> Iterator[None]:
    """Inside the context, the last of `layers` is computed only at `read_at`; None: everywhere.

    `read_at` [S] are positions of the flattened [B, L], equally many in each row and in the order of the rows. Then the
    layer's output is [B, S / B, hidden].
    """
    if read_at is None:
        yield
        return
    layer: Any = layers[-1]
    before = vars(layer).get("forward")
    vars(layer)["forward"] = _LastLayer(layer, read_at)
    try:
        yield
    finally:
        if before is None:
            del vars(layer)["forward"]
        else:
            vars(layer)["forward"] = before


def can_read_at(layers: nn.ModuleList, read_at: Tensor | None, rows: int, length: int, one_each: bool) -> bool:
    """Whether the last layer is computed at `read_at` alone, in rows of `length` tokens.

    It needs few positions, equally many in each of the `rows`: a single row, or `one_each`. A layer with dropout in its
    attention or with a sliding window is computed everywhere.
    """
    if read_at is None or not 0 < FEW * len(read_at) <= rows * length:
        return False
    if rows > 1 and not (one_each and len(read_at) == rows):
        return False
    attention: Any = layers[-1].self_attn
    dropout = attention.attention_dropout if attention.training else 0.0
    return not dropout and attention.sliding_window is None
