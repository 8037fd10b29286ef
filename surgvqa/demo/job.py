"""The whole job in the demo workspace, headless: merge, audit, train, evaluate, each as the command line runs it.

A merge that stands there whole already is left as it is (merge/command.py sees that); training and evaluation are
new runs.
"""

from __future__ import annotations

import importlib
import time
from functools import partial
from pathlib import Path
from typing import Any

from surgvqa.cli import commands, jobs
from surgvqa.config import resolve
from surgvqa.config.workspace import Workspace, load_workspace
from surgvqa.demo.workspace import Made
from surgvqa.errors import SurgvqaError
from surgvqa.outcome import Outcome
from surgvqa.terminal.figures import human_seconds
from surgvqa.terminal.job_view import JobView


def run_job(made: Made) -> Outcome:
    """Exit 1 when the audit finds fault. `data`: merge, audit, train, evaluate (their own keys) and `seconds`."""
    import torch

    began = time.monotonic()
    torch.set_num_threads(1)  # the model is so small that threads wait for each other longer than they work
    workspace = load_workspace(made.folder)
    merged = Path(workspace.value("output_path", "merge"))
    view = JobView()
    outcomes: dict[str, Outcome] = {}

    outcomes["merge"] = _step("merge", workspace, {})
    audit = resolve.resolve("audit", {"checkpoint": str(merged)}, workspace)
    outcomes["audit"] = importlib.import_module("surgvqa.checkpoint.audit").run(audit.options, workspace)
    view.show({"kind": "phase", "name": "audit", "text": f"{merged}: {'ok' if outcomes['audit'].ok else 'not ok'}"})
    if outcomes["audit"].ok:
        outcomes["train"] = _step("train", workspace, {})
        outcomes["evaluate"] = _step("evaluate", workspace, {"checkpoint": outcomes["train"].data["adapter"]})
    seconds = made.seconds + time.monotonic() - began
    data = {name: outcome.data for name, outcome in outcomes.items()}

    def show(console: Any) -> None:
        made.show(console)
        for name, outcome in outcomes.items():
            console.rule(name, align="left")
            if outcome.show:
                outcome.show(console)
        if "evaluate" in data:
            console.print(verdict(data["evaluate"]))
        console.print(f"everything in {human_seconds(seconds)}")

    return Outcome(
        {"workspace": made.data(), **data, "seconds": round(seconds, 2)},
        ok=all(outcome.ok for outcome in outcomes.values()),
        show=show,
    )


def verdict(report: dict[str, Any]) -> str:
    """What the evaluation says about learning, in one sentence; no more than the figures."""
    learnt, majority = report["keyword_accuracy"], report["majority_accuracy"]
    more = 100 * (learnt - majority)
    than = f"{more:+.1f} points against always naming each type's most frequent label ({100 * majority:.1f} %)"
    return (
        f"keyword accuracy {100 * learnt:.1f} % on {report['samples']} spoken questions in the evaluation's own "
        f"wordings, about clips that training never showed: {than}"
    )


def _step(name: str, workspace: Workspace, given: dict[str, Any]) -> Outcome:
    """One command with the workspace's settings, as a run of its own."""
    room = importlib.import_module(commands.COMMANDS[name].room)
    resolved = resolve.resolve(name, given, workspace)
    if hasattr(room, "check"):
        room.check(resolved.options)
    run = jobs.new_run(name, resolved, workspace, argv=["demo", "--run"])
    outcome = jobs.run_job(run, partial(room.run, resolved.options))
    if name == "train" and outcome.data.get("state") != "finished":
        raise SurgvqaError(f"the training run {outcome.data['run']} is {outcome.data.get('state')}, not finished")
    return outcome
