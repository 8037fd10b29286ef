"""The predicted memory of a configuration, from `surgvqa.memory`: no torch, no weight loaded."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from surgvqa import memory
from surgvqa.errors import SurgvqaError
from tui.gauge import Part, largest
from tui.settings import Settings
from tui.words import GB

SHOWN = 7  # parts with a colour of their own; the smaller ones are shown together


@dataclass
class Prediction:
    """Allocated peak and its components in bytes; `problem` says why there are none."""

    budget_bytes: float
    peak_bytes: float = 0.0
    parts: list[Part] = field(default_factory=list)
    model: str = ""
    """Whose sizes were used."""
    problem: str = ""


async def predict(settings: Settings, preset: str) -> Prediction:
    """Predicts in a thread: the checkpoint's headers are read from the disk."""
    return await asyncio.to_thread(_predict, settings, preset)


def _predict(settings: Settings, preset: str) -> Prediction:
    try:
        options = settings.resolve(preset)[0].options
        found = memory.predict_options(options)
    except SurgvqaError as error:
        return Prediction(0.0, problem=f"no prediction: {error}")
    model = "" if options.model_name_or_path else "of the real model: no checkpoint is chosen"
    return Prediction(options.budget_gb * GB, found.peak_bytes, parts(found), model)


def parts(found: memory.Prediction) -> list[Part]:
    """The components of the peak, largest first; what is small goes together."""
    return largest((Part(name, nbytes) for name, nbytes in found.peak_table.items()), SHOWN)
