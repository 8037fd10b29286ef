"""What is uploaded and its hashes, which are remembered between uploads."""

from __future__ import annotations

import hashlib
import json
import os
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
        return {"name": self.name, "kind": self.kind, "digest": self.digest, "files": files}


@dataclass
class Hashes:
    """sha256 of local files: out of the merge report, the cache (same size, time and inode), or by reading."""

    cache_file: Path = field(default_factory=lambda: HASH_CACHE.expanduser())
    cache: dict[str, list[Any]] = field(default_factory=dict)
    read_bytes: int = 0
    """How much had to be read."""

    def __post_init__(self) -> None:
        try:
            self.cache = json.loads(self.cache_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.cache = {}

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
        reported = self._reported([s for s, _ in sources], stats)
        total = sum(s.st_size for s in stats)
        done = 0

        def one(position: int) -> str:
            source, stat = sources[position][0], stats[position]
            known = self.cache.get(str(source))
            if known and known[:3] == [stat.st_size, stat.st_mtime_ns, stat.st_ino]:
                return known[3]
            return reported.get(position) or self._read(source)

        found = []
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for position, sha256 in enumerate(pool.map(one, range(len(sources)))):
                (source, path), stat = sources[position], stats[position]
                self.cache[str(source)] = [stat.st_size, stat.st_mtime_ns, stat.st_ino, sha256]
                found.append(Entry(source, path, stat.st_size, sha256, stat.st_mtime_ns))
                done += stat.st_size
                if on_bytes:
                    on_bytes(done, total)
        self._save()
        return tuple(found)

    def forget(self, source: Path) -> None:
        """The remembered hash turned out wrong."""
        self.cache.pop(str(source), None)
        self._save()

    def _read(self, file: Path) -> str:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(BLOCK))
        with open(file, "rb", buffering=0) as stream:
            while got := stream.readinto(buffer):
                digest.update(buffer[:got])
                self.read_bytes += got
        return digest.hexdigest()

    @staticmethod
    def _reported(files: list[Path], stats: list[os.stat_result]) -> dict[int, str]:
        """Position -> sha256 of the shards that have not been touched since the merge wrote its report.

        A report that is wrong is noticed: the host hashes what arrived.
        """
        found: dict[int, str] = {}
        reports: dict[Path, tuple[dict[str, Any], int]] = {}
        for position, (file, stat) in enumerate(zip(files, stats)):
            if file.suffix != ".safetensors":
                continue
            report = file.parent / MERGE_REPORT
            if file.parent not in reports:
                try:
                    shards = json.loads(report.read_text(encoding="utf-8")).get("shards")
                    reports[file.parent] = (shards if isinstance(shards, dict) else {}), report.stat().st_mtime_ns
                except (OSError, ValueError, AttributeError):
                    reports[file.parent] = {}, 0
            shards, written_ns = reports[file.parent]
            shard = shards.get(file.name)
            if isinstance(shard, dict) and shard.get("sha256") and stat.st_mtime_ns <= written_ns:
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
