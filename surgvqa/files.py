"""Reads, hashes and atomically writes files.

Standard library and Python 3.8 only, because the agent uses this module on GPU hosts.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from surgvqa.errors import UsageError
from surgvqa.untrusted import json_kind, not_utf8, parse_json

READ_AT_ONCE = 4 << 20
"""Bytes per read while hashing a file."""


USER_FOLDERS = {"config": ".config", "state": ".local/state", "cache": ".cache"}


def user_folder(kind: str) -> Path:
    """The folder of surgvqa's own files for this user (XDG Base Directory Specification).

    `kind`: "config", "state" or "cache".
    """
    chosen = os.environ.get(f"XDG_{kind.upper()}_HOME") or ""
    return (Path(chosen) if os.path.isabs(chosen) else Path.home() / USER_FOLDERS[kind]) / "surgvqa"


def free_bytes(path: Path) -> int:
    """Bytes that an ordinary user can still write on the disk where `path` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def sha256_file(file: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """The sha256 of a file in hexadecimal. `on_bytes` is called with the size of each block read."""
    digest, buffer = hashlib.sha256(), bytearray(READ_AT_ONCE)
    with open(file, "rb", buffering=0) as stream:
        while got := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:got])
            if on_bytes:
                on_bytes(got)
    return digest.hexdigest()


def open_regular(file: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file for reading.

    Raises OSError for anything else: a FIFO could block its reader for ever, and a device may have no end.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no regular file", os.fspath(file))
    return open(descriptor, "rb")


def fsync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
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
    """Writes `document` completely or not at all: writes a temporary file, fsyncs it and renames it to `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=1, default=str)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, without its byte order mark. Raises UsageError if it is missing or not text."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"{file}: no such file") from None
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}, so it cannot be read") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: {not_utf8(error)}") from None


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UsageError if the file is missing or does not contain a JSON object."""
    try:
        document = parse_json(read_text(file))
    except ValueError as error:
        raise UsageError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise UsageError(f"{file}: expected a JSON object, found {json_kind(document)}")
    return document
