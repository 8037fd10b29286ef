"""What is uploaded and its hashes, which are remembered between uploads."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgvqa.errors import UsageError

HASH_CACHE = Path("~/.cache/surgvqa/sha256.json")
MERGE_REPORT = "merge_report.json"
BLOCK = 1 << 20


@dataclass(frozen=True)
class Entry:
    """One file: where it lies here, and its path below the item (or the workspace) there."""

    source: Path
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

    @property
    def bytes(self) -> int:
        return sum(e.size for e in self.entries)

    @property
    def digest(self) -> str:
        """Names the content: the staging folder's name, so that a changed source never resumes into an old one."""
        content = [self.name, self.kind, *([e.path, e.size, e.sha256] for e in self.entries)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:40]

    def wire(self) -> dict[str, Any]:
        """As the agent takes it."""
        files = [[e.path, e.size, e.sha256, e.mtime_ns] for e in self.entries]
        modes = [e.mode for e in self.entries]
        return {"name": self.name, "kind": self.kind, "digest": self.digest, "files": files, "modes": modes}


def _identity(status: os.stat_result) -> list[int]:
    """What changes with a file's content: an edit may keep size and mtime, not ctime or inode."""
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


@dataclass
class Hashes:
    """sha256 of local files: from the cache (same size, mtime, ctime and inode), the merge report, or by reading."""

    cache_file: Path = field(default_factory=lambda: HASH_CACHE.expanduser())
    cache: dict[str, list[Any]] = field(default_factory=dict)
    read_bytes: int = 0
    """How much had to be read."""
    checksum: bool = False
    """Read every file, whatever is known of it."""
    wrong: set[Path] = field(default_factory=set)
    """Files whose remembered or reported hash turned out wrong."""

    def __post_init__(self) -> None:
        try:
            cache = json.loads(self.cache_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            cache = {}
        known = cache if isinstance(cache, dict) else {}
        self.cache = {k: v for k, v in known.items() if isinstance(v, list) and len(v) == 5 and isinstance(v[4], str)}

    def entries(
        self, sources: Iterable[tuple[Path, str]], on_bytes: Callable[[int, int], None] | None = None
    ) -> tuple[Entry, ...]:
        """An entry for each (file here, path there), in that order; hashed in parallel."""
        sources = list(sources)
        stats = []
        for source, _ in sources:
            try:
                stats.append(os.stat(source))
            except OSError as error:
                raise UsageError(f"{source}: {error.strerror}") from None
            if not stat.S_ISREG(stats[-1].st_mode):
                raise UsageError(f"{source}: no regular file")
        reported = {} if self.checksum else self._reported([s for s, _ in sources], stats)
        total = sum(s.st_size for s in stats)
        done = 0

        def one(position: int) -> str:
            source, status = sources[position][0], stats[position]
            known = None if self.checksum else self.cache.get(str(source))
            if known and known[:-1] == _identity(status):
                return str(known[-1])
            return (None if known else reported.get(position)) or self._read(source)

        found = []
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for position, sha256 in enumerate(pool.map(one, range(len(sources)))):
                (source, path), status = sources[position], stats[position]
                self.cache[str(source)] = [*_identity(status), sha256]
                found.append(Entry(source, path, status.st_size, sha256, status.st_mtime_ns, status.st_mode & 0o777))
                done += status.st_size
                if on_bytes:
                    on_bytes(done, total)
        self._save()
        return tuple(found)

    def forget(self, source: Path) -> None:
        """The hash that was remembered or reported turned out wrong: from now on the file is read."""
        self.cache.pop(str(source), None)
        self.wrong.add(source)
        self._save()

    def _read(self, file: Path) -> str:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(BLOCK))
        with open(file, "rb", buffering=0) as stream:
            while got := stream.readinto(buffer):
                digest.update(buffer[:got])
                self.read_bytes += got
        return digest.hexdigest()

    def _reported(self, files: list[Path], stats: list[os.stat_result]) -> dict[int, str]:
        """Position -> sha256 of the shards that have not been touched since the merge wrote its report.

        The time of change (ctime) tells: a shard that was replaced by an older file has an old mtime and a new ctime. A
        report that is wrong is noticed: the host hashes what arrived.
        """
        found: dict[int, str] = {}
        reports: dict[Path, tuple[dict[str, Any], tuple[int, int]]] = {}
        for position, (file, status) in enumerate(zip(files, stats)):
            if file.suffix != ".safetensors" or file in self.wrong:
                continue
            report = file.parent / MERGE_REPORT
            if file.parent not in reports:
                try:
                    shards = json.loads(report.read_text(encoding="utf-8")).get("shards")
                    written = report.stat()
                    times = written.st_mtime_ns, written.st_ctime_ns
                    reports[file.parent] = (shards if isinstance(shards, dict) else {}), times
                except (OSError, ValueError, AttributeError):
                    reports[file.parent] = {}, (0, 0)
            shards, (written_ns, changed_ns) = reports[file.parent]
            shard = shards.get(file.name)
            untouched = status.st_mtime_ns <= written_ns and status.st_ctime_ns <= changed_ns
            if isinstance(shard, dict) and isinstance(shard.get("sha256"), str) and untouched:
                found[position] = shard["sha256"]
        return found

    def _save(self) -> None:
        temporary = self.cache_file.with_name(f".{self.cache_file.name}.{os.getpid()}.tmp")
        try:
            self.cache_file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self.cache), encoding="utf-8")
            os.replace(temporary, self.cache_file)
        except OSError:
            return  # only a cache
