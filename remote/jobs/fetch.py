"""`surgvqa-remote fetch HOST RUN`: copies a run's folder from the host, verifies it, and resumes after a failure."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remote.paths import inside
from remote.ssh.bundle import bootstrap, payload
from remote.ssh.connection import Remote
from remote.ssh.errors import Unreachable, explain_ssh, not_understood
from remote.ssh.hosts import Host
from remote.ssh.patience import PATIENCE_S, Patience
from remote.ssh.process import ssh_command
from remote.ssh.replies import Replies, parse_message
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.files import sha256_file
from surgvqa.runs.reporter import Reporter

BLOCK = 1 << 18
LINE = 1 << 20
"""Bytes of the longest header line between two files."""
MAX_FILE = 1 << 40
MAX_MTIME_NS = 1 << 62
PARTIAL = ".partial"
"""Folder of incomplete files."""
ROUNDS = 8
"""How often a damaged file is requested."""
OPTIMISER_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
"""Needed to resume, not to evaluate: stay on the host unless requested. start.json (may hold secrets) always stays."""


@dataclass(frozen=True)
class Listed:
    """A file of a run as listed by the host. It limits what the host may send for this file."""

    path: str
    size: int
    mtime_ns: int


def wanted_files(host: Host, listed: Any, everything: bool) -> list[Listed]:
    """The listed files to fetch. Raises for a malformed listing or a path outside the folder."""
    files = []
    for entry in listed if isinstance(listed, list) else [None]:
        match entry:
            case [str(path), int(size), int(mtime)] if 0 <= size <= MAX_FILE and 0 <= mtime < MAX_MTIME_NS:
                files.append(Listed(named(host, path), size, mtime))
            case _:
                raise not_understood(host, f"the listing has {str(entry)[:80]}")
    if reserved := next((f.path for f in files if f.path.split("/")[0] == PARTIAL), None):
        raise not_understood(host, f"the listing has {reserved}")
    kept = [f for f in files if f.path != "start.json"]
    return kept if everything else [f for f in kept if f.path.rsplit("/", 1)[-1] not in OPTIMISER_FILES]


def named(host: Host, path: str) -> str:
    """A relative path named by the host. Raises if it would leave the folder that it is relative to."""
    try:
        return inside(path)
    except UsageError as error:
        raise not_understood(host, str(error)) from None


def folder_here(host: Host, folder: str, root: Path) -> Path:
    """The place below `root` for a folder of the host's workspace (runs/ID becomes ID). Raises if it leaves `root`."""
    return landing(root, named(host, named(host, folder).removeprefix("runs/")))


def landing(root: Path, path: str) -> Path:
    """`path` below `root`, with its folders created. Raises if an existing local symlink leads outside."""
    place = root / path
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.parent.resolve().is_relative_to(root.resolve()):
        raise SurgvqaError(f"{place}: leaves {root} through a symlink; remove it")
    return place


