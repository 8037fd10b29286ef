"""The state of an item on the host: what is already here, what is in its way, and what it no longer contains."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from typing import Any

from remote.agent.files import can_be_names, own, read_record, records, sha256_of, unchanged, walk, within, write_record
from remote.agent.manifest import Wanted, complete, unpack
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.files import open_regular

STALE_NAMED = 100
"""Names of stale files in one answer."""
_received: dict[str, dict[str, Any]] = {}
"""Items by digest that this process has received."""
_hashed: dict[tuple[Any, ...], str] = {}
"""sha256 of files that surgvqa did not make, by path, size, times and inode. One upload needs them twice."""


# --- which item is meant ---------------------------------------------------------------------------------------------


def staging_of(workspace: str, digest: str) -> str:
    if not (isinstance(digest, str) and digest.isalnum()):
        raise UsageError(f"{digest!r} is not a digest")
    return own(workspace, "staging", digest)


def stagings(workspace: str) -> list[str]:
    """The digests of all uploads that are running or were interrupted."""
    with contextlib.suppress(OSError):
        folder = own(workspace, "staging")
        return sorted(e.name for e in os.scandir(folder) if e.name.isalnum() and e.is_dir(follow_symlinks=False))
    return []


def staged_item(workspace: str, digest: str) -> dict[str, Any] | None:
    """The item whose staging folder this is; None for a manifest that is damaged."""
    path = os.path.join(staging_of(workspace, digest), "manifest.json")
    with contextlib.suppress(OSError, ValueError, RecursionError), open_regular(path) as file:
        item = json.loads(file.read())
        return item if _is_item(item) else None
    return None


def _is_item(item: Any) -> bool:
    if not isinstance(item, dict) or not isinstance(item.get("files"), list):
        return False
    types = [str, int, str, int, int]
    rows = all(isinstance(row, list) and [type(part) for part in row] == types for row in item["files"])
    texts = all(isinstance(item.get(key), str) for key in ("name", "digest"))
    known = rows and texts and item.get("kind") in ("folder", "files")
    return known and can_be_names([item["name"], *(row[0] for row in item["files"])])


def item_of(workspace: str, offer: dict[str, Any]) -> dict[str, Any]:
    """The offered item. Raises Wanted while some of its rows are missing here."""
    if "files" in offer:
        return offer  # of this side itself
    digest = offer["digest"]
    if "rows" in offer:
        try:
            sent = unpack(offer["rows"])
        except ValueError:
            raise SurgvqaError(f"{offer['name']}: the list of its files arrived damaged; upload again") from None
        _received[digest] = complete(offer, _published_rows(workspace, offer), sent)
    elif digest not in _received:
        staged = staged_item(workspace, digest)
        _received[digest] = staged or complete(offer, _published_rows(workspace, offer), [])
    return _received[digest]


def _published_rows(workspace: str, offer: dict[str, Any]) -> list[list[Any]]:
    record = read_record(workspace, offer["name"], offer["kind"])
    files = record.get("files", {}).items()
    return [[path, size, sha256, mtime_ns, mode] for path, (size, sha256, mtime_ns, mode) in files]


# --- what is here ----------------------------------------------------------------------------------------------------


class Places:
    """The final paths of an item's files. Each folder is checked once."""

    def __init__(self, workspace: str, item: dict[str, Any]):
        self.workspace = workspace
        self.root = workspace if item["kind"] == "files" else within(workspace, item["name"])
        self.prefix = "" if item["kind"] == "files" else item["name"] + "/"
        self._folders: dict[str, str] = {}

    def __call__(self, path: str) -> str:
        """The final path of a file. Raises as `within` does."""
        folder, _, name = path.rpartition("/")
        if folder not in self._folders or name in ("", ".", "..") or "\0" in name:
            full = within(self.workspace, self.prefix + path)
            self._folders[folder] = os.path.dirname(full)
            return full
        return self._folders[folder] + "/" + name


