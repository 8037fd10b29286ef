"""Spoken questions: decoding, and the log-mel features of Whisper's encoder."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from surgvqa.data.audio_container import missing_part
from surgvqa.errors import UsageError

if TYPE_CHECKING:
    from transformers import WhisperFeatureExtractor

SAMPLE_RATE = 16_000
HOP = 160
"""Whisper's mel frames are 160 samples (10 ms) apart; two of them become one position of the encoder."""


def load_audio(path: str | os.PathLike[str]) -> np.ndarray:
    """The sound as float32 [samples], mono, 16 kHz, full scale 1, as the old script loads it.

    Raises UsageError for a file that is missing, cannot be decoded, is cut short, or holds nothing: never silence in
    its place, and never a part of a question.
    """
    if not os.path.isfile(path):
        raise UsageError(f"audio {os.fspath(path)} is missing, expected a spoken question")
    try:
        missing = missing_part(Path(path).read_bytes())
        waveform = None if missing else _decode(os.fspath(path))
    except Exception as error:  # libsndfile's and audioread's own kinds, many without a text
        reason = str(error) or type(error).__name__
        raise UsageError(
            f"audio {os.fspath(path)} cannot be decoded ({reason}), expected mp3, wav, flac or ogg (m4a needs ffmpeg)"
        ) from None
    if waveform is None:
        raise UsageError(f"audio {os.fspath(path)} is cut short ({missing}), expected a whole file; copy it again")
    if not waveform.size:
        raise UsageError(f"audio {os.fspath(path)} holds no sound (0 samples), expected a spoken question")
    if not np.isfinite(waveform).all():
        raise UsageError(f"audio {os.fspath(path)} holds NaN or infinity, expected samples in -1..1")
    return waveform


def _decode(path: str) -> np.ndarray:
    import librosa  # here, not above: it takes 2 s, and a run with a full feature cache decodes nothing

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells which backend it fell back to
        return librosa.load(path, sr=SAMPLE_RATE, mono=True)[0]


def audio_seconds(path: str | os.PathLike[str]) -> float | None:
    """Length in seconds, from the header; None when libsndfile does not know the format (load_audio then decides)."""
    import soundfile

    try:
        return float(soundfile.info(os.fspath(path)).duration)
    except soundfile.LibsndfileError:
        return None


def audio_features(waveform: np.ndarray, feature_extractor: WhisperFeatureExtractor, positions: int) -> np.ndarray:
    """Log-mel spectrogram float32 [mels, 2·positions] for an encoder with `positions` positions (1500 = 30 s).

    Shorter sound is padded with zeros before the spectrogram, as Whisper does; longer sound is cut.
    """
    features: np.ndarray = feature_extractor(
        waveform,
        sampling_rate=SAMPLE_RATE,
        padding="max_length",
        max_length=2 * positions * HOP,
        truncation=True,
        return_tensors="np",
    )["input_features"][0]
    return features
