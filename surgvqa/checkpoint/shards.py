"""The shards of a new checkpoint: which tensor is in which file, and where its bytes come from.

A source produces one tensor of the output, block by block. `plan_shards` distributes the sources over files, and
`writer` writes these.
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
BLOCK_BYTES = (4 << 20) - PAGE_BYTES  # several fit into the processor's cache; the buffer of one is two huge pages


def page_memory(length: int) -> mmap.mmap:
    """`length` bytes that start on a page boundary, in huge pages if the system has them.

    The system gets the memory back when it is freed, unlike malloc's, which keeps some for each thread. Huge pages are
    cheaper to fill and to write to the disk.
    """
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
        """In safetensors' spelling."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor in the output."""

    def blocks(self) -> Iterable[tuple[int, int]]:
        """(start, length) in bytes of the blocks that are computed one at a time; in order, they cover the tensor."""

    def prepare(self) -> None:
        """Computes what does not need a block. Called, if at all, by a worker that cannot start a block."""

    def fill(self, start: int, out: memoryview) -> None:
        """Fills `out` with the tensor's bytes from `start` on. Called from several threads at once."""

    def close(self) -> None:
        """Frees what was kept for the tensor, which is complete."""

    def stats(self) -> dict[str, Any]:
        """Figures for the report; kept in the manifest, so that a resumed merge still reports them."""


def tensor_bytes(source: Source) -> int:
    """Size of the tensor in the output."""
    size = DTYPE_BYTES[source.dtype]
    for n in source.shape:
        size *= n
    return size


def split_rows(shape: tuple[int, ...], row_bytes: int, block_bytes: int | None = None) -> list[tuple[int, int]]:
    """(start, length) in rows: ranges of nearly equal length, at most `block_bytes` but at least one row each.

    Equal, because a matrix product has special cases for a thin remainder.
    """
    block_bytes = block_bytes or BLOCK_BYTES
    rows = shape[0] if shape else 1
    count = max(1, min(rows, -(-rows * row_bytes // block_bytes)))
    edges = [rows * i // count for i in range(count + 1)]
    return [(a, b - a) for a, b in itertools.pairwise(edges)]


class Files:
    """Open input files that any thread can read by position."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._open:
                self._open[file] = os.open(file, os.O_RDONLY)
            return self._open[file]

    def read_into(self, info: TensorInfo, start: int, out: memoryview) -> None:
        """Fills `out` with a tensor's bytes from `start` on. Raises SurgvqaError when the file ends too early."""
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
        """All bytes of a tensor, which must not be empty."""
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
    """A tensor whose bytes are copied unchanged."""

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
    """Distributes sources in their order over shards of at most `max_bytes` of data; a larger tensor has its own shard.

    Within a shard, wider dtypes come first, so that every tensor is aligned to its elements.
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
    """The content of model.safetensors.index.json."""
    return {
        "metadata": {"total_size": sum(tensor_bytes(s) for shard in shards for s in shard.sources)},
        "weight_map": {s.name: shard.file for shard in shards for s in shard.sources},
    }