def published(workspace: str, offer: dict[str, Any]) -> dict[str, Any]:
    """The record of exactly this content, if it was published and no file has changed since; otherwise {}."""
    record = read_record(workspace, offer["name"], offer["kind"])
    if record.get("digest") != offer["digest"] or record.get("state") != "ready":
        return {}
    if os.path.lexists(staging_of(workspace, offer["digest"])):
        return {}  # killed before it had cleaned up: `begin` does the rest
    place = Places(workspace, offer)
    try:
        for path, (size, _, mtime_ns, _) in record["files"].items():
            status = os.stat(place(path))
            if status.st_size != size or status.st_mtime_ns != mtime_ns:
                return {}
    except OSError:
        return {}
    return record if offer["kind"] == "files" or not set(walk(place.root)) - set(record["files"]) else {}


def standing(workspace: str, item: dict[str, Any], checksum: bool = False) -> dict[str, Any]:
    """Which parts of `item` are already here. `checksum`: a published file counts only after it was read again.

    state: complete, partial (some files here), absent, or foreign (something that we did not make lies in its way).
    `sources`: index -> path with the same content; `in_place`: the indices of files that are where they belong;
    `in_the_way`: files of ours to be removed first, since a file became a folder or a folder a file.
    """
    rows, place = item["files"], Places(workspace, item)
    record = read_record(workspace, item["name"], item["kind"])
    if checksum:
        forget_changed(workspace, {sha256 for _, _, sha256, *_ in rows})
        record = read_record(workspace, item["name"], item["kind"])
    _require_names(workspace, item)
    ours = ours_of(record, item["kind"])
    trusted = record["files"] if record.get("state") == "ready" else {}
    sources: dict[int, str] = {}
    in_place: set[int] = set()
    in_the_way: set[str] = set()
    foreign: list[str] = []
    for i, (path, size, sha256, *_) in enumerate(rows if trusted else []):
        known = trusted.get(path)
        if known and known[:2] == [size, sha256] and unchanged(place(path), size, known[2]):
            sources[i] = place(path)
            in_place.add(i)
    elsewhere = _published(workspace, {rows[i][2] for i in range(len(rows)) if i not in in_place})
    folders: dict[str, bool] = {}
    for i, (path, size, sha256, *_) in enumerate(rows):
        if i in in_place:
            continue
        final = place(path)
        if sha256 in elsewhere:
            sources[i] = elsewhere[sha256]
        folder = final.rpartition("/")[0]
        if folder not in folders:
            folders[folder] = os.path.isdir(folder)
            blocking = "" if folders[folder] else _file_above(place.root, path)
            if blocking:
                (in_the_way.add if blocking in ours else foreign.append)(blocking)
        if not folders[folder]:
            continue
        if not os.path.lexists(final):
            continue
        if os.path.isdir(final):
            below = [path + "/" + name for name in walk(final)]
            others = [name for name in below if name not in ours]
            foreign += others or ([] if below else [path])
            in_the_way.update(below)
        elif _same_content(final, size, sha256):  # put here by hand, or by an attempt that broke while it published
            sources[i] = final
            in_place.add(i)
        elif path not in ours:
            foreign.append(path)
    whole = len(in_place) == len(rows)
    if item["kind"] == "folder":
        if os.path.lexists(place.root) and not os.path.isdir(place.root):
            foreign.append(item["name"])
        there = set(walk(place.root))
        extra = there - ours - {row[0] for row in rows}
        whole = whole and not there - {row[0] for row in rows}
        foreign += sorted(extra) if not whole else []
    state = "complete" if whole else "foreign" if foreign else "partial" if sources else "absent"
    return {
        "state": state,
        "sources": sources,
        "in_place": in_place,
        "in_the_way": sorted(in_the_way),
        "foreign": list(dict.fromkeys(foreign))[:5],
    }


def ours_of(record: dict[str, Any], kind: str) -> set[str]:
    """The paths that may be replaced or removed."""
    adopted = record.get("adopted", [])
    if adopted and (kind == "folder" or not isinstance(adopted, list)):
        return set()  # a folder is replaced as a whole
    made = {*record.get("files", {}), *record.get("stale", {}), *record.get("old_files", {})}
    return made - set(adopted or [])


