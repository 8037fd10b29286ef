"""Makes a dataset of altered samples, with recordings and frames of other samples and generated ones.

Everything generated is a file, so the feature cache handles it like any other.
"""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
import soxr
from PIL import Image

from surgvqa.data.audio import load_audio
from surgvqa.data.audio_tokens import SAMPLE_RATE
from surgvqa.data.dataset import ClipDataset
from surgvqa.data.frames import largest_frame
from surgvqa.data.noise import noise_like
from surgvqa.probe.conditions import Case

FASTER = 1.2
SILENCE_STEP = SAMPLE_RATE // 2
"""A silence is as long as the recording to within half a second, so that few different ones need encoding."""


class Alterations:
    """Makes the altered samples; generated files are in `folder`."""

    def __init__(self, pool: ClipDataset, folder: Path):
        self.pool, self.folder = pool, folder
        self._silence = cache(self._make_silence)
        self._noise = cache(self._make_noise)
        self._fast = cache(self._make_fast)
        self._black = cache(self._make_black)

    def dataset(self, cases: Sequence[Case]) -> ClipDataset:
        """One sample for each case, in order. Raises UsageError for an unreadable recording or frame."""
        altered = copy.copy(self.pool)
        altered.samples, altered.frame_paths, altered.audio_paths = [], [], []
        for case in cases:
            self._add(altered, case)
        return altered

    def _add(self, altered: ClipDataset, case: Case) -> None:
        sample, frames = self.pool.samples[case.index], self.pool.frame_paths[case.index]
        sound, other = self.pool.audio_paths[case.index], case.partner
        if other is not None and case.condition in ("other_question", "same_question", "other_wording"):
            sound = self.pool.audio_paths[other]
        if other is not None and case.condition in ("other_text", "other_wording"):
            sample = replace(sample, question=self.pool.samples[other].question)
        if other is not None and case.condition == "other_clip":
            frames = self.pool.frame_paths[other]
        if case.condition == "silence":
            sound = self._silence(-(-len(load_audio(sound)) // SILENCE_STEP) * SILENCE_STEP)
        elif case.condition == "noise":
            sound = self._noise(sound)
        elif case.condition == "speed":
            sound = self._fast(sound)
        elif case.condition == "shuffled":
            frames = shuffled(frames, str(sample.clip))
        elif case.condition == "first_frame":
            frames = frames[:1] * len(frames)
        elif case.condition == "black":
            frames = [self._black(largest_frame([[frame]])) for frame in frames]
        altered.samples.append(sample)
        altered.frame_paths.append(list(frames))
        altered.audio_paths.append(sound)

    def _make_silence(self, samples: int) -> str:
        return self._write(f"silence-{samples}", np.zeros(samples, np.float32))

    def _make_noise(self, path: str) -> str:
        return self._write(f"noise-{_name(path)}", noise_like(load_audio(path)))

    def _make_fast(self, path: str) -> str:
        return self._write(f"fast-{_name(path)}", soxr.resample(load_audio(path), SAMPLE_RATE * FASTER, SAMPLE_RATE))

    def _make_black(self, size: tuple[int, int]) -> str:
        file = self.folder / f"black-{size[0]}x{size[1]}.png"
        Image.new("RGB", size).save(file)
        return str(file)

    def _write(self, name: str, wave: np.ndarray) -> str:
        file = self.folder / f"{name}.wav"
        soundfile.write(file, wave, SAMPLE_RATE)
        return str(file)


def shuffled(frames: Sequence[str], seed: str) -> list[str]:
    """The frames in another order, which `seed` determines; unchanged if all frames are the same."""
    found, rng = list(frames), random.Random(seed)
    while len(set(frames)) > 1 and found == list(frames):
        rng.shuffle(found)
    return found


def _name(path: str) -> str:
    return hashlib.blake2b(path.encode(errors="surrogateescape"), digest_size=8).hexdigest()
