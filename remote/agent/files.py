"""Files on the host: paths inside the workspace, the records of what was published and merged; and files sent back.

    <workspace>/.surgvqa/ready/<name>.json   what was published under <name>
    <workspace>/.surgvqa/merges/<name>.json  what was merged here for an upload, and from what

A ready record is {"name", "kind", "digest", "state": "ready" | "publishing", "files", "stale", "adopted", "old_files"}.
"files" and "stale" (published once, and no longer part of the upload) map paths to [size, sha256, mtime_ns, mode];
"adopted" lists files that were put here by hand. Only what a record lists as made here is ever replaced or removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import quote, unquote

from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.files import open_regular

LONGEST_NAME = 200
"""Characters of a record's file name at most: file systems take 255 bytes with its ending."""
BLOCK = 256 << 10  # stays in the processor's cache between reading and hashing


def within(workspace: str, path: str) -> str:
    """The full path of `path`, which stays below the workspace even when its folders' symlinks are followed."""
    parts = path.split("/")
    if not path or path.startswith("/") or "\0" in path or any(p in ("", ".", "..") for p in parts):
        raise UsageError(f"path {path!r} does not stay inside the workspace")
    full = os.path.join(workspace, path)
    parent = os.path.realpath(os.path.dirname(full))
    if parent != workspace and not parent.startswith(workspace + "/"):
        raise SurgvqaError(f"{path}: leaves the workspace {workspace} through a symlink")
    return full


def own(workspace: str, *parts: str) -> str:
    return os.path.join(workspace, ".surgvqa", *parts)


def _record_path(workspace: str, name: str, kind: str) -> str:
    """A folder may have the name of a set of files: ":" keeps the two apart, and quote() escapes it in names."""
    return own(workspace, "ready", ("" if kind == "folder" else kind + ":") + file_name(name) + ".json")


def file_name(name: str) -> str:
    """A unique file name for each name in the workspace, however long and in any alphabet."""
    quoted = quote(name, safe="", errors="surrogateescape")
    if len(quoted) <= LONGEST_NAME:
        return quoted
    return quoted[: LONGEST_NAME - 34] + "--" + hashlib.sha256(quoted.encode()).hexdigest()[:32]


def read_record(workspace: str, name: str, kind: str = "folder") -> dict[str, Any]:
    """The ready record of the folder or the set of files `name`, or {}."""
    for path in (_record_path(workspace, name, kind), _record_path(workspace, name, "folder")):  # the older place
        found = _read(path)
        if found and found.get("kind", "folder") == kind:
            return found
    return {}


def write_record(workspace: str, name: str, record: dict[str, Any]) -> None:
    """Writes the ready record of `name`."""
    kind = record.get("kind", "folder")
    write_whole(_record_path(workspace, name, kind), {"name": name, **record})
    older = _record_path(workspace, name, "folder")
    if kind != "folder" and _read(older).get("kind") == kind:
        os.unlink(older)


def forget_record(workspace: str, name: str, kind: str = "folder") -> None:
    """Removes the ready record of `name`, which is no longer here."""
    for path in (_record_path(workspace, name, kind), _record_path(workspace, name, "folder")):
        if _read(path).get("kind", "folder") == kind:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


@contextlib.contextmanager
def locked(workspace: str, how: int) -> Iterator[None]:
    """Keeps launches and publications (fcntl.LOCK_SH) apart from removals (LOCK_EX), if the file system has locks.

    The lock ends with this process.
    """
    if not os.path.isdir(own(workspace)):
        yield
        return
    descriptor = os.open(own(workspace, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)


def _read(path: str) -> dict[str, Any]:
    """A ready record, or {} for anything else. Malformed entries are left out."""
    try:
        with open_regular(path) as file:
            found = json.loads(file.read())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict) or not isinstance(found.get("files"), dict):
        return {}
    if not isinstance(found.get("name", ""), str) or found.get("kind", "folder") not in ("folder", "files"):
        return {}
    if not can_be_names([found.get("name", ""), *found["files"]]):
        return {}
    for key in ("files", "stale", "old_files"):
        entries = found.get(key, {})
        entries = entries.items() if isinstance(entries, dict) else ()
        good = {path: entry for path, entry in entries if _is_entry(entry)}
        good = good if key == "files" or can_be_names(good) else {}
        found[key] = {path: entry if len(entry) == 4 else [*entry, None] for path, entry in good.items()}
    return found


def can_be_names(names: Iterable[str]) -> bool:
    """Whether files could have all these names. Half of a surrogate pair is in no file name."""
    try:
        os.fsencode("".join(names))
    except UnicodeEncodeError:
        return False
    return True


def _is_entry(entry: Any) -> bool:
    """Older records have no mode."""
    if not isinstance(entry, list) or len(entry) not in (3, 4):
        return False
    return isinstance(entry[0], int) and isinstance(entry[1], str) and isinstance(entry[2], int)


def unfinished(workspace: str, paths: list[str]) -> str | None:
    """The first of these paths that contains, or lies in, something whose publication was interrupted."""
    for record in records(workspace):
        if record.get("state") != "publishing":
            continue
        published = [record["name"]] if record["kind"] == "folder" else record["files"]
        for path in paths:
            if any((there + "/").startswith(path + "/") or path.startswith(there + "/") for there in published):
                return path
    return None


