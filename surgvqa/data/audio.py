"""Decodes spoken questions and computes the log-mel features for Whisper's encoder."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from surgvqa.data.audio_container import missing_part
from surgvqa.data.audio_tokens import HOP, SAMPLE_RATE
from surgvqa.errors import UsageError

if TYPE_CHECKING:
    from transformers import WhisperFeatureExtractor

RATES = range(1_000, 768_001)
"""Plausible sample rates of a recording, in Hz."""
QUIET_DB = 60.0
"""Sound this far below the loudest moment of a recording is not speech."""


def load_audio(path: str | os.PathLike[str]) -> np.ndarray:
    """The sound as float32 [samples], mono, 16 kHz, full scale 1, as in the old script.

    Raises UsageError for a file that is missing, cannot be decoded, is truncated or empty. It never returns silence
    instead, or only part of a question.
    """
    if not os.path.isfile(path):
        raise UsageError(f"audio {os.fspath(path)} is missing, expected a spoken question")
    try:
        content = Path(path).read_bytes()
        missing = missing_part(content)
        if not missing:
            _require_rate(os.fspath(path))
        waveform = None if missing else _decode(os.fspath(path))
    except UsageError:
        raise
    except Exception as error:  # errors of libsndfile and audioread, many without a text
        reason = str(error) or ("unknown audio format" if content else "it is empty")
        raise UsageError(
            f"audio {os.fspath(path)} cannot be decoded ({reason}), expected mp3, wav, flac or ogg (m4a needs ffmpeg)"
        ) from None
    if waveform is None:
        raise UsageError(f"audio {os.fspath(path)} is truncated ({missing}), expected a complete file; copy it again")
    if not waveform.size:
        raise UsageError(f"audio {os.fspath(path)} holds no sound (0 samples), expected a spoken question")
    if not np.isfinite(waveform).all():
        raise UsageError(f"audio {os.fspath(path)} holds NaN or infinity, expected samples in -1..1")
    return waveform


def _require_rate(path: str) -> None:
    """Raises UsageError for an implausible sample rate, at which resampling could turn a second into hours."""
    import soundfile

    try:
        rate = soundfile.info(path).samplerate
    except soundfile.LibsndfileError:  # a format for the other decoder
        return
    if rate not in RATES:
        raise UsageError(f"audio {path} says {rate:,} samples a second, expected 1,000 to 768,000; save it again")


def _decode(path: str) -> np.ndarray:
    import librosa  # imported here, because it takes 2 s and a run with a full feature cache decodes nothing

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about the backend that it uses instead
        return librosa.load(path, sr=SAMPLE_RATE, mono=True)[0]


def audio_seconds(path: str | os.PathLike[str]) -> float | None:
    """Length in seconds, from the header; None for formats unknown to libsndfile (load_audio may know them)."""
    import soundfile

    try:
        return float(soundfile.info(os.fspath(path)).duration)
    except soundfile.LibsndfileError:
        return None


def question_end_s(waveform: np.ndarray) -> float:
    """Seconds from the beginning of the recording to the end of speech.

    That is the last moment within 60 dB of the loudest one (librosa.effects.trim), so a noisy recording is not cut.
    """
    import librosa

    _, (_, end) = librosa.effects.trim(waveform, top_db=QUIET_DB)
    return float(end) / SAMPLE_RATE


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
