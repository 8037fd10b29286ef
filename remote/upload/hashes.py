"""What is uploaded and its hashes, which are remembered between uploads."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from remote.agent.manifest import bucket_count, bucket_digests, digest_of
from remote.agent.protocol import SMALL
from surgvqa.errors import UsageError

HASH_CACHE = Path("~/.cache/surgvqa/sha256.json")
MERGE_REPORT = "merge_report.json"
BLOCK = 1 << 20
HASH_LENGTH = 64
KEPT_BYTES = 64 << 20
"""Bytes of small files that are kept in memory between hashing and sending."""
SETTLED_NS = 2 * 10**9
"""Older changes than this are told apart by their times, also where these are counted in whole seconds (FAT, ext3)."""
LFS_POINTERS = (
    b"version https://git-lfs.github.com/spec/",
    b"version https://hawser.github.com/spec/",
    b"# xet version",
)
"""How the files begin that git-LFS, its first version and git-xet leave in the place of a file."""
LFS_POINTER_BELOW = 1024
"""Bytes: every pointer has fewer."""
SHA256 = re.compile("[0-9a-f]{64}")


class Entry(NamedTuple):
    """One file: where it lies here, and its path below the item (or the workspace) there."""

    source: str
    path: str
    size: int
    sha256: str
    mtime_ns: int
    mode: int = 0o644
    """Permission bits."""


@dataclass(frozen=True)
class Item:
    """What is published on the host under one name. kind: "folder" (one rename) or "files" (into the workspace)."""

    name: str
    kind: str
    entries: tuple[Entry, ...]
    """Sorted by path, as both ends number them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", tuple(sorted(self.entries, key=attrgetter("path"))))
        folders = {entry.path.rpartition("/")[0] for entry in self.entries}
        folders |= {above for folder in folders for above in _folders_above(folder)}
        if both := next((entry for entry in self.entries if entry.path in folders), None):
            raise UsageError(f"{both.source}: {both.path} would be a file and a folder on the host; rename one")

    @cached_property
    def bytes(self) -> int:
        return sum(e.size for e in self.entries)

    @cached_property
    def large(self) -> list[int]:
        """The files that do not travel in packs: chunks of them are hashed on the host when they are whole."""
        return [index for index, entry in enumerate(self.entries) if entry.size > SMALL]

    @cached_property
    def rows(self) -> list[list[Any]]:
        """The manifest (remote/agent/manifest.py)."""
        return [[e.path, e.size, e.sha256, e.mtime_ns, e.mode] for e in self.entries]

    @cached_property
    def digest(self) -> str:
        """Names the content: the staging folder's name, so that a changed source never resumes into an old one."""
        return digest_of(self.name, self.kind, self.rows)

    @cached_property
    def offer(self) -> dict[str, str]:
        """What the host is told of it first."""
        return {"name": self.name, "kind": self.kind, "digest": self.digest}

    @cached_property
    def buckets(self) -> list[str]:
        """What the host is told before it asks for rows of the manifest."""
        return bucket_digests(self.rows, bucket_count(len(self.rows)))


