"""Which configuration fits the budget: how many layers must recompute, what the compiled ones keep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from surgvqa.memory.activations import FP32, Configuration
from surgvqa.memory.predict import CUDA_CONTEXT, Prediction, predict
from surgvqa.model.sizes import Sizes

if TYPE_CHECKING:
    import torch

MARGIN = 0.01
"""Share of the budget that `fit` leaves free: six times the most that a prediction was too low on an H100 (0.16 %, of
35 configurations, docs/benchmarks.md)."""
WORTH_TELLING_GB = 0.05
"""Of a choice."""


def memory_limit_gb(budget_gb: float, device: torch.device) -> float:
    """What a run may allocate: the budget, or what the card has beside the driver's own if that is less."""
    if device.type != "cuda":
        return budget_gb
    import torch

    total = torch.cuda.get_device_properties(device).total_memory
    return min(budget_gb, (total - CUDA_CONTEXT) / 1e9)


def plans(sizes: Sizes, c: Configuration) -> Iterator[Configuration]:
    """The ways to run `c`, fastest first: compiled layers keep everything; or only matrix products, since computing
    again what stands between them costs little; and layers recompute, the fewer the better: all of them cost a quarter
    of a step's time."""
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
) -> Prediction | None:
    """The fastest plan whose predicted peak, with a margin for the prediction's error, is within the budget; None when
    there is none. `capped`: see Prediction.fits."""
    predicted = (predict(sizes, plan, weights) for plan in plans(sizes, c))
    return next((found for found in predicted if found.fits(budget_gb * (1 - MARGIN), capped)), None)


def choices(sizes: Sizes, c: Configuration, weights: dict[str, list[int]] | None = None) -> list[tuple[str, float]]:
    """What is done otherwise than the old way, and the GB by which the peak would be higher without each (negative:
    lower, it spends memory on speed)."""
    layers, recomputing = sizes.num_hidden_layers, c.recomputing(sizes)
    at_answer = c.supervised_tokens is None
    without: dict[str, tuple[bool, dict[str, Any]]] = {
        "logits at the answer only": (at_answer, {"supervised_tokens": c.clip.tokens}),
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
