"""`surgvqa-remote fetch HOST RUN`: a run's folder from the host, verified, going on where it was broken off."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from remote.paths import inside
from remote.ssh.bundle import bootstrap, payload
from remote.ssh.connection import Remote
from remote.ssh.errors import Unreachable, explain_ssh
from remote.ssh.process import ssh_command
from remote.ssh.replies import Replies
from surgvqa.errors import SurgvqaError
from surgvqa.runs.reporter import Reporter

BLOCK = 1 << 18
ATTEMPTS = 8
OPTIMISER_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
"""Needed to resume, not to evaluate: left on the host unless asked for. start.json, which may hold secrets, always."""


def wanted_files(listed: list[list[Any]], everything: bool) -> list[tuple[str, int, int]]:
    """(path, size, mtime) of the files that are worth bringing home."""
    files = [(inside(path, "file"), size, mtime) for path, size, mtime in listed if path != "start.json"]
    if everything:
        return files
    return [f for f in files if f[0].rsplit("/", 1)[-1] not in OPTIMISER_FILES]


def fetch(remote: Remote, folder: str, target: Path, run: Reporter, everything: bool = False) -> dict[str, Any]:
    """Brings the files below `folder` of the host's workspace into `target`.

    A file appears under its name only when its hash is right.
    """
    listing = remote.call("listing", folder=folder)
    files = wanted_files(listing["files"], everything)
    total = sum(size for _, size, _ in files)
    times = {path: mtime for path, _, mtime in files}
    todo = [f for f in files if not _here(target / f[0], f[1], f[2])]
    here = total - sum(size for _, size, _ in todo)
    began, received = time.monotonic(), 0
    run.phase("fetch", f"{folder}: {len(todo)} of {len(files)} files")
    for attempt in range(ATTEMPTS):
        if not todo:
            break
        wanted = []
        for path, _, _ in todo:
            part = _part(target, path)
            wanted.append([path, part.stat().st_size if part.exists() else 0])
        request = {"op": "send", "folder": folder, "wanted": wanted, "beat": False}
        process = subprocess.Popen(
            ssh_command(remote.host, bootstrap(remote.host.entry.python)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        done: set[str] = set()
        try:
            with contextlib.suppress(OSError):  # ssh that has ended says why below
                process.stdin.write(payload({"workspace": remote.host.entry.workspace, **request}))
                process.stdin.close()
            for path, count in _receive(remote, process.stdout, target, times):
                if count is None:
                    run.warning(f"{path} is gone there meanwhile: the run goes on")
                    done.add(path)
                    continue
                received += count
                run.progress("fetch", min(total, here + received), total, "bytes", file=path)
                if not count:
                    done.add(path)
            failure: SurgvqaError | None = None
        except _Broken:
            failure = explain_ssh(remote.host, process.stderr.read().decode(errors="replace"), process.wait())
        finally:
            with contextlib.suppress(OSError):
                process.kill()
            process.wait()
        todo = [f for f in todo if f[0] not in done]
        if todo and failure:
            if not isinstance(failure, Unreachable) or attempt == ATTEMPTS - 1:
                raise failure
            run.warning(f"{failure}; trying again")
            time.sleep(min(2**attempt, 15))
    if todo:
        raise SurgvqaError(f"{todo[0][0]}: arrived damaged {ATTEMPTS} times; is the disk well?")
    return {
        "folder": str(target),
        "files": len(files),
        "bytes": total,
        "received_bytes": received,
        "seconds": time.monotonic() - began,
    }


class _Broken(Exception):
    """The stream ended early."""


def _part(target: Path, path: str) -> Path:
    return target / ".partial" / path


def _here(file: Path, size: int, mtime_ns: int) -> bool:
    """Whether the file was fetched before and has not changed on the host since."""
    try:
        stat = file.stat()
    except OSError:
        return False
    return stat.st_size == size and stat.st_mtime_ns == mtime_ns


def _receive(remote: Remote, stream: Any, target: Path, times: dict[str, int]):
    """Yields (path, bytes) as they come, (path, 0) for a file that is whole and in its place, (path, None) for one
    that the host has no more."""
    line = b""
    while not line.endswith(Replies.MARK):  # a login shell may speak first, and end without a newline
        line = stream.readline()
        if not line:
            raise _Broken
    while True:
        header = _message(remote, stream)
        if "done" in header:
            return
        if header.get("gone"):
            _part(target, header["path"]).unlink(missing_ok=True)
            yield header["path"], None
            continue
        path, offset, size = inside(header["path"], "file"), header["offset"], header["size"]
        part = _part(target, path)
        part.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with open(part, "ab") as file:
            file.truncate(offset)
        with open(part, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
        try:
            with open(part, "ab") as file:
                left = size - offset
                while left:
                    block = stream.read1(min(BLOCK, left))
                    if not block:
                        raise _Broken
                    file.write(block)
                    digest.update(block)
                    left -= len(block)
                    yield path, len(block)
        except OSError as error:
            raise SurgvqaError(f"{target / path}: {error.strerror}; run it again to go on from here") from None
        trailer = _message(remote, stream)
        if trailer["sha256"] != digest.hexdigest():
            part.unlink()
            continue
        final = target / path
        final.parent.mkdir(parents=True, exist_ok=True)
        if path in times:
            os.utime(part, ns=(times[path], times[path]))
        os.replace(part, final)
        for folder in part.parents:
            if folder == target:
                break
            with contextlib.suppress(OSError):
                folder.rmdir()
        yield path, 0


def _message(remote: Remote, stream: Any) -> dict[str, Any]:
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise _Broken
    message = json.loads(line)
    if "error" in message:
        raise SurgvqaError(f"{remote.host.name}: {message['error']}")
    return message