def _folders_above(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def whole_files(files: Iterable[str]) -> list[os.stat_result]:
    """As `whole_file`, of many; a tenth of a second less for tens of thousands."""
    found = []
    for file in files:
        try:
            status = os.stat(file)
        except OSError:
            status = whole_file(file)  # says why
        plain = stat.S_ISREG(status.st_mode) and status.st_size >= LFS_POINTER_BELOW
        found.append(status if plain else whole_file(file))
    return found


def whole_file(file: str) -> os.stat_result:
    """Raises UsageError for what cannot be sent: a dangling link, a special file, a git-LFS pointer."""
    try:
        status = os.stat(file)
        pointer = status.st_size < LFS_POINTER_BELOW and stat.S_ISREG(status.st_mode) and _is_pointer(file)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and os.path.islink(file):
            raise UsageError(f"{file}: a link to {os.readlink(file)}, which is not there; download it again") from None
        raise UsageError(f"{file}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{file}: no regular file")
    if pointer:
        raise UsageError(f"{file}: a git-LFS pointer, not the file itself; run git lfs pull in its folder")
    return status


def _is_pointer(file: str) -> bool:
    with open(file, "rb") as stream:
        return stream.read(LFS_POINTER_BELOW).removeprefix(codecs.BOM_UTF8).lstrip().startswith(LFS_POINTERS)


def read_small(source: str, size: int) -> bytes:
    """Reads a file that should have `size` bytes: fewer where it is shorter, one more where it is longer. Takes a third
    of a file object's time."""
    descriptor = os.open(source, os.O_RDONLY)
    try:
        content = os.read(descriptor, size + 1)
        while len(content) < size and (more := os.read(descriptor, size + 1 - len(content))):
            content += more
        return content
    finally:
        os.close(descriptor)


def _identity(status: os.stat_result) -> str:
    """What changes with a file's content: an edit may keep size and mtime, not ctime or inode."""
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino} "


def _are_hashes(texts: list[str]) -> bool:
    """All at once, which takes a tenth of the time."""
    together = "".join(texts)
    try:
        return bytes.fromhex(together).hex() == together and len(together) == HASH_LENGTH * len(texts)
    except ValueError:
        return False


