"""An SSH connection to a host through Fabric, with known host keys only, timeouts everywhere and one-line errors.

By default, Fabric accepts any host key, ignores `Include` and can hang for an hour on a dead link. Only one thread may
use a `Remote` at a time.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from remote.ssh import timeouts
from remote.ssh.answers import checked
from remote.ssh.bundle import bootstrap, payload, request_line
from remote.ssh.errors import Unreachable, explain
from remote.ssh.fabric_connection import chain_to
from remote.ssh.host_keys import UnknownHostKey
from remote.ssh.hosts import Host, resolve
from remote.ssh.patience import Patience
from remote.ssh.replies import Replies
from surgvqa.errors import SurgvqaError
from surgvqa.untrusted import one_line

if TYPE_CHECKING:
    from fabric import Connection

    from remote.ssh.process import AgentProcess

T = TypeVar("T")
TCPI_RTT, TCPI_MIN_RTT = 68, 148  # offsets in struct tcp_info (linux/tcp.h), microseconds

MEASURING_S = 0.05
"""Seconds that measuring a round trip takes, unless a single one takes longer."""
FURTHER_CONNECTIONS = 8


def _shortest(exchange: Callable[[], object]) -> float:
    """Seconds that the fastest of three takes; of fewer on a long link, where the first is exact enough."""
    times: list[float] = []
    while len(times) < 3 and sum(times) < MEASURING_S:
        began = time.monotonic()
        exchange()
        times.append(time.monotonic() - began)
    return min(times)


def _close(connection: Connection | None) -> None:
    """Closes a connection and the jump hosts behind it."""
    while connection is not None:
        with contextlib.suppress(Exception):
            connection.close()
        connection = connection.gateway if not isinstance(connection.gateway, (str, bool)) else None


class Remote:
    """An open connection. Use as a context manager; `call`, `ask` and `stream` ask the agent on the host.

    `call` and `ask` repeat their request after a lost connection, for as long as `patience` allows, so the host may get
    it twice. `stream` makes one attempt.
    """

    def __init__(self, host: Host, patience: Patience | None = None):
        self.host = host
        self.patience = patience or Patience()
        self.on_beat: Callable[[], None] = lambda: None
        """Called every 2 s while waiting for an answer. An exception that it raises ends the wait."""
        self._fabric: Connection | None = None
        self._further: list[Connection] = []
        """Further connections to a host that allows few sessions per connection (sshd's MaxSessions)."""
        self._waiting_agent: tuple[Callable[[bytes], object], Iterator[dict[str, Any]]] | None = None
        """The agent of `ask`: (function that writes to it, its answers)."""

    def __enter__(self) -> Remote:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def use(self, agent: AgentProcess, answers: Iterator[dict[str, Any]]) -> None:
        """Makes `ask` use this agent as long as it answers. A connection is made only when something else needs it."""
        self._waiting_agent = agent.write, answers

    def patiently(self, attempt: Callable[[], T], patience: Patience | None = None) -> T:
        """Calls `attempt` and returns its result. Repeats it while the host cannot be reached and `patience` allows.

        `patience` is the connection's own unless given.
        """
        patience = patience or self.patience
        while True:
            try:
                result = attempt()
            except Unreachable as error:
                self.close()
                patience.wait(error)
            else:
                patience.answered()
                return result

    def open(self) -> None:
        """Connects, in one attempt; raises one of remote.ssh.errors."""
        if self._fabric is not None:
            return
        self._fabric = self._connected()

    def _connected(self) -> Connection:
        """A further connection to the host; raises one of remote.ssh.errors."""
        connection = None
        at = self.host
        try:
            for at, connection in chain_to(self.host):  # noqa: B007
                connection.open()
        except Exception as error:
            transport = connection.client.get_transport() if connection else None
            goodbye = getattr(transport, "goodbye", "")
            why = transport.sock.failed() if transport and hasattr(transport.sock, "failed") else ""  # a ProxyCommand
            _close(connection)
            explained = explain(at, error, goodbye)
            if why and isinstance(explained, Unreachable):
                explained = Unreachable(one_line(f"{explained}; {why}"))
            raise explained from None
        assert connection  # a chain has at least one
        transport = connection.transport
        transport.set_keepalive(timeouts.KEEPALIVE_S)
        if isinstance(transport.sock, socket.socket) and hasattr(socket, "TCP_USER_TIMEOUT"):
            transport.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeouts.TCP_USER_TIMEOUT_MS)
        return connection

    @property
    def is_open(self) -> bool:
        """Whether there is a paramiko connection; a lost one counts until something is asked."""
        return self._fabric is not None

    def close(self) -> None:
        """Closes the connection. Jobs on the host are not affected."""
        connections = [self._fabric, *self._further]
        self._fabric, self._further, self._waiting_agent = None, [], None
        for connection in connections:
            _close(connection)

    def session(self) -> Any:
        """A channel for a command. Opens a further connection if this one allows no more channels."""
        import paramiko

        self.open()
        for connection in [self._open_fabric, *self._further]:
            try:
                return connection.create_session()
            except paramiko.ChannelException as refused:
                full = refused
        if len(self._further) >= FURTHER_CONNECTIONS:
            raise full
        self._further.append(self._connected())
        return self._further[-1].create_session()

    def stream(self, op: str, **params: Any) -> Iterator[dict[str, Any]]:
        """Runs the agent's `op` there and yields its messages as they come; raises what it answers as an error.

        Closing the iterator ends the remote side. Once the agent has spoken, silence for `timeouts.SILENCE_S` seconds
        is a lost connection; until then the login shell there has `login_timeout_s` of hosts.toml.
        """
        self.open()
        channel = None
        try:
            channel, replies = self._agent({"op": op, "workspace": self.host.entry.workspace, **params})
            for message in replies:
                self.patience.answered()
                yield checked(self.host, op, params, message)
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

    def _agent(self, request: dict[str, Any]) -> tuple[Any, Iterator[dict[str, Any]]]:
        """Starts an agent with this request. Returns (its channel, its answers)."""
        channel = self.session()
        channel.settimeout(min(timeouts.SILENCE_S, self.host.entry.login_timeout_s))
        channel.exec_command(bootstrap(self.host.entry.python))
        try:
            channel.sendall(payload(request))
        except OSError:
            if not channel.closed:
                raise  # else it ended before it had read us: its exit status and its words say why
        speaks = threading.Event()

        def on_start() -> None:
            speaks.set()
            channel.settimeout(timeouts.SILENCE_S)

        return channel, iter(Replies(self.host, self._chunks(channel, speaks), on_start, self.on_beat))

    def call(self, op: str, **params: Any) -> dict[str, Any]:
        """The agent's answer to one question."""
        return self.patiently(lambda: self._last(op, params))

    def _last(self, op: str, params: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = {}
        for message in self.stream(op, **params):
            answer = message
        return answer

    def ask(self, op: str, **params: Any) -> dict[str, Any]:
        """Like `call`, but keeps one agent for all requests, which saves three round trips and the start of Python.

        Only for operations that give one answer and leave no process behind.
        """
        return self.patiently(lambda: self.ask_once(op, **params))

    def ask_once(self, op: str, **params: Any) -> dict[str, Any]:
        """Like `ask`, but makes only one attempt."""
        request = {"op": op, "workspace": self.host.entry.workspace, "more": True, **params}
        if not self._waiting_agent:
            self.open()
        try:
            if self._waiting_agent:
                self._waiting_agent[0](request_line(request))
            else:
                channel, answers = self._agent(request)
                self._waiting_agent = channel.sendall, answers
            for answer in self._waiting_agent[1]:
                return checked(self.host, op, params, answer)
            raise Unreachable(f"{self.host.name}: connection lost before the host had answered")
        except Exception as error:
            self.close()
            raise explain(self.host, error) from None

    def round_trip(self) -> float:
        """Seconds of one round trip: the smallest that TCP has seen (tcpi_min_rtt, Linux), or of a short exchange."""
        return self.patiently(self._round_trip)

    def _round_trip(self) -> float:
        if self._fabric is None and self._waiting_agent:
            return _shortest(lambda: self.ask_once("ready"))
        self.open()
        with contextlib.suppress(OSError, AttributeError, struct.error):
            return self._tcp_us(TCPI_MIN_RTT) / 1e6
        try:
            return _shortest(self._exchange_with_sshd)
        except Exception as error:
            self.close()
            raise explain(self.host, error) from None

    def _tcp_us(self, offset: int) -> int:
        """A field of the kernel's struct tcp_info. Raises OSError, AttributeError or struct.error if it is unknown."""
        if self._open_fabric.gateway:
            raise OSError("the socket here ends at the gateway")
        info = self._open_fabric.transport.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        return struct.unpack_from("I", info, offset)[0]

    def queueing(self) -> float | None:
        """Seconds by which round trips are now longer than the shortest one: the queue at the narrowest link.

        None if unknown. Call it often: each call sends a few bytes, and later calls see their acknowledgement.
        """
        try:
            self._open_fabric.transport.send_ignore(8)
            return (self._tcp_us(TCPI_RTT) - self._tcp_us(TCPI_MIN_RTT)) / 1e6
        except (OSError, AttributeError, struct.error, EOFError):
            return None

    def _chunks(self, channel: Any, speaks: threading.Event) -> Iterator[tuple[bytes, bytes, int | None]]:
        """Yields (stdout, stderr, exit status). Raises TimeoutError if the agent is silent after it `speaks`.

        A login shell may be silent. During that time sshd itself is asked whether the connection still works.
        """
        while True:
            try:
                data = channel.recv(1 << 18)
            except TimeoutError:
                if speaks.is_set():
                    raise
                self._exchange_with_sshd()
                yield b"", b"", None
                continue
            noise = b""
            while channel.recv_stderr_ready():
                noise += channel.recv_stderr(1 << 16)
            if not data:
                noise += b"" if channel.exit_status_ready() and noise else channel.recv_stderr(1 << 16)
                yield b"", noise, channel.recv_exit_status()
                return
            yield data, noise, None

    def _exchange_with_sshd(self) -> None:
        """Makes one round trip to sshd itself. Raises if there is no answer."""
        import paramiko

        with contextlib.suppress(paramiko.ChannelException):  # a refusal is an answer
            self._open_fabric.create_session().close()


def connect(
    host: str | Host, workspace: Path, accept_new_host_key: bool = False, patience: Patience | None = None
) -> Remote:
    """An open connection to a host, given itself or by name. Accepts an unknown key only if told to."""
    remote = Remote(resolve(host, workspace) if isinstance(host, str) else host, patience)
    for _ in range(4):  # every hop may be new
        try:
            remote.patiently(remote.open)
            return remote
        except UnknownHostKey as unknown:
            if not accept_new_host_key:
                raise
            unknown.remember()
    raise SurgvqaError(f"{remote.host.name}: the accepted host key was not found in known_hosts afterwards")
