"""From a sample to the model's inputs, as numpy arrays. Made for worker processes: small to pickle, no torch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from surgvqa.config.options import DataOptions
from surgvqa.data.audio import audio_features, audio_seconds, load_audio
from surgvqa.data.frames import frame_patches, load_frame, select_frames
from surgvqa.data.lookup import AudioIndex, FrameIndex
from surgvqa.data.processors import Processors
from surgvqa.data.prompt import IGNORED, answer_ids, prompt_ids
from surgvqa.data.samples import Sample
from surgvqa.errors import SurgvqaError, UsageError, of_worker

if TYPE_CHECKING:
    from surgvqa.data.feature_store import FeatureStore

Item = dict[str, Any]
"""Arrays by name; with a feature cache also tensors, numpy has no bfloat16."""


class FeaturesGone(SurgvqaError):
    """An entry of the feature cache is gone or damaged."""


class ClipDataset:
    """`dataset[i]` is sample i, encoded; see `encode` for the arrays.

    The constructor looks up every file of every sample and raises UsageError when one is missing or ambiguous, so that
    this fails before training and not in the middle of it. `warnings` holds what the run should say once.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        frames_dir: str | os.PathLike[str],
        audio_dir: str | os.PathLike[str],
        processors: Processors,
        options: DataOptions,
        with_answer: bool = True,
    ):
        self.samples = list(samples)
        self.processors = processors
        self.frames_dir = frames_dir
        self.input_mode = options.input_mode
        self.with_answer = with_answer
        self.show(options.num_frames, options.image_size)
        audio = AudioIndex(audio_dir, self.samples)
        self.audio_paths = [str(audio.find(sample)) for sample in self.samples]
        self.warnings = self._cut_audio()
        self.store: FeatureStore | None = None
        """Once `encode.fill_cache` has set it, samples carry the encoders' outputs instead of pixels and mels."""

    def show(self, num_frames: int, image_size: int) -> None:
        """Sets how clips are shown from now on: `num_frames` of each, at most `image_size` pixels wide or high.

        With a feature cache, `encode.fill_cache` has to encode them before the next sample is taken.
        """
        frames = FrameIndex(self.frames_dir)
        self.frame_paths: list[list[str]] = []
        for sample in self.samples:
            try:
                chosen = select_frames(sample.frames, num_frames)
                self.frame_paths.append([str(frames.find(frame)) for frame in chosen])
            except UsageError as error:
                raise UsageError(f"{sample.place}: {error}") from None
        self.shown = num_frames, image_size

    @property
    def image_size(self) -> int:
        """Longest side of a frame in pixels."""
        return self.shown[1]

    def _cut_audio(self) -> list[str]:
        window = self.processors.audio_window_s
        lengths = {path: audio_seconds(path) or 0.0 for path in dict.fromkeys(self.audio_paths)}
        longest = max(lengths, key=lengths.__getitem__, default="")
        cut = sum(lengths[path] > window for path in self.audio_paths)
        if not cut:
            return []
        return [
            f"{cut} of {len(self)} spoken questions are longer than the {window:g} s that the audio encoder hears; the"
            f" rest of them is cut (longest: {lengths[longest]:.1f} s, {longest})"
        ]

    def longest(self) -> int:
        """Tokens of the longest sample, were all clips as large as the first one."""
        grids = self[0]["image_grid_thw"]
        written = self.input_mode == "audio_text"
        words = {(s.question if written else "", s.answer if self.with_answer else None) for s in self.samples}
        return max(
            len(ids_and_labels(self.processors, grids, input_mode=self.input_mode, question=q, answer=a)["input_ids"])
            for q, a in words
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        words = self._words(index)
        if self.store is not None:
            return self._from_cache(self.store, index, words)
        return encode(
            self.processors, self.frame_paths[index], self.audio_paths[index], image_size=self.image_size, **words
        )

    def words(self, index: int) -> Item:
        """Sample `index` without its frames: labels, with as many supervised ones as `self[index]` has, and the ids of
        a prompt without frames."""
        return ids_and_labels(self.processors, (), **self._words(index))

    def _words(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        return {
            "input_mode": self.input_mode,
            "question": sample.question,
            "answer": sample.answer if self.with_answer else None,
        }

    def _from_cache(self, store: FeatureStore, index: int, words: dict[str, Any]) -> Item:
        """As `encode`, with image_features [image tokens, hidden] and audio_features [audio tokens, d_model]."""
        import torch

        keys = [store.frame_key(path, self.image_size) for path in self.frame_paths[index]]
        frames = [_cached(store, key, path) for key, path in zip(keys, self.frame_paths[index])]
        grids = np.array([notes["grid"].split() for _, notes in frames], dtype=np.int64)
        sound = self.audio_paths[index]
        return {
            **ids_and_labels(self.processors, grids, **words),
            "image_features": torch.cat([features for features, _ in frames]),
            "image_grid_thw": grids,
            "audio_features": _cached(store, store.audio_key(sound), sound)[0],
        }


def _cached(store: FeatureStore, key: str, path: str) -> tuple[Any, dict[str, str]]:
    entry = store.get(key)
    if entry is None:
        raise FeaturesGone(
            f"{store.path(key)}: the cached features of {path} are gone or damaged; go on with --resume, "
            "which encodes them again"
        )
    return entry


def make_room_for_sockets() -> None:
    """Moves the temporary folder to /tmp where its path is too long for sockets.

    Worker processes pass tensors through sockets in the temporary folder, whose paths may have at most 107 bytes
    (unix(7)). With a longer one the workers fail, and the loader waits forever.
    """
    if len(os.fsencode(tempfile.gettempdir())) + len("/pymp-12345678/listener-12345678") > 107:
        tempfile.tempdir = "/tmp"


def loaded(loader: Iterable[Any]) -> Iterator[Any]:
    """The items of a data loader. An unreadable file is reported in one line, whichever process found it."""
    try:
        yield from loader
    except SurgvqaError as error:
        raise of_worker(error) from error


def encode(
    processors: Processors,
    frame_paths: Sequence[str | os.PathLike[str]],
    audio_path: str | os.PathLike[str],
    *,
    image_size: int,
    input_mode: str,
    question: str = "",
    answer: str | None = None,
) -> Item:
    """One clip and one spoken question as the model's inputs, L tokens, F frames, P patches:

    input_ids int64 [L], labels int64 [L] (-100 but for the answer; all -100 without one), pixel_values float32
    [P, 1176], image_grid_thw int64 [F, 3], input_features float32 [mels, 2·audio tokens].
    `question` is written into the prompt in input_mode audio_text only.
    """
    patches, grids = zip(
        *(frame_patches(load_frame(path, image_size), processors.image_processor) for path in frame_paths)
    )
    features = audio_features(load_audio(audio_path), processors.feature_extractor, processors.num_audio_tokens)
    return {
        **ids_and_labels(processors, grids, input_mode=input_mode, question=question, answer=answer),
        "pixel_values": np.concatenate(patches).astype(np.float32, copy=False),
        "image_grid_thw": np.stack(grids).astype(np.int64, copy=False),
        "input_features": features.astype(np.float32, copy=False),
    }


def ids_and_labels(
    processors: Processors, grids: Iterable[np.ndarray], *, input_mode: str, question: str, answer: str | None
) -> Item:
    """input_ids and labels int64 [L] of a clip whose frames have these grids (t, h, w in patches)."""
    prompt = prompt_ids(processors, grids, question, input_mode)
    learned = answer_ids(processors, answer) if answer is not None else []
    return {
        "input_ids": np.array(prompt + learned, dtype=np.int64),
        "labels": np.array([IGNORED] * len(prompt) + learned, dtype=np.int64),
    }