def fetch_run(
    remote: Remote,
    run: str,
    root: Path,
    reporter: Reporter,
    everything: bool = False,
    patience_s: float = PATIENCE_S,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Brings all folders of a run (its id, the beginning of one, a name, or "last") into `root`, one below another."""
    found = remote.call("runs", run=run)
    match found:
        case {"id": str(run_id), "folders": [str(), *_] as folders} if all(isinstance(f, str) for f in folders):
            pass
        case _:
            raise not_understood(remote.host, f"the run has no folders: {str(found)[:80]}")
    parts = []
    for folder in folders:
        target = folder_here(remote.host, folder, root)
        target.mkdir(parents=True, exist_ok=True)
        parts.append(fetch(remote, folder, target, reporter, everything, patience_s, tell))
    sums = {key: sum(part[key] for part in parts) for key in ("files", "bytes", "received_bytes", "seconds")}
    return {"run": run_id, "folder": parts[0]["folder"], "folders": [part["folder"] for part in parts], **sums}


def fetch(
    remote: Remote,
    folder: str,
    target: Path,
    run: Reporter,
    everything: bool = False,
    patience_s: float = PATIENCE_S,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Brings the files below `folder` of the host's workspace into `target`; waits `patience_s` for a lost host.

    Each wait is told by `tell` (default: a warning). A file appears under its name only when its hash is right.
    """
    listing = remote.call("listing", folder=folder)
    files = wanted_files(remote.host, listing.get("files"), everything)
    total = sum(file.size for file in files)
    todo = files
    present = {file.path for file in files if _here(target / file.path, file)}
    here = sum(file.size for file in files if file.path in present)
    began, received = time.monotonic(), 0
    run.phase("fetch", f"{folder}: {len(todo) - len(present)} of {len(files)} files")
    patience, rounds = Patience(patience_s, tell or run.warning), 0
    while todo:
        asked = {
            file.path: Asked(file, file.size, True)
            if file.path in present
            else Asked(file, _begun(_part(target, file.path), file.size))
            for file in todo
        }
        wanted = [[path, one.offset, one.file.size] for path, one in asked.items()]
        request = {"op": "send", "folder": folder, "wanted": wanted, "beat": False}
        process = subprocess.Popen(
            ssh_command(remote.host, bootstrap(remote.host.entry.python)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdin and process.stdout and process.stderr
        done: set[str] = set()
        try:
            with contextlib.suppress(OSError):  # ssh that has ended says why below
                process.stdin.write(payload({"workspace": remote.host.entry.workspace, **request}))
                process.stdin.close()
            for path, count in _receive(remote, process.stdout, target, asked):
                patience.answered()
                if count == DIFFERS:
                    present.discard(path)
                    run.warning(f"{path}: here with another content than there; fetched again")
                    continue
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
        todo = [file for file in todo if file.path not in done]
        if isinstance(failure, Unreachable):
            patience.wait(failure)
        elif failure:
            raise failure
        else:
            rounds += 1
        if todo and rounds == ROUNDS:
            raise SurgvqaError(f"{todo[0].path}: arrived damaged {ROUNDS} times; is the disk well?")
    return {
        "folder": str(target),
        "files": len(files),
        "bytes": total,
        "received_bytes": received,
        "seconds": time.monotonic() - began,
    }


class _Broken(Exception):
    """The stream ended early."""


@dataclass(frozen=True)
class Asked:
    """A request to the host for a file, from an offset on."""

    file: Listed
    offset: int
    here: bool = False
    """The file was fetched before, so only its hash is requested."""


DIFFERS = -1
"""Replaces a count of bytes when the local file differs from the host's."""


def _part(target: Path, path: str) -> Path:
    return target / PARTIAL / path


def _begun(part: Path, size: int) -> int:
    """Bytes that an earlier attempt left. Removes a partial file that cannot be the beginning of the file."""
    if part.is_symlink() or (part.is_file() and part.stat().st_size > size):
        part.unlink()
    return part.stat().st_size if part.is_file() else 0


def _here(path: Path, file: Listed) -> bool:
    """Whether the file was fetched before and has not changed on the host since."""
    try:
        stat = path.lstat()
    except OSError:
        return False
    return stat.st_size == file.size and stat.st_mtime_ns == file.mtime_ns


def _receive(remote: Remote, stream: Any, target: Path, asked: dict[str, Asked]) -> Iterator[tuple[str, int | None]]:
    """Yields (path, bytes) as they come, (path, 0) for a file that is whole and in its place, (path, None) for one
    that the host has no more, (path, DIFFERS) for one that is here with other content. Nothing is written but what was
    `asked` for, and no more of it than was listed."""
    line, before = b"", 0
    while not line.endswith(Replies.MARK):  # a login shell may speak first, and end without a newline
        line = stream.readline(LINE)
        before += len(line)
        if not line:
            raise _Broken
        if before > Replies.MAX_BEFORE:
            raise not_understood(remote.host, "output without end before the agent's own")
    while True:
        header = _message(remote, stream)
        if "done" in header:
            return
        one = asked.get(header["path"]) if isinstance(header.get("path"), str) else None
        if one is None:
            raise not_understood(remote.host, f"sent {str(header)[:80]}, which was not asked for")
        path = one.file.path
        if header.get("gone"):
            _part(target, path).unlink(missing_ok=True)
            yield path, None
            continue
        offset, size = header.get("offset"), header.get("size")
        if offset not in (0, one.offset) or not isinstance(size, int) or not offset <= size <= one.file.size:
            raise not_understood(
                remote.host, f"{path}: bytes {str(offset)[:20]} to {str(size)[:20]}, listed with {one.file.size}"
            )
        if one.here and offset == size == one.file.size:
            place = landing(target, path)
            sha256 = _message(remote, stream).get("sha256")
            same = not place.is_symlink() and sha256 == sha256_file(place)
            yield path, 0 if same else DIFFERS
            continue
        part = landing(target, f"{PARTIAL}/{path}")
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
        if trailer.get("sha256") != digest.hexdigest():
            part.unlink()
            continue
        final = landing(target, path)
        os.utime(part, ns=(one.file.mtime_ns, one.file.mtime_ns))
        os.replace(part, final)
        for folder in part.parents:
            if folder == target:
                break
            with contextlib.suppress(OSError):
                folder.rmdir()
        yield path, 0


def _message(remote: Remote, stream: Any) -> dict[str, Any]:
    line = stream.readline(LINE)
    if not line.endswith(b"\n"):
        raise not_understood(remote.host, "a line without end") if len(line) == LINE else _Broken
    return parse_message(remote.host, line)