def _require_names(workspace: str, item: dict[str, Any]) -> None:
    """Raises UsageError for a name that is too long for this file system, before anything is sent."""
    below = workspace
    while not os.path.isdir(below):
        below = os.path.dirname(below)
    try:
        longest, longest_path = os.pathconf(below, "PC_NAME_MAX"), os.pathconf(below, "PC_PATH_MAX")
    except (OSError, ValueError):
        longest, longest_path = 255, 4096
    staged = len(os.fsencode(own(workspace, "staging", "0" * 40, "tree"))) + 2
    for path in [item["name"], *(row[0] for row in item["files"])]:
        if len(path) * 4 <= longest and staged + len(path) * 4 < longest_path:
            continue
        for part in path.split("/"):
            if len(os.fsencode(part)) > longest:
                raise UsageError(f"{path}: a name there may have {longest} bytes, {part[:40]}… has more; rename it")
        if staged + len(os.fsencode(path)) >= longest_path:
            raise UsageError(f"{path[:80]}…: the path is too long for this host; shorten it")


def _published(workspace: str, hashes: set[str]) -> dict[str, str]:
    """{sha256: a published and unchanged file with it}."""
    found: dict[str, str] = {}
    for record in records(workspace) if hashes else []:
        if record.get("state") != "ready":
            continue
        place = Places(workspace, record)
        for path, (size, sha256, mtime_ns, _) in record["files"].items():
            if sha256 in hashes and sha256 not in found and unchanged(place(path), size, mtime_ns):
                found[sha256] = place(path)
    return found


def _file_above(root: str, path: str) -> str:
    """The part of `path` that is a file where a folder should be, or ''."""
    parts = path.split("/")
    for count in range(1, len(parts)):
        above = "/".join(parts[:count])
        if os.path.lexists(os.path.join(root, above)) and not os.path.isdir(os.path.join(root, above)):
            return above
    return ""


def _same_content(path: str, size: int, sha256: str) -> bool:
    try:
        status = os.stat(path)
    except OSError:
        return False
    if not stat.S_ISREG(status.st_mode) or status.st_size != size:
        return False
    key = path, size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
    if key not in _hashed:
        _hashed[key] = sha256_of(path)
    return _hashed[key] == sha256


def settle(workspace: str, item: dict[str, Any]) -> None:
    """Writes the ready record of an item whose files are all in place, and sets the permissions of our files."""
    record = read_record(workspace, item["name"], item["kind"])
    if record.get("digest") == item["digest"] and record["state"] == "ready" and not record.get("old_files"):
        return
    ours, place, files = ours_of(record, item["kind"]), Places(workspace, item), {}
    for path, size, sha256, _, mode in item["files"]:
        files[path] = [size, sha256, in_place_time(place(path), mode if path in ours else None), mode]
    stale = {p: e for p, e in {**record.get("stale", {}), **record.get("files", {})}.items() if p not in files}
    found = {"kind": item["kind"], "digest": item["digest"], "state": "ready", "files": files}
    found["stale"] = stale if item["kind"] == "files" else {}
    write_record(workspace, item["name"], {**found, "adopted": sorted(set(files) - ours)})


def in_place_time(path: str, mode: int | None) -> int:
    """The time of a file in its final place. Sets its permissions if `mode` is given."""
    status = os.stat(path)
    if mode is not None and status.st_mode & 0o777 != permissions(mode):
        os.chmod(path, permissions(mode))
    return status.st_mtime_ns


def permissions(mode: int) -> int:
    """The permissions of a file here: its own, and readable by us."""
    return mode & 0o777 | 0o400


