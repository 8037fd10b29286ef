"""What an upload knows of the link to its host: how long a round trip takes, and whether packets queue on it."""

from __future__ import annotations

import contextlib
import threading

from remote.ssh.connection import Remote
from remote.ssh.hosts import Host
from surgvqa.errors import SurgvqaError

OPENING_S = 2.0
"""Seconds that the transfer waits for the connection that watches."""


class Link:
    """Asks the kernel about a paramiko connection beside the others, which `watch` opens in a thread of its own."""

    def __init__(self, host: Host):
        self._watcher = Remote(host)
        self._opening: threading.Thread | None = None

    def watch(self) -> None:
        """Starts to connect. A failure is ignored: then nothing is known of queues."""
        self._opening = threading.Thread(target=self._open, daemon=True)
        self._opening.start()

    def _open(self) -> None:
        with contextlib.suppress(SurgvqaError):
            self._watcher.open()

    def round_trip(self, remote: Remote) -> float:
        """Seconds; measured over `remote` where this link is not watched."""
        if self._opening:
            self._opening.join(OPENING_S)
        return (self._watcher if self._watcher.is_open else remote).round_trip()

    def queueing(self) -> float | None:
        """As Remote.queueing; None where this link is not watched."""
        return self._watcher.queueing() if self._watcher.is_open else None

    def close(self) -> None:
        """Ends the connection."""
        self._watcher.close()
