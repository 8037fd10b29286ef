"""`surgvqa check-data`: every line of the JSONL files against the frames and the audio, and what the data can teach.

What stops a training run makes the answer bad (exit code 1): lines that are no samples, missing frames, missing or
ambiguous audio. The rest is pointed out: ids that stand for several questions, clips in more than one file, labels so
uneven that a blind guess scores.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import track

from surgvqa.config.options import CheckDataOptions
from surgvqa.config.workspace import Workspace
from surgvqa.data.as_trained import replay
from surgvqa.data.check_view import show_file, show_notes, show_problems, show_replay
from surgvqa.data.findings import (
    EXAMPLES,
    answers_without_label,
    cluster_count,
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
from surgvqa.errors import UsageError
from surgvqa.outcome import Outcome

WINDOW_S = 30.0
"""Whisper's window: what the audio encoder hears of a recording."""
AUDIBLE = 0.001
"""Of full scale (-60 dB). A recording that never reaches it is silence: noise of an open microphone or a codec."""


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
    """Everything that is wrong, in the order in which it was met."""

    errors: list[Problem] = field(default_factory=list)
    missing_frames: dict[str, str] = field(default_factory=dict)
    """{frame: why, with the first sample that needs it}"""
    missing_audio: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    long: list[str] = field(default_factory=list)
    """Recordings longer than the audio encoder hears."""
    same_sound: list[str] = field(default_factory=list)
    """Recordings with the content of another that asks another question."""

    def kinds(self) -> list[tuple[str, list[str]]]:
        """(title, texts) of each kind of problem."""
        return [
            ("bad lines, files or names", [str(e) for e in self.errors]),
            ("missing frames", list(self.missing_frames.values())),
            ("samples without a spoken question", self.missing_audio),
            ("silent spoken questions", self.silent),
            ("spoken questions longer than the audio encoder hears", self.long),
            ("recordings that are the same for different questions", self.same_sound),
        ]


def run(options: CheckDataOptions, workspace: Workspace) -> Outcome:
    """Reads, looks up, counts. Raises UsageError when a file or folder cannot be read at all."""
    if options.deep and not (options.frames_dir or options.audio_dir):
        raise UsageError("--deep decodes frames and recordings: name --frames_dir, --audio_dir or both")
    findings = Findings()
    files = [_read(path, options, workspace, findings) for path in dict.fromkeys(map(str, options.files))]
    frames = FrameIndex(options.frames_dir) if options.frames_dir else None
    frame_files: dict[Path, Sample] = {}
    audio_files: dict[Path, Sample] = {}
    for file in files:
        audio = AudioIndex(file.audio_dir, file.samples) if file.audio_dir else None
        for sample in file.samples:
            _look_up(sample, frames, audio, findings, frame_files, audio_files)
    if options.deep:
        _decode(frame_files, audio_files, findings)

    samples = [sample for file in files for sample in file.samples]
    collisions = id_collisions(samples)
    clips = in_several([{sample.clip for sample in file.samples} for file in files])
    shared_frames = in_several([{frame for sample in file.samples for frame in sample.frames} for file in files])
    not_checked = [name for name, where in (("frames", options.frames_dir), ("audio", options.audio_dir)) if not where]
    asked = {kind: len(found) for kind, found in wordings(samples).items()}
    later = [sample for file in files[1:] for sample in file.samples]
    ok = not (findings.errors or findings.missing_frames or findings.missing_audio)
    replayed = None
    if options.as_trained:
        groups = [(file.path, file.samples) for file in files]
        replayed = replay(options.as_trained, groups, options.frames_dir, options.audio_dir)
        ok = ok and replayed["ok"]
    data = {
        "ok": ok,
        "samples": len(samples),
        "errors": [{"file": e.file, "line": e.line, "text": e.text} for e in findings.errors],
        "id_collisions": len(collisions),
        "shared_clips": len(clips),
        "shared_frames": len(shared_frames),
        "missing_frames": len(findings.missing_frames) if options.frames_dir else None,
        "missing_audio": len(findings.missing_audio) if options.audio_dir else None,
        "not_checked": not_checked,
        "majority_accuracy": majority_accuracy(samples),
        "colliding_ids": collisions,
        "missing_frames_list": list(findings.missing_frames),
        "missing_audio_list": findings.missing_audio,
        "silent_audio_list": findings.silent,
        "long_audio_list": findings.long,
        "same_audio_list": findings.same_sound,
        "shared_clips_examples": [f"{video} {clip[0]}" for video, clip in sorted(clips)[:EXAMPLES]],
        "shared_frames_examples": sorted(shared_frames)[:EXAMPLES],
        "duplicates_list": [place for file in files for place in duplicates(file.samples)],
        "frames_out_of_order_list": frames_out_of_order(samples),
        "answers_without_label_list": answers_without_label(samples),
        "wordings": asked,
        "unseen_wordings": unseen_wordings(files[0].samples, later),
        "as_trained": replayed,
        "files": [
            {
                "file": file.path,
                "samples": len(file.samples),
                "clusters": cluster_count(file.samples),
                "wordings": {kind: len(asked) for kind, asked in wordings(file.samples).items()},
                "id_collisions": len(id_collisions(file.samples)),
                "majority_accuracy": majority_accuracy(file.samples),
                "single_label_types": file.single_label_types,
                "labels": {kind: dict(labels.most_common()) for kind, labels in sorted(file.labels.items())},
            }
            for file in files
        ],
    }

    def show(console: Console) -> None:
        for file in files:
            show_file(console, file)
            console.print()
        show_notes(console, files, data)
        there = [name for name in ("frames", "audio") if name not in not_checked]
        good = f"all {' and '.join(there)} are there{' and decode' if options.deep else ''}" if there else ""
        show_problems(console, findings.kinds(), good or "every line is a sample")
        if replayed:
            show_replay(console, replayed)

    return Outcome(data, ok=ok, show=show)


