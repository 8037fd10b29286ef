"""Files that are whole or not there: written beside, synced, renamed; and their hashes.

Standard library, Python 3.8: it travels to GPU hosts with the agent.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from surgvqa.errors import UsageError
from surgvqa.untrusted import json_kind, not_utf8, parse_json

READ_AT_ONCE = 4 << 20
"""Bytes of one read while a file is hashed."""


def free_bytes(path: Path) -> int:
    """Free disk for an ordinary user where `path` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def sha256_file(file: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Of the whole file, read block by block."""
    digest, buffer = hashlib.sha256(), bytearray(READ_AT_ONCE)
    with open(file, "rb", buffering=0) as stream:
        while got := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:got])
            if on_bytes:
                on_bytes(got)
    return digest.hexdigest()


def fsync_folder(folder: Path) -> None:
    """Makes the names in a folder last."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_synced(file: Path, content: bytes) -> None:
    """Writes a file and waits until it is on the disk."""
    with open(file, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def write_json_atomic(path: Path, document: Any) -> None:
    """Whole or not at all: written beside, fsynced, renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=1, default=str)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_text(file: Path) -> str:
    """A UTF-8 text file, with or without a byte order mark; UsageError when it is missing or something else."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"{file}: no such file") from None
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}, so it cannot be read") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: {not_utf8(error)}") from None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; UsageError when it is missing, damaged or something else."""
    try:
        document = parse_json(read_text(file))
    except ValueError as error:
        raise UsageError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise UsageError(f"{file}: expected a JSON object, found {json_kind(document)}")
    return document
