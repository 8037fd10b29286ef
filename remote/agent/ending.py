"""Ends a rented machine from itself, after its job, when its results are safe elsewhere: `--end_from host`.

One process of its own does it. It has the key of the provider's account in its memory and nowhere else: not in its
arguments, environment or files; it leaves no core, and other processes of the user cannot read its memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from remote.agent import jobs, results
from remote.agent.machine import nvidia_smi
from remote.agent.protocol import IDLE_PERCENT, IDLE_S
from remote.agent.runs import folders_of, stop
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.files import write_json_atomic
from surgvqa.runs import history
from surgvqa.runs.process import process_identity
from surgvqa.runs.state import read_run_json, state_of

ACTIVE = ("starting", "running")
LOOK_S = 2.0
AGAIN_S = 30.0
"""Between two tries of what failed."""
GPU_EVERY_S = 30.0
PR_SET_DUMPABLE = 4  # prctl(2)


def can_end(
    channel: Any, workspace: str, target: str, given: dict[str, str], machine_id: str, url: str, authorization: str
) -> dict[str, Any]:
    """Asked before the job starts: whether results get to `target` from here, and this machine gets to its provider.

    `given`: what the laptop knows of S3 (results.S3_VARIABLES). Raises for what is missing.
    """
    results.check(workspace, target, given)
    try:
        state = _ask("GET", url, f"instances/{quote(machine_id, safe='')}", authorization)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise SurgvqaError(f"this machine cannot ask the provider, so it cannot end itself: {_text(error)}") from None
    if state in ("terminating", "terminated"):
        raise SurgvqaError(f"the provider says that this machine is {state}")
    return {}


def end_from_here(
    channel: Any,
    workspace: str,
    venv: str,
    run: str,
    evaluate: list[str],
    token: str,
    limit_s: float | None,
    **there: Any,
) -> dict[str, Any]:
    """Starts the process that waits for `run`, evaluates it (`evaluate`: the words, [] for not), copies all runs,
    verifies them, and terminates the machine. `there`: as for `can_end`, which is asked again.

    `limit_s`: seconds after which runs are stopped. Asked for again while the process lives, it starts no other.
    """
    if not Path(workspace, "runs", run).is_dir():
        raise UsageError(f"no run {run}")
    noted = _note_file(workspace)
    if alive := _alive(noted):
        return {"pid": alive, "warning": ""}
    can_end(channel, workspace, **there)
    noted.parent.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        _detach()
        note = _Note(noted)
        with contextlib.suppress(BaseException):
            note("job")
            _finish(workspace, venv, run, evaluate, token, there["target"], there["given"], limit_s, note)
            _terminate(there["machine_id"], there["url"], there["authorization"], note)
        os._exit(0)
    os.waitpid(child, 0)
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if alive := _alive(noted):
            return {"pid": alive, "warning": jobs.KILLS if jobs.logout_kills() and not jobs.lingers() else ""}
        time.sleep(0.05)
    raise SurgvqaError("the process that is to end this machine did not start")


def ending(channel: Any, workspace: str) -> dict[str, Any]:
    """How far that process is: {"stage", "problem", "alive", "idle_s"}; {} when there was none.

    `idle_s`: since the job ended, or since the GPU was last seen at work after it; so it tells of a hung process too.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(_note_file(workspace).read_text(encoding="utf-8"))
        idle_s = 0.0 if known["busy_at"] is None else max(0.0, time.time() - known["busy_at"])
        alive = bool(_alive(_note_file(workspace)))
        return {"stage": str(known["stage"]), "problem": str(known["problem"]), "alive": alive, "idle_s": idle_s}
    return {}


class _Note:
    """What `ending` tells of this process."""

    def __init__(self, file: Path):
        self._file = file
        self._me = {"pid": os.getpid(), "identity": process_identity(os.getpid())}
        self._stage = self._problem = ""
        self._busy_at: float | None = None

    def __call__(self, stage: str, problem: str = "") -> None:
        self._stage, self._problem = stage, problem[:500]
        found = {**self._me, "stage": stage, "problem": self._problem, "busy_at": self._busy_at}
        with contextlib.suppress(OSError):
            write_json_atomic(self._file, found)

    def busy(self) -> None:
        """The job has ended just now, or the GPU is at work after it."""
        self._busy_at = time.time()
        self(self._stage, self._problem)


def _note_file(workspace: str) -> Path:
    return Path(workspace, ".surgvqa", "ending.json")


