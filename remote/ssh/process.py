"""The agent at the end of an OpenSSH process of its own: for bulk bytes, which paramiko is too slow for, and for the
first questions to a host that answered the last time, for which paramiko is too slow to load."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from remote.ssh import timeouts
from remote.ssh.bundle import bootstrap, payload, request_line
from remote.ssh.errors import Unreachable, explain_ssh
from remote.ssh.hosts import Host
from remote.ssh.replies import Replies
from surgvqa.errors import SurgvqaError

WHOLE_SESSION = {"SessionType": "default", "StdinNull": "no", "ForkAfterAuthentication": "no"}
"""Overridden where this ssh knows them (OpenSSH 8.7; an older one would refuse the option): a command, with input."""
SSH_FAILED = 255
"""ssh's exit status where it is not the command's."""
GOODBYE_S = 5.0
"""Seconds that an agent has to end after an error."""
FAST_CIPHER = "aes128-gcm@openssh.com"


def best_ciphers(host: Host, host_has_aes: bool) -> str | None:
    """AES-GCM first where both ends compute it in hardware and the user's ssh allows it; None leaves ssh's order."""
    allowed = host.setting("ciphers").split(",")
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            ours = " aes" in file.read()
    except OSError:
        ours = os.uname().machine == "arm64"
    if not (ours and host_has_aes and FAST_CIPHER in allowed):
        return None
    return ",".join([FAST_CIPHER, *(c for c in allowed if c != FAST_CIPHER)])


class AgentProcess:
    """The agent at the end of an `ssh` subprocess. It waits there until `begin` says what is wanted."""

    def __init__(self, host: Host, ciphers: str | None, questions: dict[str, dict[str, Any]] | None = None):
        """`questions`: operations with what they are given, which it answers one after another (`answers`)."""
        self.host = host
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self._input, theirs = socket.socketpair()  # a pipe would wake the writer at every read
        with theirs:
            self.process = subprocess.Popen(
                ssh_command(host, bootstrap(host.entry.python), ciphers),
                stdin=theirs.fileno(),
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                bufsize=0,
                start_new_session=True,
            )
        assert self.process.stdout  # a pipe
        self._stdout = self.process.stdout
        self._lock = threading.Lock()
        self._ask(payload(self._request("ready")))
        for op, params in (questions or {}).items():
            self._ask(request_line(self._request(op, **params)))

    def begin(
        self,
        request: dict[str, Any],
        on_message: Callable[[dict[str, Any]], None],
        on_end: Callable[[SurgvqaError | None], None],
    ) -> None:
        """Asks for the one thing that it is for. Messages come on a thread of their own, last `on_end(error)`, once:
        None after a good end."""
        self._on_message, self._on_end = on_message, on_end
        self._ask(request_line({"workspace": self.host.entry.workspace, **request}))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _request(self, op: str, **params: Any) -> dict[str, Any]:
        return {"op": op, "workspace": self.host.entry.workspace, "more": True, **params}

    def answers(self, within_s: float) -> Iterator[dict[str, Any]]:
        """The answers to its questions, and to those that are written from now on. Raises as `Replies` does, also where
        the agent has not spoken in `within_s` seconds."""
        deadline = time.monotonic() + within_s
        spoken = threading.Event()

        def heard() -> Iterator[tuple[bytes, bytes, int | None]]:
            chunks, ended = self._chunks(), False
            while not ended:
                wait_s = timeouts.SILENCE_S if spoken.is_set() else max(0.0, deadline - time.monotonic())
                if not select.select([self._stdout], [], [], wait_s)[0]:
                    raise TimeoutError
                chunk = next(chunks)
                ended = chunk[2] is not None
                yield chunk

        found = iter(Replies(self.host, heard(), spoken.set))
        next(found)  # to "ready"
        return found

    def _ask(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # the reader will find out why
            self.write(data)

    def write(self, data: bytes) -> None:
        """All of it; OSError when the other end is gone."""
        with self._lock:
            self._input.sendall(data)

    def copy(self, source: BinaryIO, offset: int, count: int) -> int:
        """`count` bytes of a file, fewer where it ends; not through this process where the kernel can."""
        with self._lock:
            return self._input.sendfile(source, offset, count)

    def finish(self) -> None:
        """No more input: the agent will end."""
        with self._lock:
            self._input.close()

    def kill(self) -> None:
        """Ends ssh and its proxy at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def discard(self) -> None:
        """Ends one that nothing was asked of."""
        self.kill()
        self.finish()
        self.process.wait()
        self._stdout.close()
        self._stderr.close()

    def join(self) -> None:
        self._reader.join()

    def _chunks(self) -> Iterator[tuple[bytes, bytes, int | None]]:
        """(stdout, stderr, exit status) as they come."""
        while data := os.read(self._stdout.fileno(), 1 << 16):
            yield data, b"", None
        yield b"", self._said(), self.process.wait()

    def _said(self) -> bytes:
        """What ssh wrote to stderr, once it has ended."""
        self.process.wait()
        self._stderr.seek(0)
        return self._stderr.read()

    def _read(self) -> None:
        error: SurgvqaError | None = None
        replies = Replies(self.host, self._chunks())
        try:
            for message in replies:
                self._on_message(message)
            if self.process.wait() == SSH_FAILED:  # behind the answer to "ready", which is not the last
                error = explain_ssh(self.host, self._said().decode(errors="replace"), SSH_FAILED, replies.started)
        except SurgvqaError as failure:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GOODBYE_S)
            if self.process.poll() is None:  # it goes on, after an answer that is none
                self.kill()
            text, status = self._said().decode(errors="replace"), self.process.wait()
            broken = isinstance(failure, Unreachable) or status == SSH_FAILED
            error = explain_ssh(self.host, text, status, replies.started) if broken else failure
        except (OSError, ValueError) as failure:
            error = Unreachable(f"{self.host.name}: the stream broke: {failure}")
        finally:
            self.process.wait()
            self._stdout.close()
            self._stderr.close()
        self._on_end(error)


