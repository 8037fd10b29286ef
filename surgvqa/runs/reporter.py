"""The interface through which work reports its progress."""

from __future__ import annotations

from typing import Any, Protocol


class Reporter(Protocol):
    """Implemented by a run folder (`Run`), a terminal (`TerminalReporter`) and a line of the panel."""

    def emit(self, kind: str, **fields: Any) -> None:
        """Reports one event; runs/folder.py lists the kinds and their fields."""

    def phase(self, name: str, text: str = "") -> None:
        """Reports that a new phase of the work begins."""

    def progress(self, phase: str, done: float, total: float | None, unit: str, **fields: Any) -> None:
        """Reports that `done` of `total` units of `phase` are done; `total` is None when unknown."""

    def warning(self, text: str) -> None:
        """Reports something that the user should know and that does not end the work."""
