"""Settings of torch's CUDA allocator. Torch-free, because torch reads them when it is imported."""

from __future__ import annotations

import os

SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The environment variables, the newer name first."""
EXPANDABLE = "expandable_segments:True"


def grow_segments() -> None:
    """Asks for segments that can grow, unless the environment already configures the allocator.

    After a step down, tensors of other sizes must fit between those that remain, and a capped process could not get
    new segments for them. transformers allocates the weights as one segment, and a fixed segment is not freed while it
    holds any weight: on an H100, 5 of 9.6 GB stayed reserved and empty (benchmarks/step_down.py).
    """
    if not any(name in os.environ for name in SETTINGS):
        os.environ[SETTINGS[0]] = EXPANDABLE


def segments_grow() -> bool:
    """Whether the environment asks for segments that can grow."""
    return any(EXPANDABLE in os.environ.get(name, "") for name in SETTINGS)
