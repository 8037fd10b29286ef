"""Spoken questions: eSpeak NG, from the library and voices that `espeakng-loader` bundles, through ctypes.

The synthesiser works in this process, hands its samples to a callback and plays nothing.
"""

from __future__ import annotations

import ctypes
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from surgvqa.errors import SurgvqaError

if TYPE_CHECKING:
    import numpy as np

# From eSpeak NG's speak_lib.h.
SYNCHRONOUS = 2
DONT_EXIT = 0x8000
POSITION_CHARACTER = 1
TEXT_UTF8 = 1
RATE, PITCH, RANGE = 1, 3, 4
LONGEST_DATA_PATH = 150
"""eSpeak NG keeps the path of its data in a fixed buffer of 160 bytes."""

EVENT_WORD = 1


class _Event(ctypes.Structure):
    """espeak_EVENT."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    )


LANGUAGES = ("en-us", "en")
VARIANTS = ("m1", "m3", "m7", "f1", "Annie", "f4", "Andy", "linda")
"""Of those that speak the same every time: f2, f3, f5 and whisper breathe as the clock says."""


@dataclass(frozen=True)
class Voice:
    """How a question is spoken."""

    name: str
    """eSpeak's language+variant."""
    words_per_minute: int
    pitch: int
    """0..100, 50 is the voice's own."""
    pitch_range: int
    """0..100, 50 is the voice's own; 0 is monotone."""


def draw_voice(rng: np.random.Generator) -> Voice:
    """One of the many ways to speak."""
    return Voice(
        f"{rng.choice(LANGUAGES)}+{rng.choice(VARIANTS)}",
        int(rng.integers(200, 231)),
        int(rng.integers(40, 61)),
        int(rng.integers(30, 71)),
    )


class Synthesiser:
    """eSpeak NG, opened once. `with Synthesiser() as espeak: espeak.speak(text, voice)`."""

    _callback_type = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
    )

    def __enter__(self) -> Synthesiser:
        self._folder = tempfile.TemporaryDirectory(prefix="espeak-")
        try:
            import espeakng_loader

            # A copy of its own: the library keeps state over espeak_Terminate, and the next one would speak otherwise.
            self._library = ctypes.CDLL(shutil.copy(espeakng_loader.get_library_path(), self._folder.name))
            data = espeakng_loader.get_data_path()
        except (ImportError, OSError, RuntimeError) as error:
            self._folder.cleanup()
            raise SurgvqaError(
                f"eSpeak NG cannot be loaded ({error}); pip install 'surgvqa[train]' brings it"
            ) from None
        if len(data.encode()) > LONGEST_DATA_PATH:
            short = Path(self._folder.name) / "espeak-ng-data"
            short.symlink_to(data)
            data = str(short)
        self.sample_rate = self._library.espeak_Initialize(SYNCHRONOUS, 0, data.encode(), DONT_EXIT)
        if self.sample_rate <= 0:
            raise SurgvqaError(f"eSpeak NG does not start with its voices in {data}; reinstall espeakng-loader")
        self._pieces: list[bytes] = []
        self._words: list[tuple[int, int]] = []

        @self._callback_type
        def keep(samples, count: int, events) -> int:  # 0 = go on
            for event in _until_terminated(events):
                if event.type == EVENT_WORD:
                    self._words.append((event.text_position - 1, event.sample))
            if samples and count > 0:
                self._pieces.append(ctypes.string_at(samples, count * 2))
            return 0

        self._keep = keep  # the library holds only a pointer to it
        self._library.espeak_SetSynthCallback(self._keep)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._library.espeak_Terminate()
        self._folder.cleanup()

    def speak(self, text: str, voice: Voice) -> np.ndarray:
        """The spoken text, float32 in -1..1 at `sample_rate`, silence at both ends cut to 30 ms."""
        return self.speak_words(text, voice)[0]

    def speak_words(self, text: str, voice: Voice) -> tuple[np.ndarray, list[tuple[int, float]]]:
        """As `speak`, and for each word where it begins in `text` (characters) and in the sound (seconds)."""
        import numpy as np

        if self._library.espeak_SetVoiceByName(voice.name.encode()):
            raise SurgvqaError(f"eSpeak NG has no voice {voice.name}; reinstall espeakng-loader")
        for parameter, value in ((RATE, voice.words_per_minute), (PITCH, voice.pitch), (RANGE, voice.pitch_range)):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._pieces.clear()
        self._words.clear()
        spoken = text.encode()
        status = self._library.espeak_Synth(
            spoken, ctypes.c_size_t(len(spoken) + 1), 0, POSITION_CHARACTER, 0, TEXT_UTF8, None, None
        )
        if status or self._library.espeak_Synchronize() or not self._pieces:
            raise SurgvqaError(f"eSpeak NG could not speak {text!r} with the voice {voice.name} (status {status})")
        wave = np.frombuffer(b"".join(self._pieces), np.int16).astype(np.float32) / 32768
        loud = np.flatnonzero(np.abs(wave) > 0.01)
        margin = int(0.03 * self.sample_rate)
        first = max(int(loud[0]) - margin, 0)
        words = [(place, max(sample - first, 0) / self.sample_rate) for place, sample in self._words]
        return wave[first : int(loud[-1]) + margin], words


def _until_terminated(events: Any) -> Iterator[_Event]:
    """The events of one callback; a list in C ends with one of type 0."""
    i = 0
    while events and events[i].type:
        yield events[i]
        i += 1
