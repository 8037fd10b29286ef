"""Why a host could not be reached, in one line each."""

from __future__ import annotations

import shlex
import socket
from typing import TYPE_CHECKING

from remote.ssh import timeouts
from remote.ssh.host_keys import fingerprint
from remote.ssh.hosts import Host
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.untrusted import one_line

if TYPE_CHECKING:
    pass


class Unreachable(SurgvqaError):
    """The host cannot be reached now; the same question may succeed later."""


class UnknownName(Unreachable, UsageError):
    """The name cannot be looked up: it is wrong (exit code 2), or there is no network now, so it is worth a retry."""


class AuthenticationFailed(SurgvqaError):
    """The host does not take our keys."""


class ChangedHostKey(SurgvqaError):
    """The host's key is not the one that is known. Never accepted."""


def not_understood(host: Host, what: str) -> SurgvqaError:
    """The host answered, and not as our agent does."""
    return SurgvqaError(one_line(f"{host.name}: cannot understand its answer ({what}); is this the right host?"))


def explain(host: Host, error: Exception, goodbye: str = "") -> SurgvqaError:
    """What went wrong between here and `host`, as one line that says what to do.

    `goodbye`: what the host said as it ended the connection. Only an answer of the host is a refusal of our keys.
    """
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
    told = "authentication" in goodbye.lower()  # "Too many authentication failures"
    if not told and str(error).startswith(("Authentication timeout", "Authentication failed: transport")):
        return Unreachable(f"{at}: connection lost while logging in; the host has not refused our keys")
    if told or isinstance(error, paramiko.AuthenticationException) or "No authentication methods" in str(error):
        return AuthenticationFailed(
            f"{at}: the host refused our keys; check IdentityFile, User and ssh-add -l, "
            f"or install one: ssh-copy-id {host.target}"
        )
    if isinstance(error, socket.gaierror):
        if error.errno == socket.EAI_AGAIN:
            return Unreachable(f"{host.name}: {host.hostname!r} cannot be looked up now; is there a network?")
        return UnknownName(
            f"{host.name}: unknown host {host.hostname!r}: no name of ~/.ssh/config or hosts.toml, and DNS has none"
        )
    if isinstance(error, paramiko.ssh_exception.NoValidConnectionsError):
        error = next(iter(error.errors.values()))
    if isinstance(error, ConnectionRefusedError):
        return Unreachable(f"{at}: connection refused; is the host up, and sshd on that port?")
    if isinstance(error, TimeoutError):
        return Unreachable(
            f"{at}: unreachable, no answer in {timeouts.CONNECT_TIMEOUT_S} s; is the host up and the port open?"
        )
    if isinstance(error, paramiko.ChannelException):
        return Unreachable(f"{at}: the host opens no channel: {error.text}")
    if isinstance(error, (OSError, EOFError, paramiko.SSHException)):
        return Unreachable(f"{at}: connection lost: {str(error) or type(error).__name__}")
    raise error


def explain_ssh(host: Host, stderr: str, status: int) -> SurgvqaError:
    """An OpenSSH subprocess's end as one line."""
    text = " ".join(stderr.split())
    if "REMOTE HOST IDENTIFICATION HAS CHANGED" in text or "Host key verification failed" in text:
        return ChangedHostKey(f"{host.name}: ssh refused the host key (ssh {shlex.quote(host.target)} shows why)")
    if "Permission denied" in text or "Too many authentication failures" in text:
        return AuthenticationFailed(f"{host.name}: ssh could not log in: {text[-200:]}")
    return Unreachable(f"{host.name}: ssh ended with {status}: {text[-200:] or 'no reason given'}")
