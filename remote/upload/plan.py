"""What an upload consists of: items with every file's hash, and the cheaper of two ways to a merged checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remote.paths import inside
from surgvqa.config.options import Workspace
from surgvqa.errors import SurgvqaError, UsageError

HASH_CACHE = Path("~/.cache/surgvqa/sha256.json")
MERGE_REPORT = "merge_report.json"
BLOCK = 1 << 20
MERGE_BYTES_PER_S = 300e6  # reading, arithmetic and writing on a rented host; an estimate, shown as one
HUB_BYTES_PER_S = 100e6  # from the hub to a data centre; an estimate as well


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


def remote_name(path: str | os.PathLike[str], workspace: Workspace, made_there: bool = False) -> str:
    """The name on the host of a local path: as it is inside the workspace; its last part when it lies elsewhere.

    `made_there`: it may lie below runs/, which belongs to the host's own jobs.
    """
    absolute = Path(os.path.abspath(os.path.expanduser(path)))
    root = Path(os.path.abspath(workspace.root))
    name = absolute.relative_to(root).as_posix() if absolute.is_relative_to(root) else absolute.name
    reserved = (".surgvqa", "venv") if made_there else (".surgvqa", "venv", "runs")
    if name in ("", ".") or name.split("/")[0] in reserved:
        raise UsageError(f"{path}: cannot have the name {name or '.'!r} in the host's workspace; move or rename it")
    return inside(name)


# --- hashes ----------------------------------------------------------------------------------------------------------


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


# --- items -----------------------------------------------------------------------------------------------------------


def folder_sources(folder: Path) -> list[tuple[Path, str]]:
    """Every file of a checkpoint or adapter folder, weights last: configuration arrives first."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and not f.name.startswith(".")]
    if not files:
        raise UsageError(f"{folder}: the folder is empty")
    return sorted(((f, f.relative_to(folder).as_posix()) for f in files), key=lambda s: s[0].suffix == ".safetensors")


def data_sources(options: Any, workspace: Workspace) -> list[tuple[Path, str]]:
    """The JSONL files and only the frames and spoken questions that they name."""
    from surgvqa.data.samples import AudioIndex, FrameIndex, read_samples

    found: dict[str, Path] = {}

    def add(file: Path, name: str) -> None:
        if found.setdefault(name, file) != file:
            raise UsageError(f"{file} and {found[name]} would both be {name} on the host; rename one")

    pairs = [
        (options.train_data_path, options.audio_dir),
        (options.eval_data_path, options.eval_audio_dir or options.audio_dir),
    ]
    for jsonl, audio_dir in pairs:
        if jsonl is None:
            continue
        for needed, name in ((options.frames_dir, "frames_dir"), (audio_dir, "audio_dir")):
            if needed is None:
                raise UsageError(f"missing --{name} for {jsonl} (or the key of that name in {workspace.file})")
        samples = read_samples(jsonl)
        add(Path(jsonl), remote_name(jsonl, workspace))
        frames, audio = FrameIndex(options.frames_dir), AudioIndex(audio_dir, samples)
        frames_name, audio_name = remote_name(options.frames_dir, workspace), remote_name(audio_dir, workspace)
        for sample in samples:
            for frame in sample.frames:
                file = frames.find(frame)
                add(file, f"{frames_name}/{file.relative_to(options.frames_dir).as_posix()}")
            file = audio.find(sample)
            add(file, f"{audio_name}/{file.relative_to(audio_dir).as_posix()}")
            for side in ("in", "out"):  # the question sets by which AudioIndex tells the two wordings apart
                for place, name in ((Path(jsonl).parent, None), (Path(audio_dir), audio_name)):
                    wording = place / f"{side}_{sample.video_id}.jsonl"
                    if wording.is_file() and wording != Path(jsonl):
                        add(wording, f"{name}/{wording.name}" if name else remote_name(wording, workspace))
    if found:
        for file in sorted((workspace.root / "presets").glob("*.toml")):
            add(file, f"presets/{file.name}")
    return [(file, name) for name, file in sorted(found.items())]


# --- the plan --------------------------------------------------------------------------------------------------------


@dataclass
class Way:
    """One way to have the checkpoint on the host."""

    name: str
    """merged (send the merged checkpoint), adapter (send Stage 1 and the adapter, merge there) or hub (the same, but
    the host gets Stage 1 itself)."""
    items: list[Item]
    send_bytes: int
    merge_bytes: int = 0
    """What the host would have to merge."""
    stage1: str = ""
    """Stage 1's folder in the host's workspace, for the merge."""
    hub_id: str = ""
    output: str = ""
    """The merged checkpoint's name in the workspace there, where it is merged there."""
    download_bytes: int = 0
    """What the host would have to get from the hub."""

    def merge(self) -> dict[str, str]:
        """What is merged there into what, by their names in the workspace there."""
        return {"stage1": self.stage1, "adapter": self.items[-1].name, "output": self.output}

    def seconds(self, bytes_per_s: float) -> float:
        """Sending at this rate; downloading and merging at estimated ones."""
        there = self.download_bytes / HUB_BYTES_PER_S + self.merge_bytes / MERGE_BYTES_PER_S
        return self.send_bytes / bytes_per_s + there


def cheapest(ways: list[Way], bytes_per_s: float) -> Way:
    """The way that is over first."""
    if not ways:
        raise SurgvqaError("no checkpoint to send")
    return min(ways, key=lambda way: way.seconds(bytes_per_s))
