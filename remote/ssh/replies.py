"""The agent's answers as they come over a channel."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from remote.ssh.bundle import TOO_OLD
from remote.ssh.errors import Unreachable
from remote.ssh.hosts import Host
from surgvqa.errors import SurgvqaError, UsageError


class Replies:
    """The agent's messages out of a byte stream; what a login shell prints before it is passed over."""

    MARK = b"\x1esurgvqa\x1e\n"

    def __init__(self, host: Host, chunks: Iterator[tuple[bytes, bytes, int | None]]):
        self.host, self.chunks = host, chunks

    def __iter__(self) -> Iterator[dict[str, Any]]:
        buffer, noise, started, answered = b"", b"", False, False
        for data, stderr, status in self.chunks:
            buffer += data
            noise = (noise + stderr)[-4000:]
            if not started:
                if self.MARK not in buffer:
                    if status is not None:
                        raise self._no_agent(noise or buffer, status)
                    continue
                buffer = buffer.split(self.MARK, 1)[1]
                started = True
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                message = json.loads(line)
                if "beat" in message:
                    continue
                if "error" in message:
                    kind = UsageError if message.get("usage") else SurgvqaError
                    raise kind(f"{self.host.name}: {message['error']}")
                answered = answered or "done" in message
                yield message.get("done", message)
            if status is not None and (not answered or 0 < status < 255):
                text = noise.decode(errors="replace").strip().splitlines()
                if status in (-1, 255) or not text:
                    raise Unreachable(f"{self.host.name}: connection lost before the host had answered")
                raise SurgvqaError(f"{self.host.name}: the agent failed there: {text[-1]}")

    def _no_agent(self, output: bytes, status: int) -> SurgvqaError:
        if status == -1:  # none came
            return Unreachable(f"{self.host.name}: connection lost before the host had answered")
        text = output.decode(errors="replace").strip()
        last = text.splitlines()[-1] if text else "no output"
        python = self.host.entry.python
        if status in (126, 127) or "not found" in text or TOO_OLD in last:
            why = f"{python} there: {last}" if TOO_OLD in last else f"no {python} there ({last})"
            return SurgvqaError(
                f'{self.host.name}: {why}; install Python 3.11 or name it in hosts.toml: python = "/path/to/python3"'
            )
        return SurgvqaError(f"{self.host.name}: the agent did not start (exit {status}): {last}")
