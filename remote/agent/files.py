"""Files on the host: what was published under which name, what of an upload is here already; and files sent back.

    <workspace>/.surgvqa/ready/<name>.json   what was published under <name>: digest, files with size, sha256, mtime
    <workspace>/.surgvqa/merges/<name>.json  what was merged here for an upload, and from what

An *item* is {"name", "kind": "folder" | "files", "digest", "files": [[path, size, sha256, mtime_ns], …]}. A folder is
published by one rename; files (JSONL, frames, audio) one by one into the workspace (staging.py does both). Only what a
ready record lists as made here is ever replaced or removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from typing import Any
from urllib.parse import quote, unquote

from surgvqa.errors import SurgvqaError, UsageError

STALE_NAMED = 100
"""Names of stale files in one answer."""
BLOCK = 256 << 10  # stays in the processor's cache between reading and hashing


def within(workspace: str, path: str) -> str:
    """`path` below the workspace, also after its folders' symlinks are followed."""
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
    return own(workspace, "ready", ("" if kind == "folder" else kind + ":") + quote(name, safe="") + ".json")


def read_record(workspace: str, name: str, kind: str = "folder") -> dict[str, Any]:
    """The ready record of the folder or the set of files `name`, {} when there is none."""
    for path in (_record_path(workspace, name, kind), _record_path(workspace, name, "folder")):  # the older place
        found = _read(path)
        if found and found.get("kind", "folder") == kind:
            return found
    return {}


def write_record(workspace: str, name: str, record: dict[str, Any]) -> None:
    """What was published under `name`."""
    kind = record.get("kind", "folder")
    _write(_record_path(workspace, name, kind), {"name": name, **record})
    older = _record_path(workspace, name, "folder")
    if kind != "folder" and _read(older).get("kind") == kind:
        os.unlink(older)


def _read(path: str) -> dict[str, Any]:
    """A record; {} for what is none."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def unfinished(workspace: str, paths: list[str]) -> str | None:
    """The first of these paths of the workspace that holds, or lies in, what was not published to the end."""
    for record in records(workspace):
        if record.get("state") != "publishing":
            continue
        published = [record.get("name", "")] if record.get("kind", "folder") == "folder" else record["files"]
        for path in paths:
            if any((there + "/").startswith(path + "/") or path.startswith(there + "/") for there in published):
                return path
    return None


def _write(path: str, record: dict[str, Any]) -> None:
    """Whole or not at all."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(record, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def records(workspace: str) -> list[dict[str, Any]]:
    """Every ready record."""
    found = []
    with contextlib.suppress(OSError):
        for entry in sorted(os.listdir(own(workspace, "ready"))):
            record = _read(own(workspace, "ready", entry))
            if isinstance(record.get("files"), dict):
                found.append({"name": unquote(entry[: -len(".json")]), **record})
    return found


