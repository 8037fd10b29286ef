"""Writes the shards of a checkpoint: worker threads compute and hash blocks, and one thread writes them to the disk.

    worker threads   Each takes the next task: it hashes a shard's oldest block if that is computed and no other worker
                     hashes this shard; otherwise it computes a block of about 4 MB. So a block is mostly hashed by the
                     thread that computed it, from its processor cache. If neither is possible (copied tensors are
                     ready faster than they are hashed), it prepares the tensors to come.
    disk thread      Writes hashed blocks and finishes each shard: fsync, rename, then the caller's `on_shard`.

A file is hashed from its first byte to its last, so one shard keeps two or three cores busy at most. With more cores,
several shards are written at once.

Files are written with O_DIRECT if the file system has it. The page cache would cost a copy and a new page for every
page of the file (several times the processor time, see docs/benchmarks.md), would evict other programs' pages, and has
to be flushed at the end anyway. In return, the next reader of the checkpoint has to read it from the disk.

O_DIRECT needs addresses, positions and lengths in whole pages. So each block has the same offset from the start of a
page in its buffer as in the file, its incomplete last page is put in front of the next block, and the last bytes of a
shard are written without O_DIRECT.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from surgvqa.checkpoint.shards import BLOCK_BYTES, PAGE_BYTES, Shard, Source, page_memory, tensor_bytes
from surgvqa.runs.reporter import Reporter

OnShard = Callable[[Shard, str], None]
Fill = Callable[[int, memoryview], None]
O_DIRECT = getattr(os, "O_DIRECT", 0)  # macOS has no O_DIRECT
BUFFER_BYTES = BLOCK_BYTES + PAGE_BYTES
MAX_BLOCKS = 10  # in memory, 42 MB; enough that a worker that the system suspends does not hold up the others


class _Piece(NamedTuple):
    """A range of the file that is computed in one step, from one tensor or the header."""

    position: int
    length: int
    fill: Fill
    start: int
    """Position of the range in the tensor, in bytes."""
    source: Source | None
    """The tensor, when this is its last piece."""


@dataclass(slots=True)
class _Block:
    """A piece that is computed or being computed."""

    piece: _Piece
    lead: int
    """Its position in the buffer: the same offset from the start of a page as in the file."""
    buffer: mmap.mmap
    made: bool = False


class _Output:
    """A shard file while it is written."""

    def __init__(self, folder: Path, shard: Shard):
        self.shard = shard
        self.pieces = deque(_pieces(shard))
        """Not started yet."""
        self.blocks: deque[_Block] = deque()
        """Computed or being computed, and not hashed yet; in file order."""
        self.hashing = False
        """Whether a worker hashes the first of them."""
        self.digest = hashlib.sha256()
        self.rest = b""
        """Hashed and not yet written: the beginning of a page."""
        self.file = folder / f"{shard.file}.writing"
        self.direct = False
        self.fd = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        with contextlib.suppress(OSError):  # refused by some file systems, such as tmpfs before Linux 6.6
            self._set_direct(True)

    def _set_direct(self, on: bool) -> None:
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
        fcntl.fcntl(self.fd, fcntl.F_SETFL, flags | O_DIRECT if on else flags & ~O_DIRECT)
        self.direct = on and O_DIRECT != 0

    def write(self, data: memoryview | bytes, position: int) -> None:
        """Writes all of `data`. Once the file system refuses a direct write, uses the page cache from then on."""
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self.fd, data[done:], position + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self.direct:
                    raise
                self._set_direct(False)

    def end(self) -> None:
        """Writes the last bytes, then syncs and renames the file. The folder is not synced here."""
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


class ShardWriter:
    """Writes `shards` into `folder`; calls `on_shard(shard, sha256)` for each that is on disk under its final name."""

    def __init__(self, folder: Path, shards: list[Shard], workers: int, run: Reporter, on_shard: OnShard):
        self.folder, self.workers, self.reporter, self.on_shard = folder, workers, run, on_shard
        self.waiting = deque(shards)
        self.to_prepare = deque(source for shard in shards for source in shard.sources)
        self.preparing = False
        """Only one worker prepares at a time, so that idle workers do not fill the memory."""
        self.opened: list[_Output] = []
        self.active: list[_Output] = []
        """Opened, and not yet hashed to the end."""
        self.max_active = max(1, workers // 2)
        self.max_block_bytes = MAX_BLOCKS * BUFFER_BYTES
        self.block_bytes = 0
        """Bytes of the blocks that are being computed, hashed or written."""
        self.free: list[mmap.mmap] = []
        self.done, self.total = 0, sum(s.nbytes for s in shards)
        self.error: BaseException | None = None
        self.changed = threading.Condition()
        """Guards all of the above. Notified when a block was computed, hashed or written."""
        self.disk = ThreadPoolExecutor(1, "disk")

    def run(self) -> None:
        """Writes all shards. Raises OSError from the disk and SurgvqaError from a source."""
        pool = ThreadPoolExecutor(self.workers, "merge")
        try:
            wait([pool.submit(self._guarded, self._work) for _ in range(self.workers)])
        except BaseException as error:  # Ctrl-C
            self._fail(error)
        pool.shutdown()
        self.disk.shutdown()
        for output in self.opened:
            output.close()
        if self.error:
            raise self.error

    def _guarded(self, task: Callable[..., None], *arguments: Any) -> None:
        """Runs a thread's task. The first task that fails ends all threads."""
        try:
            if not self.error:
                task(*arguments)
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()

    def _work(self) -> None:
        while task := self._next():
            task()

    def _next(self) -> Callable[[], None] | None:
        """A worker's next task; None when nothing is left or something failed."""
        with self.changed:
            while not self.error:
                for output in self.active:
                    if output.blocks and output.blocks[0].made and not output.hashing:
                        output.hashing = True
                        return partial(self._hash, output)
                if block := self._begin():
                    return partial(self._make, block)
                if not self.active and not self.waiting:
                    return None
                if self.to_prepare and not self.preparing:
                    self.preparing = True
                    return partial(self._prepare, self.to_prepare.popleft())
                self.changed.wait()
        return None

    def _begin(self) -> _Block | None:
        """The next block to compute; None when nothing is left, or when the blocks in memory leave no space for it.

        A tensor that can only be computed whole may be larger than the limit; it is then the only block in memory.
        """
        output = self._shortest()
        if not output:
            return None
        piece = output.pieces[0]
        lead = piece.position % PAGE_BYTES
        size = max(lead + piece.length, BUFFER_BYTES)
        if self.block_bytes and self.block_bytes + size > self.max_block_bytes:
            return None
        block = _Block(output.pieces.popleft(), lead, self._buffer(size))
        output.blocks.append(block)
        self.block_bytes += size
        return block

    def _shortest(self) -> _Output | None:
        """Of the active shards with pieces left to compute, the one with the fewest unhashed blocks."""
        while self.waiting and len(self.active) < self.max_active:
            self.opened.append(_Output(self.folder, self.waiting.popleft()))
            self.active.append(self.opened[-1])
        return min((o for o in self.active if o.pieces), key=lambda o: len(o.blocks), default=None)

    def _buffer(self, size: int) -> mmap.mmap:
        return self.free.pop() if self.free and size == BUFFER_BYTES else page_memory(size)

    def _prepare(self, source: Source) -> None:
        source.prepare()
        with self.changed:
            self.preparing = False

    def _make(self, block: _Block) -> None:
        lead, piece = block.lead, block.piece
        with memoryview(block.buffer) as whole, whole[lead : lead + piece.length] as view:
            piece.fill(piece.start, view)
        with self.changed:
            block.made = True
            self.changed.notify_all()

    def _hash(self, output: _Output) -> None:
        """Hashes the oldest block of a shard and passes it to the disk thread."""
        block = output.blocks[0]
        piece, lead = block.piece, block.lead
        end = lead + piece.length
        whole = end - end % PAGE_BYTES
        with memoryview(block.buffer) as view:
            output.digest.update(view[lead:end])
            view[:lead] = output.rest
            output.rest = bytes(view[whole:end])
        if piece.source:
            piece.source.close()
        with self.changed:
            output.blocks.popleft()
            output.hashing = False
            ends_shard = not output.pieces and not output.blocks
            if ends_shard:
                self.active.remove(output)
            self.disk.submit(self._guarded, self._write, output, block, whole, ends_shard)
            self.done += piece.length
            shard_done, shard = piece.position + piece.length, output.shard
            facts = {"shard": shard.file, "shard_done": shard_done, "shard_total": shard.nbytes}
            self.reporter.progress("merge", self.done, self.total, "bytes", **facts)
            self.changed.notify_all()

    def _write(self, output: _Output, block: _Block, length: int, ends_shard: bool) -> None:
        with memoryview(block.buffer) as view:
            output.write(view[:length], block.piece.position - block.lead)
        if ends_shard:
            output.end()
            self.on_shard(output.shard, output.digest.hexdigest())
        with self.changed:
            self.block_bytes -= len(block.buffer)
            if len(block.buffer) == BUFFER_BYTES:
                self.free.append(block.buffer)
            self.changed.notify_all()


def _pieces(shard: Shard) -> Iterator[_Piece]:
    """The header and all ranges of tensors that make up the file, in order."""

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
