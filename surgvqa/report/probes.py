"""The page's section on a probe: bars for how many answers change with sound or frames, and the conclusions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from surgvqa.probe.conditions import CONDITIONS
from surgvqa.report.collect import Model


@dataclass
class Row:
    """One bar."""

    text: str
    value: float
    """Share of answers that change, 0..1."""
    interval: tuple[float, float] | None
    accuracy: str
    """The change in accuracy, as text."""
    majority: None = None
    """Always None; other charts mark the majority here."""


@dataclass
class Probe:
    """One probe on the page."""

    model: str
    conclusion: list[str]
    rows: list[Row]


def probes(models: Sequence[Model]) -> list[Probe]:
    """The probes among the models' runs. Invalid parts of their reports are left out."""
    found = []
    for model in models:
        conditions, sentences = model.scores.get("conditions"), model.scores.get("conclusion")
        if isinstance(conditions, dict) and isinstance(sentences, list):
            rows = [row for name, figures in conditions.items() if (row := _row(name, figures))]
            found.append(Probe(model.name, [str(sentence) for sentence in sentences], rows))
    return found


def _row(name: str, figures: Any) -> Row | None:
    if not isinstance(figures, Mapping) or not _is_number(figures.get("influence")):
        return None
    pair, difference = figures.get("influence_interval"), figures.get("difference")
    interval = (pair[0], pair[1]) if isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair)) else None
    points = f"accuracy {100 * difference:+.1f} points" if _is_number(difference) else ""
    text = CONDITIONS[name].text if name in CONDITIONS else name
    return Row(text, min(1.0, max(0.0, figures["influence"])), interval, points)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1
