"""The events of a run, read as the file grows."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def finite(value: Any) -> Any:
    """JSON has no NaN: they become null, and a chart draws a gap."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


@dataclass
class EventTail:
    """Reads events.jsonl as it grows. A half-written last line is "not yet"; a damaged one is counted and left out."""

    path: Path
    offset: int = 0
    damaged: int = 0
    _partial: bytes = field(default=b"", repr=False)

    def read(self) -> list[dict[str, Any]]:
        """The events that are new since the last call; a file that shrank is read from its start."""
        try:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size < self.offset:
                    self.offset, self._partial = 0, b""
                file.seek(self.offset)
                data = file.read()
        except OSError:
            return []
        self.offset += len(data)
        return self.feed(data)

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The events that these bytes complete; `data` may come over any channel."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        events = []
        for line in lines:
            try:
                event = json.loads(line)
                if not isinstance(event, dict) or "kind" not in event:
                    raise ValueError
                events.append(event)
            except ValueError:
                self.damaged += bool(line.strip())
        return events

    @property
    def pending(self) -> int:
        """Bytes of the half-written last line."""
        return len(self._partial)


def finished_event(folder: Path) -> dict[str, Any] | None:
    """How the run ended; None while it has not."""
    return next((e for e in last_events(folder, b'"finished"') if e.get("kind") == "finished"), None)


def last_events(folder: Path, holding: bytes) -> Iterator[dict[str, Any]]:
    """Events of the last 64 KiB whose line holds some text, the newest first."""
    try:
        with open(folder / "events.jsonl", "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - 65536))
            lines = file.read().split(b"\n")
    except OSError:
        return
    for line in reversed(lines):
        if holding in line:
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict):
                    yield event
