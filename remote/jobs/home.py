"""Fetches and verifies all runs of a host before the host is given up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from remote.jobs.fetch import fetch_run
from remote.ssh.connection import Remote
from remote.ssh.patience import PATIENCE_S
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.runs.reporter import Reporter

GOING = ("running", "starting")


def runs_there(remote: Remote) -> list[tuple[str, str]]:
    """(id, state) of every run of the host."""
    return [(row["id"], row["state"]) for row in remote.call("runs")["runs"]]


def bring_home(
    remote: Remote,
    runs_dir: Path,
    report: Reporter,
    discard: set[str],
    fetched: list[str],
    patience_s: float = PATIENCE_S,
    tell: Callable[[str], None] | None = None,
) -> list[str]:
    """Fetches all runs except `discard` and adds them to `fetched`. Returns those that failed, with the cause.

    A run that cannot be fetched keeps no other from coming home.
    """
    left: list[str] = []
    for run, state in runs_there(remote):
        if run in discard:
            continue
        if state in GOING:
            left.append(f"{run} (it is {state})")
            continue
        try:
            fetch_run(remote, run, runs_dir, report, patience_s=patience_s, tell=tell)
        except SurgvqaError as error:
            if type(error) not in (SurgvqaError, UsageError):  # the machine, not this run
                raise
            left.append(f"{run} ({error})")
        else:
            fetched.append(run)
    new = [run for run, _ in runs_there(remote) if run not in discard and run not in fetched]
    return left or [f"{run} (it began meanwhile)" for run in new]
