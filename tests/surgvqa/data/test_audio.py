"""Sound at 16 kHz, and what broken files are told."""

import subprocess
import sys

import numpy as np
import pytest

from surgvqa.errors import UsageError

Image = pytest.importorskip("PIL.Image")
soundfile = pytest.importorskip("soundfile")
from surgvqa.data.audio import QUIET_DB, load_audio, question_end_s  # noqa: E402
from surgvqa.data.audio_tokens import SAMPLE_RATE  # noqa: E402


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """Coarse noise: compresses well, and a shifted or blank image would not pass for it."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 20, width // 20, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def tone(seconds: float, rate: int = SAMPLE_RATE) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)


@pytest.mark.parametrize("name", ["q.wav", "q.mp3", "q.flac", "q.ogg"])
def test_sound_comes_as_mono_16_khz(tmp_path, name):
    stereo = np.stack([tone(1.5, 44_100)] * 2, axis=1)
    soundfile.write(tmp_path / name, stereo, 44_100)
    waveform = load_audio(tmp_path / name)
    assert waveform.dtype == np.float32 and waveform.shape == (24_000,)
    middle = waveform[4000:20_000]
    frequency = np.argmax(np.abs(np.fft.rfft(middle))) * SAMPLE_RATE / len(middle)
    assert abs(frequency - 440) < 2 and 0.45 < np.abs(middle).max() < 0.55


@pytest.mark.parametrize(("rate", "name"), [(22_050, "q.wav"), (44_100, "q.mp3"), (16_000, "q.flac"), (8_000, "q.ogg")])
def test_sound_becomes_mono_at_16_khz_with_its_pitch(tmp_path, rate, name):
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(3 * rate) / rate)
    soundfile.write(tmp_path / name, np.stack([tone, tone], 1), rate)
    heard = load_audio(tmp_path / name)
    assert heard.dtype == np.float32 and heard.ndim == 1
    assert abs(len(heard) / SAMPLE_RATE - 3) < 0.1
    spectrum = np.abs(np.fft.rfft(heard))
    assert abs(spectrum.argmax() * SAMPLE_RATE / len(heard) - 440) < 2
    assert abs(np.abs(heard).max() - 0.5) < 0.05


def test_broken_sound_is_named_and_never_silence(tmp_path):
    soundfile.write(tmp_path / "none.wav", np.zeros(0), SAMPLE_RATE)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), SAMPLE_RATE, subtype="FLOAT")
    (tmp_path / "text.mp3").write_bytes(b"hello" * 100)
    (tmp_path / "empty.wav").write_bytes(b"")
    for name, told in [
        ("none.wav", r"holds no sound \(0 samples\)"),
        ("nan.wav", r"(holds NaN or infinity|cannot be decoded \(.*not finite)"),
        ("text.mp3", r"cannot be decoded \(.+\), expected mp3, wav"),
        ("empty.wav", r"cannot be decoded \(.+\), expected mp3, wav"),
        ("gone.mp3", "is missing"),
    ]:
        with pytest.raises(UsageError, match=rf"audio .*/{name} {told}"):
            load_audio(tmp_path / name)


def speech(seconds: float, rate: int, quiet: float) -> np.ndarray:
    """Noise of changing loudness with a quiet end."""
    noise = np.random.default_rng(7).standard_normal((int(seconds * rate), 2)) * 0.2
    noise[int(0.6 * seconds * rate) :] *= quiet
    return noise


@pytest.mark.model  # no model, but librosa, which takes seconds to import
@pytest.mark.parametrize("name", ["q.wav", "q.flac", "q.ogg", "q.mp3"])
@pytest.mark.parametrize(("rate", "seconds", "quiet"), [(16_000, 1.0, 1e-4), (24_000, 2.3, 0.0), (44_100, 0.7, 1e-2)])
def test_the_sound_and_its_end_are_librosas(tmp_path, name, rate, seconds, quiet):
    """The mission's script heard through librosa; so must we, to the last bit."""
    librosa = pytest.importorskip("librosa")
    soundfile.write(tmp_path / name, speech(seconds, rate, quiet), rate)
    expected, _ = librosa.load(tmp_path / name, sr=SAMPLE_RATE, mono=True)
    heard = load_audio(tmp_path / name)
    np.testing.assert_array_equal(heard, expected)
    _, (_, end) = librosa.effects.trim(expected, top_db=QUIET_DB)
    assert question_end_s(heard) == end / SAMPLE_RATE


def test_hearing_a_known_format_does_not_import_librosa(tmp_path):
    """On a new machine its import compiles for 12 s, in each worker."""
    soundfile.write(tmp_path / "q.mp3", tone(1.0, 24_000), 24_000)
    program = (
        "import sys; from surgvqa.data.audio import load_audio, question_end_s; "
        "assert question_end_s(load_audio(sys.argv[1])) > 0.9; sys.exit('librosa' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path / "q.mp3")]).returncode == 0
