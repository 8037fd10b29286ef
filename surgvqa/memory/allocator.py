"""How torch's CUDA allocator takes memory. Torch-free: torch reads this when it is imported."""

from __future__ import annotations

import os

SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The environment variables, the newer name first."""
EXPANDABLE = "expandable_segments:True"


def grow_segments() -> None:
    """Asks for segments that grow, unless the environment says how else: after a step down tensors of other sizes must
    fit between those that stay, and a capped process could not get new segments for them.

    transformers takes the weights' memory as one segment; of a fixed one nothing is given back while any weight is in
    it: on an H100 5 of 9.6 GB stayed reserved and empty (benchmarks/step_down.py).
    """
    if not any(name in os.environ for name in SETTINGS):
        os.environ[SETTINGS[0]] = EXPANDABLE


def segments_grow() -> bool:
    """Whether they were asked to."""
    return any(EXPANDABLE in os.environ.get(name, "") for name in SETTINGS)
