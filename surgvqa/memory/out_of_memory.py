"""An out-of-memory error in figures: what torch says was asked for, allocated and free."""

from __future__ import annotations

import gc
import re
from dataclasses import dataclass

import torch

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
SIZE = r"([\d.]+) (bytes|[KMGT]iB)"
REQUESTED = rf"allocate {SIZE}"
ALLOCATED, UNALLOCATED = rf"{SIZE} is allocated by PyTorch", rf"{SIZE} is reserved by PyTorch but unallocated"
"""Where torch's message has its figures (c10/cuda/CUDACachingAllocator.cpp)."""


@dataclass(frozen=True)
class OutOfMemory:
    """What torch's message says: in one line that fits, and in bytes."""

    text: str
    requested_bytes: int | None
    allocated_bytes: int
    reserved_bytes: int

    @property
    def is_fragmentation(self) -> bool:
        """The allocator held enough free memory, but in no piece that was large enough."""
        free = self.reserved_bytes - self.allocated_bytes
        return self.requested_bytes is not None and free >= self.requested_bytes


def read(error: torch.OutOfMemoryError) -> OutOfMemory:
    """The error in figures. What is allocated and reserved comes from the message where it says so: by the time an
    error is caught, the work that was cut off has let go of some, and the allocator would say too little."""
    message = " ".join(str(error).split("\n")[0].split())
    requested, allocated, unallocated = (size_in(message, where) for where in (REQUESTED, ALLOCATED, UNALLOCATED))
    if allocated is None or unallocated is None:
        allocated, reserved = allocator_bytes()
    else:
        reserved = allocated + unallocated
    if requested is None:
        return OutOfMemory(message, requested, allocated, reserved)
    held = f"; {allocated / 1e9:.1f} GB allocated, {(reserved - allocated) / 1e9:.2f} GB reserved but free"
    return OutOfMemory(
        f"tried to allocate {requested / 1e9:.2f} GB" + (held if reserved else ""), requested, allocated, reserved
    )


def size_in(message: str, where: str) -> int | None:
    """Bytes that stand in torch's message at `where` (`Tried to allocate 2.00 GiB`); None when it does not say."""
    found = re.search(where, message)
    return round(float(found[1]) * UNITS[found[2]]) if found else None


def allocator_bytes() -> tuple[int, int]:
    """(allocated, reserved) by torch's CUDA allocator; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0, 0
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def empty_cache() -> None:
    """Gives everything back that nothing refers to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
