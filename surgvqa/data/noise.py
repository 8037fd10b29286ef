"""Noise with the spectrum of a recording, alone or mixed with it. Uses numpy, no torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def noise_like(wave: np.ndarray) -> np.ndarray:
    """Noise [samples] with the spectrum and loudness of `wave` but random phases, so that no word can be recognised.

    The same recording always gives the same noise.
    """
    import numpy as np

    spectrum = np.abs(np.fft.rfft(wave))
    phases = np.random.default_rng(len(wave)).uniform(0, 2 * np.pi, len(spectrum))
    noise = np.fft.irfft(spectrum * np.exp(1j * phases), len(wave))
    level = _rms(wave) / max(_rms(noise), 1e-10)
    loud: np.ndarray = np.clip(noise * level, -1, 1).astype(np.float32)
    return loud


def with_noise(wave: np.ndarray, decibels: float | None) -> np.ndarray:
    """`wave` (float32 [samples], full scale 1) `decibels` louder than noise of its own spectrum; None = no noise.

    `decibels` is the signal-to-noise ratio of the mean powers. The sum is scaled down if it would exceed full scale.
    """
    if decibels is None:
        return wave
    noise = noise_like(wave)
    mixed: np.ndarray = wave + noise * (_rms(wave) / max(_rms(noise), 1e-10) * 10 ** (-decibels / 20))
    return mixed / max(1.0, float(abs(mixed).max()))


def _rms(wave: np.ndarray) -> float:
    return math.sqrt(float((wave.astype(float) ** 2).mean()))
