"""The shards of a checkpoint to be written: which tensor lies where, and where its bytes come from.

A source makes one tensor of the output, block by block; `plan_shards` lays sources out in files; `writer`
brings them to the disk.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from surgvqa.checkpoint.headers import DTYPE_BYTES, TensorInfo, header_bytes
from surgvqa.checkpoint.names import SINGLE_FILE
from surgvqa.errors import SurgvqaError

PAGE_BYTES = 4096
BLOCK_BYTES = (4 << 20) - PAGE_BYTES  # some of them fit the processor's cache; the buffer of one is two huge pages


def page_memory(length: int) -> mmap.mmap:
    """Memory that begins with a page, and goes back to the system when it is let go: what malloc keeps for each thread
    grows with the threads. In huge pages where the system has them, which cost less to fill and to hand to the disk."""
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Source(Protocol):
    """Where the bytes of one tensor of the output come from."""

    name: str

    @property
    def dtype(self) -> str:
        """As safetensors spells it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor as it will be written."""

    def blocks(self) -> Iterable[tuple[int, int]]:
        """(start, length) in bytes of the pieces that are made one at a time, in order, covering the tensor."""

    def prepare(self) -> None:
        """What can be worked out before any block is made. Called by workers that may begin none, or not at all."""

    def fill(self, start: int, out: memoryview) -> None:
        """Puts the bytes from `start` on into `out`. Called from several threads at once."""

    def close(self) -> None:
        """The tensor is done; what was kept for it may go."""

    def stats(self) -> dict[str, Any]:
        """What there is to report of it; kept in the manifest, so that a resumed merge reports all of it."""


def tensor_bytes(source: Source) -> int:
    """Size of the tensor in the output."""
    size = DTYPE_BYTES[source.dtype]
    for n in source.shape:
        size *= n
    return size


def split_rows(shape: tuple[int, ...], row_bytes: int, block_bytes: int | None = None) -> list[tuple[int, int]]:
    """Near-equal (start, length) row ranges of at most `block_bytes` (one row at least); equal, so that no thin rest
    reaches a matrix product's special cases."""
    block_bytes = block_bytes or BLOCK_BYTES
    rows = shape[0] if shape else 1
    count = max(1, min(rows, -(-rows * row_bytes // block_bytes)))
    edges = [rows * i // count for i in range(count + 1)]
    return [(a, b - a) for a, b in itertools.pairwise(edges)]


class Files:
    """Open input files, read by position from any thread."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._open:
                self._open[file] = os.open(file, os.O_RDONLY)
            return self._open[file]

    def read_into(self, info: TensorInfo, start: int, out: memoryview) -> None:
        """Bytes from `start` of a tensor; SurgvqaError when the file ends too early."""
        done = 0
        while done < len(out):
            try:
                got = os.preadv(self._descriptor(info.file), [out[done:]], info.offset + start + done)
            except OSError as error:
                raise SurgvqaError(f"{info.file}: cannot be read: {error.strerror}") from error
            if not got:
                raise SurgvqaError(f"{info.file}: ends inside {info.name}; the file changed while it was read")
            done += got

    def read(self, info: TensorInfo) -> mmap.mmap:
        """The whole tensor, which must not be empty."""
        data = page_memory(info.nbytes)
        with memoryview(data) as view:
            self.read_into(info, 0, view)
        return data

    def close(self) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()


@dataclass
class Copy:
    """A tensor whose bytes go over as they are."""

    name: str
    info: TensorInfo
    files: Files

    @property
    def dtype(self) -> str:
        return self.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    def blocks(self) -> Iterator[tuple[int, int]]:
        for start in range(0, max(1, self.info.nbytes), BLOCK_BYTES):
            yield start, min(BLOCK_BYTES, self.info.nbytes - start)

    def prepare(self) -> None:
        pass

    def fill(self, start: int, out: memoryview) -> None:
        self.files.read_into(self.info, start, out)

    def close(self) -> None:
        pass

    def stats(self) -> dict[str, Any]:
        return {}


@dataclass
class Shard:
    """One file of the output."""

    file: str
    sources: list[Source]
    head: bytes = b""
    nbytes: int = 0

    def __post_init__(self) -> None:
        self.head = header_bytes((s.name, s.dtype, s.shape, tensor_bytes(s)) for s in self.sources)
        self.nbytes = len(self.head) + sum(map(tensor_bytes, self.sources))


def plan_shards(sources: Iterable[Source], max_bytes: int) -> list[Shard]:
    """Sources in their order, in shards of at most `max_bytes` of data (a larger tensor has one to itself).

    Within a shard wider dtypes come first, so that every tensor is aligned to its elements.
    """
    groups: list[list[Source]] = [[]]
    filled = 0
    for source in sources:
        size = tensor_bytes(source)
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(source)
        filled += size
    count = len(groups)
    names = [SINGLE_FILE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return [Shard(n, sorted(group, key=lambda s: -DTYPE_BYTES[s.dtype])) for n, group in zip(names, groups)]


def index_of(shards: list[Shard]) -> dict[str, Any]:
    """model.safetensors.index.json of several shards."""
    return {
        "metadata": {"total_size": sum(tensor_bytes(s) for shard in shards for s in shard.sources)},
        "weight_map": {s.name: shard.file for shard in shards for s in shard.sources},
    }
