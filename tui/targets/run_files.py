"""A run folder's files as a target hands them to the panel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from surgvqa.untrusted import log_text

LOG_TAIL_BYTES = 256 * 1024


@dataclass
class LogLines:
    """Bytes of a log in, whole lines out."""

    _partial: bytes = b""

    def feed(self, data: bytes) -> list[str]:
        """The lines that these bytes complete."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        # A progress bar redraws its line with \r: what stands there in the end is the line.
        return [log_text(line.rstrip(b"\r").rsplit(b"\r", 1)[-1].decode("utf-8", "replace")) for line in lines]


def resumed_from(info: dict[str, Any]) -> list[str]:
    """What may be the run that this one goes on from: its name, or the parts of a path to it, innermost first."""
    resumed = ((info.get("options") or {}).get("resume") or {}).get("value")
    return list(reversed(PurePath(resumed).parts)) if resumed else []


def curve_events(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that draw the curve."""
    return [event for event in events if event["kind"] in ("metric", "eval")]
