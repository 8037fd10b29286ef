"""One SSH connection to one host, over Fabric, made strict: known host keys, timeouts everywhere, one-line errors.

Fabric's own default accepts any host key without asking, ignores `Include`, and can hang for an hour on a dead link;
all three are set right here. A `Remote` belongs to one thread at a time.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remote.ssh import timeouts
from remote.ssh.bundle import bootstrap, payload, request_line
from remote.ssh.errors import Unreachable, explain
from remote.ssh.fabric_connection import chain_to
from remote.ssh.host_keys import UnknownHostKey
from remote.ssh.hosts import Host, resolve
from remote.ssh.replies import Replies
from surgvqa.errors import SurgvqaError

if TYPE_CHECKING:
    from fabric import Connection

TCPI_RTT, TCPI_MIN_RTT = 68, 148  # offsets in struct tcp_info (linux/tcp.h), microseconds


class Remote:
    """An open connection. Use as a context manager; `call` and `stream` ask the agent on the host."""

    def __init__(self, host: Host):
        self.host = host
        self._fabric: Connection | None = None
        self._waiting_agent: tuple[Any, Iterator[dict[str, Any]]] | None = None
        """The agent of `ask`: its channel and its answers."""

    def __enter__(self) -> Remote:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Connects; raises one of this module's errors."""
        if self._fabric is not None:
            return
        connection = None
        at = self.host
        try:
            for at, connection in chain_to(self.host):  # noqa: B007
                connection.open()
        except Exception as error:
            self._fabric = connection
            transport = connection.client.get_transport() if connection else None
            goodbye = getattr(transport, "goodbye", "")
            self.close()
            raise explain(at, error, goodbye) from None
        assert connection  # a chain has at least one
        transport = connection.transport
        transport.set_keepalive(timeouts.KEEPALIVE_S)
        if isinstance(transport.sock, socket.socket) and hasattr(socket, "TCP_USER_TIMEOUT"):
            transport.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeouts.TCP_USER_TIMEOUT_MS)
        self._fabric = connection

    def close(self) -> None:
        """Drops the connection; jobs on the host do not notice."""
        connection, self._fabric, self._waiting_agent = self._fabric, None, None
        while connection is not None:
            with contextlib.suppress(Exception):
                connection.close()
            connection = connection.gateway if not isinstance(connection.gateway, (str, bool)) else None

    def stream(self, op: str, silence_s: float = timeouts.SILENCE_S, **params: Any) -> Iterator[dict[str, Any]]:
        """Runs the agent's `op` there and yields its messages as they come; raises what it answers as an error.

        Closing the iterator ends the remote side. Once the agent has spoken, silence for `silence_s` seconds is a lost
        connection; until then the login shell there has `login_timeout_s` of hosts.toml.
        """
        self.open()
        channel = None
        try:
            channel, replies = self._agent({"op": op, "workspace": self.host.entry.workspace, **params}, silence_s)
            yield from replies
        except SurgvqaError:
            raise
        except Exception as error:
            self.close()  # after a drop, cached channels stay broken
            raise explain(self.host, error) from None
        finally:
            if channel is not None:
                with contextlib.suppress(Exception):
                    channel.close()

    @property
    def _open_fabric(self) -> Connection:
        if self._fabric is None:
            raise EOFError("the connection is closed")
        return self._fabric

    def _agent(self, request: dict[str, Any], silence_s: float) -> tuple[Any, Iterator[dict[str, Any]]]:
        """Starts one with that request: its channel and its answers."""
        channel = self._open_fabric.create_session()
        channel.settimeout(max(self.host.entry.login_timeout_s, silence_s))
        channel.exec_command(bootstrap(self.host.entry.python))
        try:
            channel.sendall(payload(request))
        except OSError:
            if not channel.closed:
                raise  # else it ended before it had read us: its exit status and its words say why
        return channel, iter(Replies(self.host, self._chunks(channel), lambda: channel.settimeout(silence_s)))

    def call(self, op: str, **params: Any) -> dict[str, Any]:
        """The agent's answer to one question."""
        answer: dict[str, Any] = {}
        for message in self.stream(op, **params):
            answer = message
        return answer

    def ask(self, op: str, **params: Any) -> dict[str, Any]:
        """As `call`, but of one agent that waits for the next question: one round trip instead of four and a start.

        Only for operations that give one answer and leave no process behind.
        """
        request = {"op": op, "workspace": self.host.entry.workspace, "more": True, **params}
        self.open()
        try:
            if self._waiting_agent:
                self._waiting_agent[0].sendall(request_line(request))
            else:
                self._waiting_agent = self._agent(request, timeouts.SILENCE_S)
            for answer in self._waiting_agent[1]:
                return answer
            raise Unreachable(f"{self.host.name}: connection lost before the host had answered")
        except Exception as error:
            self.close()
            raise explain(self.host, error) from None

    def round_trip(self) -> float:
        """Seconds of one round trip: the smallest that TCP has seen (tcpi_min_rtt, Linux), or of opening a channel."""
        self.open()
        with contextlib.suppress(OSError, AttributeError, struct.error):
            return self._tcp_us(TCPI_MIN_RTT) / 1e6
        times = []
        try:
            for _ in range(3):
                began = time.monotonic()
                self._open_fabric.create_session().close()
                times.append(time.monotonic() - began)
        except Exception as error:
            self.close()
            raise explain(self.host, error) from None
        return min(times)

    def _tcp_us(self, offset: int) -> int:
        """A number of the kernel's struct tcp_info; OSError, AttributeError or struct.error where it cannot be had."""
        if self._open_fabric.gateway:
            raise OSError("the socket here ends at the gateway")
        info = self._open_fabric.transport.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        return struct.unpack_from("I", info, offset)[0]

    def queueing(self) -> float | None:
        """Seconds by which round trips are longer now than the shortest was: the queue before the narrowest link.

        To be called often: each call sends a few bytes, whose acknowledgement later calls see. None: cannot be known.
        """
        try:
            self._open_fabric.transport.send_ignore(8)
            return (self._tcp_us(TCPI_RTT) - self._tcp_us(TCPI_MIN_RTT)) / 1e6
        except (OSError, AttributeError, struct.error, EOFError):
            return None

    @staticmethod
    def _chunks(channel: Any) -> Iterator[tuple[bytes, bytes, int | None]]:
        """(stdout, stderr, exit status) as they come."""
        while True:
            data = channel.recv(1 << 18)
            noise = b""
            while channel.recv_stderr_ready():
                noise += channel.recv_stderr(1 << 16)
            if not data:
                noise += b"" if channel.exit_status_ready() and noise else channel.recv_stderr(1 << 16)
                yield b"", noise, channel.recv_exit_status()
                return
            yield data, noise, None


def connect(host: str | Host, workspace: Path, accept_new_host_key: bool = False) -> Remote:
    """An open connection to a host, or to that of a name. An unknown key is accepted only when asked to."""
    remote = Remote(resolve(host, workspace) if isinstance(host, str) else host)
    for _ in range(4):  # every hop may be new
        try:
            remote.open()
            return remote
        except UnknownHostKey as unknown:
            if not accept_new_host_key:
                raise
            unknown.remember()
    raise SurgvqaError(f"{remote.host.name}: the accepted host key is not found again in known_hosts")
