"""The small commands over presets and run folders: presets, runs, follow, stop."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path

from rich.table import Table
from rich.text import Text

from presets import load_presets
from surgvqa.config.options import WORKSPACE_FILE, Workspace, resolve
from surgvqa.outcome import Outcome
from surgvqa.runs import folder as run_folders
from surgvqa.terminal.job_view import JobView, bar, human_seconds


def runs_dirs(workspace: Workspace) -> list[Path]:
    """Where runs may lie: this workspace and, from a folder that is none, the workspaces directly below it."""
    found = [workspace.runs_dir]
    if not workspace.file.is_file():
        found += [file.parent / "runs" for file in sorted(workspace.root.glob(f"*/{WORKSPACE_FILE}"))]
    return [d for d in found if d.is_dir()] or found[:1]


def runs(arguments: Namespace, workspace: Workspace) -> Outcome:
    """The run list, newest first."""
    listed = sorted((r for d in runs_dirs(workspace) for r in run_folders.list_runs(d)), key=lambda r: -r.started)
    data = {"runs": [r.data() for r in listed]}

    def show(console) -> None:
        table = Table("run", "command", "state", "started", "steps", "name", box=None)
        table.columns[0].no_wrap = table.columns[3].no_wrap = True  # the id is there to be copied
        for r in listed:
            started = time.strftime("%m-%d %H:%M", time.localtime(r.started))
            table.add_row(r.id, r.command, r.state, started, str(r.steps or ""), r.name)
        console.print(table if listed else f"no runs in {', '.join(map(str, runs_dirs(workspace)))}")

    return Outcome(data, show=show)


def follow(arguments: Namespace, workspace: Workspace) -> Outcome:
    """Draws a run's events until it ends; Ctrl-C leaves the run alone."""
    folder = run_folders.find_run(arguments.run_name, runs_dirs(workspace))
    view = JobView()
    try:
        for event in run_folders.follow_events(folder):
            view.show(event)
            if event["kind"] == "error":
                view.console.print(Text.assemble(("error:", "red"), f" {event.get('text')}"))
    finally:
        view.close()
    finished = run_folders.finished_event(folder) or {}
    state = run_folders.state_of(folder, finished)
    return Outcome(
        {"run": folder.name, "state": state, **(finished.get("result") or {})},
        ok=state in ("finished", "stopped") and not finished.get("exit_code"),
        show=lambda console: console.print(f"{folder.name}: {state}"),
    )


def stop(arguments: Namespace, workspace: Workspace) -> Outcome:
    """Asks a run to end, waits for it, and ends it by force after 30 s."""
    folder = run_folders.find_run(arguments.run_name, runs_dirs(workspace))
    before, began = run_folders.state_of(folder), time.monotonic()
    state = run_folders.stop(folder)
    text = f"{folder.name}: {state}" + (
        f" after {human_seconds(time.monotonic() - began)}" if before == "running" else " (it was not running)"
    )
    return Outcome({"run": folder.name, "state": state}, show=lambda console: console.print(text))


def presets(arguments: Namespace, workspace: Workspace) -> Outcome:
    """Every preset: what it sets, why, what it gives up, and its predicted peak against the budget."""
    from surgvqa.memory.budget import check, preset_peaks  # a quarter of every command's start otherwise

    listed = load_presets(workspace.root)
    options = resolve("budget", {}, workspace).options
    check(options)
    peaks = preset_peaks(options, listed)
    data = {
        "budget_gb": options.budget_gb,
        "presets": [
            {
                "name": p.name,
                "reason": p.reason,
                "gives_up": p.gives_up,
                "rung": p.rung,
                "settings": p.settings,
                "predicted_peak_gb": peaks[p.name],
                "fits": peaks[p.name] <= options.budget_gb,
            }
            for p in listed
        ],
    }

    def show(console) -> None:
        table = Table("preset", f"GB of {options.budget_gb:g}", "why it is, and what it gives up", box=None)
        table.columns[0].no_wrap = table.columns[1].no_wrap = True
        for p in listed:
            sets = Text("\n".join(f"  {k}={v}" for k, v in p.settings.items()), "dim")
            name = Text.assemble((p.name, "bold"), "" if p.rung is None else f"  rung {p.rung}", "\n", sets)
            peak = Text.assemble(bar(peaks[p.name] / options.budget_gb, 10), f" {peaks[p.name]:.1f}")
            table.add_row(name, peak, Text.assemble(p.reason, ("\ngives up: ", "dim"), p.gives_up))
        console.print(table)

    return Outcome(data, show=show)
