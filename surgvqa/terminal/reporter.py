"""The reporter for work without a run folder: draws events on the terminal and does not store them."""

from __future__ import annotations

import time
from typing import Any

from surgvqa.terminal.job_view import JobView


class TerminalReporter:
    """A `Reporter` (runs/reporter.py) that draws each event on stderr."""

    def __init__(self) -> None:
        self.view = JobView()
        self.last = 0.0

    def __enter__(self) -> TerminalReporter:
        return self

    def __exit__(self, *_: object) -> None:
        self.view.close()

    def emit(self, kind: str, **fields: Any) -> None:
        self.view.show({"kind": kind, **fields})

    def phase(self, name: str, text: str = "") -> None:
        self.emit("phase", name=name, text=text)

    def warning(self, text: str) -> None:
        self.emit("warning", text=text)

    def progress(self, phase: str, done: float, total: float | None, unit: str, **fields: Any) -> None:
        now = time.monotonic()
        if now - self.last > 0.2 or done == total:
            self.last = now
            self.emit("progress", phase=phase, done=done, total=total, unit=unit)
