"""Decodes spoken questions and computes the log-mel features for Whisper's encoder."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from surgvqa.data.audio_container import missing_part
from surgvqa.data.audio_tokens import HOP, SAMPLE_RATE
from surgvqa.errors import SurgvqaError, UsageError, unexpected, unimportable

if TYPE_CHECKING:
    from transformers import WhisperFeatureExtractor

RATES = range(1_000, 768_001)
"""Plausible sample rates of a recording, in Hz."""
QUIET_DB = 60.0
"""Sound this far below the loudest moment of a recording is not speech."""
LOUDNESS_FRAME, LOUDNESS_HOP, INAUDIBLE = 2048, 512, 1e-5
"""Samples of a frame and between frames, and the amplitude below which all is equally silent: librosa's defaults."""


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
    except (Exception, SystemExit) as error:  # errors of libsndfile and audioread, many without a text
        if isinstance(error, ImportError) or unimportable(error):
            raise SurgvqaError(f"no decoder for audio {os.fspath(path)}: {unexpected(error)}") from None
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
    """What `librosa.load(path, sr=SAMPLE_RATE, mono=True)` returns, bit for bit.

    librosa itself decodes only formats unknown to libsndfile (m4a, through ffmpeg): on a new machine its first import
    compiles for 12 s, in every data loader's worker at once, and each later one takes 2 s.
    """
    import soundfile
    import soxr

    try:
        with soundfile.SoundFile(path) as file:  # soundfile.read seeks first, after which an MP3 decodes differently
            sound, rate = file.read(dtype="float32", always_2d=True), file.samplerate
    except soundfile.LibsndfileError:
        import librosa

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about the backend that it uses instead
            return librosa.load(path, sr=SAMPLE_RATE, mono=True)[0]
    waveform: np.ndarray = np.mean(sound.T, axis=0) if sound.shape[1] > 1 else sound[:, 0]
    if rate == SAMPLE_RATE or not waveform.size or not np.isfinite(waveform).all():
        return waveform
    length = math.ceil(len(waveform) * (float(SAMPLE_RATE) / rate))
    resampled: np.ndarray = soxr.resample(waveform, rate, SAMPLE_RATE, quality="soxr_hq")[:length]
    return np.pad(resampled, (0, length - len(resampled)))


def audio_seconds(path: str | os.PathLike[str]) -> float | None:
    """Length in seconds, from the header; None for formats unknown to libsndfile (load_audio may know them)."""
    import soundfile

    try:
        return float(soundfile.info(os.fspath(path)).duration)
    except soundfile.LibsndfileError:
        return None


def question_end_s(waveform: np.ndarray) -> float:
    """Seconds from the beginning of the recording to the end of speech.

    That is the last moment within 60 dB of the loudest one, as librosa.effects.trim finds it, so a noisy recording is
    not cut: the end of the last of the hops whose frame is that loud (root mean square of LOUDNESS_FRAME samples around
    the hop's beginning, zeros outside of the recording).
    """
    around = np.pad(waveform, LOUDNESS_FRAME // 2)
    frames = np.lib.stride_tricks.sliding_window_view(around, LOUDNESS_FRAME)[::LOUDNESS_HOP]
    power = np.maximum(np.mean(np.square(frames), axis=1), INAUDIBLE**2)
    loud = np.flatnonzero(10 * np.log10(power / power.max()) > -QUIET_DB)
    return min(len(waveform), (int(loud[-1]) + 1) * LOUDNESS_HOP) / SAMPLE_RATE


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
