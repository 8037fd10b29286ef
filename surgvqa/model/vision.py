"""Runs the vision tower with one attention kernel for all frames of a call, and without waiting for the GPU.

This changes results only by rounding. Upstream launches a kernel for each frame in each layer. While data loaders keep
the cores busy, launching those takes twice as long as the GPU needs to run them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgvqa.model.torch_internals import fused
from surgvqa.model.transformers_internals import (
    attention_of,
    get_vision_position_ids,
    register_attention,
    set_attention,
    vision_rotary,
)

FRAME_ATTENTION = "surgvqa_flash_frames"
"""Name of `frame_attention` among transformers' attention functions. Because it contains "flash", upstream passes all
frames at once with their boundaries."""


def frame_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each frame: [1, patches, heads, size] from [1, heads, patches, size].

    `cu_seq_lens_q` [frames + 1], on the host, has the frames' boundaries; `max_length_q` is the longest frame's length.
    """
    heads, patches, size = query.shape[1:]
    frames = cu_seq_lens_q.shape[0] - 1
    if frames * max_length_q == patches:  # all of equal length
        q, k, v = (x[0].view(heads, frames, max_length_q, size).transpose(0, 1) for x in (query, key, value))
        found = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        return found.transpose(1, 2).reshape(1, patches, heads, size), None
    lengths = cu_seq_lens_q.diff().tolist()
    per_frame = zip(*(x.split(lengths, dim=2) for x in (query, key, value)))
    parts = [F.scaled_dot_product_attention(q, k, v, scale=scaling) for q, k, v in per_frame]
    return torch.cat(parts, dim=2).transpose(1, 2), None


register_attention(FRAME_ATTENTION, frame_attention)


def sizes_of(visual: Any, image_grid_thw: Tensor, device: torch.device) -> dict[str, Any]:
    """Arguments for the tower `visual` that it would otherwise read from the GPU in each layer.

    For the frames `image_grid_thw` [F, 3] (t, h, w): their boundaries, the longest length, and each patch's position.
    """
    if attention_of(visual.config) == "sdpa":
        set_attention(visual.config, FRAME_ATTENTION)
    grid = image_grid_thw.cpu()
    lengths = (grid[:, 1] * grid[:, 2]).repeat_interleave(grid[:, 0])
    begins = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    on_host = attention_of(visual.config) in (FRAME_ATTENTION, "eager")
    places = get_vision_position_ids(grid, visual.config.spatial_merge_size)
    return {
        "cu_seqlens": begins if on_host else begins.to(device),
        "max_seqlen": int(lengths.max()),
        "position_ids": places.to(device),
    }


@contextmanager
def fused_elementwise(visual: Any) -> Iterator[None]:
    """Inside the context, rotary positions and activations of the tower `visual` are a compiled kernel each.

    Uncompiled they are some 12 and 3 kernels, a quarter of the host's time for the whole tower. To compile the whole
    block takes 6 to 12 s. What this gains is in docs/log.md.
    """
    activations = [block.mlp.act for block in visual.blocks]
    together = fused(type(activations[0]).forward)
    with vision_rotary(fused):
        for activation in activations:
            vars(activation)["forward"] = partial(together, activation)
        try:
            yield
        finally:
            for activation in activations:
                del vars(activation)["forward"]
