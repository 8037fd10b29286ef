"""What lies on the host's disk, and the removal of what is ours, by name.

A *lot* is one thing there: a checkpoint or data that was published or merged here, a run, an interrupted upload, the
environment, a cache. What we did not make is "unknown": it is measured, never touched. A folder that is removed goes to
<workspace>/.surgvqa/removed/ by one rename first, so that a removal that is killed leaves nothing half there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Callable
from urllib.parse import unquote

from remote.agent import staging
from remote.agent.files import forget_record, locked, own, read_record, records, unchanged, walk, within, write_record
from remote.agent.standing import Places, existing, ours_of, remove_empty, staged_item, staging_of, stagings
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.files import user_folder
from surgvqa.runs import history
from surgvqa.runs.process import job_processes
from surgvqa.runs.state import read_run_json
from surgvqa.untrusted import parse_object

MAX_LOTS = 1000
"""Lots in one answer, the largest first."""
LONGEST_S = 60.0
MOST_FILES = 3_000_000
"""A look at the disk ends after so long or so many files; its figures are then marked as not complete."""
NAMED = 3
STAGING = "staging"
CACHED = ("in_use.lock", "hashes.json", "answers")


@dataclass
class Lot:
    """One thing on the disk. `roots`: the folders and files that it consists of."""

    name: str
    kind: str
    roots: list[str]
    remove: Callable[[], None] | None = None
    """None: it is not ours to remove."""
    note: str = ""
    files: frozenset[str] = field(default_factory=frozenset)
    """The files that are ours in a folder where others may lie; empty: all of it is."""
    used_by: str = ""
    """The run or the upload that works with it."""


class Meter:
    """Adds up what the disk holds: a file with several names once, and no more of it than time allows."""

    def __init__(self) -> None:
        self.deadline, self.left = time.monotonic() + LONGEST_S, MOST_FILES
        self.complete = True
        self._seen: set[tuple[int, int]] = set()

    def measure(self, roots: Iterable[str], without: Iterable[str] = ()) -> dict[str, Any]:
        """{"bytes", "files", "newest"} of these folders and files: bytes as the disk has them allocated, the time of
        the newest file. Links are not followed."""
        waiting, without = list(roots), set(without)
        total, files, newest = 0, 0, 0.0
        while waiting:
            path = waiting.pop()
            if path in without:
                continue
            self.left -= 1
            if self.left < 0 or time.monotonic() > self.deadline:
                self.complete = False
                break
            try:
                status = os.lstat(path)
                if stat.S_ISDIR(status.st_mode):
                    with os.scandir(path) as entries:
                        for entry in entries:
                            waiting.append(entry.path)
                            if len(waiting) > self.left:
                                self.complete = False
                                break
                    continue
            except OSError:  # gone meanwhile, or not for us to read
                continue
            files, newest = files + 1, max(newest, status.st_mtime)
            key = status.st_dev, status.st_ino
            if status.st_nlink == 1 or key not in self._seen:
                total += status.st_blocks * 512
                self._seen.add(key)
        return {"bytes": total, "files": files, "newest": newest}


def disk(channel: Any, workspace: str, venv: str) -> dict[str, Any]:
    """Every lot of the workspace and of our caches, with what the file system has left."""
    meter, now, there = Meter(), time.time(), list(lots(workspace, venv))
    rows = [_row(lot, meter.measure(lot.files or lot.roots), now) for lot in there]
    rows += [_row(lot, found, now) for lot, found in _unknown(workspace, there, meter)]
    rows.sort(key=lambda row: (-row["bytes"], row["name"]))
    usage = shutil.disk_usage(existing(workspace))
    return {
        "workspace": workspace,
        "free_bytes": usage.free,
        "total_bytes": usage.total,
        "entries": rows[:MAX_LOTS],
        "more": len(rows[MAX_LOTS:]),
        "complete": meter.complete,
    }


def _row(lot: Lot, found: dict[str, Any], now: float) -> dict[str, Any]:
    return {
        "name": lot.name,
        "kind": lot.kind,
        "bytes": found["bytes"],
        "files": found["files"],
        "age_s": max(0.0, now - found["newest"]) if found["newest"] else None,
        "ours": lot.remove is not None,
        "in_use": lot.used_by,
        "note": lot.note,
    }


def clean(channel: Any, workspace: str, venv: str, names: list[str], again: bool = False) -> dict[str, Any]:
    """Removes lots by name; "staging" stands for every interrupted upload. All names are looked at before the first is
    removed: UsageError for an unknown one or one not ours, SurgvqaError for one that is in use. `again`: the answer was
    lost, so what is gone was removed."""
    with locked(workspace, fcntl.LOCK_EX):
        chosen = _chosen(list(lots(workspace, venv)), names, again)
        meter, removed, freed = Meter(), [], 0
        for lot in chosen:
            assert lot.remove
            held = meter.measure(lot.files or lot.roots)["bytes"]
            lot.remove()
            removed.append(lot.name)
            freed += held
        if os.path.isdir(own(workspace, "removed")):
            _empty(_aside(workspace))
        return {"cleaned": removed, "cleaned_bytes": freed}


def _chosen(there: list[Lot], names: list[str], again: bool) -> list[Lot]:
    chosen: dict[tuple[str, str], Lot] = {}
    for name in names:
        fits = [lot for lot in there if name in (lot.name, f"{lot.kind}:{lot.name}")]
        if name == STAGING and not fits:
            fits = [lot for lot in there if lot.kind == STAGING and not lot.used_by]
        elif len(fits) > 1:
            ways = " or ".join(f"{lot.kind}:{lot.name}" for lot in fits)
            raise UsageError(f"{name}: may be {ways}; say which")
        if not fits and name != STAGING and not again:
            raise UsageError(f"{name}: nothing of ours has this name there; surgvqa-remote disk lists what has")
        for lot in fits:
            if lot.remove is None:
                raise UsageError(f"{name}: {lot.note or 'not made by surgvqa'}; it is not removed from here")
            if lot.used_by:
                raise SurgvqaError(f"{name}: in use by {lot.used_by}; nothing was removed")
            chosen[lot.kind, lot.name] = lot
    return list(chosen.values())


def abandoned(channel: Any, workspace: str, digests: list[str]) -> dict[str, Any]:
    """The interrupted uploads here, except those with these digests: {"uploads": [{"name", "bytes", "age_s"}]}."""
    meter, found, now = Meter(), [], time.time()
    for lot in _stagings(workspace):
        if not lot.used_by and os.path.basename(lot.roots[0]) not in digests:
            row = _row(lot, meter.measure(lot.roots), now)
            found.append({key: row[key] for key in ("name", "bytes", "age_s", "note")})
    return {"uploads": found[:MAX_LOTS]}


# --- the lots --------------------------------------------------------------------------------------------------------


def lots(workspace: str, venv: str) -> Iterator[Lot]:
    """Everything that we know of, with who uses it."""
    runs = history.list_runs(Path(workspace, "runs"))
    used = _used(workspace, runs)
    anybody = next((run.id for run in runs if run.state in ("running", "starting")), "")
    for lot in _known(workspace, venv, runs):
        if lot.kind != STAGING:  # which no job knows of
            lot.used_by = anybody if lot.kind in ("venv", "cache") else _user_of(lot, used)
        yield lot


def _known(workspace: str, venv: str, runs: list[Any]) -> Iterator[Lot]:
    yield from _published(workspace)
    yield from _merges(workspace)
    for run in runs:
        place = str(run.folder)
        if os.path.lexists(place):
            plain = os.path.isdir(place) and not os.path.islink(place)
            yield Lot("runs/" + run.id, "run", [place], _remover(workspace, place) if plain else None, run.state)
    yield from _stagings(workspace)
    yield from _environment(workspace, venv)
    yield from _caches(workspace)


def _published(workspace: str) -> Iterator[Lot]:
    for record in records(workspace):
        name, kind = record["name"], record["kind"]
        try:
            place = Places(workspace, record)
            paths = {path: place(path) for path in record["files"]}
            roots = [place.root] if kind == "folder" else []
        except (SurgvqaError, AttributeError, TypeError) as error:
            yield Lot(str(name), "records", [], None, f"its record is damaged: {error}")
            continue
        ours = ours_of(record, kind)
        if kind == "folder":
            problem = _not_ours(place.root, paths, record) if ours else "it lay here before the upload"
            remove = None if problem else _remover(workspace, place.root, partial(forget_record, workspace, name))
            yield Lot(name, "checkpoint", roots, remove, problem)
        else:
            kept = len(set(paths) - ours)
            note = f"{kept} of its files lay here before the upload and stay" if kept else ""
            remove = partial(_remove_data, workspace, name) if ours else None
            mine = frozenset(paths[path] for path in paths if path in ours)
            yield Lot(name, "data", [], remove, note, mine)


def _not_ours(root: str, paths: dict[str, str], record: dict[str, Any]) -> str:
    """Why this folder is not only what was published, or ''."""
    if os.path.islink(root):
        return "its folder is a link now"
    there, files = set(walk(root)), record["files"]
    changed = [path for path in there & set(files) if not unchanged(paths[path], files[path][0], files[path][2])]
    others = sorted(there - set(files)) + sorted(changed)
    return f"{', '.join(others[:NAMED])} in it is not what was published" if others else ""


def _merges(workspace: str) -> Iterator[Lot]:
    """Checkpoints that were merged here for an upload."""
    folder = own(workspace, "merges")
    published = {record["name"] for record in records(workspace) if record["kind"] == "folder"}
    for entry in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        name, note = unquote(entry[: -len(".json")], errors="surrogateescape"), os.path.join(folder, entry)
        try:
            root = within(workspace, name)
            noted = parse_object(Path(note).read_bytes())["files"]
            files = {path: (size, time_ns) for path, (size, time_ns) in noted.items()}
        except (SurgvqaError, OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if name in published or not os.path.isdir(root):
            continue
        there = {path: os.path.join(root, path) for path in walk(root)}
        others = [p for p, full in there.items() if p not in files or not unchanged(full, *files[p])]
        problem = f"{', '.join(sorted(others)[:NAMED])} in it was not made by the merge" if others else ""
        problem = "its folder is a link" if os.path.islink(root) else problem
        remove = None if problem else _remover(workspace, root, partial(os.unlink, note))
        yield Lot(name, "checkpoint", [root], remove, problem or "merged here")


def _stagings(workspace: str) -> Iterator[Lot]:
    for digest in stagings(workspace):
        folder, item = staging_of(workspace, digest), staged_item(workspace, digest)
        name, kind = (item["name"], item["kind"]) if item else ("?", "folder")
        old = read_record(workspace, name, kind).get("old_files", {})
        busy = f"the upload of {name}" if staging.is_alive(folder) else ""

        remove = partial(_discard, folder, old)
        yield Lot(f"{STAGING}/{digest[:12]}", STAGING, [folder], remove, f"upload of {name}", used_by=busy)
    if os.path.isdir(own(workspace, "removed")):
        yield Lot(f"{STAGING}/removed", STAGING, [own(workspace, "removed")], lambda: None, "a removal broken off")


def _discard(folder: str, old_files: Any) -> None:
    staging.discard(folder, old_files)
    if os.path.lexists(folder):
        raise SurgvqaError(f"{folder}: holds files that we did not put there; move them away")


def _environment(workspace: str, venv: str) -> Iterator[Lot]:
    place = os.path.join(workspace, os.path.expanduser(venv))
    if not os.path.lexists(place):
        return
    noted = own(workspace, "installed.json")
    made = False
    with contextlib.suppress(OSError, ValueError):
        made = parse_object(Path(noted).read_bytes()).get("made_venv") is True
    inside = os.path.normpath(place).startswith(workspace + "/") and not os.path.islink(place)
    if made and inside and os.path.isfile(os.path.join(place, "pyvenv.cfg")):
        yield Lot(venv, "venv", [place], _remover(workspace, place, lambda: os.unlink(noted)), "setup makes it again")
    else:
        yield Lot(venv, "venv", [place], None, "not made by surgvqa-remote setup")


def _caches(workspace: str) -> Iterator[Lot]:
    jobs = os.path.join(workspace, "cache")
    if os.path.isdir(jobs) and not os.path.islink(jobs) and all(map(_is_cached, os.listdir(jobs))):
        yield Lot("cache", "cache", [jobs], _remover(workspace, jobs), "of jobs: encoder features, answers")
    records_of_ours = [own(workspace, name) for name in ("ready", "merges", "wheels", "installed.json")]
    yield Lot(".surgvqa", "records", [*records_of_ours, os.path.join(workspace, "surgvqa.toml")], None, "our records")
    bytecode = str(user_folder("cache") / "bytecode")
    if os.path.isdir(bytecode):
        yield Lot("bytecode", "cache", [bytecode], lambda: shutil.rmtree(bytecode), f"{bytecode}, made again")
    hub = os.environ.get("HF_HOME") or os.path.join(os.path.expanduser("~"), ".cache", "huggingface")
    if os.path.isdir(hub):
        yield Lot("huggingface", "cache", [hub], None, f"{hub}: shared with other programs (hf cache delete)")


def _is_cached(name: str) -> bool:
    """Whether a job of ours makes something of this name in its workspace's cache/ (data/feature_store.py,
    evaluation/answers.py)."""
    return name in CACHED or (len(name) == 2 and not set(name) - set("0123456789abcdef"))


def _unknown(workspace: str, there: list[Lot], meter: Meter) -> Iterator[tuple[Lot, dict[str, Any]]]:
    """What lies in the workspace and belongs to no lot, by its first folder."""
    without: set[str] = {own(workspace)}
    made_by: dict[str, str] = {}
    for lot in there:
        if lot.kind == "checkpoint" and not lot.remove:
            without.update(lot.roots)  # with what lies in it, which its note names
        else:
            without.update(lot.files or lot.roots)
    for run in history.list_runs(Path(workspace, "runs")):
        for output in _paths_of(workspace, run.folder, ("output_dir", "output_path")):
            made_by[output] = run.id
    try:
        entries = sorted(os.listdir(workspace))
    except OSError:
        return
    for entry in entries:
        path = os.path.join(workspace, entry)
        found = meter.measure([path], without)
        if found["files"]:
            maker = next((run for output, run in made_by.items() if (output + "/").startswith(path + "/")), "")
            note = f"output of {maker}" if maker else "not made by surgvqa"
            yield Lot(entry, "unknown", [path], None, note), found


# --- in use ----------------------------------------------------------------------------------------------------------


def _used(workspace: str, runs: list[Any]) -> dict[str, str]:
    """{path: run} of all that the running jobs were given; the workspace itself for one that has not said yet."""
    used: dict[str, str] = {}
    for run in runs:
        if run.state in ("running", "starting"):
            used[str(run.folder)] = run.id
            used.update(dict.fromkeys(_paths_of(workspace, run.folder) or [workspace], run.id))
        elif run.state == "unknown" and read_run_json(run.folder):  # another machine's, which shares this disk
            used.update(dict.fromkeys([str(run.folder), *_paths_of(workspace, run.folder)], run.id))
    for folder in job_processes():  # one whose run.json was deleted under it
        if folder.startswith(workspace + "/") and not os.path.isfile(os.path.join(folder, "run.json")):
            used[workspace] = os.path.basename(folder)
    return used


def _paths_of(workspace: str, folder: Path, only: tuple[str, ...] = ()) -> list[str]:
    """The paths of the workspace among a run's options, also of runs that are named there; [] while it has noted
    none."""
    info = read_run_json(folder)
    options = {name: noted.get("value") for name, noted in info.get("options", {}).items() if isinstance(noted, dict)}
    found = []
    for name, value in options.items():
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str) or not text or "\0" in text or (only and name not in only):
                continue
            full = os.path.realpath(os.path.join(info.get("cwd") or workspace, os.path.expanduser(text)))
            if full.startswith(workspace + "/"):
                found.append(full)
            if name in ("resume", "checkpoint", "checkpoint_path") and "/" not in text:
                with contextlib.suppress(UsageError):
                    found.append(str(history.find_run(text, [Path(workspace, "runs")])))
    return found


def _user_of(lot: Lot, used: dict[str, str]) -> str:
    """The run that was given a path above or below this lot."""
    roots = {os.path.realpath(root) for root in lot.roots}
    folders = {os.path.realpath(os.path.dirname(path)) for path in lot.files}
    for path, run in used.items():
        above = any((one + "/").startswith(path + "/") for one in roots | folders)
        if above or any(path.startswith(root + "/") for root in roots) or path in lot.files:
            return run
    return ""


# --- removal ---------------------------------------------------------------------------------------------------------


def _remover(workspace: str, folder: str, then: Callable[[], object] = lambda: None) -> Callable[[], None]:
    """Removes a folder of ours as a whole, then what says that it is there."""

    def remove() -> None:
        aside = _aside(workspace)
        os.makedirs(aside, mode=0o700, exist_ok=True)
        os.rename(folder, os.path.join(aside, str(time.time_ns())))
        with contextlib.suppress(FileNotFoundError):
            then()
        _empty(aside)
        remove_empty(workspace, os.path.dirname(folder))

    return remove


def _aside(workspace: str) -> str:
    """The folder of what is removed. SurgvqaError for a link: what lies behind it is not ours."""
    aside = own(workspace, "removed")
    if os.path.islink(aside):
        raise SurgvqaError(f"{aside}: a link, expected a folder; move it away")
    return aside


def _empty(aside: str) -> None:
    """Removes what lies in the folder of what is removed. Folders in it are moved up before they are emptied: however
    deep they lie, no path becomes too long. Links are not followed."""
    count, waiting = 0, []
    for entry in list(os.scandir(aside)):
        if entry.is_dir(follow_symlinks=False):
            waiting.append(entry.path)
        else:
            os.unlink(entry.path)
    while waiting:
        folder = waiting.pop()
        os.chmod(folder, 0o700)  # ours, whatever mode it has
        for entry in list(os.scandir(folder)):
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            count += 1
            waiting.append(os.path.join(aside, f"{time.time_ns()}-{count}"))
            os.rename(entry.path, waiting[-1])
        os.rmdir(folder)
    os.rmdir(aside)


def _remove_data(workspace: str, name: str) -> None:
    """The data files that we published and that nobody has changed since. A removal that is broken off leaves them
    marked as being published: nothing is launched on them."""
    record = read_record(workspace, name, "files")
    ours, place = ours_of(record, "files"), Places(workspace, record)
    made = {**record.get("old_files", {}), **record.get("stale", {}), **record["files"]}
    write_record(workspace, name, {**record, "state": "publishing"})
    for path in sorted(ours):
        size, _, mtime_ns, _ = made[path]
        full = place(path)
        if not os.path.islink(full) and unchanged(full, size, mtime_ns):
            os.unlink(full)
            remove_empty(workspace, os.path.dirname(full))
    forget_record(workspace, name, "files")
