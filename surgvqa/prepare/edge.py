"""Speaks questions with the voices of Microsoft Edge, through the package edge-tts (an extra of the same name).

This is a network service without guarantees. The code follows the package's interface and was never tried against the
service itself.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from surgvqa.config.settings import nearest
from surgvqa.errors import SurgvqaError, UsageError

if TYPE_CHECKING:
    import numpy as np

WAITS_S = (1.0, 5.0)
"""Seconds to wait before the second and the third attempt."""


class Edge:
    """The service's English voices. Every call opens a connection."""

    known: tuple[str, ...] = (
        "en-US-AriaNeural",
        "en-US-GuyNeural",
        "en-US-JennyNeural",
        "en-GB-RyanNeural",
        "en-GB-SoniaNeural",
    )
    held_out: tuple[str, ...] = ("en-US-ChristopherNeural", "en-IE-EmilyNeural")

    def refuse_unknown(self, voices: Sequence[str]) -> None:
        """Raises UsageError for a voice that the service does not list."""
        import edge_tts

        there = [str(voice["ShortName"]) for voice in _with_retries(edge_tts.list_voices)]
        for voice in voices:
            if voice not in there:
                raise UsageError(f"edge-tts has no voice {voice}{nearest(voice, there)}")

    def say(self, text: str, voice: str, speed: float) -> tuple[np.ndarray, int]:
        """(float32 [samples] in -1..1, sample rate in Hz). Raises SurgvqaError when the service sends no sound."""
        import edge_tts
        import soundfile

        async def received() -> bytes:
            speech = edge_tts.Communicate(text, voice, rate=f"{round(100 * (speed - 1)):+d}%")
            return b"".join([part["data"] async for part in speech.stream() if part["type"] == "audio"])

        sound = _with_retries(received)
        try:
            wave, rate = soundfile.read(io.BytesIO(sound), dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise SurgvqaError(f"edge-tts sent no sound for {text!r} with the voice {voice} ({error})") from None
        mono: np.ndarray = wave.mean(axis=1)
        return mono, rate


def _with_retries(ask: Any) -> Any:
    """The result of the coroutine function `ask`, tried three times. Raises SurgvqaError without an answer."""
    for wait in (*WAITS_S, None):
        try:
            return asyncio.run(ask())
        except Exception as error:  # errors of edge_tts, aiohttp and the system
            if wait is None:
                reason = str(error) or type(error).__name__
                raise SurgvqaError(
                    f"edge-tts: the service does not answer ({reason}); the same command continues"
                ) from None
            time.sleep(wait)
