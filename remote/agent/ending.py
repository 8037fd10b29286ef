"""Ends a rented machine from itself, when its job is over and its results lie elsewhere: `--end_from host`.

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
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from remote.agent import jobs
from remote.agent.runs import stop
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.files import sha256_file, write_json_atomic
from surgvqa.runs import history
from surgvqa.runs.process import process_identity
from surgvqa.runs.state import state_of

ACTIVE = ("starting", "running")
LOOK_S = 2.0
AGAIN_S = 30.0
"""Between two tries of what failed."""
PR_SET_DUMPABLE = 4  # prctl(2)
MARK = "surgvqa-results.txt"
RSYNC = ("rsync", "-a", "--partial", "--exclude=start.json", "-e", "ssh -o BatchMode=yes")


def end_from_here(
    channel: Any,
    workspace: str,
    venv: str,
    run: str,
    evaluate: list[str],
    token: str,
    results: str,
    limit_s: float | None,
    machine_id: str,
    url: str,
    authorization: str,
) -> dict[str, Any]:
    """Starts the process that waits for `run`, evaluates it (`evaluate`: the words, [] for not), copies all runs to
    `results`, verifies them, and terminates `machine_id`. A bad target is told before it returns.

    `limit_s`: seconds after which the run is stopped. Asked for again while the process lives, it starts no other.
    """
    if not Path(workspace, "runs", run).is_dir():
        raise UsageError(f"no run {run}")
    _check_target(workspace, results)
    with tempfile.TemporaryDirectory() as trial:
        os.mkdir(os.path.join(trial, "runs"))
        Path(trial, "runs", MARK).write_text("surgvqa copies runs here\n", encoding="utf-8")
        copy_results(os.path.join(trial, "runs"), results)
    noted = _note_file(workspace)
    with contextlib.suppress(OSError, ValueError, KeyError):
        known = json.loads(noted.read_text(encoding="utf-8"))
        if process_identity(known["pid"]) == known["identity"]:
            return {"pid": known["pid"], "warning": ""}
    noted.parent.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        _detach()
        me = {"pid": os.getpid(), "identity": process_identity(os.getpid())}

        def note(stage: str, problem: str = "") -> None:
            with contextlib.suppress(OSError):
                write_json_atomic(noted, {**me, "stage": stage, "problem": problem[:500], "at": time.time()})

        with contextlib.suppress(BaseException):
            note("job")
            _finish(workspace, venv, run, evaluate, token, results, limit_s, note)
            _terminate(machine_id, url, authorization, note)
        os._exit(0)
    os.waitpid(child, 0)
    until = time.monotonic() + 10
    while time.monotonic() < until:
        with contextlib.suppress(OSError, ValueError, KeyError):
            known = json.loads(noted.read_text(encoding="utf-8"))
            if process_identity(known["pid"]) == known["identity"]:
                kills = jobs.logout_kills() and not jobs.lingers()
                return {"pid": known["pid"], "warning": jobs.KILLS if kills else ""}
        time.sleep(0.05)
    raise SurgvqaError("the process that is to end this machine did not start")


def ending(channel: Any, workspace: str) -> dict[str, Any]:
    """How far that process is: {"stage", "problem", "alive"}; {} when there was none."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        known = json.loads(_note_file(workspace).read_text(encoding="utf-8"))
        alive = process_identity(known["pid"]) == known["identity"]
        return {"stage": str(known["stage"]), "problem": str(known["problem"]), "alive": alive}
    return {}


def copy_results(folder: str, results: str) -> None:
    """All files of `folder`, called runs, to `results`, verified by hash. SurgvqaError when one is not there."""
    source = Path(folder)
    if ":" in results:
        words = [*RSYNC, "--", str(source), f"{results.rstrip('/')}/"]
        for more in ([], ["--checksum", "--dry-run", "--itemize-changes"]):
            done = subprocess.run([words[0], *more, *words[1:]], capture_output=True, text=True, errors="replace")
            if done.returncode:
                raise SurgvqaError(f"rsync to {results}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
        if changed := [line for line in done.stdout.splitlines() if line.startswith("<f")]:
            raise SurgvqaError(f"{results}: differs: {changed[0]}")
        return
    for file in sorted(source.rglob("*")):
        if file.is_symlink() or not file.is_file() or file.name == "start.json":
            continue
        there = Path(results, source.name, file.relative_to(source))
        try:
            there.parent.mkdir(parents=True, exist_ok=True)
            if not there.is_file() or there.stat().st_size != file.stat().st_size or _differ(file, there):
                part = there.with_name(there.name + ".part")
                shutil.copyfile(file, part)
                os.replace(part, there)
                if _differ(file, there):
                    raise SurgvqaError(f"{there}: differs from {file}")
        except OSError as error:
            raise SurgvqaError(f"{there}: {error.strerror}") from None


def _differ(one: Path, other: Path) -> bool:
    return sha256_file(one) != sha256_file(other)


def _check_target(workspace: str, results: str) -> None:
    if ":" in results:
        if not shutil.which("rsync"):
            raise SurgvqaError("no rsync on this machine")
        return
    if not os.path.isabs(results) or not os.path.isdir(results):
        raise UsageError(f"results {results}: expected a folder of a persistent file system, or an rsync target")
    if os.stat(results).st_dev == os.stat(workspace).st_dev:
        raise UsageError(f"results {results}: lies on the disk of this machine, which goes with it")


def _note_file(workspace: str) -> Path:
    return Path(workspace, ".surgvqa", "ending.json")


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
    workspace: str, venv: str, run: str, evaluate: list[str], token: str, results: str, limit_s: float | None, note: Any
) -> None:
    """The job, its evaluation, and every run at `results`. Results are never given up: a copy is tried for ever."""
    until = float("inf") if limit_s is None else time.monotonic() + limit_s
    _wait(workspace, run, until)
    if evaluate and time.monotonic() < until:
        note("evaluate")
        try:
            started = jobs.launch(None, workspace, venv, evaluate[0], evaluate[1:], [], {}, {}, False, token)
            _wait(workspace, started["run"], until)
        except (SurgvqaError, OSError) as error:
            note("evaluate", str(error))
    while True:
        note("copy")
        try:
            while [one for one in history.list_runs(Path(workspace, "runs")) if one.state in ACTIVE]:
                time.sleep(LOOK_S)
            return copy_results(os.path.join(workspace, "runs"), results)
        except (SurgvqaError, OSError) as error:
            note("copy", str(error))
            time.sleep(AGAIN_S)


def _wait(workspace: str, run: str, until: float) -> None:
    while state_of(Path(workspace, "runs", run)) in ACTIVE:
        if time.monotonic() > until:
            stop(None, workspace, run, 60.0)
            return
        time.sleep(LOOK_S)


def _terminate(machine_id: str, url: str, authorization: str, note: Any) -> None:
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
            note("terminate", "asked for, and the provider does not say terminated")
        except (OSError, ValueError, http.client.HTTPException) as error:
            note("terminate", str(error) or type(error).__name__)
            time.sleep(AGAIN_S)


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