def forget_changed(workspace: str, hashes: set[str]) -> None:
    """Reads every published file with one of these hashes; a record of other content no longer counts as untouched."""
    for record in records(workspace):
        place, changed = Places(workspace, record), False
        for path, entry in record["files"].items():
            size, sha256, mtime_ns, _ = entry
            full = place(path)
            if sha256 in hashes and unchanged(full, size, mtime_ns) and sha256_of(full) != sha256:
                entry[2] = -1  # a time that no file has
                changed = True
        if changed:
            write_record(workspace, record["name"], record)


def known(channel: Any, workspace: str, items: list[dict[str, Any]], checksum: bool = False) -> dict[str, Any]:
    """The state of each item here, and the indices of files that need not be sent. Changes nothing.

    `published`: it is complete and recorded, so nothing more need be asked. `stagings`: number of uploads that are
    running or were interrupted, including these.
    """
    answers, wanted = [], {}
    for offer in items:
        record = {} if checksum else published(workspace, offer)
        if record:
            answer: dict[str, Any] = {"state": "complete", "have": [], "foreign": [], "published": True}
            stale, paths = sorted(record["stale"]), record["files"]
        else:
            try:
                item = item_of(workspace, offer)
            except Wanted as missing:
                wanted.update(missing.of)
                continue
            stands = standing(workspace, item, checksum)
            answer = {"state": stands["state"], "have": sorted(stands["sources"]), "foreign": stands["foreign"]}
            stale, paths = sorted(stale_files(workspace, item)), [row[0] for row in item["files"]]
        answer.update(stale=stale[:STALE_NAMED], stale_files=len(stale), replaced=_replaced(paths, stale))
        answers.append(answer)
    if wanted:
        raise Wanted(wanted)
    free = shutil.disk_usage(existing(workspace)).free
    return {"items": answers, "free": free, "stagings": len(stagings(workspace))}


def existing(path: str) -> str:
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


# --- what it no longer contains -------------------------------------------------------------------------------------


def stale_files(workspace: str, item: dict[str, Any]) -> dict[str, Any]:
    """Files that an earlier upload of this set published and that are no longer part of it, as recorded."""
    if item["kind"] != "files":
        return {}  # a folder is replaced as a whole
    kept = {row[0] for row in item["files"]}
    record = read_record(workspace, item["name"], "files")
    recorded = {**record.get("stale", {}), **record.get("files", {})}
    return {path: entry for path, entry in recorded.items() if path not in kept}


def _replaced(paths: Any, stale: Any) -> bool:
    """Whether a stale file differs from a new one only in its extension: a frame would be found twice."""
    if not stale:
        return False
    stems = {os.path.splitext(path)[0] for path in paths}
    return any(os.path.splitext(path)[0] in stems for path in stale)


def retire(channel: Any, workspace: str, item: dict[str, Any], everything: bool) -> dict[str, Any]:
    """Removes stale files of a set: those that a file of another extension has replaced, or `everything` stale.

    Only what the record says that we published, and only while it has the size and the time that we gave it.
    """
    item = item_of(workspace, item)
    record, place = read_record(workspace, item["name"], "files"), Places(workspace, item)
    stems = {os.path.splitext(row[0])[0] for row in item["files"]}
    removed, kept = [], []
    for path, entry in stale_files(workspace, item).items():
        if not everything and os.path.splitext(path)[0] not in stems:
            continue
        full = place(path)
        if os.path.lexists(full):
            if os.path.islink(full) or not unchanged(full, entry[0], entry[2]):
                kept.append(path)
                continue
            os.unlink(full)
            removed.append(path)
        for key in ("files", "stale", "old_files"):
            record.get(key, {}).pop(path, None)
        remove_empty(workspace, os.path.dirname(full))
    if record:
        write_record(workspace, item["name"], record)
    return {"removed": removed[:STALE_NAMED], "removed_files": len(removed), "changed": kept[:STALE_NAMED]}


def remove_empty(workspace: str, folder: str) -> None:
    """Removes an empty folder of the workspace, and the folders above it that are then empty."""
    with contextlib.suppress(OSError):
        while folder != workspace:
            os.rmdir(folder)
            folder = os.path.dirname(folder)
