"""Writes the shards of a checkpoint: blocks made and hashed by worker threads, written past the page cache.

    worker threads   each takes what is next: hashes a shard's oldest block, if it is made and nobody hashes this shard;
                     else makes a block of about 4 MB. So a block is mostly hashed by whoever made it, out of its cache.
                     While neither may be (a copied tensor is made faster than hashed): prepares the tensors to come
    one more thread  writes what is hashed, and ends a shard: fsync, rename, then the caller's `on_shard`

Hashing goes through a file from its first byte to its last, so one shard keeps two or three cores busy at most: with
more, several shards are made at once.

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
O_DIRECT = getattr(os, "O_DIRECT", 0)  # macOS has none
BUFFER_BYTES = BLOCK_BYTES + PAGE_BYTES
HELD_BLOCKS = 10  # 42 MB; enough that a worker that the system puts aside holds nobody up


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
    """A piece in the making, or made."""

    piece: _Piece
    lead: int
    """Where it begins in its buffer: as far from the start of a page as in the file."""
    buffer: mmap.mmap
    made: bool = False


class _Output:
    """A shard file while it is written."""

    def __init__(self, folder: Path, shard: Shard):
        self.shard = shard
        self.pieces = deque(_pieces(shard))
        """What nobody has begun to make."""
        self.blocks: deque[_Block] = deque()
        """In the making or made, not hashed yet; in the order of the file."""
        self.hashing = False
        """Whether a worker is at the first of them."""
        self.digest = hashlib.sha256()
        self.rest = b""
        """What is hashed and not written yet: the beginning of a page."""
        self.file = folder / f"{shard.file}.writing"
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


class ShardWriter:
    """Writes `shards` into `folder`; calls `on_shard(shard, sha256)` once a shard is on the disk under its name."""

    def __init__(self, folder: Path, shards: list[Shard], workers: int, run: Reporter, on_shard: OnShard):
        self.folder, self.workers, self.run_, self.on_shard = folder, workers, run, on_shard
        self.waiting = deque(shards)
        self.to_prepare = deque(source for shard in shards for source in shard.sources)
        self.preparing = False
        """One worker at a time, so that idle ones do not fill the memory."""
        self.begun: list[_Output] = []
        self.at_hand: list[_Output] = []
        """Begun, and not yet hashed to the end."""
        self.at_once = max(1, workers // 2)
        self.room = HELD_BLOCKS * BUFFER_BYTES
        self.held = 0
        """Bytes of the blocks that exist, from the beginning of their making to the end of their writing."""
        self.free: list[mmap.mmap] = []
        self.done, self.total = 0, sum(s.nbytes for s in shards)
        self.error: BaseException | None = None
        self.changed = threading.Condition()
        """Held for whatever is above; told when a block was made, hashed or written."""
        self.disk = ThreadPoolExecutor(1, "disk")

    def run(self) -> None:
        """Writes them all. OSError from the disk, SurgvqaError from a source."""
        pool = ThreadPoolExecutor(self.workers, "merge")
        try:
            wait([pool.submit(self._guarded, self._work) for _ in range(self.workers)])
        except BaseException as error:  # Ctrl-C
            self._fail(error)
        pool.shutdown()
        self.disk.shutdown()
        for output in self.begun:
            output.close()
        if self.error:
            raise self.error

    def _guarded(self, task: Callable[..., None], *arguments: Any) -> None:
        """What a thread does; the first that fails ends them all."""
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
        """What a worker does next; None when nothing is left or something failed."""
        with self.changed:
            while not self.error:
                for output in self.at_hand:
                    if output.blocks and output.blocks[0].made and not output.hashing:
                        output.hashing = True
                        return partial(self._hash, output)
                if block := self._begin():
                    return partial(self._make, block)
                if not self.at_hand and not self.waiting:
                    return None
                if self.to_prepare and not self.preparing:
                    self.preparing = True
                    return partial(self._prepare, self.to_prepare.popleft())
                self.changed.wait()
        return None

    def _begin(self) -> _Block | None:
        """The next block to be made; None when nothing is left, or too much is held to begin another.

        A tensor that can only be made whole may be larger than all that is to be held: it is then held alone.
        """
        output = self._shortest()
        if not output:
            return None
        piece = output.pieces[0]
        lead = piece.position % PAGE_BYTES
        size = max(lead + piece.length, BUFFER_BYTES)
        if self.held and self.held + size > self.room:
            return None
        block = _Block(output.pieces.popleft(), lead, self._buffer(size))
        output.blocks.append(block)
        self.held += size
        return block

    def _shortest(self) -> _Output | None:
        """The shard at hand that has the fewest blocks ahead of its hash, of those with something left to make."""
        while self.waiting and len(self.at_hand) < self.at_once:
            self.begun.append(_Output(self.folder, self.waiting.popleft()))
            self.at_hand.append(self.begun[-1])
        return min((o for o in self.at_hand if o.pieces), key=lambda o: len(o.blocks), default=None)

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
        """Hashes the oldest block of a shard and hands it to the disk thread."""
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
                self.at_hand.remove(output)
            self.disk.submit(self._guarded, self._write, output, block, whole, ends_shard)
            self.done += piece.length
            shard_done, shard = piece.position + piece.length, output.shard
            facts = {"shard": shard.file, "shard_done": shard_done, "shard_total": shard.nbytes}
            self.run_.progress("merge", self.done, self.total, "bytes", **facts)
            self.changed.notify_all()

    def _write(self, output: _Output, block: _Block, length: int, ends_shard: bool) -> None:
        with memoryview(block.buffer) as view:
            output.write(view[:length], block.piece.position - block.lead)
        if ends_shard:
            output.end()
            self.on_shard(output.shard, output.digest.hexdigest())
        with self.changed:
            self.held -= len(block.buffer)
            if len(block.buffer) == BUFFER_BYTES:
                self.free.append(block.buffer)
            self.changed.notify_all()


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
