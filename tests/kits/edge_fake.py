"""The package edge-tts as `surgvqa.prepare.edge` uses it, after edge-tts 7.3: the same signatures, checks and chunks.

The service behind it is replaced by tones, as long as the text and as high as the voice's name says.
"""

import importlib.machinery
import io
import re
import types

import numpy as np
import soundfile

VOICES = ("en-US-AriaNeural", "en-US-GuyNeural", "en-GB-RyanNeural")
RATE = 24000


class NoAudioReceived(Exception):
    """edge_tts.exceptions.NoAudioReceived."""


def package(failures=0):
    """A module to stand in sys.modules as `edge_tts`; `asked` lists (text, voice, rate) of what was spoken. Its first
    `failures` connections are refused."""
    module = types.ModuleType("edge_tts")
    module.__spec__ = importlib.machinery.ModuleSpec("edge_tts", None)
    module.asked, module.failures = [], failures

    def connect():
        if module.failures:
            module.failures -= 1
            raise ConnectionError("Cannot connect to host speech.platform.bing.com:443")

    async def list_voices(*, connector=None, proxy=None):
        connect()
        return [{"ShortName": name, "Locale": name[:5], "Gender": "Female"} for name in VOICES]

    class Communicate:
        def __init__(self, text, voice="en-US-EmmaMultilingualNeural", *, rate="+0%", volume="+0%", pitch="+0Hz"):
            if not re.match(r"^([a-z]{2,})-([A-Z]{2,})-(.+Neural)$", voice):
                raise ValueError(f"Invalid voice '{voice}'.")
            if not re.match(r"^[+-]\d+%$", rate):
                raise ValueError(f"Invalid rate '{rate}'.")
            self.text, self.voice, self.rate = text, voice, rate

        async def stream(self):
            connect()
            module.asked.append((self.text, self.voice, self.rate))
            if self.text == "Nothing?":
                raise NoAudioReceived("No audio was received. Please verify that your parameters are correct.")
            seconds = len(self.text) * 0.06 / (1 + int(self.rate[:-1]) / 100)
            pitch = 200 + 100 * VOICES.index(self.voice)
            tone = 0.3 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * RATE)) / RATE)
            sound = io.BytesIO()
            soundfile.write(sound, tone.astype(np.float32), RATE, format="MP3")
            content = sound.getvalue()
            for start in range(0, len(content), 720):
                yield {"type": "audio", "data": content[start : start + 720]}
            yield {"type": "SentenceBoundary", "offset": 1000000, "duration": 20000000, "text": self.text}

    module.Communicate, module.list_voices = Communicate, list_voices
    return module
