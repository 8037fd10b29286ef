"""Speaks questions with eSpeak NG, whose library and voices `espeakng-loader` bundles, through ctypes.

The synthesiser runs in this process, passes its samples to a callback and plays nothing. `speak` and the demo use it.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from surgvqa.config.settings import nearest
from surgvqa.errors import SurgvqaError, UsageError

if TYPE_CHECKING:
    import numpy as np

# From eSpeak NG's speak_lib.h.
SYNCHRONOUS = 2
DONT_EXIT = 0x8000
POSITION_CHARACTER = 1
TEXT_UTF8 = 1
RATE, PITCH, RANGE = 1, 3, 4
WORDS_PER_MINUTE = 175
"""eSpeak's default speed."""
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
"""The demo's variants, which always speak the same way."""
RESTLESS = ("Alicia", "Demonic", "Reed", "caleb", "f2", "f3", "f5", "sandro", "victor", "whisper", "whisperf")
"""Variants that breathe depending on the clock."""


@dataclass(frozen=True)
class Voice:
    """A voice and how it speaks."""

    name: str
    """eSpeak's language+variant."""
    words_per_minute: int
    pitch: int
    """0..100; 50 is the voice's default."""
    pitch_range: int
    """0..100; 50 is the voice's default, 0 is monotone."""


def draw_voice(rng: np.random.Generator) -> Voice:
    """A random voice with random speed and pitch."""
    return Voice(
        f"{rng.choice(LANGUAGES)}+{rng.choice(VARIANTS)}",
        int(rng.integers(200, 231)),
        int(rng.integers(40, 61)),
        int(rng.integers(30, 71)),
    )


class Synthesiser:
    """eSpeak NG, loaded once. `with Synthesiser() as espeak: espeak.speak(text, voice)`."""

    _callback_type = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
    )

    def __enter__(self) -> Synthesiser:
        self._folder = tempfile.TemporaryDirectory(prefix="espeak-")
        try:
            import espeakng_loader

            # Load a separate copy: the library keeps state after espeak_Terminate, which would change later speech.
            self._library = ctypes.CDLL(shutil.copy(espeakng_loader.get_library_path(), self._folder.name))
            data = espeakng_loader.get_data_path()
        except (ImportError, OSError, RuntimeError) as error:
            self._folder.cleanup()
            raise SurgvqaError(
                f"eSpeak NG cannot be loaded ({error}); pip install 'surgvqa[speak]' installs it"
            ) from None
        self.voices = Path(data) / "voices"
        if len(data.encode()) > LONGEST_DATA_PATH:
            short = Path(self._folder.name) / "espeak-ng-data"
            short.symlink_to(data)
            data = str(short)
        self.sample_rate = self._library.espeak_Initialize(SYNCHRONOUS, 0, data.encode(), DONT_EXIT)
        if self.sample_rate <= 0:
            raise SurgvqaError(f"eSpeak NG does not start with its voices in {data}; reinstall espeakng-loader")
        self._pieces: list[bytes] = []
        self._words: list[tuple[int, int]] = []

        def keep(samples: Any, count: int, events: Any) -> int:  # returns 0 to continue
            for event in _until_terminated(events):
                if event.type == EVENT_WORD:
                    self._words.append((event.text_position - 1, event.sample))
            if samples and count > 0:
                self._pieces.append(ctypes.string_at(samples, count * 2))
            return 0

        self._keep = self._callback_type(keep)  # the library keeps only a pointer to it
        self._library.espeak_SetSynthCallback(self._keep)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._library.espeak_Terminate()
        with contextlib.suppress(AttributeError):  # without dlclose, the copy stays until the process ends
            ctypes.CDLL(None).dlclose(ctypes.c_void_p(self._library._handle))
        self._folder.cleanup()

    def refuse_unknown(self, name: str) -> None:
        """Raises UsageError for a voice (language, or language+variant) that is unknown or never speaks the same twice.

        The library itself accepts any variant and uses the language's plain voice for an unknown one.
        """
        _, plus, variant = name.partition("+")
        variants = sorted(file.name for file in (self.voices / "!v").iterdir())
        if self._library.espeak_SetVoiceByName(name.encode()):
            raise UsageError(f"eSpeak NG has no voice {name}, expected a language (en-us) or language+variant (en+m3)")
        if plus and variant not in variants:
            raise UsageError(f"eSpeak NG has no variant {variant} (voice {name}){nearest(variant, variants)}")
        if variant in RESTLESS:
            raise UsageError(f"voice {name}: {variant} never speaks the same twice (it breathes by the clock)")

    def speak(self, text: str, voice: Voice) -> np.ndarray:
        """The spoken text, float32 [samples] in -1..1 at `sample_rate`, with silence at both ends cut to 30 ms."""
        return self.speak_words(text, voice)[0]

    def speak_words(self, text: str, voice: Voice) -> tuple[np.ndarray, list[tuple[int, float]]]:
        """Like `speak`, and for each word its start in `text` (characters) and in the sound (seconds)."""
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
        if not loud.size:
            raise SurgvqaError(f"eSpeak NG says nothing for {text!r} with the voice {voice.name}")
        margin = int(0.03 * self.sample_rate)
        first = max(int(loud[0]) - margin, 0)
        words = [(place, max(sample - first, 0) / self.sample_rate) for place, sample in self._words]
        return wave[first : int(loud[-1]) + margin], words


class Espeak:
    """eSpeak NG for `speak`. Loads the library for each utterance (3 ms), so that a text always sounds the same."""

    known: tuple[str, ...] = ("en-us+m1", "en-us+f1", "en-us+Annie", "en+m3", "en+linda", "en-gb-scotland+f4")
    held_out: tuple[str, ...] = ("en-us+Andy", "en-gb-x-rp+m7")

    def refuse_unknown(self, voices: Sequence[str]) -> None:
        """Raises UsageError for an unavailable voice."""
        with Synthesiser() as espeak:
            for voice in voices:
                espeak.refuse_unknown(voice)

    def say(self, text: str, voice: str, speed: float) -> tuple[np.ndarray, int]:
        """(float32 [samples] in -1..1, sample rate in Hz)."""
        with Synthesiser() as espeak:
            return espeak.speak(text, Voice(voice, round(WORDS_PER_MINUTE * speed), 50, 50)), espeak.sample_rate


def _until_terminated(events: Any) -> Iterator[_Event]:
    """Yields the events of one callback. The C list ends with an event of type 0."""
    i = 0
    while events and events[i].type:
        yield events[i]
        i += 1
