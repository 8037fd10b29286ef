"""Turns a sample into the model's inputs, as numpy arrays. For worker processes: small to pickle, without torch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from surgvqa.config.options import DataOptions
from surgvqa.data.audio import audio_features, audio_seconds, load_audio, question_end_s
from surgvqa.data.audio_tokens import tokens_to
from surgvqa.data.frames import frame_patches, load_frame, select_frames
from surgvqa.data.lookup import AudioIndex, FrameIndex
from surgvqa.data.processors import Processors
from surgvqa.data.prompt import IGNORED, answer_ids, prompt_ids
from surgvqa.data.samples import Sample
from surgvqa.errors import SurgvqaError, UsageError, of_worker

if TYPE_CHECKING:
    from surgvqa.data.feature_store import FeatureStore

EncodedSample = dict[str, Any]
"""{name: array}; with a feature cache also tensors, because numpy has no bfloat16."""


class FeaturesGone(SurgvqaError):
    """An entry of the feature cache is missing or damaged."""


class ClipDataset:
    """`dataset[i]` is the encoded sample i; see `encode` for the arrays.

    The constructor looks up every file of every sample and raises UsageError for a missing or ambiguous one, so that a
    run fails before training and not during it. `warnings` are those that the run should show once.
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
        self.audio_margin_s = options.audio_margin_s
        self.show(options.num_frames, options.image_size, options.audio_span)
        self.audio_paths: list[str] = [""] * len(self.samples)
        """The recordings; empty strings if questions are only written."""
        if self.spoken:
            audio = AudioIndex(audio_dir, self.samples)
            self.audio_paths = [str(audio.find(sample)) for sample in self.samples]
        lengths = {path: audio_seconds(path) for path in dict.fromkeys(filter(None, self.audio_paths))}
        window = self.processors.audio_window_s
        self.longest_question_s = max((window if s is None else min(s, window) for s in lengths.values()), default=0.0)
        """Seconds of each recording, at most the window; formats unknown to libsndfile count as the whole window."""
        self.warnings = self._warn_of_long_audio({path: seconds or 0.0 for path, seconds in lengths.items()})
        self.store: FeatureStore | None = None
        """The feature cache, set by `encode.fill_cache`; samples then have the encoders' outputs, no pixels or mels."""

    def show(self, num_frames: int, image_size: int, audio_span: str) -> None:
        """Sets how samples are shown from now on: `num_frames` of at most `image_size` pixels, and `audio_span`.

        With a feature cache, `encode.fill_cache` has to encode the new frames before the next sample is read.
        """
        frames = FrameIndex(self.frames_dir)
        self.frame_paths: list[list[str]] = []
        for sample in self.samples:
            try:
                chosen = select_frames(sample.frames, num_frames)
                self.frame_paths.append([str(frames.find(frame)) for frame in chosen])
            except UsageError as error:
                raise UsageError(f"{sample.place}: {error}") from None
        self.shown = num_frames, image_size, audio_span

    @property
    def spoken(self) -> bool:
        """Whether the model hears the question."""
        return self.input_mode != "text_only"

    @property
    def image_size(self) -> int:
        """Longest side of a frame in pixels."""
        return self.shown[1]

    def _audio_tokens(self, end_s: float) -> int:
        positions = self.processors.num_audio_tokens
        return tokens_to(end_s, positions, self.shown[2], self.audio_margin_s) if self.spoken else 0

    def _warn_of_long_audio(self, lengths: dict[str, float]) -> list[str]:
        window = self.processors.audio_window_s
        longest = max(lengths, key=lengths.__getitem__, default="")
        cut = sum(lengths.get(path, 0.0) > window for path in self.audio_paths)
        if not cut:
            return []
        return [
            f"{cut} of {len(self)} spoken questions are longer than the audio encoder's window of {window:g} s;"
            f" the rest is cut (longest: {lengths[longest]:.1f} s, {longest})"
        ]

    def longest(self) -> int:
        """Upper bound for the tokens of a sample, if all clips are as large as the first one.

        Every question counts as long as the longest recording.
        """
        grids = self[0]["image_grid_thw"]
        written = self.input_mode != "audio_only"
        words = {(s.question if written else "", s.answer if self.with_answer else None) for s in self.samples}
        sound = self._audio_tokens(self.longest_question_s)
        return max(
            len(
                ids_and_labels(self.processors, grids, sound, input_mode=self.input_mode, question=q, answer=a)[
                    "input_ids"
                ]
            )
            for q, a in words
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> EncodedSample:
        words = self._words(index)
        if self.store is not None:
            return self._from_cache(self.store, index, words)
        return encode(
            self.processors,
            self.frame_paths[index],
            self.audio_paths[index],
            image_size=self.image_size,
            audio_span=self.shown[2],
            audio_margin_s=self.audio_margin_s,
            **words,
        )

    def words(self, index: int) -> EncodedSample:
        """Sample `index` without frames and audio: input_ids, and labels of which as many are supervised as usual."""
        return ids_and_labels(self.processors, (), 0, **self._words(index))

    def _words(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        return {
            "input_mode": self.input_mode,
            "question": sample.question,
            "answer": sample.answer if self.with_answer else None,
        }

    def _from_cache(self, store: FeatureStore, index: int, words: dict[str, Any]) -> EncodedSample:
        """Like `encode`, but with image_features [image tokens, hidden] and audio_features [audio tokens, d_model].

        The cache has all features of a question; only the first audio_tokens are used.
        """
        import torch

        keys = [store.frame_key(path, self.image_size) for path in self.frame_paths[index]]
        frames = [_cached(store, key, path) for key, path in zip(keys, self.frame_paths[index])]
        grids = np.array([notes["grid"].split() for _, notes in frames], dtype=np.int64)
        seen = {"image_features": torch.cat([features for features, _ in frames]), "image_grid_thw": grids}
        if not self.spoken:
            return {**ids_and_labels(self.processors, grids, 0, **words), **seen}
        path = self.audio_paths[index]
        heard, notes = _cached(store, store.audio_key(path), path)
        audio_tokens = self._audio_tokens(float(notes["question_end_s"]))
        return {
            **ids_and_labels(self.processors, grids, audio_tokens, **words),
            **seen,
            "audio_features": heard[:audio_tokens],
        }


def _cached(store: FeatureStore, key: str, path: str) -> tuple[Any, dict[str, str]]:
    entry = store.get(key)
    if entry is None:
        raise FeaturesGone(
            f"{store.path(key)}: the cached features of {path} are missing or damaged; resume with --resume, "
            "which encodes them again"
        )
    return entry


def make_room_for_sockets() -> None:
    """Moves the temporary folder to /tmp if its path is too long for sockets.

    Worker processes pass tensors through sockets in the temporary folder, whose paths are limited to 107 bytes
    (unix(7)). With a longer path the workers fail, and the loader waits forever.
    """
    if len(os.fsencode(tempfile.gettempdir())) + len("/pymp-12345678/listener-12345678") > 107:
        tempfile.tempdir = "/tmp"


def loaded(loader: Iterable[Any]) -> Iterator[Any]:
    """Yields the items of a data loader. An unreadable file gives a one-line error, whichever process found it."""
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
    audio_span: str = "full",
    audio_margin_s: float = 0.0,
    question: str = "",
    answer: str | None = None,
) -> EncodedSample:
    """The model's inputs for one clip and one spoken question, with L tokens, F frames and P patches.

    input_ids int64 [L], labels int64 [L] (-100 except for the answer; all -100 without one), pixel_values float32
    [P, 1176], image_grid_thw int64 [F, 3], input_features float32 [mels, 2·positions of the encoder], and audio_tokens,
    how many of the encoder's states are used (`audio_span`, `audio_margin_s`: see `tokens_to`).
    The prompt contains `question` in the input modes audio_text and text_only. With the latter there is no audio and
    no input_features.
    """
    patches, grids = zip(
        *(frame_patches(load_frame(path, image_size), processors.image_processor) for path in frame_paths)
    )
    seen = {
        "pixel_values": np.concatenate(patches).astype(np.float32, copy=False),
        "image_grid_thw": np.stack(grids).astype(np.int64, copy=False),
    }
    words: dict[str, Any] = {"input_mode": input_mode, "question": question, "answer": answer}
    if input_mode == "text_only":
        return {**ids_and_labels(processors, grids, 0, **words), **seen}
    sound, positions = load_audio(audio_path), processors.num_audio_tokens
    features = audio_features(sound, processors.feature_extractor, positions)
    end_s = question_end_s(sound) if audio_span == "spoken" else 0.0
    audio_tokens = tokens_to(end_s, positions, audio_span, audio_margin_s)
    return {
        **ids_and_labels(processors, grids, audio_tokens, **words),
        **seen,
        "input_features": features.astype(np.float32, copy=False),
    }


def ids_and_labels(
    processors: Processors,
    grids: Iterable[np.ndarray],
    audio_tokens: int,
    *,
    input_mode: str,
    question: str,
    answer: str | None,
) -> EncodedSample:
    """input_ids and labels int64 [L], and audio_tokens, for frames with these grids (t, h, w in patches)."""
    prompt = prompt_ids(processors, grids, audio_tokens, question, input_mode)
    learned = answer_ids(processors, answer) if answer is not None else []
    return {
        "input_ids": np.array(prompt + learned, dtype=np.int64),
        "labels": np.array([IGNORED] * len(prompt) + learned, dtype=np.int64),
        "audio_tokens": audio_tokens,
    }
