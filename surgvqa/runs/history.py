"""Lists the runs of a workspace and finds them by name."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from surgvqa.errors import UsageError
from surgvqa.runs.events import last_events
from surgvqa.runs.process import job_processes
from surgvqa.runs.ranks import run_of
from surgvqa.runs.state import check_run_json, read_run_json, state_of

NO_FOLDER = "(its folder is gone)"
"""Shown in place of the name of a job that still runs without its run folder."""


@dataclass(frozen=True)
class RunSummary:
    """One row of the run list."""

    id: str
    command: str
    state: str
    started: float
    steps: int
    host: str
    name: str
    folder: Path
    problem: str = ""
    """What is wrong with its run.json."""

    def data(self) -> dict[str, Any]:
        """The row for --json."""
        return {**vars(self), "folder": str(self.folder)}


def list_runs(runs_dir: Path) -> list[RunSummary]:
    """Every run in `runs_dir`, newest first, including jobs that still run although their folder was deleted."""
    runs_dir = Path(runs_dir).absolute()
    found = [summary(folder) for folder in (runs_dir.iterdir() if runs_dir.is_dir() else [])]
    known = {run.folder.name for run in found if run}
    lost = [Path(folder) for folder in job_processes()]
    orphans = [_without_folder(folder) for folder in lost if folder.parent == runs_dir and folder.name not in known]
    return newest_first([*(run for run in found if run), *orphans])


def newest_first(found: Iterable[RunSummary]) -> list[RunSummary]:
    """The runs in the order of every run list."""
    return sorted(found, key=lambda run: (run.started, run.id), reverse=True)


def summary(folder: Path) -> RunSummary | None:
    """The row of one run; None for a folder that is not a run. Of a damaged run.json only its own fields are lost."""
    info, problem = check_run_json(folder)
    if not info and not problem:
        return None
    of_id = _read_id(folder.name)
    return RunSummary(
        folder.name,
        info.get("command", of_id[0]),
        state_of(folder),
        info.get("started", of_id[1]),
        last_step(folder),
        info.get("host", "?"),
        run_name(info),
        folder,
        problem,
    )


def _without_folder(folder: Path) -> RunSummary:
    """The row of a running job whose folder was deleted."""
    command, started = _read_id(folder.name)
    return RunSummary(folder.name, command, "running", started, 0, platform.node(), NO_FOLDER, folder)


def _read_id(run_id: str) -> tuple[str, float]:
    """The command and the start time (Unix seconds) in a run id (`new_run_id`); "?" and 0 for other names."""
    day, time, *command = run_id.split("-")[:-1] if run_id.count("-") > 2 else ("", "")
    try:
        return "-".join(command), datetime.strptime(f"{day}-{time}", "%Y%m%d-%H%M%S").timestamp()
    except (ValueError, OverflowError):
        return "?", 0.0


def run_name(info: dict[str, Any]) -> str:
    """The name that the user gave the run, or ''."""
    named = info.get("options", {}).get("run_name")
    return str(named.get("value") or "") if isinstance(named, dict) else ""


def last_step(folder: Path) -> int:
    """The last optimiser step that the run reported, read from the end of its events; 0 for a job without steps."""
    return next((e["step"] for e in last_events(folder, b'"step"') if isinstance(e.get("step"), int)), 0)


def find_run(name: str, runs_dirs: list[Path], command: str | None = None, before: float = math.inf) -> Path:
    """The run folder for `name`: a folder, an id, the beginning of an id, a run name, or `last`.

    `last` is the newest run of `command`, or the newest of all if `command` has none. Only runs that started earlier
    than `before` (Unix seconds) count, except for a folder or an exact id. Raises UsageError when no run or more than
    one run matches.
    """
    if (Path(name) / "run.json").is_file():
        return Path(name).resolve()
    runs = sorted((r for d in runs_dirs for r in list_runs(d)), key=lambda r: r.started, reverse=True)
    if not runs:
        raise UsageError(f"{name}: no runs in {', '.join(map(str, runs_dirs))}")
    ids = {r.id for r in runs}
    runs = [r for r in runs if r.id == name or r.started < before]
    # Of a run on several machines with one disk, the run's own folder is meant.
    runs = [r for r in runs if r.id == name or run_of(r.id) == r.id or run_of(r.id) not in ids]
    if name == "last" and runs:
        return next((r for r in runs if r.command == command), runs[0]).folder
    exact = [r for r in runs if r.id == name] or [r for r in runs if r.name == name][:1]
    matches = exact or [r for r in runs if r.id.startswith(name)]
    if len(matches) == 1:
        return matches[0].folder
    if matches:
        named = ", ".join(r.id for r in matches[:3]) + (", …" if len(matches) > 3 else "")
        raise UsageError(f"{name}: matches {len(matches)} runs ({named}); give more of the id")
    raise UsageError(f"{name}: no such run in {', '.join(map(str, runs_dirs))} (surgvqa runs lists them)")


def start_of(run_id: str | None, runs_dirs: list[Path]) -> float:
    """When the run with that id started; infinity for None and for a run that has no folder yet.

    A launched job finds its own folder there already, and must not take it for the `last` one.
    """
    folder = next((d / run_id for d in runs_dirs if (d / run_id / "run.json").is_file()), None) if run_id else None
    started: float = read_run_json(folder).get("started", math.inf) if folder else math.inf
    return started
