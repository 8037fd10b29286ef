"""Supervises one detached job on a GPU host: starts it, forwards signals, ends what it left, records how it ended.

    python -m surgvqa.runs.supervisor RUN_FOLDER

reads RUN_FOLDER/start.json (argv, cwd, env with secrets, locks; mode 0600, deleted once read) and writes

    supervisor.json   pid, identity, state ("running", or "busy" with the holder of the GPU)
    exit.json         exit_code or signal, stopped, swept (processes that the job left behind), ended

It is a session leader and a child subreaper, so it can end everything that the job starts (torchrun's workers, which
have sessions of their own, dataloader workers, W&B's service), even when the launcher was killed. Standard library
only, Python 3.8: the SSH agent copies this file to hosts where surgvqa is not installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from surgvqa.files import write_json_atomic
from surgvqa.runs.events import finished_event
from surgvqa.runs.process import STOP_GRACE_S, descendants, end_all, process_identity

SWEEP_GRACE_S = 3.0  # processes that the job left behind have this long to end
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)


# --- files -----------------------------------------------------------------------------------------------------------


def take_locks(paths: list[str], run_id: str) -> tuple[list[int], str]:
    """Locks all of these files exclusively; if one is locked, locks none and returns the run id of its holder.

    The job inherits the descriptors, so a lock lasts as long as any process of the job.
    """
    descriptors: list[int] = []
    for path in paths:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = _holder(descriptor)
            for opened in [*descriptors, descriptor]:
                os.close(opened)
            return [], holder
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, run_id.encode(), 0)
        descriptors.append(descriptor)
    return descriptors, ""


def _holder(descriptor: int) -> str:
    """The run that holds the lock. It writes its id just after locking and removes it when it ends."""
    for _ in range(40):
        name = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        if name:
            return name
        time.sleep(0.05)
    return "another job"


def stop_grace_s(folder: Path) -> float:
    """The grace period in the stop request (stop.json) in seconds, else STOP_GRACE_S."""
    try:
        return float(json.loads((folder / "stop.json").read_text(encoding="utf-8"))["grace_s"])
    except (OSError, ValueError, KeyError, TypeError):
        return STOP_GRACE_S


def close_events(folder: Path, code: int | None, killed_by: int | None, stopped: bool) -> None:
    """Writes the `finished` event of a job that was killed and so could not write it itself."""
    try:
        if finished_event(folder):
            return
        with open(folder / "events.jsonl", "ab+") as file:
            file.seek(max(0, file.tell() - 1))
            tail = file.read()
            why = f"ended with {code}"
            if killed_by:
                hint = "; out of memory?" if killed_by == signal.SIGKILL and not stopped else ""
                why = f"killed by {signal.Signals(killed_by).name}{hint}"
            events: list[dict[str, Any]] = [] if stopped else [{"kind": "error", "text": why}]
            state = "stopped" if stopped else "died"
            events += [{"kind": "finished", "state": state, "exit_code": code, "result": {}}]
            lines = [json.dumps({"v": 1, "t": round(time.time(), 3), **event}) for event in events]
            broken = b"\n" if tail and not tail.endswith(b"\n") else b""
            file.write(broken + "".join(line + "\n" for line in lines).encode())
    except OSError:
        return  # a full disk; state_of still sees that the process is gone


def record_end(file: Path, document: dict[str, Any]) -> None:
    """Writes how the job ended. A full disk or a deleted run folder is ignored."""
    with contextlib.suppress(OSError):
        write_json_atomic(file, document)


# --- the supervisor --------------------------------------------------------------------------------------------------


def supervise(folder: Path) -> int:
    """Runs the job of `folder` to its end and returns its exit code."""
    start_file = folder / "start.json"
    start = json.loads(start_file.read_text(encoding="utf-8"))
    start_file.unlink()  # its environment may hold secrets
    with contextlib.suppress(OSError):
        os.setsid()
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for number in (1, 2):
        os.dup2(log, number)
    os.close(log)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    me = {"pid": os.getpid(), "identity": process_identity(os.getpid()), "started": time.time()}
    locks, holder = take_locks(start.get("locks", []), folder.name)
    if holder:
        write_json_atomic(folder / "supervisor.json", {**me, "state": "busy", "holder": holder})
        return 75  # EX_TEMPFAIL

    watched = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    began = time.time()
    try:
        job = subprocess.Popen(
            start["argv"],
            cwd=start["cwd"],
            env=start["env"],
            stdin=subprocess.DEVNULL,
            pass_fds=locks,
            start_new_session=True,
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, watched),
        )
    except OSError as error:
        write_json_atomic(
            folder / "supervisor.json", {**me, "state": "failed", "error": f"{start['argv'][0]}: {error.strerror}"}
        )
        write_json_atomic(folder / "exit.json", {"v": 1, "exit_code": 127, "signal": None, "ended": time.time()})
        return 127
    write_json_atomic(folder / "supervisor.json", {**me, "state": "running", "job_pid": job.pid})

    status = None
    kill_at = None
    while status is None:
        got = signal.sigtimedwait(watched, 0.5)
        if got and got.si_signo in (signal.SIGTERM, signal.SIGINT) and kill_at is None:
            kill_at = time.monotonic() + stop_grace_s(folder)
            with contextlib.suppress(ProcessLookupError):
                os.kill(
                    job.pid, signal.SIGTERM
                )  # not job.send_signal, which would reap the job and lose its exit status
        if kill_at and time.monotonic() > kill_at:
            end_all(descendants(os.getpid()), 0.0)
        while True:  # reap the job and the orphans that this process inherited
            try:
                pid, ended = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not pid:
                break
            if pid == job.pid:
                status = ended
    swept = 0
    for _ in range(20):  # this process inherits the children of each killed parent
        left = descendants(os.getpid())
        if not left:
            break
        swept += end_all(left, SWEEP_GRACE_S)
    for lock in locks:
        os.ftruncate(lock, 0)
    killed_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    code: int | None = None if killed_by else os.WEXITSTATUS(status)
    close_events(folder, code, killed_by, stopped=kill_at is not None)
    record_end(
        folder / "exit.json",
        {
            "v": 1,
            "exit_code": code,
            "signal": killed_by,
            "stopped": kill_at is not None,
            "swept": swept,
            "started": began,
            "ended": time.time(),
        },
    )
    return 128 + killed_by if killed_by else code or 0


if __name__ == "__main__":
    sys.exit(supervise(Path(sys.argv[1])))
