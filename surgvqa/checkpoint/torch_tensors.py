"""A checkpoint's tensors in torch: dtypes, .bin and .pt files, casts to BF16."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from surgvqa.checkpoint.headers import TensorInfo
from surgvqa.checkpoint.shards import Files, split_rows
from surgvqa.errors import UsageError, first_line

DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class MemoryTensor(TensorInfo):
    """A tensor of a .bin or .pt file, kept in memory (memory-mapped if possible), since these have no plain header."""

    value: torch.Tensor = field(default=None, compare=False)  # type: ignore[assignment]  # always passed


def read_torch_file(file: Path) -> dict[str, TensorInfo]:
    """{name: tensor} of a state dict saved by torch.save. Only tensors are unpickled (weights_only).

    Raises UsageError for a missing file and for anything but a state dict of float tensors.
    """
    try:
        document = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{file}: no such file") from None
    except Exception as error:
        raise UsageError(f"{file}: cannot be loaded as plain weights: {first_line(error)}") from None
    if isinstance(document, torch.Tensor):
        document = {"weight": document}
    if isinstance(document, dict) and isinstance(document.get("state_dict"), dict):
        document = document["state_dict"]
    if not isinstance(document, dict) or not all(isinstance(v, torch.Tensor) for v in document.values()):
        raise UsageError(f"{file}: expected a state dict of tensors")
    found: dict[str, TensorInfo] = {}
    for name, value in document.items():
        if value.dtype not in _NAMES:
            raise UsageError(f"{file}: {name} is {value.dtype}; expected a float tensor")
        value = value.detach().contiguous()
        nbytes = value.numel() * value.element_size()
        found[name] = MemoryTensor(name, _NAMES[value.dtype], tuple(value.shape), file, 0, nbytes, value)
    return found


def load(info: TensorInfo, files: Files) -> torch.Tensor:
    """The whole tensor, on the CPU, in its own dtype."""
    if isinstance(info, MemoryTensor):
        return info.value
    if not info.numel:
        return torch.empty(info.shape, dtype=DTYPES[info.dtype])
    return torch.frombuffer(files.read(info), dtype=DTYPES[info.dtype]).view(info.shape)


class RowSource:
    """A float tensor of the output, always BF16, that is computed in blocks of rows."""

    dtype = "BF16"
    whole = False
    """Whether it must be computed in one block."""

    def __init__(self, name: str, shape: tuple[int, ...]):
        self.name, self.shape = name, shape
        self.row_numel = math.prod(shape[1:]) if shape else 1

    def blocks(self) -> Iterator[tuple[int, int]]:
        row = 2 * self.row_numel
        if self.whole or not row:
            yield 0, 2 * math.prod(self.shape)
            return
        for first, count in split_rows(self.shape, row):
            yield first * row, count * row

    def rows(self, start: int, out: memoryview) -> tuple[int, int, torch.Tensor]:
        """(first row, number of rows, `out` as a BF16 tensor [rows, row_numel])."""
        target = torch.frombuffer(out, dtype=torch.bfloat16).view(-1, self.row_numel)
        return start // (2 * self.row_numel), target.shape[0], target

    def prepare(self) -> None:
        pass

    def close(self) -> None:
        pass


def read_rows(info: TensorInfo, files: Files, first: int, count: int) -> torch.Tensor:
    """`count` elements of a tensor from element `first` on, one-dimensional."""
    dtype = DTYPES[info.dtype]
    if isinstance(info, MemoryTensor):
        return info.value.view(-1)[first : first + count]
    raw = bytearray(count * dtype.itemsize)
    files.read_into(info, first * dtype.itemsize, memoryview(raw))
    return torch.frombuffer(raw, dtype=dtype)


class Cast(RowSource):
    """A float tensor of the base with another dtype, rounded to BF16."""

    def __init__(self, name: str, info: TensorInfo, files: Files):
        super().__init__(name, info.shape)
        self.info, self.files = info, files

    def fill(self, start: int, out: memoryview) -> None:
        if out.nbytes:
            _, _, target = self.rows(start, out)
            target.copy_(read_rows(self.info, self.files, start // 2, target.numel()).view_as(target))

    def stats(self) -> dict[str, Any]:
        return {"what": "cast", "from": self.info.dtype}
