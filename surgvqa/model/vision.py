"""How the vision tower runs: the frames of a call attend in one kernel, and nothing in it waits for the GPU.

None of it changes what is computed beyond rounding. Upstream calls a kernel for each frame in each layer; beside busy
data loaders the host then takes twice as long to launch these as the GPU to run them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgvqa.model.transformers_internals import (
    attention_of,
    get_vision_position_ids,
    register_attention,
    set_attention,
)

FRAME_ATTENTION = "surgvqa_flash_frames"
"""Name of `frame_attention` among transformers' attention functions. "flash" in it makes upstream hand over all frames
at once, and with them where each begins."""


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
    """Attention within each frame: [1, patches, heads, size] from [1, heads, patches, size]. `cu_seq_lens_q`
    [frames + 1], on the host, says where the frames begin and end, `max_length_q` how long the longest is."""
    heads, patches, size = query.shape[1:]
    frames = cu_seq_lens_q.shape[0] - 1
    if frames * max_length_q == patches:  # all equally long
        q, k, v = (x[0].view(heads, frames, max_length_q, size).transpose(0, 1) for x in (query, key, value))
        found = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        return found.transpose(1, 2).reshape(1, patches, heads, size), None
    lengths = cu_seq_lens_q.diff().tolist()
    apart = zip(*(x.split(lengths, dim=2) for x in (query, key, value)))
    parts = [F.scaled_dot_product_attention(q, k, v, scale=scaling) for q, k, v in apart]
    return torch.cat(parts, dim=2).transpose(1, 2), None


register_attention(FRAME_ATTENTION, frame_attention)


def sizes_of(visual: Any, image_grid_thw: Tensor, device: torch.device) -> dict[str, Any]:
    """What the tower `visual` would otherwise ask the GPU for, layer by layer: where each of the frames
    `image_grid_thw` [F, 3] (t, h, w) begins, how long the longest is, and where each patch stands."""
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
