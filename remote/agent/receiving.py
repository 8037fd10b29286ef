"""Receives chunks of large files and packs of small files on the host, and hashes them as they arrive."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import threading
import time
from typing import Any

from remote.agent.files import BLOCK
from remote.agent.protocol import FRAME, HOLE, INDEX, MAX_PACK, MAX_PACK_FILES, PACK, SMALL
from remote.agent.staging import begun, note, staged
from remote.agent.standing import permissions
from surgvqa.errors import SurgvqaError
from surgvqa.runs.process import process_identity

PIPE = 1 << 20  # the largest pipe that an ordinary user may have
F_SETPIPE_SZ = 1031  # fcntl has the name since Python 3.10
PROGRESS_S = 0.25
SILENT_RECEIVER_S = 120


class Input:
    """Standard input, which the kernel moves into files without a copy in this process if it can."""

    def __init__(self, stdin: Any):
        with contextlib.suppress(OSError):  # then sshd writes larger pieces
            fcntl.fcntl(0, F_SETPIPE_SZ, PIPE)
        self._ahead = stdin.read(len(stdin.peek(1)))  # came together with the request
        self._splice = getattr(os, "splice", None)  # Linux, Python 3.10

    def read(self, count: int, at_once: bool = False) -> bytes:
        """Reads that many bytes; fewer at the end, or with `at_once`."""
        data, self._ahead = self._ahead[:count], self._ahead[count:]
        while len(data) < count and not (data and at_once):
            more = os.read(0, count - len(data))
            if not more:
                break
            data += more
        return data

    def copy(self, target: int, offset: int, count: int) -> int:
        """Copies up to `count` bytes into an open file at `offset`; returns how many, 0 at the end."""
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
    """Receives chunks and packs from standard input until it ends.

    The journal gets a chunk once it is complete, and a small file once its hash is correct.
    """
    staging, rows = begun(workspace, digest)
    mine = os.path.join(staging, "receivers", str(os.getpid()))
    with open(mine, "w", encoding="utf-8") as file:
        file.write(process_identity(os.getpid()) or "")
    try:
        return {"received": _Receiver(channel, staging, rows).run()}
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(mine)


class _Receiver:
    """Writes the frames from standard input into the staged files."""

    def __init__(self, channel: Any, staging: str, rows: list[list[Any]]):
        self.channel, self.staging, self.rows = channel, staging, rows
        self.pipe = Input(channel.stdin)
        self.got, self.said = 0, time.monotonic()
        self.heard = [time.monotonic()]
        self.opened, self.target = -1, -1
        self.folders: set[str] = set()
        self.folder, self.folder_file = "", -1
        self.masked = os.umask(0o077)
        os.umask(self.masked)

    def run(self) -> int:
        """Runs until the input ends. Returns the number of bytes received."""
        threading.Thread(target=_end_when_silent, args=(self.heard,), daemon=True).start()
        while len(header := self.pipe.read(FRAME.size)) == FRAME.size:
            index, offset, length = FRAME.unpack(header)
            if not (self._take_pack(offset, length) if index == PACK else self._take_chunk(index, offset, length)):
                break
        return self.got

    def _count(self, count: int) -> None:
        self.got += count
        now = self.heard[0] = time.monotonic()
        if now - self.said > PROGRESS_S:
            self.said = now
            self.channel.say({"got": self.got})

    def _make_folder(self, path: str) -> None:
        folder = path.rpartition("/")[0]
        if folder not in self.folders:
            os.makedirs(folder, exist_ok=True)
            self.folders.add(folder)

    def _take_chunk(self, index: int, offset: int, length: int) -> bool:
        """Receives a piece of one file. Returns whether all of it arrived. A hole has no bytes and is not written."""
        hole, index = index & HOLE, index & ~HOLE
        if index >= len(self.rows) or offset + length > self.rows[index][1]:
            raise SurgvqaError("a chunk lies outside its file; the stream is damaged")
        if index != self.opened:
            if self.target >= 0:
                os.close(self.target)
            path = staged(self.staging, self.rows[index][0])
            self._make_folder(path)
            self.target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            self.opened = index
            if os.fstat(self.target).st_nlink > 1:
                raise SurgvqaError(f"{self.rows[index][0]}: staged as a link to a published file; upload again")
        at = offset + length if hole else offset
        if hole and os.fstat(self.target).st_size < at:
            os.ftruncate(self.target, at)
        while at < offset + length:
            count = self.pipe.copy(self.target, at, offset + length - at)
            if not count:
                return False
            at += count
            self._count(count)
        note(self.staging, [(index, offset, length)])
        self.channel.say({"ack": [index, offset], "got": self.got})
        return True

    def _take_pack(self, files: int, length: int) -> bool:
        """Receives whole small files. Returns whether all arrived. One with a wrong hash is named, not written."""
        if not 0 < files <= MAX_PACK_FILES or length > MAX_PACK:
            raise SurgvqaError("a pack is too large; the stream is damaged")
        indices = [index for (index,) in INDEX.iter_unpack(self.pipe.read(files * INDEX.size))]
        if any(i >= len(self.rows) or self.rows[i][1] > SMALL for i in indices) or length != sum(
            self.rows[i][1] for i in indices
        ):
            raise SurgvqaError("a pack has other files than it should; the stream is damaged")
        parts = []
        while length:
            part = self.pipe.read(min(length, BLOCK), at_once=True)
            if not part:
                return False
            parts.append(part)
            length -= len(part)
            self._count(len(part))
        body, at, wrong, right = memoryview(b"".join(parts)), 0, [], []
        for index in indices:
            path, size, sha256, mtime_ns, mode = self.rows[index]
            content, at = body[at : at + size], at + size
            if hashlib.sha256(content).hexdigest() != sha256:
                wrong.append(index)
                continue
            self._write(staged(self.staging, path), content, mtime_ns, permissions(mode))
            right.append((index, 0, size))
        note(self.staging, right)
        self.channel.say({"ack": [indices[0], 0], "got": self.got, "wrong": wrong})
        return True

    def _enter(self, folder: str) -> None:
        """Opens a staging folder, in which one file after another is then written without looking up its path."""
        os.makedirs(folder, exist_ok=True)
        if self.folder_file >= 0:
            os.close(self.folder_file)
        self.folder, self.folder_file = folder, os.open(folder, os.O_RDONLY | os.O_DIRECTORY)

    def _write(self, path: str, content: memoryview, mtime_ns: int, mode: int) -> None:
        """Writes a new file, because an existing one may be a link to a published file."""
        folder, _, name = path.rpartition("/")
        if folder != self.folder:
            self._enter(folder)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            target = os.open(name, flags, mode, dir_fd=self.folder_file)
        except FileExistsError:
            os.unlink(path)
            target = os.open(name, flags, mode, dir_fd=self.folder_file)
        try:
            while content:
                content = content[os.write(target, content) :]
            if mode & self.masked:
                os.fchmod(target, mode)
            os.utime(target, ns=(mtime_ns, mtime_ns))
        finally:
            os.close(target)


def _end_when_silent(heard: list[float]) -> None:
    while time.monotonic() - heard[0] < SILENT_RECEIVER_S:
        time.sleep(5)
    os._exit(1)


def verify(channel: Any, workspace: str, digest: str) -> dict[str, Any]:
    """Hashes staged files as they grow: reads [index, upto] lines, answers {"file", "sha256"} for each whole file."""
    from concurrent.futures import ThreadPoolExecutor  # loads logging: a third of a receiver's start

    staging, rows = begun(workspace, digest)
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
                with open(staged(staging, rows[index][0]), "rb", buffering=0) as file:
                    file.seek(at)
                    while at < upto:
                        count = file.readinto(buffer[: upto - at])
                        if not count:
                            channel.say(
                                {"error": f"{rows[index][0]}: became shorter while it was staged; upload again"}
                            )
                            os._exit(1)
                        running.update(buffer[:count])
                        at += count
            with lock:
                if at >= arrived[index]:
                    states[index] = (running, at)
                    busy.discard(index)
                    break
        if at == rows[index][1]:
            channel.say({"file": index, "sha256": running.hexdigest()})

    jobs = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for line in channel.stdin:
            index, upto = json.loads(line)
            if upto < 0:  # the file is sent again
                states.pop(index, None)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(staged(staging, rows[index][0]))
                note(staging, [(index, 0, -1)])
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
