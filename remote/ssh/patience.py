"""How long a lost network is waited for: one rule for every command, and for the panel.

Only an answer of the server is a refusal. Everything else is `Unreachable`: no DNS for a moment, no route, a connection
that is refused, cut or silent at any stage. It is tried again, with growing pauses, until the host has been away for
`--patience_s` seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from remote.ssh.errors import SlowLogin, UnknownName, Unreachable

PATIENCE_S = 300.0
PATIENCE_HELP = "seconds to wait for a host that cannot be reached before giving up"
BACKOFF_S = (1, 2, 4, 8, 15, 30)


def pause_s(attempt: int) -> float:
    """Seconds to wait after that many failed attempts in a row, counted from 0."""
    return BACKOFF_S[min(attempt, len(BACKOFF_S) - 1)]


class Patience:
    """Waits between attempts to reach a host, and gives up when it has been away for too long."""

    def __init__(self, seconds: float = 0.0, tell: Callable[[str], None] = lambda text: None):
        """`seconds`: 0 gives up at once, math.inf never. `tell` is called before each wait, with one line."""
        self.seconds, self.tell = seconds, tell
        self.reached = False
        """Whether the host has answered before: a name that is unknown now is then no spelling mistake."""
        self._attempt = 0
        self._away_since: float | None = None
        self._ended = threading.Event()

    def close(self) -> None:
        """Ends a wait that goes on in another thread: it gives up."""
        self.seconds = 0.0
        self._ended.set()

    def answered(self) -> None:
        """The host is there: the next loss is a new one."""
        self.reached, self._attempt, self._away_since = True, 0, None

    def wait(self, error: Unreachable) -> None:
        """Returns when it is time to try again. Raises `error` when that makes no sense (any more)."""
        pause = self.next_pause_s(error)
        self.tell(f"{error}; trying again")
        if self._ended.wait(pause):
            raise error

    def next_pause_s(self, error: Unreachable) -> float:
        """As `wait`, for a caller that waits in its own way."""
        if isinstance(error, SlowLogin) or (isinstance(error, UnknownName) and not self.reached):
            raise error
        now = time.monotonic()  # on Linux it stands still while a laptop sleeps
        self._away_since = now if self._away_since is None else self._away_since
        left = self._away_since + self.seconds - now
        if left <= 0:
            raise error
        self._attempt += 1
        return min(pause_s(self._attempt - 1), left)
