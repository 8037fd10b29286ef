"""`check-data --deep`: decodes every frame and recording and checks their content."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from surgvqa.data.jsonl import Problem
from surgvqa.data.samples import Sample
from surgvqa.errors import UsageError
from surgvqa.terminal.progress import in_threads

WINDOW_S = 30.0
"""Seconds of a recording in Whisper's window."""
SHORTEST_S = 0.25
"""Seconds; no spoken question is shorter."""
AUDIBLE = 0.001
"""Share of full scale (-60 dB). A recording that always stays closer to its mean is silent: noise of a microphone or
codec."""
FLAT = 8
"""Grey levels (of 256) that a frame of one colour may span after JPEG compression."""


@dataclass
class DecodedFindings:
    """Findings of decoding, in the order of the samples."""

    errors: list[Problem] = field(default_factory=list)
    """Files that cannot be decoded."""
    silent: list[str] = field(default_factory=list)
    short: list[str] = field(default_factory=list)
    long: list[str] = field(default_factory=list)
    """Recordings longer than the audio encoder's window."""
    same_sound: list[str] = field(default_factory=list)
    """Recordings with the same sound as another one for a different question."""
    blank: list[str] = field(default_factory=list)
    """Frames of a single colour."""
    odd_sizes: list[str] = field(default_factory=list)
    """Frames of another size than most of their video."""


@dataclass(frozen=True)
class _Frame:
    size: tuple[int, int]
    blank: bool


@dataclass(frozen=True)
class _Sound:
    seconds: float
    silent: bool
    content: bytes


def decode(frame_files: Mapping[Path, Sample], audio_files: Mapping[Path, Sample]) -> DecodedFindings:
    """Decodes every file. The mappings give for each the first sample that needs it."""
    found = DecodedFindings()
    sizes: dict[str, dict[Path, tuple[int, int]]] = defaultdict(dict)
    heard: dict[bytes, tuple[Path, Sample]] = {}
    jobs = [(_frame, *pair) for pair in frame_files.items()] + [(_sound, *pair) for pair in audio_files.items()]

    def work(job: tuple[object, Path, Sample]) -> _Frame | _Sound | Problem:
        reader, path, sample = job
        try:
            return _frame(path) if reader is _frame else _sound(path)
        except UsageError as error:
            return Problem(sample.file, sample.line, str(error))

    for (_, path, sample), result in zip(jobs, in_threads(work, jobs, "decoding")):
        if isinstance(result, Problem):
            found.errors.append(result)
        elif isinstance(result, _Frame):
            sizes[sample.video_id][path] = result.size
            if result.blank:
                found.blank.append(str(path))
        else:
            _note_sound(found, path, sample, result, heard)
    for of_video in sizes.values():
        usual, count = Counter(of_video.values()).most_common(1)[0]
        found.odd_sizes += [
            f"{path}: {width}×{height} pixels, {count:,} of the video's {len(of_video):,} are {usual[0]}×{usual[1]}"
            for path, (width, height) in of_video.items()
            if (width, height) != usual
        ]
    return found


def _frame(path: Path) -> _Frame:
    import numpy as np

    from surgvqa.data.frames import load_frame

    image = load_frame(path, image_size=sys.maxsize)
    pixels = np.asarray(image)
    return _Frame(image.size, bool((pixels.max((0, 1)) - pixels.min((0, 1)) <= FLAT).all()))


def _sound(path: Path) -> _Sound:
    from surgvqa.data.audio import load_audio
    from surgvqa.data.audio_tokens import SAMPLE_RATE

    wave = load_audio(path)
    silent = bool(abs(wave - wave.mean()).max() < AUDIBLE)
    return _Sound(len(wave) / SAMPLE_RATE, silent, hashlib.blake2b(wave.tobytes()).digest())


def _note_sound(
    found: DecodedFindings, path: Path, sample: Sample, sound: _Sound, heard: dict[bytes, tuple[Path, Sample]]
) -> None:
    if sound.silent:
        found.silent.append(str(path))
    if sound.seconds < SHORTEST_S:
        found.short.append(f"{path}: {sound.seconds:.2f} s")
    if sound.seconds > WINDOW_S:
        found.long.append(f"{path}: {sound.seconds:.1f} s, but only {WINDOW_S:g} s are heard")
    other, asked = heard.setdefault(sound.content, (path, sample))
    if asked.wording != sample.wording:
        found.same_sound.append(
            f"{path} has the same sound as {other}, but {sample.place} and {asked.place} ask different questions"
        )
