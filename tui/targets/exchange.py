"""What the panel and the thread that owns the connection say to each other."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Iterator
from typing import Any

from remote.ssh import timeouts
from remote.ssh.bundle import bootstrap, payload
from remote.ssh.connection import Remote
from remote.ssh.hosts import Host
from remote.ssh.replies import Replies, silent
from surgvqa.errors import SurgvqaError


class Line(Remote):
    """The connection itself; only the link's thread touches it."""

    def begin(self, op: str, params: dict[str, Any]) -> Any:
        """Opens a channel and asks; the answers are to be read from it."""
        channel = self.session()
        channel.settimeout(timeouts.SILENCE_S)
        channel.exec_command(bootstrap(self.host.entry.python))
        channel.sendall(payload({"op": op, "workspace": self.host.entry.workspace, **params}))
        return channel

    @property
    def alive(self) -> bool:
        """Whether the transport still stands, as far as it knows."""
        return self._fabric is not None and bool(self._fabric.is_connected)


class Exchange:
    """One request to the agent. The link's thread puts answers in; iterating, in one other thread, takes them out."""

    def __init__(self, op: str, params: dict[str, Any], patient: bool):
        self.op, self.params = op, params
        self.patient = patient
        """Waits for a connection instead of failing while there is none."""
        self.left = False
        self.channel: Any = None
        self._answers: queue.SimpleQueue[dict[str, Any] | Exception | None] = queue.SimpleQueue()
        self._buffer = self._noise = b""
        self._began = self._answered = False
        self._heard = 0.0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while (answer := self._answers.get()) is not None:
            if isinstance(answer, Exception):
                raise answer
            yield answer

    def end(self, error: Exception | None = None) -> None:
        """No more answers; why. From any thread."""
        self._answers.put(error)

    def close(self) -> None:
        """Closes the channel, so that the agent there ends."""
        if self.channel is not None:
            with contextlib.suppress(Exception):
                self.channel.close()

    def begin(self, line: Line) -> None:
        """Asks; raises when the connection does not take it."""
        self.channel = line.begin(self.op, self.params)
        self._heard = time.monotonic()

    def read(self, host: Host) -> bool:
        """Hands on what has arrived; whether that was all. Raises Unreachable after a long silence."""
        channel, heard = self.channel, False
        while channel.recv_ready():
            self._buffer += channel.recv(1 << 18)
            heard = True
        while channel.recv_stderr_ready():
            self._noise = (self._noise + channel.recv_stderr(1 << 16))[-4000:]
            heard = True
        now = time.monotonic()
        if heard:
            self._heard = now
        elif now - self._heard > (timeouts.SILENCE_S if self._began else host.entry.login_timeout_s):
            raise silent(host, self._began, self._buffer[-4000:])
        over = (channel.eof_received or channel.closed) and channel.exit_status_ready() and not channel.recv_ready()
        try:
            for message in Replies(host, iter(self._arrived(over))):
                self._answers.put(message)
        except SurgvqaError as error:
            self.end(error)
            return True
        if over:
            self.end()
        return over

    def _arrived(self, over: bool) -> list[tuple[bytes, bytes, int | None]]:
        """What `Replies` can read now: whole lines after the mark."""
        upto = len(self._buffer) if over else self._buffer.rfind(b"\n") + 1
        if not self._began and not over:
            self._began = Replies.MARK in self._buffer
            if not self._began:
                return []
            ready = self._buffer[:upto]
        else:
            ready = (Replies.MARK if self._began else b"") + self._buffer[:upto]
        self._buffer = self._buffer[upto:]
        self._answered = self._answered or b'\n{"done":' in ready
        chunks: list[tuple[bytes, bytes, int | None]] = [(ready, b"", None)]
        if over and not self._answered:
            chunks.append((b"", self._noise, self.channel.recv_exit_status()))
        return chunks

    @property
    def quiet(self) -> bool:
        """Whether the channel has said its last but its exit status is not known yet: nothing to wait on."""
        return self.channel.eof_received or self.channel.closed
