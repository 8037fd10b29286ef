"""`surgvqa runs`, `follow` and `stop`."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from surgvqa.config.workspace import Workspace
from surgvqa.outcome import Outcome
from surgvqa.runs import events, history, launch
from surgvqa.runs.events import EventTail
from surgvqa.runs.state import state_of
from surgvqa.terminal.drawing import plain
from surgvqa.terminal.figures import human_seconds
from surgvqa.terminal.job_view import JobView


def runs(arguments: Namespace, workspace: Workspace) -> Outcome:
    """The run list, newest first."""
    listed = sorted((r for d in workspace.runs_dirs for r in history.list_runs(d)), key=lambda r: -r.started)
    data = {"runs": [r.data() for r in listed]}

    def show(console: Console) -> None:
        table = Table("run", "command", "state", "started", "steps", "name", box=None)
        table.columns[0].no_wrap = table.columns[3].no_wrap = True  # users copy the id
        for r in listed:
            started = time.strftime("%m-%d %H:%M", time.localtime(r.started))
            table.add_row(*map(plain, (r.id, r.command, r.state, started, r.steps or "", r.name)))
        for r in listed:
            if r.problem:
                console.print(plain(f"{r.id}/{r.problem}"), style="yellow")
        console.print(table if listed else plain(f"no runs in {', '.join(map(str, workspace.runs_dirs))}"))

    return Outcome(data, show=show)


def follow(arguments: Namespace, workspace: Workspace) -> Outcome:
    """Draws a run's events until it ends. Ctrl-C ends only the drawing, not the run."""
    folder = history.find_run(arguments.run_name, workspace.runs_dirs)
    view, tail = JobView(), EventTail(folder / "events.jsonl")
    try:
        for event in follow_events(folder, tail):
            view.show(event)
            if event["kind"] == "error":
                view.console.print(Text.assemble(("error:", "red"), f" {event.get('text')}"))
    finally:
        view.close()
    for problem in tail.problems:
        view.show({"kind": "warning", "text": f"{tail.path}: {problem}; left out"})
    finished = events.finished_event(folder) or {}
    state = state_of(folder, finished)
    return Outcome(
        {"run": folder.name, "state": state, **(finished.get("result") or {})},
        ok=state in ("finished", "stopped") and not finished.get("exit_code"),
        show=lambda console: console.print(plain(f"{folder.name}: {state}")),
    )


def stop(arguments: Namespace, workspace: Workspace) -> Outcome:
    """Asks a run to end, waits for it, and kills it after 30 s."""
    folder = history.find_run(arguments.run_name, workspace.runs_dirs)
    was_active, began = state_of(folder) in ("starting", "running"), time.monotonic()
    state = launch.stop(folder)
    how = f" after {human_seconds(time.monotonic() - began)}" if was_active else " (it was not running)"
    text = f"{folder.name}: {state}{how}"
    return Outcome({"run": folder.name, "state": state}, show=lambda console: console.print(plain(text)))


def follow_events(folder: Path, tail: EventTail, poll_s: float = 0.2) -> Iterator[dict[str, Any]]:
    """Yields the events of `tail` until the run has ended or died."""
    while True:
        ended = state_of(folder) not in ("starting", "running")
        for event in tail.read():
            yield event
            if event["kind"] == "finished":
                return
        if ended:
            return
        time.sleep(poll_s)
