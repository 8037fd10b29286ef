"""Starts a job as a process of its own, and stops it."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

from surgvqa.errors import SurgvqaError
from surgvqa.files import write_json_atomic
from surgvqa.runs import bytecode
from surgvqa.runs.folder import new_run_id
from surgvqa.runs.process import RUN_VARIABLE, STOP_GRACE_S, job_processes, machine_id, process_identity
from surgvqa.runs.state import read_run_json, state_of
from surgvqa.untrusted import json_line


def launch(
    command: str, argv: list[str], workspace: Path, runs_dir: Path | None = None, module: str = "surgvqa"
) -> Path:
    """Starts `surgvqa COMMAND ARGV…` in a session of its own and returns its run folder.

    With `module` "remote" it starts `surgvqa-remote`. The job outlives this process, writes its output to the run
    folder's log.txt, and replaces the run.json written here. Raises SurgvqaError when the folder cannot be written.
    """
    run_id = new_run_id(command)
    folder = (runs_dir or Path(workspace) / "runs") / run_id
    try:
        folder.mkdir(parents=True)
        write_json_atomic(
            folder / "run.json",
            {
                "v": 1,
                "id": run_id,
                "command": command,
                "argv": [command, *argv],
                "cwd": str(workspace),
                "host": platform.node(),
                "machine": machine_id(),
                "pid": None,
                "started": time.time(),
            },
        )
        begun = {
            "v": 1,
            "t": time.time(),
            "kind": "phase",
            "name": "start",
            "text": "loads libraries, checks the input",
        }
        (folder / "events.jsonl").write_bytes(json_line(begun))
        detached = {"SURGVQA_DETACHED": "1", RUN_VARIABLE: str(folder.absolute())}
        with open(folder / "log.txt", "ab") as log:
            subprocess.Popen(
                [sys.executable, "-m", module, command, *argv, "--run_id", run_id],
                cwd=workspace,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **bytecode.environment(), **detached},
            )
    except OSError as error:
        raise SurgvqaError(f"{folder}: cannot start the job: {error.strerror}") from None
    return folder


def stop(folder: Path, grace_s: float = STOP_GRACE_S) -> str:
    """Sends SIGTERM and, after `grace_s` seconds, SIGKILL to the job and its children. Returns the state afterwards.

    A signal is sent only if both pid and start time are the job's. If the job is still starting, waits for it first.
    """
    import psutil

    while state_of(folder) == "starting":
        time.sleep(0.05)
    info, lost = read_run_json(folder), None
    while not info and (lost := job_processes().get(str(folder.absolute()))):  # its folder was deleted while it ran
        if identity := process_identity(lost[0]):  # otherwise it was a launcher that has ended: look again
            info = {"pid": lost[0], "identity": identity}
    pid, identity = info.get("pid"), info.get("identity")
    if not pid or not identity or process_identity(pid) != identity:
        return state_of(folder)
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):  # it may end at any moment
        family = psutil.Process(pid).children(recursive=True)
        os.kill(pid, signal.SIGTERM)
        if not _wait_for_end(pid, identity, grace_s):
            family = psutil.Process(pid).children(recursive=True) or family
            os.kill(pid, signal.SIGKILL)
            _wait_for_end(pid, identity, 5.0)
    for child in family:  # psutil compares start times before it signals
        with contextlib.suppress(psutil.Error):
            child.kill()
    return "stopped" if lost else state_of(folder)


def _wait_for_end(pid: int, identity: str, within_s: float) -> bool:
    """Waits until the process has ended; False if it is still alive after `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while process_identity(pid) == identity:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
