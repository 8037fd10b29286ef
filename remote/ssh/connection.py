"""One SSH connection to one host, over Fabric, made strict: known host keys, timeouts everywhere, one-line errors.

Fabric's own default accepts any host key without asking, ignores `Include`, and can hang for an hour on a dead link;
all three are set right here. A `Remote` belongs to one thread at a time.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import os
import shlex
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remote.ssh.bundle import TOO_OLD, bootstrap, payload, request_line
from remote.ssh.hosts import Host, resolve, ssh_settings
from surgvqa.errors import SurgvqaError, UsageError

if TYPE_CHECKING:
    import paramiko
    from fabric import Connection

CONNECT_TIMEOUT_S = 10
CHANNEL_TIMEOUT_S = 8
KEEPALIVE_S = 5
TCP_USER_TIMEOUT_MS = 15_000  # unacknowledged data ends a dead link after this
TCPI_RTT, TCPI_MIN_RTT = 68, 148  # offsets in struct tcp_info (linux/tcp.h), microseconds
SILENCE_S = 12.0  # the agent speaks every 2 s; longer silence is a lost connection


class Unreachable(SurgvqaError):
    """The host cannot be reached now; the same question may succeed later."""


class AuthenticationFailed(SurgvqaError):
    """The host does not take our keys."""


class ChangedHostKey(SurgvqaError):
    """The host's key is not the one that is known. Never accepted."""


class UnknownHostKey(SurgvqaError):
    """The host's key is not known yet; `remember` it after a person has compared the fingerprint."""

    def __init__(self, host: Host, key: paramiko.PKey):
        self.host, self.key = host, key
        self.fingerprint = fingerprint(key)
        super().__init__(
            f"{host.name}: unknown host key, {key.get_name()} {self.fingerprint}; compare it with the provider's "
            "console, then run again with --accept-new-host-key"
        )

    def remember(self) -> None:
        """Adds the key to the user's known_hosts (hashed when ssh is set so)."""
        from paramiko import HostKeys

        host = self.host
        if not host.known_hosts_files:
            raise UsageError(f"{host.name}: ssh has no UserKnownHostsFile to remember the key in")
        name = HostKeys.hash_host(host.key_name) if host.setting("hashknownhosts") == "yes" else host.key_name
        file = host.known_hosts_files[0]
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        before = file.read_bytes() if file.exists() else b""
        newline = "\n" if before and not before.endswith(b"\n") else ""  # else the key before it would be lost
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.write(f"{newline}{name} {self.key.get_name()} {self.key.get_base64()}\n")


