"""A connection by the user's own way: a ProxyCommand, which a shell runs as OpenSSH has it run, or a socket of ours."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable

import fabric
import paramiko

ENDS_IN_S = 0.2
"""Seconds that a command has to end once its output has."""
MOST_SAID = 1 << 16


class Proxy(paramiko.ProxyCommand):
    """Its input and output in place of a socket. paramiko's own runs no shell, and spins when the command has ended."""

    def __init__(self, command: str):
        self.cmd = [os.environ.get("SHELL") or "/bin/sh", "-c", f"exec {command}"]
        self.timeout = None
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            self.cmd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            bufsize=0,
            start_new_session=True,
        )

    def recv(self, size: int) -> bytes:
        """Up to `size` bytes, none at the end; TimeoutError after the socket's timeout."""
        assert self.process.stdout  # a pipe
        ready, _, _ = select.select([self.process.stdout], [], [], self.timeout)
        if not ready:
            raise TimeoutError
        return os.read(self.process.stdout.fileno(), size)

    def failed(self) -> str:
        """Why the command has ended, by its last words; '' where it has not, or well."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if status := self.process.wait(ENDS_IN_S):
                self._said.seek(0)
                lines = self._said.read(MOST_SAID).decode(errors="replace").strip().splitlines() or ["no reason given"]
                return f"ProxyCommand ended with {status}: {lines[-1][:200]}"
        return ""

    def close(self) -> None:
        """Ends the command and what it started."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)


class Connection(fabric.Connection):
    """Fabric's, whose own way to a ProxyCommand knows no port but 22."""

    connected: Callable[[], socket.socket] | None = None
    """Makes the TCP connection, where paramiko's own way would be another than ssh's."""

    def open(self) -> object:
        if self.connected and not self.is_connected:
            self.connect_kwargs["sock"] = self.connected()
        return super().open()

    def open_gateway(self) -> object:
        return Proxy(self.gateway) if isinstance(self.gateway, str) else super().open_gateway()
