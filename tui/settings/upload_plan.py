"""What would be uploaded: checkpoints and data, with the number of files and their size. No torch; reads the disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from surgvqa.config.workspace import Workspace
from surgvqa.data.lookup import AudioIndex, FrameIndex
from surgvqa.data.samples import read_samples
from surgvqa.errors import UsageError


@dataclass(frozen=True)
class PlanRow:
    """A checkpoint, or a kind of data."""

    what: str
    path: str
    files: int
    bytes: int
    problem: str = ""
    """Why it cannot be sent as it is."""


def file_plan(workspace: Workspace, checkpoint: Path | None = None) -> list[PlanRow]:
    """The merged checkpoint, the adapter, and the data: JSONL files and only the frames and audio that they name.

    `checkpoint`: one that was just merged, in place of the one that surgvqa.toml names."""
    items = []
    merged = checkpoint or workspace.value("model_name_or_path", "train") or workspace.value("output_path", "merge")
    if merged:
        items.append(_folder("merged checkpoint", Path(merged), "merge first (key 1)"))
    adapter = workspace.value("stage2_adapter_path", "merge")
    if adapter:
        items.append(_folder("Stage-2 adapter", Path(adapter), "no such folder"))
    for what, data, audio in (
        ("training", "train_data_path", ("audio_dir",)),
        ("evaluation", "eval_data_path", ("eval_audio_dir", "audio_dir")),
    ):
        path = workspace.value(data, "train")
        if path:
            frames = workspace.value("frames_dir", "train")
            audio_dir = next((d for d in (workspace.value(a, "train") for a in audio) if d), None)
            items += _data(what, Path(path), frames, audio_dir)
    return items


def _folder(what: str, path: Path, absent: str) -> PlanRow:
    if not path.is_dir():
        return PlanRow(what, str(path), 0, 0, absent)
    return _files(what, path, (p for p in path.rglob("*") if p.is_file()))


def _files(what: str, path: Path, files: Iterable[Path], problem: str = "") -> PlanRow:
    sizes = [file.stat().st_size for file in set(files)]
    return PlanRow(what, str(path), len(sizes), sum(sizes), problem)


def _data(what: str, path: Path, frames_dir: str | None, audio_dir: str | None) -> list[PlanRow]:
    try:
        samples = read_samples(path)
    except UsageError as error:
        return [PlanRow(f"{what} samples", str(path), 0, 0, str(error))]
    items = [_files(f"{what} samples", path, [path])]
    if frames_dir:
        index = FrameIndex(frames_dir)
        items.append(
            _named(f"{what} frames", frames_dir, (lambda f=f: index.find(f) for s in samples for f in s.frames))
        )
    if audio_dir:
        voices = AudioIndex(audio_dir, samples)
        items.append(_named(f"{what} audio", audio_dir, (lambda s=s: voices.find(s) for s in samples)))
    return items


def _named(what: str, folder: str, finders) -> PlanRow:
    found, problems = set(), []
    for find in finders:
        try:
            found.add(find())
        except UsageError as error:
            problems.append(str(error))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return _files(what, Path(folder), found, problems[0] + more if problems else "")