def fingerprint(key: paramiko.PKey) -> str:
    """As `ssh` shows it: SHA256:base64 without padding."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(key.asbytes()).digest()).decode().rstrip("=")


def known_keys(host: Host) -> tuple[list[paramiko.PKey], list[paramiko.PKey]]:
    """The accepted and the revoked keys of `host`; OpenSSH itself searches (hashed names, wildcards, several files)."""
    from paramiko.hostkeys import HostKeyEntry

    accepted, revoked = [], []
    for file in host.known_hosts_files:
        if not file.is_file():
            continue
        done = subprocess.run(
            ["ssh-keygen", "-F", host.key_name, "-f", str(file)],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=20,
        )
        for line in done.stdout.splitlines():
            words = line.split()
            marker = words.pop(0) if words and words[0].startswith("@") else ""
            if line.startswith("#") or len(words) < 3 or marker == "@cert-authority":
                continue
            with contextlib.suppress(Exception):  # a kind of key that paramiko does not know
                entry = HostKeyEntry.from_line(f"{host.key_name} {words[1]} {words[2]}")
                (revoked if marker == "@revoked" else accepted).append(entry.key)
    return accepted, revoked


def jump_host(hop: str, name: str) -> Host:
    """One hop of ProxyJump ([user@]host[:port]) as a host of its own, with its own ssh settings."""
    from remote.ssh.hosts import HostEntry, ssh_config_option

    hop = hop.removeprefix("ssh://").rstrip("/")
    user, at, rest = hop.rpartition("@")
    address, colon, port = rest.rpartition(":")
    options = ssh_config_option() + (["-l", user] if at else [])
    if colon and port.isdigit():
        rest, options = address, [*options, "-p", port]
    rest = rest.removeprefix("[").removesuffix("]")  # an IPv6 address
    return Host(f"{name} via {rest}", HostEntry(), rest, tuple(options), ssh_settings(rest, options), "ProxyJump")


def _chain(host: Host, beyond: tuple[str, ...] = ()) -> list[tuple[Host, Connection]]:
    """The jumps to `host` and the host itself, each with a connection through the one before; none is open yet.

    `beyond`: what is reached through `host`; to be jumped to again would never end.
    """
    if host.target in beyond:
        raise UsageError(f"{host.name}: ProxyJump goes in a circle; give that host 'ProxyJump none' in ~/.ssh/config")
    chain: list[tuple[Host, Connection]] = []
    for hop in host.jump.split(",") if host.jump else []:
        hop_host = jump_host(hop.strip(), host.name)
        chain += [(hop_host, _fabric(hop_host, chain[-1][1]))] if chain else _chain(hop_host, (*beyond, host.target))
    return [*chain, (host, _fabric(host, chain[-1][1] if chain else None))]


def _fabric(host: Host, gateway: Any) -> Connection:
    """A Fabric connection, not yet open, with strict host keys."""
    import paramiko
    from fabric import Config

    from remote.ssh.proxy import Connection

    log = logging.getLogger("paramiko")  # its tracebacks would land on the panel's screen
    log.setLevel(logging.CRITICAL)
    log.propagate = False

    if gateway is None:
        gateway = host.proxy_command or False
    accepted, revoked = known_keys(host)
    kinds = {key.get_name() for key in accepted}
    kinds |= {"rsa-sha2-512", "rsa-sha2-256"} if "ssh-rsa" in kinds else set()
    connect: dict[str, Any] = {
        "key_filename": host.identity_files,
        "look_for_keys": False,
        "allow_agent": host.setting("identitiesonly") != "yes" and host.ssh.get("identityagent") != ["none"],
        "banner_timeout": CONNECT_TIMEOUT_S,
        "auth_timeout": CONNECT_TIMEOUT_S,
        "channel_timeout": CHANNEL_TIMEOUT_S,
    }
    if kinds:  # let the host show a key of a kind that we know
        preferred = paramiko.Transport._preferred_keys
        connect["disabled_algorithms"] = {"keys": [k for k in preferred if k not in kinds]}
    connection = Connection(
        host.hostname,
        user=host.user,
        port=host.port,
        gateway=gateway,
        connect_timeout=CONNECT_TIMEOUT_S,
        connect_kwargs=connect,
        config=Config(lazy=True, overrides={"load_ssh_configs": False}),
    )
    under = host.hostname if host.port == 22 else f"[{host.hostname}]:{host.port}"
    for key in accepted:
        connection.client.get_host_keys().add(under, key.get_name(), key)

    class Strict(paramiko.MissingHostKeyPolicy):
        def missing_host_key(self, client: Any, hostname: str, key: paramiko.PKey) -> None:
            if any(key == bad for bad in revoked):
                raise ChangedHostKey(f"{host.name}: this host key is marked @revoked in known_hosts; refused")
            raise UnknownHostKey(host, key)

    connection.client.set_missing_host_key_policy(Strict())
    return connection


def explain(host: Host, error: Exception) -> SurgvqaError:
    """What went wrong between here and `host`, as one line that says what to do."""
    import paramiko

    at = f"{host.name} ({host.user}@{host.hostname}:{host.port})"
    if isinstance(error, SurgvqaError):
        return error
    if isinstance(error, paramiko.BadHostKeyException):
        return ChangedHostKey(
            f"{at}: THE HOST KEY HAS CHANGED, now {error.key.get_name()} {fingerprint(error.key)}, known "
            f"{fingerprint(error.expected_key)}; refused. If the host was rebuilt: ssh-keygen -R '{host.key_name}'"
        )
    if isinstance(error, paramiko.ssh_exception.IncompatiblePeer):
        if "host key" in str(error).lower() or "key" in str(error).lower():
            return ChangedHostKey(
                f"{at}: the host shows no key of the kind that is known for it; refused. "
                f"If the host was rebuilt: ssh-keygen -R '{host.key_name}'"
            )
        return SurgvqaError(f"{at}: no common SSH algorithm: {error}")
    if isinstance(error, paramiko.PasswordRequiredException):
        return AuthenticationFailed(f"{at}: the private key is encrypted; load it first: ssh-add FILE")
    if isinstance(error, (paramiko.AuthenticationException,)) or "No authentication methods" in str(error):
        return AuthenticationFailed(
            f"{at}: the host refused our keys; check IdentityFile, User and ssh-add -l, "
            f"or install one: ssh-copy-id {host.target}"
        )
    if isinstance(error, socket.gaierror):
        return UsageError(
            f"{host.name}: unknown host {host.hostname!r}: no name of ~/.ssh/config or hosts.toml, and DNS has none"
        )
    if isinstance(error, paramiko.ssh_exception.NoValidConnectionsError):
        error = next(iter(error.errors.values()))
    if isinstance(error, ConnectionRefusedError):
        return Unreachable(f"{at}: connection refused; is the host up, and sshd on that port?")
    if isinstance(error, TimeoutError):
        return Unreachable(f"{at}: unreachable, no answer in {CONNECT_TIMEOUT_S} s; is the host up and the port open?")
    if isinstance(error, paramiko.ChannelException):
        return Unreachable(f"{at}: the host opens no channel: {error.text}")
    if isinstance(error, (OSError, EOFError, paramiko.SSHException)):
        return Unreachable(f"{at}: connection lost: {str(error) or type(error).__name__}")
    raise error


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
            for at, connection in _chain(self.host):  # noqa: B007
                connection.open()
        except Exception as error:
            self._fabric = connection
            self.close()
            raise explain(at, error) from None
        transport = connection.transport
        transport.set_keepalive(KEEPALIVE_S)
        if isinstance(transport.sock, socket.socket) and hasattr(socket, "TCP_USER_TIMEOUT"):
            transport.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TCP_USER_TIMEOUT_MS)
        self._fabric = connection

    def close(self) -> None:
        """Drops the connection; jobs on the host do not notice."""
        connection, self._fabric, self._waiting_agent = self._fabric, None, None
        while connection is not None:
            with contextlib.suppress(Exception):
                connection.close()
            connection = connection.gateway if not isinstance(connection.gateway, (str, bool)) else None

    def stream(self, op: str, silence_s: float = SILENCE_S, **params: Any) -> Iterator[dict[str, Any]]:
        """Runs the agent's `op` there and yields its messages as they come; raises what it answers as an error.

        Closing the iterator ends the remote side. Silence for `silence_s` seconds is a lost connection.
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

    def _agent(self, request: dict[str, Any], silence_s: float) -> tuple[Any, Iterator[dict[str, Any]]]:
        """Starts one with that request: its channel and its answers."""
        channel = self._fabric.create_session()
        channel.settimeout(silence_s)
        channel.exec_command(bootstrap(self.host.entry.python))
        try:
            channel.sendall(payload(request))
        except OSError:
            if not channel.closed:
                raise  # else it ended before it had read us: its exit status and its words say why
        return channel, iter(Replies(self.host, self._chunks(channel)))

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
                self._waiting_agent = self._agent(request, SILENCE_S)
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
                self._fabric.create_session().close()
                times.append(time.monotonic() - began)
        except Exception as error:
            self.close()
            raise explain(self.host, error) from None
        return min(times)

    def _tcp_us(self, offset: int) -> int:
        """A number of the kernel's struct tcp_info; OSError, AttributeError or struct.error where it cannot be had."""
        if self._fabric.gateway:
            raise OSError("the socket here ends at the gateway")
        info = self._fabric.transport.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        return struct.unpack_from("I", info, offset)[0]

    def queueing(self) -> float | None:
        """Seconds by which round trips are longer now than the shortest was: the queue before the narrowest link.

        To be called often: each call sends a few bytes, whose acknowledgement later calls see. None: cannot be known.
        """
        try:
            self._fabric.transport.send_ignore(8)
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


def ssh_command(host: Host, remote_command: str, ciphers: str | None = None) -> list[str]:
    """OpenSSH as a subprocess with a connection of its own, as strict and as impatient as ours."""
    settings = {
        "BatchMode": "yes",
        "StrictHostKeyChecking": "yes",
        "ConnectTimeout": str(CONNECT_TIMEOUT_S),
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
    }
    words = ["ssh", "-T", *host.options]
    for key, value in settings.items():
        words += ["-o", f"{key}={value}"]
    return [*words, "--", host.target, remote_command]


def explain_ssh(host: Host, stderr: str, status: int) -> SurgvqaError:
    """An OpenSSH subprocess's end as one line."""
    text = " ".join(stderr.split())
    if "REMOTE HOST IDENTIFICATION HAS CHANGED" in text or "Host key verification failed" in text:
        return ChangedHostKey(f"{host.name}: ssh refused the host key (ssh {shlex.quote(host.target)} shows why)")
    if "Permission denied" in text:
        return AuthenticationFailed(f"{host.name}: ssh could not log in: {text[-200:]}")
    return Unreachable(f"{host.name}: ssh ended with {status}: {text[-200:] or 'no reason given'}")


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
