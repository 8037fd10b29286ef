"""The predicted memory of a configuration, from `surgvqa.memory.predict`: no torch, no weight loaded."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from surgvqa.errors import SurgvqaError
from surgvqa.machine import gpu
from surgvqa.memory import fit
from surgvqa.memory import predict as predict_module
from surgvqa.memory.budget import NO_GPU
from surgvqa.model.sizes import Sizes, checkpoint_sizes
from tui import words
from tui.content.memory import Part, largest
from tui.settings.settings import Settings
from tui.words import GB

SHOWN = 7  # parts with a colour of their own; the smaller ones are shown together


@dataclass
class PredictedPeak:
    """Allocated peak and its components in bytes; `problem` says why there are none."""

    budget_bytes: float
    peak_bytes: float = 0.0
    parts: list[Part] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Whose sizes were used, where it holds, what the training will make of the spare."""
    problem: str = ""


async def predict(settings: Settings, preset: str, here: bool = True) -> PredictedPeak:
    """Predicts in a thread: the checkpoint's headers are read from the disk. `here`: the training would run on this
    machine."""
    return await asyncio.to_thread(_predict, settings, preset, here)


def _predict(settings: Settings, preset: str, here: bool) -> PredictedPeak:
    try:
        options = settings.resolve(preset)[0].options
        folder = options.model_name_or_path
        sizes, weights = checkpoint_sizes(folder) if folder else (Sizes(), None)
        configuration = predict_module.configuration(sizes, options)
        found = predict_module.predict(sizes, configuration, weights)
    except SurgvqaError as error:
        return PredictedPeak(0.0, problem=f"no prediction: {error}")
    notes = [] if folder else ["of the real model: no checkpoint is chosen"]
    if options.gradient_checkpointing and options.checkpointed_layers is None:
        fitted = fit.fit(sizes, configuration, options.budget_gb, weights)
        if fitted and fitted.peak_bytes > found.peak_bytes:
            count = fitted.configuration.checkpointed_layers
            notes.append(f"spare for speed: {words.gb(fitted.peak_bytes)}, {count} of {fitted.layers} layers recompute")
    if here and not gpu.any_gpu():
        notes.append(NO_GPU)
    return PredictedPeak(options.budget_gb * GB, found.peak_bytes, parts(found), notes)


def parts(found: predict_module.MemoryPrediction) -> list[Part]:
    """The components of the peak, largest first; what is small goes together."""
    return largest((Part(name, nbytes) for name, nbytes in found.peak_table.items()), SHOWN)
