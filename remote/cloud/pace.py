"""Limits the requests to the provider by all processes of this user together."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from remote.cloud.provider import Clock
from surgvqa.untrusted import is_kind


class Pace:
    """Spaces requests. With a `file`, processes that share it take turns: its lock is held while one waits."""

    def __init__(self, clock: Clock, file: Path | None = None):
        self._clock, self._file = clock, file
        self._next: dict[str, float] = {}

    def wait(self, every: dict[str, float], at_least: float = 0.0) -> None:
        """Sleeps `at_least` seconds, and until one of each kind of `every` (kind -> seconds between) may be sent."""
        if self._file is None:
            self._turn(every, at_least)
            return
        if at_least > 0:  # ours alone: nobody else has to wait for it
            self._clock.sleep(at_least)
        self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with open(descriptor, "r+", encoding="ascii", errors="replace") as stream:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._next = _read(stream.read(4096))
            self._turn(every, 0.0)
            stream.seek(0)
            stream.truncate()
            stream.write("".join(f"{kind} {at!r}\n" for kind, at in self._next.items()))

    def _turn(self, every: dict[str, float], at_least: float) -> None:
        now = self._clock.time()
        # a clock that was set back must not make us wait longer than the rule itself
        pause = max([at_least, *(min(self._next.get(kind, 0.0) - now, gap) for kind, gap in every.items())])
        if pause > 0:
            self._clock.sleep(pause)
        now = self._clock.time()
        self._next |= {kind: now + gap for kind, gap in every.items()}


def _read(text: str) -> dict[str, float]:
    """Kind -> when the next may be sent. What cannot be read is left out: at worst the provider answers 429."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        kind, _, at = line.partition(" ")
        try:
            found[kind] = float(at)
        except ValueError:
            continue
    return {kind: at for kind, at in found.items() if is_kind(at, "a time")}
