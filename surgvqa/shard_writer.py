"""Writes the shards of a checkpoint: blocks made by worker threads, hashed in order, written past the page cache.

    worker threads   read and compute a block of about 4 MB at a time
    calling thread   hashes the finished blocks in the order of the file
    one more thread  writes them, and ends a shard: fsync, rename, then the caller's `on_shard`

Files are written with O_DIRECT where the file system has it: the page cache costs a copy and a fresh page for every
page of the file (several times the processor time, see docs/benchmarks.md), throws out what others have in it, and has
to be flushed at the end anyway. The price: whoever reads the checkpoint next reads it from the disk.

O_DIRECT wants addresses, positions and lengths in whole pages. So a block lies in its buffer as far from the start of a
page as in the file, what it leaves of its last page goes in front of the next block, and the last bytes of a shard are
written without O_DIRECT.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from surgvqa.runs import Run
from surgvqa.shards import BLOCK_BYTES, PAGE_BYTES, Shard, Source, tensor_bytes

OnShard = Callable[[Shard, str], None]
Fill = Callable[[int, memoryview], None]
O_DIRECT = getattr(os, "O_DIRECT", 0)  # macOS has none
BUFFER_BYTES = BLOCK_BYTES + PAGE_BYTES


class _Output:
    """A shard file while it is written."""

    def __init__(self, folder: Path, shard: Shard):
        self.shard = shard
        self.file = folder / f"{shard.file}.writing"
        self.digest = hashlib.sha256()
        self.rest = b""
        """What is hashed and not written yet: the beginning of a page."""
        self.direct = False
        self.fd = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        with contextlib.suppress(OSError):  # tmpfs before Linux 6.6 and others refuse it
            self._set_direct(True)

    def _set_direct(self, on: bool) -> None:
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
        fcntl.fcntl(self.fd, fcntl.F_SETFL, flags | O_DIRECT if on else flags & ~O_DIRECT)
        self.direct = on and O_DIRECT != 0

    def write(self, data: memoryview | bytes, position: int) -> None:
        """All of `data`; through the page cache from the first write on that the file system takes no other way."""
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self.fd, data[done:], position + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self.direct:
                    raise
                self._set_direct(False)

    def end(self) -> None:
        """Brings the last bytes and the name to the disk, but for the folder's fsync."""
        if self.direct:
            self._set_direct(False)
        self.write(self.rest, self.shard.nbytes - len(self.rest))
        os.fsync(self.fd)
        os.rename(self.file, self.file.with_name(self.shard.file))
        self.close()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class _Piece(NamedTuple):
    """What is made at once: a range of the file, from one tensor (or the header)."""

    position: int
    length: int
    fill: Fill
    start: int
    """Of the range in the tensor."""
    source: Source | None
    """The tensor, when this is its last piece."""


@dataclass(slots=True)
class _Block:
    """A piece on its way to the disk."""

    output: _Output
    piece: _Piece
    ends_shard: bool
    lead: int
    """Where it begins in its buffer: as far from the start of a page as in the file."""
    buffer: mmap.mmap
    future: Future = field(init=False)
    """Of its making, then of its writing."""


class ShardWriter:
    """Writes `shards` into `folder`; calls `on_shard(shard, sha256)` once a shard is on the disk under its name."""

    def __init__(self, folder: Path, shards: list[Shard], workers: int, run: Run, on_shard: OnShard):
        self.folder, self.shards, self.run_, self.on_shard = folder, shards, run, on_shard
        self.done = 0
        self.total = sum(s.nbytes for s in shards)
        self.depth = 4 * workers + 4  # enough that a worker that the system puts aside holds nobody up
        self.making: deque[_Block] = deque()
        self.writing: deque[_Block] = deque()
        self.free: list[mmap.mmap] = []
        self.pool = ThreadPoolExecutor(workers, "merge")
        self.disk = ThreadPoolExecutor(1, "disk")

    def run(self) -> None:
        """Writes them all. OSError from the disk, SurgvqaError from a source."""
        outputs: list[_Output] = []
        try:
            for shard in self.shards:
                outputs.append(_Output(self.folder, shard))
                pieces = list(_pieces(shard))
                for number, piece in enumerate(pieces, 1):
                    self._make(outputs[-1], piece, ends_shard=number == len(pieces))
            while self.making:
                self._hash()
            while self.writing:
                self._free_oldest()
        finally:
            self.pool.shutdown(cancel_futures=True)
            self.disk.shutdown(cancel_futures=True)
            for output in outputs:
                output.close()

    def _make(self, output: _Output, piece: _Piece, ends_shard: bool) -> None:
        """Has a worker make a block, once there is room for one more."""
        while len(self.making) + len(self.writing) >= self.depth:
            if len(self.writing) > self.depth // 2 or not self.making:
                self._free_oldest()
            else:
                self._hash()
        lead = piece.position % PAGE_BYTES
        block = _Block(output, piece, ends_shard, lead, self._buffer(lead + piece.length))
        block.future = self.pool.submit(_fill, block)
        self.making.append(block)

    def _buffer(self, length: int) -> mmap.mmap:
        if length > BUFFER_BYTES:
            return _memory(length)
        return self.free.pop() if self.free else _memory(BUFFER_BYTES)

    def _hash(self) -> None:
        """Waits for the oldest block in the making, hashes it and hands it to the disk thread."""
        block = self.making.popleft()
        block.future.result()
        output, piece, lead = block.output, block.piece, block.lead
        end = lead + piece.length
        whole = end - end % PAGE_BYTES
        with memoryview(block.buffer) as view:
            output.digest.update(view[lead:end])
            view[:lead] = output.rest
            output.rest = bytes(view[whole:end])
        block.future = self.disk.submit(self._write, block, whole)
        self.writing.append(block)
        if piece.source:
            piece.source.close()
        self.done += piece.length
        shard_done, shard = piece.position + piece.length, output.shard
        facts = {"shard": shard.file, "shard_done": shard_done, "shard_total": shard.nbytes}
        self.run_.progress("merge", self.done, self.total, "bytes", **facts)
        while self.writing and self.writing[0].future.done():
            self._free_oldest()

    def _write(self, block: _Block, length: int) -> None:
        output = block.output
        with memoryview(block.buffer) as view:
            output.write(view[:length], block.piece.position - block.lead)
        if block.ends_shard:
            output.end()
            self.on_shard(output.shard, output.digest.hexdigest())

    def _free_oldest(self) -> None:
        """Waits for the oldest block on its way to the disk; a full disk shows here."""
        block = self.writing.popleft()
        block.future.result()
        if len(block.buffer) == BUFFER_BYTES:
            self.free.append(block.buffer)


def _pieces(shard: Shard) -> Iterator[_Piece]:
    """All that the file is made of, in order."""

    def fill_head(_: int, out: memoryview) -> None:
        out[:] = shard.head

    yield _Piece(0, len(shard.head), fill_head, 0, None)
    position = len(shard.head)
    for source in shard.sources:
        size = tensor_bytes(source)
        for start, length in source.blocks():
            last = source if start + length == size else None
            yield _Piece(position + start, length, source.fill, start, last)
        position += size


def _memory(length: int) -> mmap.mmap:
    """Memory that begins with a page; in huge pages where the system has them, which cost less to hand to the disk."""
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _fill(block: _Block) -> None:
    first, piece = block.lead, block.piece
    with memoryview(block.buffer) as whole, whole[first : first + piece.length] as view:
        piece.fill(piece.start, view)
