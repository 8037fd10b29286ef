"""The events of a run, read as the file grows."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgvqa.files import open_regular
from surgvqa.untrusted import of_kinds, parse_object


def finite(value: Any) -> Any:
    """`value` with None in place of NaN and infinity, which JSON lacks; a chart draws a gap there."""
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
    "data_wait", "done", "total", "process_bytes", "allocated_bytes", "reserved_bytes", "used_bytes",
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
"""The types of some fields of events, in every kind of event (runs/folder.py lists the kinds)."""
MAX_LINE = 16 << 20
"""Longest line that is kept, in bytes; the lines of a run are far shorter."""
READ_AT_ONCE = 4 << 20
LAST_LINES = 10
PROBLEMS_KEPT = 5


def parse_event(line: bytes) -> tuple[dict[str, Any], list[str]]:
    """An event without its fields of the wrong type, and a message for each of those.

    Raises ValueError for a line that is not an event.
    """
    event, wrong = of_kinds(parse_object(line), FIELDS)
    if not isinstance(event.get("kind"), str):
        raise ValueError("not an event: it has no kind")
    return event, wrong


@dataclass
class EventTail:
    """Reads events.jsonl as it grows.

    A half-written last line is kept until it is complete. A damaged line or a field of the wrong type is left out and
    named in `problems`.
    """

    path: Path
    offset: int = 0
    damaged: int = 0
    """Number of damaged lines."""
    problems: list[str] = field(default_factory=list)
    """What is wrong with the first damaged lines: "line 7: step is text, expected a number"."""
    more: bool = False
    """Whether the last call left something unread."""
    _line: int = field(default=0, repr=False)
    _partial: bytes = field(default=b"", repr=False)

    def read(self) -> list[dict[str, Any]]:
        """All new events since the last call. A file that shrank is read again from its start."""
        events = self.read_some()
        while self.more:
            events += self.read_some()
        return events

    def read_some(self) -> list[dict[str, Any]]:
        """Like `read`, but reads at most READ_AT_ONCE bytes; `more` says whether there are more."""
        self.more = False
        try:
            with open_regular(self.path) as file:
                size = os.fstat(file.fileno()).st_size
                if size < self.offset:
                    self.offset, self._partial, self._line = 0, b"", 0
                file.seek(self.offset)
                data = file.read(READ_AT_ONCE)
        except OSError:
            return []
        self.offset += len(data)
        self.more = bool(data) and self.offset < size
        return self.feed(data)

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The events that `data` completes. The bytes may come from a file or over the network."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > MAX_LINE:  # too long: this invalid start makes the whole line a damaged one
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
        """Length of the half-written last line in bytes."""
        return len(self._partial)


def finished_event(folder: Path) -> dict[str, Any] | None:
    """The `finished` event, which says how the run ended; None if there is none yet."""
    return next((e for e in last_events(folder, b'"finished"') if e["kind"] == "finished"), None)


def last_events(folder: Path, holding: bytes) -> Iterator[dict[str, Any]]:
    """Events near the end of the file whose line contains `holding`, newest first.

    Searches at least the last 64 KiB and the last LAST_LINES lines, but not more than about MAX_LINE bytes.
    """
    try:
        with open_regular(folder / "events.jsonl") as file:
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
