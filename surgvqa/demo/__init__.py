"""`surgvqa demo [DIR]`: the embedded workspace, and with `--run` the whole job in it: merge, audit, train, evaluate."""

from __future__ import annotations

from pathlib import Path

from surgvqa.config.options import DemoOptions
from surgvqa.config.workspace import Workspace
from surgvqa.outcome import Outcome


def check(options: DemoOptions) -> None:
    """UsageError when the folder is not ours to write in."""
    from surgvqa.demo.workspace import require_ours

    require_ours(Path(options.directory), options.demo_seed)


def run(options: DemoOptions, workspace: Workspace) -> Outcome:
    """Makes the workspace (or finds it whole), then goes on with the job when asked to."""
    from surgvqa.demo.workspace import make_workspace
    from surgvqa.terminal.job_view import JobView

    view = JobView()
    try:
        made = make_workspace(Path(options.directory), options.demo_seed, view.show)
    finally:
        view.close()
    if options.run:
        from surgvqa.demo.job import run_job

        return run_job(made)
    return Outcome(made.data(), show=made.show)
