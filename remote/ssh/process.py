"""Runs the agent through an OpenSSH process: for bulk data, where paramiko is too slow, and for an upload's questions,
because paramiko takes too long to load."""

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
"""Options that ssh needs to run a command with input. Set only if this ssh knows them (OpenSSH 8.7 and later)."""
SSH_FAILED = 255
"""ssh's own exit status, as opposed to that of the command."""
GOODBYE_S = 5.0
"""Seconds that an agent may take to end after an error."""
FAST_CIPHER = "aes128-gcm@openssh.com"


def best_ciphers(host: Host, host_has_aes: bool) -> str | None:
    """A cipher list with AES-GCM first, or None for ssh's own order.

    AES-GCM is best if both ends have hardware for it and the user's ssh allows it.
    """
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
    """An agent behind an `ssh` subprocess. It waits until `begin` gives it a request."""

    def __init__(self, host: Host, ciphers: str | None, questions: dict[str, dict[str, Any]] | None = None):
        """`questions`: {operation: parameters}, which the agent answers in this order (see `answers`)."""
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
        """Sends the agent's one request. A thread calls `on_message` for each message and at last `on_end(error)` once.

        The error is None if the request succeeded.
        """
        self._on_message, self._on_end = on_message, on_end
        self._ask(request_line({"workspace": self.host.entry.workspace, **request}))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _request(self, op: str, **params: Any) -> dict[str, Any]:
        return {"op": op, "workspace": self.host.entry.workspace, "more": True, **params}

    def answers(self, within_s: float) -> Iterator[dict[str, Any]]:
        """The answers to `questions` and to all later requests. Raises as `Replies` does, also if the agent has not
        started within `within_s` seconds."""
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
        """Writes all bytes. Raises OSError when the other end is gone."""
        with self._lock:
            self._input.sendall(data)

    def copy(self, source: BinaryIO, offset: int, count: int) -> int:
        """Sends `count` bytes of a file, fewer if it ends, and returns how many. The kernel copies them if it can."""
        with self._lock:
            return self._input.sendfile(source, offset, count)

    def finish(self) -> None:
        """Closes the input, so that the agent ends."""
        with self._lock:
            self._input.close()

    def kill(self) -> None:
        """Kills ssh and its proxy."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def discard(self) -> None:
        """Ends an agent that has no request."""
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
    """Agents started in advance, so that `take` need not wait for the SSH handshake and for Python."""

    def __init__(self, host: Host, ciphers: str | None):
        self.host, self.ciphers = host, ciphers
        self._waiting: list[AgentProcess] = []
        self._lock = threading.Lock()

    def fill(self, count: int) -> None:
        """Starts agents until `count` wait. Raises OSError if ssh does not start."""
        with self._lock:
            while len(self._waiting) < count:
                self._waiting.append(AgentProcess(self.host, self.ciphers))

    def take(self) -> AgentProcess:
        """A waiting agent, or a new one. Raises OSError if ssh does not start."""
        with self._lock:
            while self._waiting:
                agent = self._waiting.pop()
                if agent.process.poll() is None:
                    return agent
                agent.discard()
        return AgentProcess(self.host, self.ciphers)

    def close(self) -> None:
        """Ends the agents that were not needed."""
        with self._lock:
            while self._waiting:
                self._waiting.pop().discard()


def ssh_command(host: Host, remote_command: str, ciphers: str | None = None) -> list[str]:
    """The command line of an ssh process with its own connection, with the same checks and timeouts as ours."""
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
