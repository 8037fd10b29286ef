"""`surgvqa check-data`: checks every line of the JSONL files against the frames and the audio, and describes the data.

Findings that would stop a training run give exit code 1: invalid lines, missing frames, missing or ambiguous audio.
Others are only reported: ids of several questions, clips in more than one file, labels so uneven that a blind guess
scores well.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from surgvqa.config.options import CheckDataOptions
from surgvqa.config.workspace import Workspace
from surgvqa.data.as_trained import replay
from surgvqa.data.boxes import Boxes
from surgvqa.data.check_view import show_file, show_notes, show_problems, show_replay
from surgvqa.data.deep import DecodedFindings, decode
from surgvqa.data.findings import (
    EXAMPLES,
    answers_without_label,
    cluster_count,
    contradictions,
    duplicates,
    frames_out_of_order,
    id_collisions,
    in_several,
    unseen_wordings,
    wordings,
)
from surgvqa.data.jsonl import Problem
from surgvqa.data.lookup import AudioIndex, FrameIndex, MissingFile
from surgvqa.data.samples import Sample, majority_accuracy, scan_samples
from surgvqa.data.visibility import summary, visibility
from surgvqa.errors import UsageError
from surgvqa.machine.packages import require_installed
from surgvqa.outcome import Outcome


@dataclass
class File:
    """One JSONL file and what was found in it."""

    path: str
    audio_dir: str | None
    samples: list[Sample]
    labels: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """{question type: {label: samples}}"""

    def __post_init__(self) -> None:
        for sample in self.samples:
            self.labels[sample.question_type][sample.label] += 1

    @property
    def single_label_types(self) -> list[str]:
        return sorted(kind for kind, labels in self.labels.items() if len(labels) == 1)


@dataclass
class Findings:
    """Everything that is wrong, in the order in which it was found."""

    errors: list[Problem] = field(default_factory=list)
    missing_frames: dict[str, str] = field(default_factory=dict)
    """{frame: message that names the first sample that needs it}"""
    missing_audio: list[str] = field(default_factory=list)

    def kinds(self, deep: DecodedFindings) -> list[tuple[str, list[str]]]:
        """(title, texts) of each kind of problem."""
        return [
            ("invalid lines, files or names", [str(e) for e in self.errors]),
            ("missing frames", list(self.missing_frames.values())),
            ("samples without a spoken question", self.missing_audio),
            ("silent spoken questions", deep.silent),
            ("recordings too short for a question", deep.short),
            ("spoken questions longer than the audio encoder's window", deep.long),
            ("identical recordings of different questions", deep.same_sound),
            ("frames of a single colour", deep.blank),
            ("frames of another size than most of their video", deep.odd_sizes),
        ]


def run(options: CheckDataOptions, workspace: Workspace) -> Outcome:
    """Checks the files. Raises UsageError when a file or folder cannot be read at all."""
    if options.deep and not (options.frames_dir or options.audio_dir):
        raise UsageError("--deep decodes frames and recordings: name --frames_dir, --audio_dir or both")
    if options.deep:
        require_installed("check-data --deep", ("numpy", "librosa") if options.audio_dir else ("numpy",), "train")
    findings = Findings()
    files = [_read(path, options, workspace, findings) for path in dict.fromkeys(map(str, options.files))]
    frames = FrameIndex(options.frames_dir) if options.frames_dir else None
    frame_files: dict[Path, Sample] = {}
    audio_files: dict[Path, Sample] = {}
    for file in files:
        audio = AudioIndex(file.audio_dir, file.samples) if file.audio_dir else None
        for sample in file.samples:
            _look_up(sample, frames, audio, findings, frame_files, audio_files)
    deep = decode(frame_files, audio_files) if options.deep else DecodedFindings()
    findings.errors += deep.errors

    samples = [sample for file in files for sample in file.samples]
    not_checked = [name for name, where in (("frames", options.frames_dir), ("audio", options.audio_dir)) if not where]
    seen = summary(visibility(samples, Boxes(options.boxes), options.drift)) if options.boxes else None
    replayed = None
    if options.as_trained:
        groups = [(file.path, file.samples) for file in files]
        replayed = replay(options.as_trained, groups, options.frames_dir, options.audio_dir)
    ok = not (findings.errors or findings.missing_frames or findings.missing_audio) and (replayed or {"ok": True})["ok"]
    data = {
        "ok": ok,
        **_text_findings(files, samples),
        "errors": [{"file": e.file, "line": e.line, "text": e.text} for e in findings.errors],
        "missing_frames": len(findings.missing_frames) if options.frames_dir else None,
        "missing_audio": len(findings.missing_audio) if options.audio_dir else None,
        "not_checked": not_checked,
        "missing_frames_list": list(findings.missing_frames),
        "missing_audio_list": findings.missing_audio,
        "silent_audio_list": deep.silent,
        "short_audio_list": deep.short,
        "long_audio_list": deep.long,
        "same_audio_list": deep.same_sound,
        "blank_frames_list": deep.blank,
        "odd_size_frames_list": deep.odd_sizes,
        "visibility": seen,
        "as_trained": replayed,
        "files": [_file_findings(file) for file in files],
    }

    def show(console: Console) -> None:
        for file in files:
            show_file(console, file)
            console.print()
        show_notes(console, files, data)
        there = [name for name in ("frames", "audio") if name not in not_checked]
        good = f"all {' and '.join(there)} are there{' and decode' if options.deep else ''}" if there else ""
        show_problems(console, findings.kinds(deep), good or "every line is a sample")
        if replayed:
            show_replay(console, replayed)

    return Outcome(data, ok=ok, show=show)


def _text_findings(files: Sequence[File], samples: Sequence[Sample]) -> dict[str, Any]:
    """Findings from the text of all `files` together; `samples` are those of all of them."""
    collisions = id_collisions(samples)
    clips = in_several([{sample.clip for sample in file.samples} for file in files])
    frames = in_several([{frame for sample in file.samples for frame in sample.frames} for file in files])
    later = [sample for file in files[1:] for sample in file.samples]
    return {
        "samples": len(samples),
        "id_collisions": len(collisions),
        "id_collisions_within": len({name for file in files for name in id_collisions(file.samples)}),
        "colliding_ids": collisions,
        "shared_clips": len(clips),
        "shared_clips_examples": [f"{video} {clip[0]}" for video, clip in sorted(clips)[:EXAMPLES]],
        "shared_frames": len(frames),
        "shared_frames_examples": sorted(frames)[:EXAMPLES],
        "majority_accuracy": majority_accuracy(samples),
        "duplicates_list": [place for file in files for place in duplicates(file.samples)],
        "contradictions_list": [place for file in files for place in contradictions(file.samples)],
        "frames_out_of_order_list": frames_out_of_order(samples),
        "answers_without_label_list": answers_without_label(samples),
        "wordings": {kind: len(found) for kind, found in wordings(samples).items()},
        "unseen_wordings": unseen_wordings(files[0].samples, later),
    }


def _file_findings(file: File) -> dict[str, Any]:
    """Findings from the text of one file."""
    return {
        "file": file.path,
        "samples": len(file.samples),
        "clusters": cluster_count(file.samples),
        "wordings": {kind: len(asked) for kind, asked in wordings(file.samples).items()},
        "id_collisions": len(id_collisions(file.samples)),
        "majority_accuracy": majority_accuracy(file.samples),
        "single_label_types": file.single_label_types,
        "labels": {kind: dict(labels.most_common()) for kind, labels in sorted(file.labels.items())},
    }


# --- looking up -------------------------------------------------------------------------------------------------------


def _read(path: str, options: CheckDataOptions, workspace: Workspace, findings: Findings) -> File:
    samples, problems = scan_samples(path)
    findings.errors += problems

    def is_configured_as(key: str) -> bool:
        configured = workspace.value(key)
        return configured is not None and Path(configured).resolve() == Path(path).resolve()

    later = path != options.files[0] and not is_configured_as("train_data_path")
    for_eval = options.eval_audio_dir if later or is_configured_as("eval_data_path") else None
    return File(path, for_eval or options.audio_dir, samples)


def _look_up(
    sample: Sample,
    frames: FrameIndex | None,
    audio: AudioIndex | None,
    findings: Findings,
    frame_files: dict[Path, Sample],
    audio_files: dict[Path, Sample],
) -> None:
    """Finds the sample's files; stores each in `frame_files` or `audio_files` with the first sample that needs it."""
    for frame in sample.frames if frames else ():
        if frames is None or frame in findings.missing_frames:
            continue
        try:
            frame_files.setdefault(frames.find(frame), sample)
        except MissingFile as error:
            findings.missing_frames[frame] = f"{sample.place}: {error}"
    if audio is None:
        return
    try:
        audio_files.setdefault(audio.find(sample), sample)
    except MissingFile as error:
        findings.missing_audio.append(str(error))
    except UsageError as error:
        findings.errors.append(Problem(sample.file, sample.line, str(error).removeprefix(f"{sample.place}: ")))
