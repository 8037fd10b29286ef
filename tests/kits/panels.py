"""For tests of the panel: a workspace, runs in it, and what the panel shows."""

import json
import time
from pathlib import Path

from textual.widgets import Static

from surgvqa.config.workspace import load_workspace
from surgvqa.runs import folder, state
from tui.app import Panel
from tui.targets.local import LocalTarget
from tui.widgets.head import TITLES
from tui.widgets.timeline_view import TimelineView

SIZES = [(80, 24), (120, 36)]


def panel(root: Path, host: str | None = None) -> Panel:
    return Panel(LocalTarget(load_workspace(root)), host)


def options(**values):
    return {name: {"value": value, "from": "command line"} for name, value in values.items()}


def training(root: Path, steps: int = 30, name: str = "first", **more) -> folder.Run:
    """A run folder of a training that this very process seems to do."""
    run = folder.Run.create(root / "runs", "train", options=options(run_name=name, budget_gb=28.5), **more)
    run.phase("train", f"{steps} steps")
    for step in range(1, steps + 1):
        run.emit("metric", step=step, total_steps=100, loss=3.0 / step, learning_rate=1e-4, samples_per_s=2.5)
    run.emit("eval", step=steps, eval_loss=0.75)
    run.emit("gpu", device=0, backend="host", process_bytes=1.5e9, total_bytes=16e9)
    (run.folder / "log.txt").write_text("loading\nengine text [/x] is no markup\n")
    return run


def die(run: folder.Run) -> None:
    """As if the process were gone: its identity fits no living one."""
    info = state.read_run_json(run.folder)
    (run.folder / "run.json").write_text(json.dumps({**info, "identity": "gone"}))


async def settle(pilot, condition, seconds: float = 60.0) -> None:
    """Waits for what the next ticks will bring."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await pilot.pause(0.05)


def text(app: Panel, selector: str) -> str:
    return str(app.screen.query_one(selector, Static).content)


async def go(app: Panel, pilot, mode: str) -> None:
    """Goes to a screen by its key and waits until it is there and takes keys."""
    await settle(pilot, lambda: app.front is not None and app.front.MODE in TITLES)
    await pilot.press(str(list(TITLES).index(mode) + 1))
    await settle(pilot, lambda: app.front is not None and mode == app.front.MODE and (app.focused or mode == "monitor"))


def timeline(app: Panel) -> list[str]:
    """The texts of the visible entries of Monitor's timeline."""
    return [entry.text for entry in app.screen.query_one(TimelineView).visible_entries]