def write_whole(path: str, record: dict[str, Any]) -> None:
    """Whole or not at all."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(record))  # which is three times as fast as json.dump
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def records(workspace: str) -> list[dict[str, Any]]:
    """Every ready record."""
    found = []
    with contextlib.suppress(OSError):
        for entry in sorted(os.listdir(own(workspace, "ready"))):
            record = _read(own(workspace, "ready", entry))
            if record:
                name = unquote(entry[: -len(".json")], errors="surrogateescape")
                found.append({"kind": "folder", "name": name, **record})
    return found


def sha256_of(path: str) -> str:
    """The sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        buffer = memoryview(bytearray(BLOCK))
        while True:
            got = file.readinto(buffer)
            if not got:
                return digest.hexdigest()
            digest.update(buffer[:got])


def unchanged(path: str | os.PathLike[str], size: int, mtime_ns: int) -> bool:
    try:
        stat = os.stat(path)
    except OSError:
        return False
    return stat.st_size == size and stat.st_mtime_ns == mtime_ns


def walk(root: str) -> list[str]:
    """All files below a folder, relative to it. Skips folders that are links or that we may not read."""
    found, waiting = [], [""]
    while waiting:
        below = waiting.pop()
        with contextlib.suppress(OSError), os.scandir(f"{root}/{below}") as entries:
            for entry in entries:
                if not entry.is_dir():
                    found.append(below + entry.name)
                elif not entry.is_symlink():
                    waiting.append(f"{below}{entry.name}/")
    return found


# --- merges ----------------------------------------------------------------------------------------------------------


def _merge_inputs(workspace: str, stage1: str, adapter: str) -> list[Any] | None:
    """Path and sha256 of every file of both folders. None if one is not here as it was published."""
    found = []
    for name in (stage1, adapter):
        record = read_record(workspace, name)
        if record.get("state") != "ready" or record.get("kind") != "folder":
            return None
        for path, (size, sha256, mtime_ns, _) in sorted(record["files"].items()):
            if not unchanged(within(workspace, name + "/" + path), size, mtime_ns):
                return None
            found.append([name, path, sha256])
    return found


def _sizes_and_times(folder: str) -> dict[str, Any]:
    stats = {path: os.stat(os.path.join(folder, path)) for path in walk(folder)}
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}


def merged(channel: Any, workspace: str, stage1: str, adapter: str, output: str) -> dict[str, Any]:
    """Whether `output` is unchanged since `note_merge` recorded it for the same content of both folders."""
    try:
        with open(own(workspace, "merges", file_name(output) + ".json"), encoding="utf-8") as file:
            noted = json.load(file)
        now = _sizes_and_times(within(workspace, output))
    except (OSError, ValueError):
        return {"same": False}
    same = bool(now) and noted == {"inputs": _merge_inputs(workspace, stage1, adapter), "files": now}
    return {"same": same}


def note_merge(channel: Any, workspace: str, stage1: str, adapter: str, output: str) -> dict[str, Any]:
    """Records the inputs of a successful merge here, and the sizes and times of its files."""
    inputs = _merge_inputs(workspace, stage1, adapter)
    if inputs is not None:  # else somebody changes them: merged anew the next time
        noted = {"inputs": inputs, "files": _sizes_and_times(within(workspace, output))}
        write_whole(own(workspace, "merges", file_name(output) + ".json"), noted)
    return {}


# --- sending back ----------------------------------------------------------------------------------------------------


def listing(channel: Any, workspace: str, folder: str) -> dict[str, Any]:
    """Every file below a folder of the workspace: path, size, mtime."""
    root = within(workspace, folder)
    if not os.path.isdir(root):
        raise UsageError(f"no folder {folder} in {workspace}")
    found = []
    for path in sorted(walk(root)):
        full = os.path.join(root, path)
        if os.path.isfile(full) and not os.path.islink(full):
            with contextlib.suppress(FileNotFoundError):  # a run that goes on rotates its checkpoints
                stat = os.stat(full)
                found.append([path, stat.st_size, stat.st_mtime_ns])
    return {"files": found}


def send(channel: Any, workspace: str, folder: str, wanted: list[Any]) -> dict[str, Any]:
    """Sends files from given offsets: {"path", "offset", "size"}, the bytes, then {"path", "sha256"} of the whole.

    `wanted`: [path, offset, size as listed]; of a file that has grown since, as much as was listed. {"path", "gone":
    true} for one that is there no more.
    """
    root = within(workspace, folder)
    for path, offset, listed in wanted:
        digest = hashlib.sha256()
        try:
            source = open_regular(within(root, path))
        except FileNotFoundError:
            channel.say({"path": path, "gone": True})
            continue
        with source as file:
            size = min(listed, os.fstat(file.fileno()).st_size)
            offset = offset if offset <= size else 0
            channel.say({"path": path, "offset": offset, "size": size})
            at = 0
            while at < size:
                block = file.read(min(BLOCK, (offset if at < offset else size) - at))
                if not block:
                    raise SurgvqaError(f"{path} became shorter while it was sent")
                digest.update(block)
                if at >= offset:
                    channel.write(block)
                at += len(block)
        channel.say({"path": path, "sha256": digest.hexdigest()})
    return {}
