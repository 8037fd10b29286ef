"""The predicted memory of a configuration, from `surgvqa.memory`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from surgvqa.errors import SurgvqaError
from tui.gauge import Part
from tui.settings import Settings
from tui.words import GB


@dataclass
class Prediction:
    """Peak and components in bytes; `problem` says why there are none."""

    budget_bytes: float
    peak_bytes: float = 0.0
    parts: list[Part] = field(default_factory=list)
    problem: str = ""


async def predict(settings: Settings, preset: str) -> Prediction:
    """Predicts in a thread: the checkpoint's headers are read from the disk."""
    return await asyncio.to_thread(_predict, settings, preset)


def _predict(settings: Settings, preset: str) -> Prediction:
    try:
        options = settings.resolve(preset)[0].options
    except SurgvqaError as error:
        return Prediction(0.0, problem=str(error))
    budget = options.budget_gb * GB
    try:
        from surgvqa import memory  # noqa: F401
    except ImportError:
        return Prediction(budget, problem="no prediction yet: this version has no memory model")
    return Prediction(budget, problem="no prediction yet")