def _alive(noted: Path) -> int:
    """The process that a note is of, or 0."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(noted.read_text(encoding="utf-8"))
        return int(known["pid"]) if process_identity(known["pid"]) == known["identity"] else 0
    return 0


def _detach() -> None:
    """A process of its own, of which nobody reads the memory, and which the connection does not wait for."""
    os.setsid()
    if os.fork():
        os._exit(0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)


def _finish(
    workspace: str,
    venv: str,
    run: str,
    evaluate: list[str],
    token: str,
    target: str,
    given: dict[str, str],
    limit_s: float | None,
    note: _Note,
) -> None:
    """The job, its evaluation, and every run at `target`. Results are never given up: a copy is tried for ever."""
    until = float("inf") if limit_s is None else time.monotonic() + limit_s
    _wait(workspace, run, until)
    note.busy()
    if evaluate and time.monotonic() < until:
        note("evaluate")
        try:
            started = jobs.launch(None, workspace, venv, evaluate[0], evaluate[1:], [], {}, {}, False, token)
            _wait(workspace, started["run"], until, note)
        except (SurgvqaError, OSError) as error:
            note("evaluate", str(error))
    while True:
        try:
            found = _listed(workspace)
            for one in found:
                if _active(workspace, one):
                    note(f"wait for {one}")
                    _wait(workspace, one, until, note)
            note(f"copy to {target}")
            results.copy(workspace, _folders(workspace), target, given)
            if not [one for one in _listed(workspace) if one not in found or _active(workspace, one)]:
                return
        except (SurgvqaError, OSError) as error:
            note(f"copy to {target}", str(error))
            time.sleep(AGAIN_S)


def _active(workspace: str, run: str) -> bool:
    return state_of(Path(workspace, "runs", run)) in ACTIVE


def _listed(workspace: str) -> list[str]:
    return sorted(one.id for one in history.list_runs(Path(workspace, "runs")))


def _folders(workspace: str) -> list[str]:
    """runs, and the folders of the workspace outside of it that runs wrote into."""
    runs = [(Path(workspace, "runs", run), read_run_json(Path(workspace, "runs", run))) for run in _listed(workspace)]
    found = {name for folder, info in runs for name in folders_of(workspace, folder, info)}
    return ["runs", *sorted(name for name in found if name.split("/")[0] != "runs")]


def _wait(workspace: str, run: str, until: float, note: _Note | None = None) -> None:
    """Until the run has ended. Stops it at `until`, and, with a `note`, when the GPU has done nothing for IDLE_S."""
    busy = looked = time.monotonic()
    while _active(workspace, run):
        now = time.monotonic()
        if note and now - looked >= GPU_EVERY_S:
            looked = now
            if _gpu_works():
                busy = now
                note.busy()
        if now > until or (note and now - busy > IDLE_S):
            stop(None, workspace, run, 60.0)
            return
        time.sleep(LOOK_S)


def _gpu_works() -> bool:
    """Whether a card is at work, or it cannot be told."""
    cells = [row[0] for row in nvidia_smi("--query-gpu=utilization.gpu") or [["unknown"]] if row]
    return any(not cell.isdigit() or int(cell) >= IDLE_PERCENT for cell in cells)


def _terminate(machine_id: str, url: str, authorization: str, note: _Note) -> None:
    """Asks until the provider says terminated; with it this process goes too."""
    note("terminate")
    while True:
        try:
            _ask("POST", url, "instance-operations/terminate", authorization, {"instance_ids": [machine_id]})
            for _ in range(10):
                if _ask("GET", url, f"instances/{quote(machine_id, safe='')}", authorization) == "terminated":
                    note("terminated")
                    return
                time.sleep(AGAIN_S)
            note("terminate", "the provider was asked to terminate it and does not say terminated; asking again")
        except (OSError, ValueError, http.client.HTTPException) as error:
            note("terminate", _text(error))
            time.sleep(AGAIN_S)


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__


def _ask(method: str, url: str, path: str, authorization: str, body: Any = None) -> str:
    """The status that the answer tells of a machine; "" when it tells none. OSError for a refusal."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.netloc, timeout=30)
    try:
        headers = {"Authorization": authorization, "Content-Type": "application/json", "User-Agent": "surgvqa-remote"}
        connection.request(method, f"{parts.path}/{path}", None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        content = answer.read(1 << 20)
        if answer.status != 200:
            raise OSError(f"{path}: HTTP {answer.status}")
        data = json.loads(content).get("data")
        return str(data.get("status", "")) if isinstance(data, dict) else ""
    finally:
        connection.close()
