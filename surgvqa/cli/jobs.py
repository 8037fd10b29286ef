"""Runs a job, which is a command with a run folder, a log and an outcome."""

from __future__ import annotations

import atexit
import os
import signal
import threading
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

from surgvqa.config.resolve import Resolved
from surgvqa.config.workspace import Workspace, find_workspace
from surgvqa.errors import SurgvqaError, unexpected
from surgvqa.outcome import Outcome
from surgvqa.runs.events import finished_event
from surgvqa.runs.folder import Run
from surgvqa.runs.ranks import rank_and_count
from surgvqa.runs.state import read_run_json
from surgvqa.terminal.job_view import JobView, OutputToLog


def record_failure(argv: list[str], error: SurgvqaError) -> None:
    """Records a usage error of a launched job in the run folder that was made for it."""

    def value(option: str) -> str | None:
        """The option's last value, as in argparse."""
        found = None
        for word, after in zip(argv, [*argv[1:], None]):
            name, equals, text = word.partition("=")
            if name == option:
                found = text if equals else after
        return found

    run_id = value("--run_id")
    if not run_id or rank_and_count()[0]:
        return
    folder = Path(value("--workspace") or find_workspace()) / "runs" / run_id
    if folder.is_dir() and finished_event(folder) is None:
        with suppress(SurgvqaError, OSError), Run(folder):
            raise error


def run_job(run: Run, work: Callable[[Run], Outcome], log: str = "log.txt") -> Outcome:
    """Runs `work` with its run folder; in the foreground its events are drawn and its output goes to `log` there.

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
        with nullcontext() if detached else OutputToLog(run.folder / log) as output:
            view = JobView(getattr(output, "terminal", None))
            run.observer = None if detached else view.show
            try:
                with run:
                    try:
                        _record_inputs(run)
                        outcome = work(run)
                    except (SurgvqaError, KeyboardInterrupt):
                        if stopping:  # a wait that was interrupted may fail on its way out
                            run.ranks.look()  # torchrun stops all when one of them has failed
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
        raise SurgvqaError(f"{unexpected(error)} (details: {run.folder / log})") from error
    finally:
        if stopping:
            # A signal that comes late must not kill a process that has ended as stopped, not even while it exits, when
            # Python puts back the default of every handler.
            atexit.register(_ignore_stops)
        else:
            for number, handler in previous.items():
                signal.signal(number, handler)
    outcome.data = {"run": run.id, **outcome.data}
    return outcome


def _ignore_stops() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


HASHES_ITSELF = ("merge", "upload", "setup")
"""Commands without hashed inputs: a merge's report and an upload's manifest have the hashes, and setup has no input."""


def _record_inputs(run: Run) -> None:
    """Writes hashes of the run's inputs, as they are at its start, to run.json.

    If a file that the run does not need cannot be hashed, it warns.
    """
    if run.ranks.rank:
        return
    record = read_run_json(run.folder)
    options = {name: row["value"] for name, row in record.get("options", {}).items()}
    if options.get("dry_run") or options.get("predictions"):  # only a question
        return
    if record.get("command") in HASHES_ITSELF:
        return
    from surgvqa.provenance.hashes import Hashes  # which load much that a command on a host has no use for
    from surgvqa.provenance.record import hash_inputs

    run.phase("hash inputs")
    done, lock = 0, threading.Lock()

    def read(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            run.progress("hash inputs", done, None, "bytes", every_s=1.0)

    with suppress(SurgvqaError, OSError):
        run.record(inputs=hash_inputs(options, Hashes(run.workspace / "cache", read), run.warning))


def new_run(
    name: str,
    resolved: Resolved,
    workspace: Workspace,
    run_id: str | None = None,
    argv: list[str] | None = None,
) -> Run:
    """The run folder of a command whose options are resolved."""
    from surgvqa.provenance.record import surroundings

    return Run.create(
        workspace.runs_dir,
        name,
        run_id=run_id,
        options=resolved.record(),
        preset=resolved.preset,
        argv=argv,
        workspace=workspace.root,
        about=surroundings(),
    )
