"""The agent's answers as they come over a channel."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from remote.ssh import timeouts
from remote.ssh.bundle import TOO_OLD
from remote.ssh.errors import SlowLogin, Unreachable, not_understood
from remote.ssh.hosts import Host
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.untrusted import cleaned, load_json, one_line

SIGNALLED = 128
"""A shell's exit status for a program that a signal ended is this and the signal's number."""


def parse_message(host: Host, line: bytes) -> dict[str, Any]:
    """One line of the agent. Raises what it says as an error, and SurgvqaError for what is no message.

    Text is printable, but for the bytes of a file that is followed (`file` and `text`): whoever shows them cleans them.
    """
    try:
        message = load_json(line)
        if not isinstance(message, dict):
            raise ValueError(f"a {type(message).__name__}")
        raw = {"text": message["text"]} if "file" in message and isinstance(message.get("text"), str) else {}
        message = {**cleaned({**message, **dict.fromkeys(raw, "")}), **raw}
    except ValueError as error:
        raise not_understood(host, str(error)) from None
    if "error" in message:
        kind = UsageError if message.get("usage") else SurgvqaError
        raise kind(one_line(f"{host.name}: {message['error']}"))
    return message


def silent(host: Host, started: bool, printed: bytes) -> Unreachable:
    """The host was waited for long enough: which stage is slow. `printed` is what came before the agent spoke."""
    if started:
        return Unreachable(f"{host.name}: connection lost, no answer for {timeouts.SILENCE_S:.0f} s")
    lines = printed.decode(errors="replace").strip().splitlines()
    last = f" (it printed last: {lines[-1][:80]})" if lines else ""
    return SlowLogin(
        one_line(
            f"{host.name}: logged in, but its login shell had not started {host.entry.python} after "
            f"{host.entry.login_timeout_s:g} s{last}; make its ~/.bashrc faster, or set login_timeout_s in hosts.toml"
        )
    )


class Replies:
    """The agent's messages out of a byte stream; what a login shell prints before it is passed over."""

    MARK = b"\x1esurgvqa\x1e\n"
    MAX_BEFORE = 16 << 20
    """Bytes that a login shell may print before the agent speaks."""
    MAX_MESSAGE = 64 << 20
    """Bytes of the longest message: the listing of some 500,000 files."""

    def __init__(
        self,
        host: Host,
        chunks: Iterator[tuple[bytes, bytes, int | None]],
        on_start: Callable[[], None] = lambda: None,
        on_beat: Callable[[], None] = lambda: None,
    ):
        """`chunks`: (stdout, stderr, exit status), TimeoutError after a silence. `on_start` is called when the agent
        first speaks, `on_beat` whenever it says that it lives."""
        self.host, self.chunks, self.on_start, self.on_beat = host, chunks, on_start, on_beat
        self.started, self._printed = False, b""
        """Whether the agent has spoken."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self._messages()
        except TimeoutError:
            raise silent(self.host, self.started, self._printed) from None

    def _messages(self) -> Iterator[dict[str, Any]]:
        buffer, noise, started, answered = b"", b"", False, False
        deadline = time.monotonic() + self.host.entry.login_timeout_s
        for data, stderr, status in self.chunks:
            buffer += data
            noise = (noise + stderr)[-4000:]
            if not started:
                if self.MARK not in buffer:
                    self._printed = (self._printed + data + stderr)[-4000:]
                    if status is not None:
                        raise self._no_agent(noise or buffer, status)
                    if len(buffer) > self.MAX_BEFORE:
                        first = buffer[:60].decode(errors="replace")
                        raise SurgvqaError(
                            one_line(f"{self.host.name}: its login shell prints without end: {first} …; mend it there")
                        )
                    if time.monotonic() > deadline:
                        raise TimeoutError
                    continue
                buffer = buffer.split(self.MARK, 1)[1]
                started = self.started = True
                self.on_start()
            *lines, buffer = buffer.split(b"\n")
            if len(buffer) > self.MAX_MESSAGE:
                raise not_understood(self.host, f"a message of more than {self.MAX_MESSAGE >> 20} MiB")
            for line in lines:
                message = parse_message(self.host, line)
                if "beat" in message:
                    self.on_beat()
                    continue
                answered = answered or "done" in message
                answer = message.get("done", message)
                if not isinstance(answer, dict):
                    raise not_understood(self.host, f"an answer that is a {type(answer).__name__}")
                yield answer
            if status is not None and (not answered or 0 < status < 255):
                text = noise.decode(errors="replace").strip().splitlines()
                if SIGNALLED < status < 255:
                    raise self._signalled(status)
                if status in (-1, 255) or not text:
                    raise Unreachable(f"{self.host.name}: connection lost before the host had answered")
                raise SurgvqaError(f"{self.host.name}: the agent failed there: {text[-1]}")

    def _signalled(self, status: int) -> Unreachable:
        """A host that shuts down ends every process so, and one that is short of memory some."""
        why = f"{self.host.entry.python} there was ended by signal {status - SIGNALLED} before it had answered"
        return Unreachable(f"{self.host.name}: {why}")

    def _no_agent(self, output: bytes, status: int) -> SurgvqaError:
        if status == -1:  # none came
            return Unreachable(f"{self.host.name}: connection lost before the host had answered")
        if SIGNALLED < status < 255:
            return self._signalled(status)
        text = output.decode(errors="replace").strip()
        last = text.splitlines()[-1] if text else "no output"
        python = self.host.entry.python
        if status in (126, 127) or "not found" in text or TOO_OLD in last:
            why = f"{python} there: {last}" if TOO_OLD in last else f"no {python} there ({last})"
            return SurgvqaError(
                f'{self.host.name}: {why}; install Python 3.11 or name it in hosts.toml: python = "/path/to/python3"'
            )
        return SurgvqaError(f"{self.host.name}: the agent did not start (exit {status}): {last}")
