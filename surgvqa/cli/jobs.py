"""Runs a command that is a job: with a run folder, a log and an outcome."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

from surgvqa.config.resolve import Resolved
from surgvqa.config.workspace import Workspace, find_workspace
from surgvqa.errors import SurgvqaError
from surgvqa.outcome import Outcome
from surgvqa.runs.events import finished_event
from surgvqa.runs.folder import Run
from surgvqa.terminal.job_view import JobView, OutputToLog


def record_failure(argv: list[str], error: SurgvqaError) -> None:
    """Records a usage error of a launched job in the run folder that was made for it."""

    def value(option: str) -> str | None:
        """The last one counts, as for argparse."""
        found = None
        for word, after in zip(argv, [*argv[1:], None]):
            name, equals, text = word.partition("=")
            if name == option:
                found = text if equals else after
        return found

    run_id = value("--run_id")
    if not run_id:
        return
    folder = Path(value("--workspace") or find_workspace()) / "runs" / run_id
    if folder.is_dir() and finished_event(folder) is None:
        with suppress(SurgvqaError, OSError), Run(folder):
            raise error


def run_job(run: Run, work: Callable[[Run], Outcome]) -> Outcome:
    """Runs `work` with its run folder; in the foreground its events are drawn and its output goes to log.txt.

    SIGTERM (the panel's stop) and Ctrl-C do the same, once: open files are closed and the run ends as "stopped".
    Raises SurgvqaError, with one line for people, for any error of `work`; its traceback goes to log.txt.
    """
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            raise KeyboardInterrupt

    detached = os.environ.get("SURGVQA_DETACHED") == "1"
    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with nullcontext() if detached else OutputToLog(run.folder / "log.txt") as output:
            view = JobView(getattr(output, "terminal", None))
            run.observer = None if detached else view.show
            try:
                with run:
                    try:
                        outcome = work(run)
                    except (SurgvqaError, KeyboardInterrupt):
                        if stopping:  # a wait that was interrupted may fail on its way out
                            raise KeyboardInterrupt from None
                        raise
                    except Exception:
                        if stopping:
                            raise KeyboardInterrupt from None
                        traceback.print_exc()  # into log.txt; the terminal gets one line
                        raise
                    run.result = {**outcome.data, **run.result}
                    run.exit_code = 0 if outcome.ok else 1
            finally:
                view.close()
    except (SurgvqaError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise SurgvqaError(f"{type(error).__name__}: {error} (details: {run.folder / 'log.txt'})") from error
    finally:
        if not stopping:  # else a signal that comes late would kill a process that has ended as stopped
            for number, handler in previous.items():
                signal.signal(number, handler)
    outcome.data = {"run": run.id, **outcome.data}
    return outcome


def new_run(
    name: str,
    resolved: Resolved,
    workspace: Workspace,
    run_id: str | None = None,
    argv: list[str] | None = None,
) -> Run:
    """The run folder of a command whose options are resolved."""
    return Run.create(
        workspace.runs_dir,
        name,
        run_id=run_id,
        options=resolved.record(),
        preset=resolved.preset,
        argv=argv,
        workspace=workspace.root,
    )
