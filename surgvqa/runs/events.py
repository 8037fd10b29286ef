"""The events of a run, read as the file grows."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgvqa.untrusted import parse_object


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
    "t", "step", "total_steps", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm", "samples_per_s",
    "data_wait", "done", "total", "device", "process_bytes", "allocated_bytes", "reserved_bytes", "used_bytes",
    "total_bytes", "utilization_percent", "temperature_c", "power_w", "peak_allocated_bytes", "peak_reserved_bytes",
    "requested_bytes", "budget_gb", "exit_code",
))
# fmt: on
TEXTS = frozenset(("name", "text", "phase", "unit", "path", "state", "action", "backend", "file"))
OBJECTS = frozenset(("settings", "predicted", "memory", "result"))
"""Fields of events that are a number, a text or an object wherever they occur (runs/folder.py lists the kinds)."""
MAX_LINE = 16 << 20
"""Bytes of the longest line that is kept; nothing that a run writes comes near."""
READ_AT_ONCE = 4 << 20


def parse_event(line: bytes) -> tuple[dict[str, Any], int]:
    """An event, and how many of its fields were left out because they are of another type than they have to be.

    Raises ValueError for a line that is no event.
    """
    event = parse_object(line)
    if not isinstance(event.get("kind"), str):
        raise ValueError("no event: it has no kind")
    wrong = [name for name, value in event.items() if value is not None and not _right_type(name, value)]
    for name in wrong:
        del event[name]
    return event, len(wrong)


def _right_type(name: str, value: Any) -> bool:
    if name in NUMBERS:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if name in TEXTS:
        return isinstance(value, str)
    return isinstance(value, dict) if name in OBJECTS else True


@dataclass
class EventTail:
    """Reads events.jsonl as it grows. A half-written last line is "not yet"; a damaged one is counted and left out, and
    so is a field of the wrong type."""

    path: Path
    offset: int = 0
    damaged: int = 0
    _partial: bytes = field(default=b"", repr=False)

    def read(self) -> list[dict[str, Any]]:
        """The events that are new since the last call; a file that shrank is read from its start."""
        events: list[dict[str, Any]] = []
        try:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size < self.offset:
                    self.offset, self._partial = 0, b""
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
            try:
                event, wrong = parse_event(line)
            except ValueError:
                self.damaged += bool(line.strip())
            else:
                self.damaged += bool(wrong)
                events.append(event)
        return events

    @property
    def pending(self) -> int:
        """Bytes of the half-written last line."""
        return len(self._partial)


def finished_event(folder: Path) -> dict[str, Any] | None:
    """How the run ended; None while it has not."""
    return next((e for e in last_events(folder, b'"finished"') if e["kind"] == "finished"), None)


def last_events(folder: Path, holding: bytes) -> Iterator[dict[str, Any]]:
    """Events of the last 64 KiB, and of the last line however long it is, whose line holds some text; newest first."""
    try:
        with open(folder / "events.jsonl", "rb") as file:
            size = os.fstat(file.fileno()).st_size
            window = 65536
            while True:
                file.seek(max(0, size - window))
                data = file.read(window)
                if window >= min(size, MAX_LINE) or b"\n" in data.rstrip(b"\n"):
                    break
                window *= 4
    except OSError:
        return
    for line in reversed(data.split(b"\n")):
        if holding in line:
            with contextlib.suppress(ValueError):
                yield parse_event(line)[0]
