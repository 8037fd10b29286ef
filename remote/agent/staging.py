"""The staging folder of an upload: begins it, publishes it by renames, and removes it.

    <workspace>/.surgvqa/staging/<digest>/   manifest.json, journal (chunks that arrived), tree/<path>, receivers/<pid>,
                                             old (the folder that is being replaced)

An item is as in manifest.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

from remote.agent.files import locked, read_record, sha256_of, walk, write_record, write_whole
from remote.agent.protocol import SMALL
from remote.agent.standing import (
    Places,
    in_place_time,
    item_of,
    ours_of,
    permissions,
    remove_empty,
    settle,
    staged_item,
    staging_of,
    stagings,
    standing,
)
from surgvqa.errors import SurgvqaError
from surgvqa.runs.process import process_identity, signal_exactly


def begin(channel: Any, workspace: str, item: dict[str, Any]) -> dict[str, Any]:
    """Prepares the staging folder of `item` and answers what it already holds.

    "whole": the indices of files that need not be sent. "done": {index: [[offset, length], …]} of incomplete files.
    "removed": bytes of an older upload that this one replaces.
    """
    item = item_of(workspace, item)
    rows, digest = item["files"], item["digest"]
    stands = standing(workspace, item)
    staging = staging_of(workspace, digest)
    if stands["state"] == "complete":
        _end(workspace, item, read_record(workspace, item["name"], item["kind"]).get("old_files", {}))
        settle(workspace, item)
        return {"complete": True, "removed": _supersede(workspace, item)}
    if stands["state"] == "foreign":
        raise SurgvqaError(
            "{} exists in {} and was not made by upload; move it away or choose another name".format(
                ", ".join(stands["foreign"]), workspace
            )
        )
    for folder in ("", "tree", "receivers"):
        os.makedirs(os.path.join(staging, folder), exist_ok=True)
    os.chmod(staging, 0o700)  # until it is published with its own mode, nobody else reads what arrives
    _end_receivers(staging)
    removed = _supersede(workspace, item, staging)
    write_whole(os.path.join(staging, "manifest.json"), item)
    done = _journal(staging, rows)
    linked = []
    needed = set(range(len(rows))) - (stands["in_place"] if item["kind"] == "files" else set())
    for i, source in stands["sources"].items():
        size, target = rows[i][1], staged(staging, rows[i][0])
        if i not in needed or (_is_whole(done.get(i, []), size) and os.path.exists(target)):
            continue
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(target)
        try:
            if os.stat(source).st_mode & 0o777 != permissions(rows[i][4]):
                raise PermissionError  # two links of a file have one mode
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
        done[i] = [(0, size)]
        linked.append((i, 0, size))
    note(staging, linked)
    whole = {i for i in range(len(rows)) if i not in needed or _is_whole(done.get(i, []), rows[i][1])}
    partly = {i: ranges for i, ranges in done.items() if i not in whole}
    missing = sum(rows[i][1] for i in needed - whole) - sum(n for ranges in partly.values() for _, n in ranges)
    free = shutil.disk_usage(staging).free
    if missing > free:
        raise SurgvqaError(
            f"disk full: {missing / 1e9:.2f} GB to come, {free / 1e9:.2f} GB free in {workspace}; "
            "free some space there or choose another workspace"
        )
    return {"complete": False, "whole": sorted(whole), "done": partly, "free": free, "removed": removed}


def begun(workspace: str, digest: str) -> tuple[str, list[list[Any]]]:
    """The staging folder that `begin` made, and the rows of its item."""
    item = staged_item(workspace, digest)
    if item is None:
        raise SurgvqaError("the staging folder of this upload is gone; upload again")
    return staging_of(workspace, digest), item["files"]


def staged(staging: str, path: str) -> str:
    """The path of a file before it is published."""
    return f"{staging}/tree/{path}"


def _is_whole(ranges: list[tuple[int, int]], size: int) -> bool:
    return bool(ranges) and sum(length for _, length in ranges) == size


def _end_receivers(staging: str) -> None:
    """Kills the receivers of a lost connection, which may still write."""
    folder = os.path.join(staging, "receivers")
    for entry in os.listdir(folder) if os.path.isdir(folder) else []:
        path = os.path.join(folder, entry)
        with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
            signal_exactly(int(entry), file.read(), 9)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _journal(staging: str, rows: list[list[Any]]) -> dict[int, list[tuple[int, int]]]:
    """The chunks that arrived, by file. Counts only complete lines of the journal and files that are long enough.

    A small file is hashed again, because no verifier does.
    """
    done: dict[int, dict[int, int]] = {}
    try:
        with open(os.path.join(staging, "journal"), encoding="ascii", errors="replace") as file:
            for line in file:
                words = line.split()
                if line.endswith("\n") and len(words) == 3:
                    with contextlib.suppress(ValueError):
                        i, offset, length = map(int, words)
                        if length < 0:
                            done.pop(i, None)
                        else:
                            done.setdefault(i, {})[offset] = length
    except FileNotFoundError:
        return {}
    kept = {}
    for i, ranges in done.items():
        with contextlib.suppress(OSError, IndexError):
            path, size, sha256, *_ = rows[i]
            file_here = staged(staging, path)
            there = os.path.getsize(file_here)
            if all(offset + length <= min(there, size) for offset, length in ranges.items()) and (
                size > SMALL or sha256_of(file_here) == sha256
            ):
                kept[i] = sorted(ranges.items())
    return kept


def note(staging: str, chunks: list[tuple[int, int, int]]) -> None:
    """Adds chunks to the journal with one write; length -1 forgets the file."""
    descriptor = os.open(os.path.join(staging, "journal"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, "".join(f"{i} {offset} {length}\n" for i, offset, length in chunks).encode())
    finally:
        os.close(descriptor)


def publish(channel: Any, workspace: str, item: dict[str, Any]) -> dict[str, Any]:
    """Renames the verified files to their final names and writes the ready record."""
    with locked(workspace, fcntl.LOCK_SH):
        return _publish(workspace, item_of(workspace, item))


def _publish(workspace: str, item: dict[str, Any]) -> dict[str, Any]:
    name, kind, rows = item["name"], item["kind"], item["files"]
    folder = kind == "folder"
    staging = staging_of(workspace, item["digest"])
    tree, old = os.path.join(staging, "tree"), os.path.join(staging, "old")
    stands = standing(workspace, item)
    if stands["state"] == "foreign":
        raise SurgvqaError(f"{name} was changed by somebody else during the upload; nothing was published")
    here = set() if folder else stands["in_place"]
    files = {path: [size, sha256, mtime_ns, mode] for path, size, sha256, mtime_ns, mode in rows}
    before = read_record(workspace, name, kind)
    ours, place = ours_of(before, kind), Places(workspace, item)
    for i, (path, size, _, mtime_ns, mode) in enumerate(rows):
        if i in here:
            files[path][2] = in_place_time(place(path), mode if path in ours else None)
        else:
            files[path][2] = _finish(staged(staging, path), path, size, mtime_ns, permissions(mode))
    old_files = {**before.get("old_files", {}), **before.get("stale", {}), **before.get("files", {})}
    record = {
        "kind": kind,
        "digest": item["digest"],
        "files": files,
        "adopted": sorted({rows[i][0] for i in here} - ours),
    }
    record["stale"] = {} if folder else {path: entry for path, entry in old_files.items() if path not in files}
    write_record(workspace, name, {**record, "old_files": old_files, "state": "publishing"})
    for path in stands["in_the_way"]:
        if not folder:
            os.unlink(place(path))
            remove_empty(workspace, os.path.dirname(place(path)))
            record["stale"].pop(path, None)
    if folder:
        os.makedirs(os.path.dirname(place.root), exist_ok=True)
        if os.path.lexists(place.root):
            os.rename(place.root, old)
        os.rename(tree, place.root)
    else:
        _move_into(tree, workspace)
    ready = {**record, "state": "ready"}
    replaced = os.path.lexists(old)
    write_record(workspace, name, {**ready, "old_files": old_files} if replaced else ready)
    _end(workspace, item, old_files)
    if replaced:  # until here the record says what `old` may lose, should we be killed while it is removed
        write_record(workspace, name, ready)
    return {"name": name, "files": len(rows)}


def _finish(staged: str, path: str, size: int, mtime_ns: int, mode: int) -> int:
    """Sets the time and permissions of a staged file. Returns its time. Raises SurgvqaError if it is incomplete."""
    try:
        status = os.stat(staged)
    except FileNotFoundError:
        status = None
    if status is None or status.st_size != size:
        raise SurgvqaError(f"{path} did not arrive whole; upload again")
    if status.st_mode & 0o777 != mode:
        os.chmod(staged, mode)
    if status.st_mtime_ns == mtime_ns or status.st_nlink > 1:  # a link to a published file keeps that file's time
        return status.st_mtime_ns
    os.utime(staged, ns=(mtime_ns, mtime_ns))
    return os.stat(staged).st_mtime_ns


def _move_into(source: str, target: str) -> None:
    """Moves the contents of `source` into `target`. A folder that `target` lacks is moved by one rename."""
    with os.scandir(source) as entries:
        names = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_folder in names:
        here, there = os.path.join(source, name), os.path.join(target, name)
        if not is_folder:
            if os.path.exists(there) and os.path.samefile(here, there):
                os.unlink(here)  # rename(2) does nothing between two links of one file
            else:
                os.replace(here, there)
        elif os.path.lexists(there):
            _move_into(here, there)
            os.rmdir(here)
        else:
            os.rename(here, there)


# --- what is left over -----------------------------------------------------------------------------------------------


def _end(workspace: str, item: dict[str, Any], old_files: Any) -> None:
    """Removes the staging folder of a published item, and the files that the item replaced."""
    staging = staging_of(workspace, item["digest"])
    if os.path.isdir(staging):
        discard(staging, old_files)


def discard(staging: str, old_files: Any = ()) -> None:
    """Removes a staging folder. In the replaced folder (`old`) only `old_files` are removed: others are not ours."""
    _end_receivers(staging)
    _remove(os.path.join(staging, "old"), old_files)
    for name in os.listdir(staging):
        path = os.path.join(staging, name)
        if name == "old":
            continue
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                os.unlink(path)
    with contextlib.suppress(OSError):
        os.rmdir(staging)


def is_alive(staging: str) -> bool:
    """Whether a receiver writes into this staging folder."""
    with contextlib.suppress(OSError):
        for entry in os.listdir(os.path.join(staging, "receivers")):
            with contextlib.suppress(OSError, ValueError):
                identity = Path(staging, "receivers", entry).read_text(encoding="utf-8")
                if identity and process_identity(int(entry)) == identity:
                    return True
    return False


def _supersede(workspace: str, item: dict[str, Any], staging: str | None = None) -> int:
    """Removes the staging folders of older contents of the same name. Returns their bytes.

    Complete files are moved to `staging`, if it is given.
    """
    removed = 0
    for digest in stagings(workspace):
        other, folder = staged_item(workspace, digest), staging_of(workspace, digest)
        if digest == item["digest"] or other is None or is_alive(folder):
            continue
        if (other["name"], other["kind"]) == (item["name"], item["kind"]):
            if staging:
                _inherit(staging, item["files"], folder, other["files"])
            removed += size_of(folder)
            discard(folder, read_record(workspace, item["name"], item["kind"]).get("old_files", {}))
    return removed


def _inherit(staging: str, rows: list[list[Any]], other: str, other_rows: list[list[Any]]) -> None:
    done = _journal(other, other_rows)
    whole = {row[2]: row[0] for i, row in enumerate(other_rows) if _is_whole(done.get(i, []), row[1])}
    for i, (path, size, sha256, *_) in enumerate(rows):
        target = staged(staging, path)
        if sha256 in whole and not os.path.lexists(target):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # one of two with the same content
                os.rename(staged(other, whole[sha256]), target)
                note(staging, [(i, 0, size)])


def size_of(folder: str) -> int:
    """Bytes of all files in a folder."""
    total = 0
    for path in walk(folder):
        with contextlib.suppress(OSError):
            total += os.lstat(os.path.join(folder, path)).st_size
    return total


def _remove(root: str, files: Any) -> None:
    """Removes exactly these files below `root`, and the folders that are empty afterwards."""
    for path in files:
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(root, path))
    for folder, _, _ in os.walk(root, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(folder)
