"""Reads and writes safetensors headers.

A safetensors file is 8 bytes (little-endian length), a JSON header {name: {dtype, shape, data_offsets}}, then the data
(https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgvqa.untrusted import json_kind, load_json, printable

META = "__metadata__"
MAX_HEADER_BYTES = 32_000_000
"""More than MAX_TENSORS need. The format's own limit of 100 MB could become gigabytes of Python objects."""
MAX_TENSORS = 50_000
"""The real model has 1,300."""
MAX_NAME, MAX_DIMENSIONS, MAX_SIZE = 500, 8, 1 << 48
"""Limits for a tensor: length of its name, number of dimensions, and each size or byte offset."""
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "C64": 8, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
LFS_POINTER = b"version https://git-lfs"
FLOAT_DTYPES = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor in one file."""

    name: str
    """The name in the file."""
    dtype: str
    """In safetensors' spelling: BF16, F16, F32, …"""
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Position of its first byte in the file."""
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_header(file: Path) -> tuple[dict[str, TensorInfo], list[str]]:
    """The tensors of one safetensors file, and what is wrong with it: one line per problem, which names the file.

    A file whose header cannot be read, or is too large, gives no tensors and one problem.
    """
    try:
        if not file.is_file():
            return {}, [f"{file}: {no_file(file)}"]
        size = file.stat().st_size
        with open(file, "rb") as stream:
            first = stream.read(8)
            if first == LFS_POINTER[:8] and stream.read(len(LFS_POINTER) - 8) == LFS_POINTER[8:]:
                return {}, [f"{file}: a git-LFS pointer, not the weights; fetch them with `git lfs pull`"]
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length > size - 8:
                return {}, [f"{file}: truncated, or not a safetensors file ({size} bytes)"]
            if length > MAX_HEADER_BYTES:
                return {}, [f"{file}: a header of {length} bytes, expected {MAX_HEADER_BYTES} at most"]
            text = stream.read(length)
        if (count := text.count(b'"data_offsets"')) > MAX_TENSORS:
            return {}, [f"{file}: {count} tensors in its header, expected {MAX_TENSORS} at most"]
        document = load_json(text)
        if not isinstance(document, dict):
            return {}, [f"{file}: damaged header: expected an object, found {json_kind(document)}"]
        entries = [_entry(name, fields) for name, fields in document.items() if name != META]
    except OSError as error:
        return {}, [f"{file}: cannot be read: {error.strerror}"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, [f"{file}: damaged header: {printable(str(error))[:200]}"]

    problems, data = [], 8 + length
    end_of_last, last = 0, ""
    for name, dtype, shape, begin, end in sorted(entries, key=lambda e: (e[3], e[4])):
        if dtype not in DTYPE_BYTES:
            problems.append(f"{file}: {name}: unknown dtype {dtype}")
        elif end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
            wanted = math.prod(shape) * DTYPE_BYTES[dtype]
            problems.append(f"{file}: {name}: {end - begin} bytes, but {dtype} {list(shape)} needs {wanted}")
        if begin < end_of_last:
            problems.append(f"{file}: {name}: overlaps the data of {last}")
        elif begin > end_of_last:
            problems.append(f"{file}: {begin - end_of_last} bytes that belong to no tensor before {name}")
        if data + end > size:
            problems.append(f"{file}: {name}: truncated: data ends at byte {data + end}, the file at {size}")
        end_of_last, last = max(end_of_last, end), name
    if entries and data + end_of_last < size:
        problems.append(f"{file}: {size - data - end_of_last} bytes after the last tensor")
    tensors = {
        n: TensorInfo(n, dtype, shape, file, data + begin, end - begin) for n, dtype, shape, begin, end in entries
    }
    return tensors, problems


def no_file(file: Path) -> str:
    """Why a path is not a regular file, as a message."""
    if file.is_symlink() and not file.exists():
        return "a broken link"
    return "not a regular file" if file.exists() else "missing"


def _entry(name: str, fields: Any) -> tuple[str, str, tuple[int, ...], int, int]:
    """(name, dtype, shape, begin, end) of one tensor in a header. Raises ValueError, KeyError or TypeError if invalid.

    Names and numbers are bounded, so that none can fill a screen or the memory.
    """
    if len(name) > MAX_NAME or printable(name) != name:
        raise ValueError(f"{name[:60]!r}: not a valid tensor name")
    dtype, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    numbers = (*shape[: MAX_DIMENSIONS + 1], begin, end)
    if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n <= MAX_SIZE for n in numbers):
        raise ValueError(f"{name}: a shape or offset that is negative, fractional or too large")
    if not isinstance(dtype, str):
        raise ValueError(f"{name}: dtype is {str(dtype)[:20]!r}")
    return name, dtype[:20], shape, begin, end


def header_bytes(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """Length and header of a safetensors file whose tensors (name, dtype, shape, nbytes) follow each other in order."""
    document: dict[str, Any] = {META: {"format": "pt"}}
    offset = 0
    for name, dtype, shape, nbytes in tensors:
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8
    return len(text).to_bytes(8, "little") + text
