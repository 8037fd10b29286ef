"""Attention of few tokens to many, with a mask, where several heads share keys."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Kernels that take a mask. cuDNN's makes a new plan for each number of queries, which took 110 ms."""


def attend_grouped(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Attention [B, N, heads, size] of `queries` [B, heads, N, size] to `keys` and `values` [B, groups, L, size].

    `mask` [B, 1, N, L] is boolean (True: seen) or is added to the scores. The heads that share keys are computed as
    further queries of one head. transformers repeats the keys for each head when there is a mask.
    """
    batch, heads, number, size = queries.shape
    groups = keys.shape[1]
    sharing = heads // groups
    shared = queries.reshape(batch, groups, sharing * number, size)
    of_all = mask[:, :, None].expand(-1, -1, sharing, -1, -1).reshape(batch, 1, sharing * number, -1)
    with sdpa_kernel(KERNELS):
        found = F.scaled_dot_product_attention(shared, keys, values, attn_mask=of_all, scale=scale)
    return found.reshape(batch, heads, number, size).transpose(1, 2)
