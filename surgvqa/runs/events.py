"""The events of a run, read as the file grows."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgvqa.untrusted import of_kinds, parse_object


def finite(value: Any) -> Any:
    """JSON has no NaN: they become null, and a chart draws a gap."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


# fmt: off
NUMBERS = frozenset((
    "step", "total_steps", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm", "samples_per_s",
    "data_wait", "done", "total", "device", "process_bytes", "allocated_bytes", "reserved_bytes", "used_bytes",
    "total_bytes", "utilization_percent", "temperature_c", "power_w", "peak_allocated_bytes", "peak_reserved_bytes",
    "requested_bytes", "budget_gb", "exit_code",
))
# fmt: on
TEXTS = frozenset(("name", "text", "phase", "unit", "path", "state", "action", "backend", "file"))
OBJECTS = frozenset(("settings", "predicted", "memory", "result"))
FIELDS = {
    **dict.fromkeys(NUMBERS, "a number"),
    "t": "a time",
    **dict.fromkeys(TEXTS, "text"),
    **dict.fromkeys(OBJECTS, "an object"),
}
"""What some fields of events are, wherever they occur (runs/folder.py lists the kinds of events)."""
MAX_LINE = 16 << 20
"""Bytes of the longest line that is kept; nothing that a run writes comes near."""
READ_AT_ONCE = 4 << 20
LAST_LINES = 10
PROBLEMS_KEPT = 5


def parse_event(line: bytes) -> tuple[dict[str, Any], list[str]]:
    """An event without its fields of the wrong type, and what is wrong with each of those.

    Raises ValueError for a line that is no event.
    """
    event, wrong = of_kinds(parse_object(line), FIELDS)
    if not isinstance(event.get("kind"), str):
        raise ValueError("no event: it has no kind")
    return event, wrong


@dataclass
class EventTail:
    """Reads events.jsonl as it grows.

    A half-written last line waits until it is whole. A damaged line, or a field of the wrong type, is left out and
    named in `problems`.
    """

    path: Path
    offset: int = 0
    damaged: int = 0
    """How many lines were damaged."""
    problems: list[str] = field(default_factory=list)
    """What was wrong with the first of them: "line 7: step is text, expected a number"."""
    _line: int = field(default=0, repr=False)
    _partial: bytes = field(default=b"", repr=False)

    def read(self) -> list[dict[str, Any]]:
        """The events that are new since the last call; a file that shrank is read from its start."""
        events: list[dict[str, Any]] = []
        try:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size < self.offset:
                    self.offset, self._partial, self._line = 0, b"", 0
                file.seek(self.offset)
                while data := file.read(READ_AT_ONCE):
                    self.offset += len(data)
                    events += self.feed(data)
        except OSError:
            pass
        return events

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The events that these bytes complete; `data` may come over any channel."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > MAX_LINE:  # its end will be no event: the whole line is lost
            self._partial = b"x"
        events = []
        for line in lines:
            self._line += 1
            if not line.strip():
                continue
            try:
                event, wrong = parse_event(line)
                events.append(event)
            except ValueError as error:
                wrong = [str(error)]
            if wrong:
                self.damaged += 1
                self.problems += [f"line {self._line}: {text}" for text in wrong[: PROBLEMS_KEPT - len(self.problems)]]
        return events

    @property
    def pending(self) -> int:
        """Bytes of the half-written last line."""
        return len(self._partial)


def finished_event(folder: Path) -> dict[str, Any] | None:
    """How the run ended; None while it has not."""
    return next((e for e in last_events(folder, b'"finished"') if e["kind"] == "finished"), None)


def last_events(folder: Path, holding: bytes) -> Iterator[dict[str, Any]]:
    """Events near the end of the file whose line holds some text, newest first: at least of the last 64 KiB and of the
    last LAST_LINES lines, however long these are (up to MAX_LINE)."""
    try:
        with open(folder / "events.jsonl", "rb") as file:
            size = os.fstat(file.fileno()).st_size
            window = 65536
            while True:
                file.seek(max(0, size - window))
                data = file.read(window)
                if window >= min(size, MAX_LINE) or data.count(b"\n") > LAST_LINES:
                    break
                window *= 4
    except OSError:
        return
    for line in reversed(data.split(b"\n")):
        if holding in line:
            with contextlib.suppress(ValueError):
                yield parse_event(line)[0]
