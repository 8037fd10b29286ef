"""What happened in a run, in order: entries made from its events, between them the lines that the process wrote."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from surgvqa.terminal.figures import human_seconds
from tui import words

LEVELS = ("all", "events", "warnings and errors")
"""What the level filter goes through."""
OUTPUT, EVENT, GOOD, WARNING, ERROR = "output", "event", "good", "warning", "error"
KEPT = 6000
"""Entries kept in memory; the files have all of them."""
TRACEBACK = "Traceback (most recent call last)"
NOT_SCORES = ("step", "epoch", "runtime", "per_second")


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that happened."""

    order: float
    """Unix seconds by which it is sorted."""
    t: float | None
    """When it happened; None: not known, for lines written before they were looked at."""
    level: str
    text: str
    step: int | None = None


class Timeline:
    """Entries in the order of time. Lines of output carry no time: they have that of the look that found them."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.version = 0
        """Grows when entries were put between others or dropped; while it stays, entries were only appended."""
        self._looked = False

    def add(
        self, events: list[dict[str, Any]], lines: list[str], now: float, began: float = 0.0, more: bool = False
    ) -> None:
        """Takes in what one look at the run found: its new events and lines, `now` the time of the look, `began` that
        of the run, `more` whether the look goes on. Lines of the first look were written at some time before it: they
        stand at the run's beginning, and an error's traceback at its end."""
        new = [entry for event in events for entry in _of_event(event)]
        if self._looked:
            new += [Entry(now, now, OUTPUT, line) for line in lines]
        elif lines:
            last = max((entry.order for entry in (*self.entries[-1:], *new)), default=now)
            raised = next((i for i in reversed(range(len(lines))) if lines[i].startswith(TRACEBACK)), len(lines))
            new += [Entry(began, None, OUTPUT, line) for line in lines[:raised]]
            new += [Entry(math.nextafter(last, 0.0), None, OUTPUT, line) for line in lines[raised:]]
        self._looked = self._looked or (bool(events or lines) and not more)
        new.sort(key=lambda entry: entry.order)
        if not new:
            return
        if self.entries and new[0].order < self.entries[-1].order:
            at = bisect_right(self.entries, new[0].order, key=lambda entry: entry.order)
            self.entries[at:] = sorted([*self.entries[at:], *new], key=lambda entry: entry.order)
            self.version += 1
        else:
            self.entries += new
        if len(self.entries) > KEPT:
            del self.entries[: len(self.entries) - KEPT * 3 // 4]
            self.version += 1


def shown(entry: Entry, level: int) -> bool:
    """Whether the filter LEVELS[level] lets an entry through."""
    return level == 0 or (entry.level != OUTPUT if level == 1 else entry.level in (WARNING, ERROR))


def _of_event(event: dict[str, Any]) -> list[Entry]:
    make = MAKERS.get(str(event.get("kind")))
    made = make(event) if make else None
    if made is None:
        return []
    level, text = made
    t, step = event.get("t"), event.get("step")
    known = float(t) if isinstance(t, (int, float)) else None
    return [Entry(known or 0.0, known, level, text, int(step) if isinstance(step, (int, float)) else None)]


def _text(event: dict[str, Any], key: str = "text") -> str:
    return " ".join(str(event.get(key) or "").split())


def _phase(event: dict[str, Any]) -> tuple[str, str]:
    text = _text(event)
    return EVENT, f"{_text(event, 'name')}: {text}" if text else _text(event, "name")


def _plan(event: dict[str, Any]) -> tuple[str, str] | None:
    size = event.get("output_bytes")
    return (EVENT, f"plan: {words.size(size)} to write") if isinstance(size, (int, float)) else None


def _eval(event: dict[str, Any]) -> tuple[str, str]:
    scores = [
        f"{name.removeprefix('eval_').replace('_', ' ')} {value:.4g}"
        for name, value in event.items()
        if isinstance(value, (int, float)) and name not in ("v", "t") and not name.endswith(NOT_SCORES)
    ]
    return GOOD, f"evaluated at step {event.get('step')}: {', '.join(scores) or 'no finite figure'}"


def _settings(event: dict[str, Any]) -> str:
    return ", ".join(f"{name} {words.value(value)}" for name, value in (event.get("settings") or {}).items())


def _preset(event: dict[str, Any]) -> tuple[str, str]:
    settings = _settings(event)
    return WARNING if event.get("step") else EVENT, f"preset {_text(event, 'name')}" + (settings and f": {settings}")


def _retreat(event: dict[str, Any]) -> tuple[str, str]:
    return WARNING, f"stepped down: {_settings(event) or 'smaller'}"


def _oom(event: dict[str, Any]) -> tuple[str, str]:
    step = "" if event.get("step") is None else f" at step {event['step']}"
    return ERROR, f"out of GPU memory{step}: {_text(event)}"


def _finished(event: dict[str, Any]) -> tuple[str, str]:
    state, result = str(event.get("state", "finished")), event.get("result") or {}
    seconds = result.get("seconds")
    took = f" after {human_seconds(seconds)}" if isinstance(seconds, (int, float)) else ""
    return {"finished": GOOD, "failed": ERROR}.get(state, WARNING), f"{state}{took}"


MAKERS = {
    "phase": _phase,
    "plan": _plan,
    "eval": _eval,
    "checkpoint": lambda event: (GOOD, f"checkpoint {_text(event, 'path')}"),
    "preset": _preset,
    "oom": _oom,
    "retreat": _retreat,
    "warning": lambda event: (WARNING, _text(event)),
    "error": lambda event: (ERROR, _text(event)),
    "finished": _finished,
}
"""Level and text of the kinds of events that are entries; metrics and samples are in the charts."""