# --- looking up -------------------------------------------------------------------------------------------------------


def _read(path: str, options: CheckDataOptions, workspace: Workspace, findings: Findings) -> File:
    samples, problems = scan_samples(path)
    findings.errors += problems

    def is_the(key: str) -> bool:
        configured = workspace.value(key)
        return configured is not None and Path(configured).resolve() == Path(path).resolve()

    later = path != options.files[0] and not is_the("train_data_path")
    for_eval = options.eval_audio_dir if later or is_the("eval_data_path") else None
    return File(path, for_eval or options.audio_dir, samples)


def _look_up(
    sample: Sample,
    frames: FrameIndex | None,
    audio: AudioIndex | None,
    findings: Findings,
    frame_files: dict[Path, Sample],
    audio_files: dict[Path, Sample],
) -> None:
    """Finds the sample's files; keeps each with the first sample that needs it."""
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


def _decode(frame_files: dict[Path, Sample], audio_files: dict[Path, Sample], findings: Findings) -> None:
    """Decodes every file: broken ones become errors, silent, long and repeated spoken questions are noted."""
    from surgvqa.data.audio import SAMPLE_RATE, load_audio
    from surgvqa.data.frames import load_frame

    def frame(path: Path) -> None:
        load_frame(path, image_size=sys.maxsize)

    spoken: dict[bytes, tuple[Path, Sample]] = {}

    def audio(path: Path) -> None:
        waveform = load_audio(path)
        if abs(waveform).max() < AUDIBLE:
            findings.silent.append(str(path))
        if len(waveform) > WINDOW_S * SAMPLE_RATE:
            findings.long.append(f"{path}: {len(waveform) / SAMPLE_RATE:.1f} s, heard are {WINDOW_S:g} s")
        sample, content = audio_files[path], hashlib.blake2b(path.read_bytes()).digest()
        other, asked = spoken.setdefault(content, (path, sample))
        if asked.wording != sample.wording:
            findings.same_sound.append(f"{path} sounds as {other}, but {sample.place} asks another than {asked.place}")

    def broken(job: tuple[Callable[[Path], None], Path, Sample]) -> Problem | None:
        decode, path, sample = job
        try:
            decode(path)
        except UsageError as error:
            return Problem(sample.file, sample.line, str(error))
        return None

    jobs = [(frame, *pair) for pair in frame_files.items()] + [(audio, *pair) for pair in audio_files.items()]
    terminal = Console(stderr=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow and libsndfile decode without the interpreter lock
        results = track(
            pool.map(broken, jobs),
            "decoding",
            total=len(jobs),
            console=terminal,
            transient=True,
            disable=not terminal.is_terminal,
        )
        findings.errors += [problem for problem in results if problem]