class Reserve:
    """Agents that are started before it is known what to ask them: `take` spares the handshake and Python's start."""

    def __init__(self, host: Host, ciphers: str | None):
        self.host, self.ciphers = host, ciphers
        self._waiting: list[AgentProcess] = []
        self._lock = threading.Lock()

    def fill(self, count: int) -> None:
        """Starts agents until that many wait. Raises OSError where ssh does not start."""
        with self._lock:
            while len(self._waiting) < count:
                self._waiting.append(AgentProcess(self.host, self.ciphers))

    def take(self) -> AgentProcess:
        """One that waits, or a new one. Raises OSError where ssh does not start."""
        with self._lock:
            while self._waiting:
                agent = self._waiting.pop()
                if agent.process.poll() is None:
                    return agent
                agent.discard()
        return AgentProcess(self.host, self.ciphers)

    def close(self) -> None:
        """Ends those that were not needed."""
        with self._lock:
            while self._waiting:
                self._waiting.pop().discard()


def ssh_command(host: Host, remote_command: str, ciphers: str | None = None) -> list[str]:
    """OpenSSH as a subprocess with a connection of its own, as strict and as impatient as ours."""
    settings = {
        "BatchMode": "yes",
        "StrictHostKeyChecking": "yes",
        "ConnectTimeout": str(timeouts.CONNECT_TIMEOUT_S),
        "ServerAliveInterval": "5",
        "ServerAliveCountMax": "3",
        "ControlPath": "none",
        "ClearAllForwardings": "yes",
        "ForwardAgent": "no",
        "PermitLocalCommand": "no",
        "RemoteCommand": "none",
        "Compression": "no",
        "LogLevel": "ERROR",
        **({"Ciphers": ciphers} if ciphers else {}),
        **{key: value for key, value in WHOLE_SESSION.items() if key.lower() in host.ssh},
    }
    words = ["ssh", "-T", *host.options]
    for key, value in settings.items():
        words += ["-o", f"{key}={value}"]
    return [*words, "--", host.target, remote_command]
