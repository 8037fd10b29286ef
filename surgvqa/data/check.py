"""`surgvqa check-data`: every line of the JSONL files against the frames and the audio, and what the data can teach.

What stops a training run makes the answer bad (exit code 1): lines that are no samples, missing frames, missing or
ambiguous audio. The rest is pointed out: ids that stand for several questions, clips in more than one file, labels so
uneven that a blind guess scores.
"""

from __future__ import annotations

import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from surgvqa.config.options import CheckDataOptions
from surgvqa.config.workspace import Workspace
from surgvqa.data.jsonl import Problem
from surgvqa.data.lookup import AudioIndex, FrameIndex, MissingFile
from surgvqa.data.samples import Sample, majority_accuracy, scan_samples
from surgvqa.errors import UsageError
from surgvqa.outcome import Outcome

SHOWN = 10
"""Problems of one kind that people are shown; the rest is counted. --json has them all."""
BAR_CELLS = 20
COLOURS = ("cyan", "magenta", "yellow", "white")
SHADES = "━╍┈·"
"""How the most frequent label is drawn, the second, the third, and all others: told apart without colour too."""


@dataclass
class File:
    """One JSONL file and what was found in it."""

    path: str
    audio_dir: str
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


def run(options: CheckDataOptions, workspace: Workspace) -> Outcome:
    """Reads, looks up, counts. Raises UsageError when a file or folder cannot be read at all."""
    findings = Findings()
    files = [_read(path, options, workspace, findings) for path in dict.fromkeys(map(str, options.files))]
    frames = FrameIndex(options.frames_dir)
    frame_files: dict[Path, Sample] = {}
    audio_files: dict[Path, Sample] = {}
    for file in files:
        audio = AudioIndex(file.audio_dir, file.samples)
        for sample in file.samples:
            _look_up(sample, frames, audio, findings, frame_files, audio_files)
    if options.deep:
        _decode(frame_files, audio_files, findings)

    samples = [sample for file in files for sample in file.samples]
    collisions = id_collisions(samples)
    clips = _in_several([{sample.clip for sample in file.samples} for file in files])
    shared_frames = _in_several([{frame for sample in file.samples for frame in sample.frames} for file in files])
    ok = not (findings.errors or findings.missing_frames or findings.missing_audio)
    data = {
        "ok": ok,
        "samples": len(samples),
        "errors": [{"file": e.file, "line": e.line, "text": e.text} for e in findings.errors],
        "id_collisions": len(collisions),
        "shared_clips": len(clips),
        "shared_frames": len(shared_frames),
        "missing_frames": len(findings.missing_frames),
        "missing_audio": len(findings.missing_audio),
        "majority_accuracy": majority_accuracy(samples),
        "colliding_ids": collisions,
        "missing_frames_list": list(findings.missing_frames),
        "missing_audio_list": findings.missing_audio,
        "silent_audio_list": findings.silent,
        "files": [
            {
                "file": file.path,
                "samples": len(file.samples),
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
            _show_file(console, file)
            console.print()
        _show_notes(console, files, data)
        _show_problems(console, findings, deep=options.deep)

    return Outcome(data, ok=ok, show=show)


def id_collisions(samples: Iterable[Sample]) -> list[str]:
    """The ids that stand for more than one question, whatever the video."""
    questions: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        questions[sample.id].add(sample.wording)
    return sorted(name for name, asked in questions.items() if len(asked) > 1)


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
    frames: FrameIndex,
    audio: AudioIndex,
    findings: Findings,
    frame_files: dict[Path, Sample],
    audio_files: dict[Path, Sample],
) -> None:
    """Finds the sample's files; keeps each with the first sample that needs it."""
    for frame in sample.frames:
        if frame in findings.missing_frames:
            continue
        try:
            frame_files.setdefault(frames.find(frame), sample)
        except MissingFile as error:
            findings.missing_frames[frame] = f"{sample.place}: {error}"
    try:
        audio_files.setdefault(audio.find(sample), sample)
    except MissingFile as error:
        findings.missing_audio.append(str(error))
    except UsageError as error:
        findings.errors.append(Problem(sample.file, sample.line, str(error).removeprefix(f"{sample.place}: ")))


def _decode(frame_files: dict[Path, Sample], audio_files: dict[Path, Sample], findings: Findings) -> None:
    """Decodes every file: broken ones become errors, spoken questions of digital silence are noted."""
    from surgvqa.data.audio import load_audio
    from surgvqa.data.frames import load_frame

    def frame(path: Path) -> None:
        load_frame(path, image_size=sys.maxsize)

    def audio(path: Path) -> None:
        if not load_audio(path).any():
            findings.silent.append(str(path))

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


def _in_several(groups: Sequence[set[Any]]) -> set[Any]:
    """What is in more than one of the sets."""
    counts = Counter(item for group in groups for item in group)
    return {item for item, count in counts.items() if count > 1}


# --- showing ----------------------------------------------------------------------------------------------------------


def _show_file(console: Console, file: File) -> None:
    """Label balance by question type: a bar in which each label has its shade, most frequent first."""
    clips = len({sample.clip for sample in file.samples})
    console.print(Text.assemble((file.path, "bold"), f"  {len(file.samples):,} samples, {clips:,} clips"))
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("question type", no_wrap=True)
    table.add_column("samples", justify="right")
    table.add_column("balance", no_wrap=True)
    table.add_column("labels", overflow="fold")
    for kind, counts in sorted(file.labels.items()):
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        labels = " · ".join(f"{label} {count}" for label, count in ranked)
        only = ("one label only  " if len(ranked) == 1 else "", "yellow")
        bar = _coloured(_bar([n for _, n in ranked]))
        table.add_row(kind, str(counts.total()), bar, Text.assemble(only, labels))
    console.print(table)


def _bar(counts: Sequence[int]) -> str:
    """Shares as one bar of BAR_CELLS cells; each cell takes the shade of the label at its middle."""
    total, ends = sum(counts), list(accumulate(counts))
    cells = ((cell + 0.5) / BAR_CELLS * total for cell in range(BAR_CELLS))
    labels = (next(i for i, end in enumerate(ends) if middle < end) for middle in cells)
    return "".join(SHADES[min(label, len(SHADES) - 1)] for label in labels)


def _coloured(bar: str) -> Text:
    """The bar with a colour a label."""
    parts = ("".join(group) for _, group in groupby(bar))
    return Text.assemble(*((part, COLOURS[SHADES.index(part[0])]) for part in parts))


def _show_notes(console: Console, files: list[File], data: dict[str, Any]) -> None:
    """What is no error but bears on what a score is worth; a yellow bullet where there is something to see."""

    def note(text: str, remarkable: bool = False) -> None:
        console.print(Text.assemble(("•", "yellow" if remarkable else ""), f" {text}"))

    several = len(files) > 1
    by_file = ", ".join(f"{_name(f['file'])} {100 * f['majority_accuracy']:.1f} %" for f in data["files"])
    note(
        f"majority accuracy (a blind guess by question type): {100 * data['majority_accuracy']:.1f} %"
        + (f" ({by_file})" if several else "")
    )
    within = sum(file["id_collisions"] for file in data["files"])
    inside = f", {within} of them inside one file" if several else ""
    example = f", as {data['colliding_ids'][0]}" if data["colliding_ids"] else ""
    note(f"ids that stand for more than one question: {data['id_collisions']}{inside}{example}", within > 0)
    if several:
        clips, frames = data["shared_clips"], data["shared_frames"]
        note(f"clips in more than one file: {clips:,} (frames in more than one file: {frames:,})", clips > 0)
    for file in files:
        if kinds := file.single_label_types:
            note(f"question types with a single label in {_name(file.path)}: {len(kinds)} of {len(file.labels)}", True)


def _name(path: str) -> str:
    return Path(path).name


def _show_problems(console: Console, findings: Findings, deep: bool) -> None:
    """First ten of each kind, the rest counted."""
    kinds = [
        ("bad lines, files or names", [str(e) for e in findings.errors]),
        ("missing frames", list(findings.missing_frames.values())),
        ("samples without a spoken question", findings.missing_audio),
        ("spoken questions of pure silence", findings.silent),
    ]
    for title, texts in kinds:
        if texts:
            console.print(Text(f"{len(texts):,} {title}", "red"))
            for text in texts[:SHOWN]:
                console.print(Text(f"  {text}"), soft_wrap=True)
            if len(texts) > SHOWN:
                console.print(f"  … and {len(texts) - SHOWN:,} more (--json lists them all)")
    if not any(texts for _, texts in kinds):
        console.print(Text(f"every frame and every spoken question is there{' and decodes' if deep else ''}", "green"))
