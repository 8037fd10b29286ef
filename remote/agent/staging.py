"""The receiving side of an upload, on the host: chunks into a staging folder, verified there, published by rename.

    <workspace>/.surgvqa/staging/<digest>/   manifest.json, journal (chunks that arrived), files/<index>,
                                             receivers/<pid>

An item is as in files.py.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from remote.agent.files import BLOCK, own, read_record, standing, within, write_record
from remote.agent.protocol import FRAME
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.runs.process import process_identity, signal_exactly

PIPE = 1 << 20  # the largest pipe that an ordinary user may have
F_SETPIPE_SZ = 1031  # fcntl has the name since Python 3.10
PROGRESS_S = 0.25
SILENT_RECEIVER_S = 120


def _staging(workspace: str, digest: str) -> str:
    if not digest.isalnum():
        raise UsageError(f"digest {digest!r} is none")
    return own(workspace, "staging", digest)


def begin(channel: Any, workspace: str, item: dict[str, Any]) -> dict[str, Any]:
    """Prepares the staging folder of `item` and says which chunks it holds already."""
    stands = standing(workspace, item)
    if stands["state"] == "complete":
        return {"complete": True}
    if stands["state"] == "foreign":
        raise SurgvqaError(
            "{} exists in {} and was not made by upload; move it away or choose another name".format(
                ", ".join(stands["foreign"]), workspace
            )
        )
    staging = _staging(workspace, item["digest"])
    os.makedirs(staging, exist_ok=True)
    os.chmod(staging, 0o700)  # until it is published with its own mode, nobody else reads what arrives
    os.makedirs(os.path.join(staging, "files"), exist_ok=True)
    os.makedirs(os.path.join(staging, "receivers"), exist_ok=True)
    _end_receivers(staging)
    for i, (path, *_) in enumerate(item["files"]):  # an attempt that broke while it published
        with contextlib.suppress(OSError):
            os.rename(os.path.join(staging, "tree", path), os.path.join(staging, "files", str(i)))
    with open(os.path.join(staging, "manifest.json"), "w", encoding="utf-8") as file:
        json.dump(item, file)
    done = _journal(staging, item)
    for i, source in stands["sources"].items():
        size, target = item["files"][i][1], os.path.join(staging, "files", str(i))
        if sum(n for _, n in done.get(i, [])) == size and os.path.exists(target):
            continue
        with contextlib.suppress(FileNotFoundError):
            os.unlink(target)
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
        done[i] = [(0, size)]
        _note(staging, [(i, 0, size)])
    missing = sum(e[1] for e in item["files"]) - sum(n for ranges in done.values() for _, n in ranges)
    free = shutil.disk_usage(staging).free
    if missing > free:
        raise SurgvqaError(
            f"disk full: {missing / 1e9:.2f} GB to come, {free / 1e9:.2f} GB free in {workspace}; "
            "free some space there or choose another workspace"
        )
    return {"complete": False, "done": {str(i): ranges for i, ranges in done.items()}, "free": free}


def _end_receivers(staging: str) -> None:
    """Receivers of a connection that broke may still write: end these very processes."""
    folder = os.path.join(staging, "receivers")
    for entry in os.listdir(folder):
        path = os.path.join(folder, entry)
        with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
            signal_exactly(int(entry), file.read(), 9)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _journal(staging: str, item: dict[str, Any]) -> dict[int, list[tuple[int, int]]]:
    """Chunks that arrived, by file: only whole journal lines, only files that are as long as they say."""
    done: dict[int, dict[int, int]] = {}
    try:
        with open(os.path.join(staging, "journal"), encoding="ascii") as file:
            for line in file:
                words = line.split()
                if line.endswith("\n") and len(words) == 3:
                    i, offset, length = map(int, words)
                    if length < 0:
                        done.pop(i, None)
                    else:
                        done.setdefault(i, {})[offset] = length
    except FileNotFoundError:
        return {}
    kept = {}
    for i, ranges in done.items():
        with contextlib.suppress(OSError):
            size = os.path.getsize(os.path.join(staging, "files", str(i)))
            if i < len(item["files"]) and all(offset + length <= size for offset, length in ranges.items()):
                kept[i] = sorted(ranges.items())
    return kept


def _note(staging: str, chunks: list[tuple[int, int, int]]) -> None:
    """Adds chunks to the journal with one write; length -1 forgets the file."""
    descriptor = os.open(os.path.join(staging, "journal"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, "".join(f"{i} {offset} {length}\n" for i, offset, length in chunks).encode())
    finally:
        os.close(descriptor)


class Input:
    """Standard input that goes into files without a copy in this process, where the kernel can."""

    def __init__(self, stdin: Any):
        with contextlib.suppress(OSError):  # then sshd writes larger pieces
            fcntl.fcntl(0, F_SETPIPE_SZ, PIPE)
        self._ahead = stdin.read(len(stdin.peek(1)))  # came together with the request
        self._splice = getattr(os, "splice", None)  # Linux, Python 3.10

    def read(self, count: int) -> bytes:
        """So many bytes; fewer at the end."""
        data, self._ahead = self._ahead[:count], self._ahead[count:]
        while len(data) < count:
            more = os.read(0, count - len(data))
            if not more:
                break
            data += more
        return data

    def copy(self, target: int, offset: int, count: int) -> int:
        """Up to `count` bytes into an open file at `offset`; how many, 0 at the end."""
        if self._splice and not self._ahead:
            try:
                return self._splice(0, target, count, offset_dst=offset)
            except OSError as error:
                if error.errno != errno.EINVAL:  # no pipe, or a file system without
                    raise
                self._splice = None
        count = min(count, BLOCK)
        view = memoryview(self.read(min(count, len(self._ahead))) or os.read(0, count))
        written = 0
        while written < len(view):
            written += os.pwrite(target, view[written:], offset + written)
        return written


def receive(channel: Any, workspace: str, digest: str) -> dict[str, Any]:
    """Takes chunks from standard input until it ends. A chunk is in the journal only when it is whole."""
    staging = _staging(workspace, digest)
    with open(os.path.join(staging, "manifest.json"), encoding="utf-8") as file:
        sizes = [entry[1] for entry in json.load(file)["files"]]
    mine = os.path.join(staging, "receivers", str(os.getpid()))
    with open(mine, "w", encoding="utf-8") as file:
        file.write(process_identity(os.getpid()) or "")
    heard = [time.monotonic()]
    threading.Thread(target=_end_when_silent, args=(heard,), daemon=True).start()
    pipe = Input(channel.stdin)
    got, said = 0, time.monotonic()
    opened, target = -1, -1
    try:
        while True:
            header = pipe.read(FRAME.size)
            if len(header) < FRAME.size:
                return {"received": got}
            index, offset, length = FRAME.unpack(header)
            if index >= len(sizes) or offset + length > sizes[index]:
                raise SurgvqaError("a chunk lies outside its file; the stream is damaged")
            if index != opened:
                if target >= 0:
                    os.close(target)
                path = os.path.join(staging, "files", str(index))
                target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
                opened = index
                if os.fstat(target).st_nlink > 1:
                    raise SurgvqaError(f"staged file {index} is shared with a published one; upload again")
            left, at = length, offset
            while left:
                count = pipe.copy(target, at, left)
                if not count:
                    return {"received": got}
                left, at, got = left - count, at + count, got + count
                now = heard[0] = time.monotonic()
                if now - said > PROGRESS_S:
                    said = now
                    channel.say({"got": got})
            _note(staging, [(index, offset, length)])
            channel.say({"ack": [index, offset], "got": got})
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(mine)


def _end_when_silent(heard: list[float]) -> None:
    while time.monotonic() - heard[0] < SILENT_RECEIVER_S:
        time.sleep(5)
    os._exit(1)


def verify(channel: Any, workspace: str, digest: str) -> dict[str, Any]:
    """Hashes staged files as they grow: reads [index, upto] lines, answers {"file", "sha256"} for each whole file."""
    staging = _staging(workspace, digest)
    with open(os.path.join(staging, "manifest.json"), encoding="utf-8") as file:
        sizes = [entry[1] for entry in json.load(file)["files"]]
    states: dict[int, tuple[Any, int]] = {}  # running hash, bytes that it has seen
    arrived: dict[int, int] = {}
    busy: set[int] = set()
    lock = threading.Lock()

    def advance(index: int) -> None:
        running, at = states.setdefault(index, (hashlib.sha256(), 0))
        buffer = memoryview(bytearray(BLOCK))
        while True:
            upto = arrived[index]
            if at < upto:
                with open(os.path.join(staging, "files", str(index)), "rb", buffering=0) as file:
                    file.seek(at)
                    while at < upto:
                        count = file.readinto(buffer[: upto - at])
                        if not count:
                            channel.say({"error": f"staged file {index} became shorter; upload again"})
                            os._exit(1)
                        running.update(buffer[:count])
                        at += count
            with lock:
                if at >= arrived[index]:
                    states[index] = (running, at)
                    busy.discard(index)
                    break
        if at == sizes[index]:
            channel.say({"file": index, "sha256": running.hexdigest()})

    jobs = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for line in channel.stdin:
            index, upto = json.loads(line)
            if upto < 0:  # the file is sent again
                states.pop(index, None)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(staging, "files", str(index)))
                _note(staging, [(index, 0, -1)])
                channel.say({"reset": index})
                continue
            with lock:
                arrived[index] = upto
                idle = index not in busy
                busy.add(index)
            if idle:
                jobs.append(pool.submit(advance, index))
    for job in jobs:
        job.result()
    return {}


def publish(channel: Any, workspace: str, item: dict[str, Any]) -> dict[str, Any]:
    """Renames what was verified to its final names and writes the ready record."""
    name, kind, entries = item["name"], item["kind"], item["files"]
    folder = kind == "folder"
    staging = _staging(workspace, item["digest"])
    tree, old = os.path.join(staging, "tree"), os.path.join(staging, "old")
    staged = [os.path.join(staging, "files", str(i)) for i in range(len(entries))]
    for path, (name_in, size, _, _) in zip(staged, entries):
        if size == 0:
            open(path, "ab").close()
        if not os.path.exists(path) or os.path.getsize(path) != size:
            raise SurgvqaError(f"{name_in} did not arrive whole; upload again")
    if standing(workspace, item)["state"] == "foreign":
        raise SurgvqaError(f"{name} was changed by somebody else during the upload; nothing was published")
    before = read_record(workspace, name, kind)
    old_files = {**before.get("old_files", {}), **before.get("files", {})}
    files = {path: [size, sha256, mtime_ns] for path, size, sha256, mtime_ns in entries}
    record = {"kind": kind, "digest": item["digest"], "files": files if folder else {**old_files, **files}}
    write_record(workspace, name, {**record, "old_files": old_files, "state": "publishing"})
    modes = item.get("modes") or [0o644] * len(entries)
    for path, (final_path, _, _, mtime_ns), mode in zip(staged, entries, modes):
        place = os.path.join(tree, final_path) if folder else within(workspace, final_path)
        os.makedirs(os.path.dirname(place), exist_ok=True)
        if os.stat(path).st_nlink == 1:  # a link to a published file keeps that file's time
            os.utime(path, ns=(mtime_ns, mtime_ns))
            os.chmod(path, (mode & 0o777) | 0o400)
        if os.path.exists(place) and os.path.samefile(path, place):
            os.unlink(path)  # rename(2) does nothing between two links of one file
        else:
            os.replace(path, place)
        files[final_path][2] = os.stat(place).st_mtime_ns
    if folder:
        final = within(workspace, name)
        os.makedirs(os.path.dirname(final), exist_ok=True)
        if os.path.lexists(final):
            os.rename(final, old)
        os.rename(tree, final)
    record["files"].update(files)
    write_record(workspace, name, {**record, "state": "ready"})
    if folder:
        _remove(old, old_files)
    for leftover in ("journal", "manifest.json"):
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(staging, leftover))
    for empty in ("files", "receivers", ""):
        with contextlib.suppress(OSError):
            os.rmdir(os.path.join(staging, empty))
    return {"name": name, "files": len(entries)}


def _remove(root: str, files: Any) -> None:
    """Removes these files below `root` by exact name, then the folders that this left empty."""
    for path in files:
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(root, path))
    for folder, _, _ in os.walk(root, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(folder)
