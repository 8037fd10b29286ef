"""A run that was recorded on a GPU, played as if it went on now: for who has no GPU and wants to see one at work."""

from __future__ import annotations

import json
import time
from importlib import resources
from pathlib import Path
from typing import Any

from surgvqa.config.workspace import Workspace
from surgvqa.runs.history import RunSummary
from tui.targets.local import LocalTarget
from tui.targets.target import Feed, RunUpdate

RUN_ID = "recording-h100"
NAME = "a recording: H100"
SPEED = 8.0
"""Times as fast as it went."""
FILE = "h100-train.jsonl"
BUDGET_GB = 28.5


def recorded_events() -> list[dict[str, Any]]:
    """The events, `t` in seconds since the first."""
    text = resources.files("tui.recordings").joinpath(FILE).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


class RecordedFeed:
    """Hands on each event when its time has come."""

    def __init__(self, began: float) -> None:
        self.began = began
        self._waiting = recorded_events()

    def read(self) -> RunUpdate:
        due = (time.time() - self.began) * SPEED
        count = next((i for i, event in enumerate(self._waiting) if event["t"] > due), len(self._waiting))
        events = [{**event, "t": self.began + event["t"] / SPEED} for event in self._waiting[:count]]
        del self._waiting[:count]
        options = {"run_name": NAME, "budget_gb": BUDGET_GB}
        info = {
            "id": RUN_ID,
            "command": "train",
            "started": self.began,
            "recording": f"a recording of a run on an H100, {SPEED:g} times as fast",
            "options": {name: {"value": value, "from": "recording"} for name, value in options.items()},
        }
        return RunUpdate(info, "running" if self._waiting else "finished", [], events, [])

    def close(self) -> None:
        """Nothing is held open."""


class DemoTarget(LocalTarget):
    """This machine, with the recording below its own runs; it begins when the panel does."""

    def __init__(self, workspace: Workspace) -> None:
        super().__init__(workspace)
        self.began = time.time()
        self.lasts_s = recorded_events()[-1]["t"] / SPEED

    def runs(self) -> list[RunSummary]:
        state = "running" if time.time() - self.began < self.lasts_s else "finished"
        recorded = RunSummary(RUN_ID, "recording", state, self.began, 0, "?", NAME, Path())
        return [*super().runs(), recorded]

    def feed(self, run_id: str) -> Feed:  # type: ignore[override]  # a Feed, as Target has it
        return RecordedFeed(self.began) if run_id == RUN_ID else super().feed(run_id)