def sha256_of(path: str) -> str:
    """Of a whole file."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        buffer = memoryview(bytearray(BLOCK))
        while True:
            got = file.readinto(buffer)
            if not got:
                return digest.hexdigest()
            digest.update(buffer[:got])


def unchanged(path: str, size: int, mtime_ns: int) -> bool:
    try:
        stat = os.stat(path)
    except OSError:
        return False
    return stat.st_size == size and stat.st_mtime_ns == mtime_ns


def final_path(workspace: str, item: dict[str, Any], path: str) -> str:
    return within(workspace, path if item["kind"] == "files" else item["name"] + "/" + path)


def standing(workspace: str, item: dict[str, Any], checksum: bool = False) -> dict[str, Any]:
    """What of `item` is here already. `checksum`: a published file counts only after it was read again.

    state: complete (published and untouched, or found by hash), partial (some files here), absent, or foreign
    (something else lies under the final name that we did not make). `sources`: index -> path with the same content.
    """
    entries = item["files"]
    finals = [final_path(workspace, item, path) for path, *_ in entries]
    record = read_record(workspace, item["name"], item["kind"])
    adopted = bool(record.get("adopted"))
    ours = set() if adopted else set(record.get("files", {})) | set(record.get("old_files", {}))
    if checksum:
        forget_changed(workspace, {sha256 for _, _, sha256, _ in entries})
    published: dict[str, str] = {}  # sha256 -> path
    for other in records(workspace):
        for path, (size, sha256, mtime_ns) in other["files"].items():
            full = final_path(workspace, other, path)
            if other.get("state") == "ready" and unchanged(full, size, mtime_ns):
                published[sha256] = full
    sources: dict[int, str] = {}
    in_place, foreign = set(), []
    for i, (path, size, sha256, _) in enumerate(entries):
        final, source = finals[i], published.get(sha256)
        if source and os.path.getsize(source) == size:
            sources[i] = source
        if source and os.path.exists(final) and os.path.samefile(source, final):
            in_place.add(i)
        elif os.path.isfile(final) and os.path.getsize(final) == size and sha256_of(final) == sha256:
            sources[i] = final  # put here by hand, or by an attempt that broke while it published
            in_place.add(i)
        elif os.path.lexists(final) and path not in ours:
            foreign.append(path)
    whole = len(in_place) == len(entries)
    if item["kind"] == "folder":
        root = os.path.join(workspace, item["name"])
        extra = set(walk(root)) - ours - {e[0] for e in entries}
        whole = whole and not set(walk(root)) - {e[0] for e in entries}
        foreign += sorted(extra) if not whole else []
    if whole and (record.get("digest") != item["digest"] or record["state"] != "ready"):
        kept = record.get("files", {}) if item["kind"] == "files" else {}
        listed = {e[0]: [e[1], e[2], os.stat(f).st_mtime_ns] for e, f in zip(entries, finals)}
        by_hand = adopted or not {e[0] for e in entries} <= ours
        record = {"kind": item["kind"], "digest": item["digest"], "state": "ready", "adopted": by_hand}
        write_record(workspace, item["name"], {**record, "files": {**kept, **listed}})
    state = "complete" if whole else "foreign" if foreign else "partial" if sources else "absent"
    return {"state": state, "sources": sources, "foreign": foreign[:5]}


def forget_changed(workspace: str, hashes: set[str]) -> None:
    """Reads every published file with one of these hashes; a record of other content no longer counts as untouched."""
    for record in records(workspace):
        for path, entry in record["files"].items():
            size, sha256, mtime_ns = entry
            full = final_path(workspace, record, path)
            if sha256 in hashes and unchanged(full, size, mtime_ns) and sha256_of(full) != sha256:
                entry[2] = -1  # a time that no file has
                record.setdefault("changed", True)
        if record.pop("changed", False):
            write_record(workspace, record["name"], record)


def walk(root: str) -> list[str]:
    found = []
    for folder, _, names in os.walk(root):
        found += [os.path.relpath(os.path.join(folder, n), root) for n in names]
    return found


def known(channel: Any, workspace: str, items: list[dict[str, Any]], checksum: bool = False) -> dict[str, Any]:
    """For each item: its state here and the indices of the files that need not be sent."""
    answers = []
    for item in items:
        stands = standing(workspace, item, checksum)
        answer: dict[str, Any] = {
            "state": stands["state"],
            "have": sorted(stands["sources"]),
            "foreign": stands["foreign"],
        }
        stale = sorted(_stale(workspace, item))
        answer.update(stale=stale[:STALE_NAMED], stale_files=len(stale), replaced=_replaced(item, stale))
        answers.append(answer)
    return {"items": answers, "free": shutil.disk_usage(existing(workspace)).free}


def _stale(workspace: str, item: dict[str, Any]) -> list[str]:
    """Files that an upload of this set of files once published and that it holds no more."""
    if item["kind"] != "files":
        return []  # a folder is replaced as a whole
    kept = {path for path, *_ in item["files"]}
    return [path for path in read_record(workspace, item["name"], "files").get("files", {}) if path not in kept]


def _replaced(item: dict[str, Any], stale: list[str]) -> bool:
    """Whether one of the stale files has the name of a new one but for its extension: a frame would be found twice."""
    stems = {os.path.splitext(path)[0] for path, *_ in item["files"]}
    return any(os.path.splitext(path)[0] in stems for path in stale)


def retire(channel: Any, workspace: str, item: dict[str, Any], everything: bool) -> dict[str, Any]:
    """Removes stale files of a set: those that a file of another extension has replaced, or `everything` stale.

    Only what the record says that we published, and only while it has the size and the time that we gave it.
    """
    record = read_record(workspace, item["name"], "files")
    stems = {os.path.splitext(path)[0] for path, *_ in item["files"]}
    removed, kept = [], []
    for path in _stale(workspace, item):
        if not everything and os.path.splitext(path)[0] not in stems:
            continue
        full = final_path(workspace, item, path)
        size, _, mtime_ns = record["files"][path]
        if os.path.lexists(full):
            if os.path.islink(full) or not unchanged(full, size, mtime_ns):
                kept.append(path)
                continue
            os.unlink(full)
            removed.append(path)
        del record["files"][path]
        record.get("old_files", {}).pop(path, None)
        folder = os.path.dirname(full)
        with contextlib.suppress(OSError):
            while folder != workspace:
                os.rmdir(folder)
                folder = os.path.dirname(folder)
    if record:
        write_record(workspace, item["name"], record)
    return {"removed": removed[:STALE_NAMED], "removed_files": len(removed), "changed": kept[:STALE_NAMED]}


def existing(path: str) -> str:
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


# --- merges ----------------------------------------------------------------------------------------------------------


def _merge_inputs(workspace: str, stage1: str, adapter: str) -> list[Any] | None:
    """Path and sha256 of every file of both folders; None when one is not here as it was published."""
    found = []
    for name in (stage1, adapter):
        record = read_record(workspace, name)
        if record.get("state") != "ready" or record.get("kind") != "folder":
            return None
        for path, (size, sha256, mtime_ns) in sorted(record["files"].items()):
            if not unchanged(final_path(workspace, record, path), size, mtime_ns):
                return None
            found.append([name, path, sha256])
    return found


def _sizes_and_times(folder: str) -> dict[str, Any]:
    stats = {path: os.stat(os.path.join(folder, path)) for path in walk(folder)}
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}


def merged(channel: Any, workspace: str, stage1: str, adapter: str, output: str) -> dict[str, Any]:
    """Whether `output` is, untouched, what `note_merge` noted for the same content of both folders."""
    try:
        with open(own(workspace, "merges", quote(output, safe="") + ".json"), encoding="utf-8") as file:
            noted = json.load(file)
        now = _sizes_and_times(within(workspace, output))
    except (OSError, ValueError):
        return {"same": False}
    same = bool(now) and noted == {"inputs": _merge_inputs(workspace, stage1, adapter), "files": now}
    return {"same": same}


def note_merge(channel: Any, workspace: str, stage1: str, adapter: str, output: str) -> dict[str, Any]:
    """After a merge here that ended well: notes what it was made from, and its files' sizes and times."""
    inputs = _merge_inputs(workspace, stage1, adapter)
    if inputs is not None:  # else somebody changes them: merged anew the next time
        noted = {"inputs": inputs, "files": _sizes_and_times(within(workspace, output))}
        _write(own(workspace, "merges", quote(output, safe="") + ".json"), noted)
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
            source = open(within(root, path), "rb", buffering=0)  # noqa: SIM115
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
