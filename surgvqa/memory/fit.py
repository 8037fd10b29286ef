"""Finds the configuration that fits the budget: how many layers recompute, and what compiled layers keep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from surgvqa.memory.activations import FP32, Configuration
from surgvqa.memory.predict import CUDA_CONTEXT, NCCL, MemoryPrediction, predict
from surgvqa.model.sizes import Sizes

if TYPE_CHECKING:
    import torch

MARGIN = 0.01
"""Share of the budget that `fit` leaves free: six times the largest underestimate on an H100 (0.16 % in 35
configurations, docs/benchmarks.md)."""
WORTH_TELLING_GB = 0.05
"""Smallest effect of a choice that is shown."""


def memory_limit_gb(budget_gb: float, device: torch.device, ranks: int = 1) -> float:
    """GB that a run may allocate: the budget, or the card's memory without the driver's part if that is less.

    With several `ranks`, NCCL's buffers are subtracted too.
    """
    if device.type != "cuda":
        return budget_gb
    import torch

    total = torch.cuda.get_device_properties(device).total_memory
    return min(budget_gb, (total - CUDA_CONTEXT - (NCCL if ranks > 1 else 0)) / 1e9)


def plans(sizes: Sizes, c: Configuration) -> Iterator[Configuration]:
    """Yields the ways to run `c`, fastest first.

    First, compiled layers keep everything. Then they keep only matrix products, because recomputing what is between
    them costs little. Then more and more layers recompute; all of them cost a quarter of a step's time.
    """
    if c.keep == "auto":
        yield replace(c, keep="all", checkpointed_layers=0)
        c = replace(c, keep="products")
    for count in range(sizes.num_hidden_layers + 1):
        yield replace(c, checkpointed_layers=count)


def fit(
    sizes: Sizes,
    c: Configuration,
    budget_gb: float,
    weights: dict[str, list[int]] | None = None,
    capped: bool = False,
) -> MemoryPrediction | None:
    """The fastest plan whose predicted peak is within the budget, less MARGIN; None if there is none.

    `capped`: see MemoryPrediction.needed_gb.
    """
    predicted = (predict(sizes, plan, weights) for plan in plans(sizes, c))
    return next((found for found in predicted if found.fits(budget_gb * (1 - MARGIN), capped)), None)


def choices(sizes: Sizes, c: Configuration, weights: dict[str, list[int]] | None = None) -> list[tuple[str, float]]:
    """(how `c` differs from the old script, GB that the peak would be higher without it).

    The GB are negative for choices that use memory for speed.
    """
    layers, recomputing = sizes.num_hidden_layers, c.recomputing(sizes)
    at_answer = c.supervised_tokens is None
    without: dict[str, tuple[bool, dict[str, Any]]] = {
        "logits at the answer only": (
            at_answer,
            {"supervised_tokens": c.clip.tokens, "last_layer_whole": True},
        ),
        "frames and questions encoded once, the encoders off the GPU": (
            c.cached_features and not c.encoders_resident,
            {"cached_features": False, "encoders_resident": True},
        ),
        "8-bit AdamW": (c.eight_bit, {"eight_bit": False}),
        "no float32 copies of LoRA's inputs": (
            not c.casts_lora_inputs and c.adapter_bytes == FP32,
            {"casts_lora_inputs": True},
        ),
        "compiled layers keep only matrix products": (c.compiled and c.keep != "all", {"keep": "all"}),
        f"{layers - recomputing} of {layers} layers do not recompute, a third less to compute in each": (
            recomputing < layers,
            {"checkpointed_layers": None},
        ),
    }
    peak = predict(sizes, c, weights).predicted_peak_gb
    saved = {
        text: predict(sizes, replace(c, **other), weights).predicted_peak_gb - peak
        for text, (chosen, other) in without.items()
        if chosen
    }
    return [(text, gb) for text, gb in saved.items() if abs(gb) >= WORTH_TELLING_GB]
