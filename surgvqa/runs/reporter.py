"""What work tells of itself while it is done, whoever listens."""

from __future__ import annotations

from typing import Any, Protocol


class Reporter(Protocol):
    """A run folder (`Run`), a terminal (`TerminalReporter`) or a line of the panel."""

    def emit(self, kind: str, **fields: Any) -> None:
        """One event; runs/folder.py lists the kinds and their fields."""

    def phase(self, name: str, text: str = "") -> None:
        """A new part of the work begins."""

    def progress(self, phase: str, done: float, total: float | None, unit: str, **fields: Any) -> None:
        """How far `phase` is, in `unit`s."""

    def warning(self, text: str) -> None:
        """Something that the user should know and the work survives."""
