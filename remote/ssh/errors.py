"""Why a host could not be reached, in one line each."""

from __future__ import annotations

import shlex
import socket

from remote.ssh import timeouts
from remote.ssh.host_keys import fingerprint, known_keys
from remote.ssh.hosts import Host
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.untrusted import one_line


class Unreachable(SurgvqaError):
    """The host cannot be reached now; the same question may succeed later."""


class UnknownName(Unreachable, UsageError):
    """DNS has no such name, and no key is known for it: most likely it is misspelt (exit code 2)."""


class SlowLogin(Unreachable):
    """The host let us in, and its login shell has not started the agent in `login_timeout_s`."""


class AuthenticationFailed(SurgvqaError):
    """The host does not take our keys."""


class ChangedHostKey(SurgvqaError):
    """The host's key is not the one that is known. Never accepted."""


def address(host: Host) -> str:
    """The host as messages name it: gpuhost (ubuntu@192.0.2.7:22)."""
    return f"{host.name} ({host.user}@{host.hostname}:{host.port})"


def not_understood(host: Host, what: str) -> SurgvqaError:
    """The host answered, and not as our agent does."""
    return SurgvqaError(one_line(f"{host.name}: cannot understand its answer ({what}); is this the right host?"))


def explain(host: Host, error: Exception, goodbye: str = "") -> SurgvqaError:
    """What went wrong between here and `host`, as one line that says what to do.

    `goodbye`: what the host said as it ended the connection. Only an answer of the host is a refusal (patience.py); of
    keys, remote/ssh/keys.py says it.
    """
    import paramiko

    at = address(host)
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
    if "authentication" in goodbye.lower():  # "Too many authentication failures"
        return AuthenticationFailed(f"{at}: the host refused our keys ({goodbye})")
    if isinstance(error, socket.gaierror):
        if error.errno == socket.EAI_AGAIN or known_keys(host)[0]:  # a host that was reached before has a name
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
        return Unreachable(one_line(f"{at}: connection lost: {str(error) or type(error).__name__}"))
    # What paramiko raises over bytes that are no SSH may be anything: UnicodeDecodeError, ValueError, struct.error.
    return Unreachable(one_line(f"{at}: connection lost: {type(error).__name__}: {error}"))


SSH_ITSELF = ("command-line line", "Bad configuration option", "Bad owner or permissions", "Unable to negotiate")
"""What OpenSSH says where no later attempt can succeed: of its options, its files, the host's algorithms."""


def explain_ssh(host: Host, stderr: str, status: int, logged_in: bool = False) -> SurgvqaError:
    """An OpenSSH subprocess's end as one line. Once it had `logged_in`, only the connection can have ended; what stands
    in `stderr` is then also what the login shell there wrote."""
    text = " ".join(stderr.split())
    if logged_in:
        return Unreachable(f"{host.name}: connection lost: ssh ended with {status}: {text[-200:] or 'no reason given'}")
    if "REMOTE HOST IDENTIFICATION HAS CHANGED" in text or "Host key verification failed" in text:
        return ChangedHostKey(f"{host.name}: ssh refused the host key (ssh {shlex.quote(host.target)} shows why)")
    if "Permission denied (" in text or "Too many authentication failures" in text:
        return AuthenticationFailed(f"{host.name}: ssh could not log in: {text[-200:]}")
    if any(words in text for words in SSH_ITSELF):
        return SurgvqaError(f"{host.name}: ssh cannot connect: {text[-200:]}")
    return Unreachable(f"{host.name}: ssh ended with {status}: {text[-200:] or 'no reason given'}")
