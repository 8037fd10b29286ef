"""The figures of an out-of-memory error: the bytes that torch says were requested, allocated and free."""

from __future__ import annotations

import gc
import re
from dataclasses import dataclass

import torch

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
SIZE = r"([\d.]+) (bytes|[KMGT]iB)"
REQUESTED = rf"allocate {SIZE}"
ALLOCATED, UNALLOCATED = rf"{SIZE} is allocated by PyTorch", rf"{SIZE} is reserved by PyTorch but unallocated"
"""Patterns of the figures in torch's message (c10/cuda/CUDACachingAllocator.cpp)."""


@dataclass(frozen=True)
class OutOfMemory:
    """The content of torch's message: a short line, and figures in bytes."""

    text: str
    requested_bytes: int | None
    allocated_bytes: int
    reserved_bytes: int

    @property
    def is_fragmentation(self) -> bool:
        """Whether the allocator had enough free memory, but no single block that was large enough."""
        free = self.reserved_bytes - self.allocated_bytes
        return self.requested_bytes is not None and free >= self.requested_bytes


def read(error: torch.OutOfMemoryError) -> OutOfMemory:
    """The figures of an error.

    Allocated and reserved bytes come from the message if it has them: when the error is caught, the interrupted work
    has already freed some memory, and the allocator's own figures would be too low.
    """
    message = " ".join(str(error).split("\n")[0].split())
    requested, allocated, unallocated = (size_in(message, where) for where in (REQUESTED, ALLOCATED, UNALLOCATED))
    if allocated is None or unallocated is None:
        allocated, reserved = allocator_bytes()
    else:
        reserved = allocated + unallocated
    if requested is None:
        return OutOfMemory(message, requested, allocated, reserved)
    in_use = f"; {allocated / 1e9:.1f} GB allocated, {(reserved - allocated) / 1e9:.2f} GB reserved but free"
    return OutOfMemory(
        f"tried to allocate {requested / 1e9:.2f} GB" + (in_use if reserved else ""), requested, allocated, reserved
    )


def size_in(message: str, where: str) -> int | None:
    """Bytes in torch's message where the pattern `where` matches (`Tried to allocate 2.00 GiB`), else None."""
    found = re.search(where, message)
    return round(float(found[1]) * UNITS[found[2]]) if found else None


def allocator_bytes() -> tuple[int, int]:
    """(allocated, reserved) by torch's CUDA allocator; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0, 0
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def empty_cache() -> None:
    """Frees all memory that nothing refers to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