@dataclass
class Hashes:
    """sha256 of local files: from the cache (same size, mtime, ctime and inode), the merge report, or by reading."""

    cache_file: Path = field(default_factory=lambda: HASH_CACHE.expanduser())
    cache: dict[str, str] = field(default_factory=dict)
    """Path -> its identity and its hash, in one text: tens of thousands of lists take three times as long to read."""
    read_bytes: int = 0
    """How many bytes were read."""
    checksum: bool = False
    """Read every file, whatever is known of it."""
    wrong: set[str] = field(default_factory=set)
    """Files whose remembered or reported hash turned out wrong."""
    contents: dict[str, bytes] = field(default_factory=dict)
    """Small files as they were read, up to KEPT_BYTES in all: they are sent from here, not read again."""
    before_reading: Callable[[], object] = lambda: None
    """Called before a large file is read, which takes a while: it may raise."""
    _changed: bool = False
    _kept_bytes: int = 0

    def __post_init__(self) -> None:
        try:
            cache = json.loads(self.cache_file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            cache = {}
        known = cache if isinstance(cache, dict) else {}
        self.cache = {path: text for path, text in known.items() if isinstance(text, str)}
        if not _are_hashes([text[-HASH_LENGTH:] for text in self.cache.values()]):
            self.cache = {}

    def entries(
        self, sources: Iterable[tuple[str | Path, str]], on_bytes: Callable[[int, int], None] | None = None
    ) -> tuple[Entry, ...]:
        """An entry for each (file here, path there), in that order; large files are hashed in parallel."""
        named = [(os.fspath(source), path) for source, path in sources]
        stats = whole_files(source for source, _ in named)
        reported = {} if self.checksum else self._reported([source for source, _ in named], stats)
        found: list[str] = []
        unknown = []
        for position, ((source, _), status) in enumerate(zip(named, stats)):
            known = "" if self.checksum else self.cache.get(source, "")
            sha256 = known[-HASH_LENGTH:] if known[:-HASH_LENGTH] == _identity(status) else ""
            if not known:
                sha256 = reported.get(position, "")
            if not sha256:
                unknown.append(position)
            elif not known:
                self._remember(source, status, sha256)
            found.append(sha256)
        for position, sha256 in self._read_all(named, stats, unknown, on_bytes):
            self._remember(named[position][0], stats[position], sha256)
            found[position] = sha256
        self._save()
        return tuple(
            Entry(source, path, status.st_size, sha256, status.st_mtime_ns, status.st_mode & 0o777)
            for (source, path), status, sha256 in zip(named, stats, found)
        )

    def _remember(self, source: str, status: os.stat_result, sha256: str) -> None:
        """Nothing of a file that was changed just now: a further change within one tick of the clock would show in
        nothing of `_identity`."""
        settled = time.time_ns() - status.st_ctime_ns > SETTLED_NS
        known = _identity(status) + sha256 if sha256 and settled else ""
        if known == self.cache.get(source, ""):
            return
        self._changed = True
        if known:
            self.cache[source] = known
        else:
            del self.cache[source]

    def _read_all(
        self,
        sources: list[tuple[str, str]],
        stats: list[os.stat_result],
        unknown: list[int],
        on_bytes: Callable[[int, int], None] | None,
    ) -> Iterator[tuple[int, str]]:
        """Reads the files whose hash is unknown, those that are large in threads; (position, sha256)."""
        total = sum(status.st_size for status in stats)
        done = total - sum(stats[position].st_size for position in unknown)
        large = [position for position in unknown if stats[position].st_size > BLOCK]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            reading = {position: pool.submit(self._read_large, sources[position][0]) for position in large}
            for position in unknown:  # a thread costs more than a small file
                ahead = reading.get(position)
                source, size = sources[position][0], stats[position].st_size
                yield position, ahead.result() if ahead else self._read_small(source, size)
                done += stats[position].st_size
                if on_bytes:
                    on_bytes(done, total)

    def forget(self, source: str) -> None:
        """The hash that was remembered or reported turned out wrong: from now on the file is read."""
        self.cache.pop(source, None)
        self._changed = True
        self.wrong.add(source)
        self._save()

    def _read_small(self, source: str, size: int) -> str:
        content = read_small(source, size)
        self.read_bytes += size
        if size <= SMALL and self._kept_bytes + size <= KEPT_BYTES:
            self.contents[source] = content
            self._kept_bytes += size
        return hashlib.sha256(content).hexdigest()

    def _read_large(self, source: str) -> str:
        self.before_reading()
        digest, buffer = hashlib.sha256(), memoryview(bytearray(BLOCK))
        with open(source, "rb", buffering=0) as stream:
            while got := stream.readinto(buffer):
                digest.update(buffer[:got])
                self.read_bytes += got
        return digest.hexdigest()

    def _reported(self, files: list[str], stats: list[os.stat_result]) -> dict[int, str]:
        """Position -> sha256 of the shards that have not been touched since the merge wrote its report.

        The time of change (ctime) tells: a shard that was replaced by an older file has an old mtime and a new ctime. A
        report that is wrong is noticed: the host hashes what arrived.
        """
        found: dict[int, str] = {}
        reports: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {}
        for position, (file, status) in enumerate(zip(files, stats)):
            if not file.endswith(".safetensors") or file in self.wrong:
                continue
            folder, name = os.path.split(file)
            if folder not in reports:
                reports[folder] = _merge_report(Path(folder, MERGE_REPORT))
            shards, (written_ns, changed_ns) = reports[folder]
            shard = shards.get(name)
            untouched = status.st_mtime_ns <= written_ns and status.st_ctime_ns <= changed_ns
            if isinstance(shard, dict) and SHA256.fullmatch(str(shard.get("sha256"))) and untouched:
                found[position] = shard["sha256"]
        return found

    def _save(self) -> None:
        if not self._changed:
            return
        temporary = self.cache_file.with_name(f".{self.cache_file.name}.{os.getpid()}.tmp")
        try:
            self.cache_file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self.cache), encoding="utf-8")
            os.replace(temporary, self.cache_file)
            self._changed = False
        except OSError:
            return  # only a cache


def _merge_report(report: Path) -> tuple[dict[str, Any], tuple[int, int]]:
    """The shards that a merge report names, and when it was written and changed; nothing where there is none."""
    try:
        shards = json.loads(report.read_text(encoding="utf-8")).get("shards")
        written = report.stat()
        return (shards if isinstance(shards, dict) else {}), (written.st_mtime_ns, written.st_ctime_ns)
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}, (0, 0)
