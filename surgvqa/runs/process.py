"""Processes, identified by pid and start time together."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

STOP_GRACE_S = 30.0
"""Seconds from SIGTERM, on which a job saves a checkpoint and ends cleanly, to SIGKILL."""
RUN_VARIABLE = "SURGVQA_RUN"
"""The environment variable of a detached job that holds its run folder's absolute path."""


MACHINE_ID = Path("/etc/machine-id")


def machine_id() -> str:
    """An id that stays the same when the machine is renamed; '' on systems without one (macOS, some containers).

    A hash of the id in machine-id(5), because that page calls the id itself confidential.
    """
    try:
        text = MACHINE_ID.read_text().strip()
    except (OSError, ValueError):
        return ""
    return hashlib.sha256(f"surgvqa {text}".encode()).hexdigest()[:16] if text and text != "uninitialized" else ""


def process_stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat (proc(5)) from the state on; None if the process is gone.

    The name before them is skipped, because it may contain spaces and brackets.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return text[text.rindex(")") + 2 :].split()


def process_identity(pid: int) -> str | None:
    """Boot id and start time (clock ticks) of a live process; None when it is gone or a zombie.

    A pid can be reused; pid and identity together cannot.
    """
    if sys.platform != "linux":
        return _identity_without_proc(pid)
    stat = process_stat(pid)
    if stat is None or stat[0] in "ZX":
        return None
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return f"{boot}:{stat[19]}"


def _identity_without_proc(pid: int) -> str | None:
    import psutil  # imported here because this module also runs on hosts that have only the standard library

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.Error:
        return None


def descendants(root: int) -> list[int]:
    """The pids of all live descendants of `root`."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            stat = process_stat(int(entry))
            if stat is not None and stat[0] not in "ZX":
                children.setdefault(int(stat[1]), []).append(int(entry))
    found, waiting = [], [root]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def job_processes() -> dict[str, list[int]]:
    """{run folder: pids of its detached job, the job before its children}, including jobs whose folder was deleted.

    A job and all its children were started with RUN_VARIABLE in their environment. Only Linux exposes it.
    """
    found: dict[str, list[int]] = {}
    mark = f"{RUN_VARIABLE}=".encode()
    for entry in os.listdir("/proc") if sys.platform == "linux" else []:
        if entry.isdigit():
            try:
                variables = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
            except OSError:  # another user's process, or gone
                continue
            folder = next((v[len(mark) :] for v in variables if v.startswith(mark)), None)
            if folder and process_identity(int(entry)):
                found.setdefault(os.fsdecode(folder), []).append(int(entry))
    return {folder: _root_first(pids) for folder, pids in found.items()}


def _root_first(pids: list[int]) -> list[int]:
    parents = {pid: int((process_stat(pid) or ["", "0"])[1]) for pid in pids}
    return sorted(pids, key=lambda pid: (parents[pid] in parents, pid))


def signal_exactly(pid: int, identity: str | None, number: int) -> bool:
    """Signals the process only if it still has this identity; returns whether it did. Free of races with pidfd."""
    try:
        handle = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
    except OSError:
        return False
    try:
        if identity is None or process_identity(pid) != identity:
            return False
        if handle is None:
            os.kill(pid, number)
        else:
            signal.pidfd_send_signal(handle, number)
        return True
    except ProcessLookupError:
        return False
    finally:
        if handle is not None:
            os.close(handle)


def end_all(pids: list[int], grace_s: float) -> int:
    """Sends these processes SIGTERM and, after `grace_s` seconds, SIGKILL. Returns how many were alive at first."""
    known = {pid: process_identity(pid) for pid in pids}
    known = {pid: identity for pid, identity in known.items() if identity}
    for number, patience in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 2.0)):
        for pid, identity in known.items():
            signal_exactly(pid, identity, number)
        deadline = time.monotonic() + patience
        while any(process_identity(p) == i for p, i in known.items()) and time.monotonic() < deadline:
            time.sleep(0.02)
    return len(known)
