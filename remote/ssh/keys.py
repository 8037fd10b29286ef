"""Logs in with the keys that ssh would try: certificates, then the agent's keys, then those of IdentityFile."""

from __future__ import annotations

import base64
import copy
import io
import os
from collections.abc import Iterator
from typing import Any

import paramiko
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from paramiko.pkey import PublicBlob

from remote.ssh.errors import AuthenticationFailed, Unreachable, address
from remote.ssh.hosts import Host
from remote.ssh.paramiko_internals import AgentAt, Transport
from surgvqa.untrusted import one_line

LARGEST_KEY_FILE = 1 << 20
OPENSSH_MAGIC = b"openssh-key-v1\0"
CERTIFICATE = "-cert-v01@openssh.com"
"""The end of a certificate's type (PROTOCOL.certkeys of OpenSSH)."""


class UnusableKey(ValueError):
    """A key file cannot be used. The text is one line: which file, why, and what to do."""


def agent_keys(host: Host) -> tuple[list[paramiko.PKey], str]:
    """(the keys in the ssh-agent of IdentityAgent or SSH_AUTH_SOCK, why it cannot be asked or '')."""
    path = host.identity_agent
    if not path:
        return [], ""
    try:
        keys: list[Any] = list(AgentAt(path).get_keys())
    except (OSError, paramiko.SSHException) as error:
        return [], f"the ssh-agent at {path} does not answer ({error})"
    for key in keys:
        if key.get_name().endswith(CERTIFICATE):
            key.public_blob = PublicBlob(key.get_name(), key.blob)
    return keys, ""


def _read(file: str) -> bytes:
    """A key file. Raises UnusableKey."""
    try:
        with open(file, "rb") as stream:
            data = stream.read(LARGEST_KEY_FILE + 1)
    except OSError as error:
        raise UnusableKey(f"{file}: {error.strerror}") from None
    if len(data) > LARGEST_KEY_FILE:
        raise UnusableKey(f"{file}: larger than {LARGEST_KEY_FILE >> 20} MiB, so no key")
    return data


def public_line(file: str) -> PublicBlob | None:
    """The public key or certificate in a .pub file, or None."""
    try:
        kind, blob = _read(file).decode(errors="replace").split()[:2]
        return PublicBlob.from_string(f"{kind} {blob}") if kind.startswith(("ssh-", "ecdsa-", "sk-")) else None
    except ValueError:  # UnusableKey too
        return None


def public_blob(file: str) -> bytes | None:
    """The public key of IdentityFile `file`, or None if unknown.

    It comes from the file itself (x.pub, or OpenSSH's format, in which it is never encrypted) or from the .pub file
    beside it.
    """
    for path in (file, f"{file}.pub"):
        if found := public_line(path):
            return bytes(found.key_blob)
    try:
        lines = _read(file).decode("ascii").split("-----")
        data = base64.b64decode(lines[2])
        message = paramiko.Message(data[len(OPENSSH_MAGIC) :])
        for _ in ("cipher", "key derivation", "its options"):
            message.get_binary()
        return message.get_binary() if data.startswith(OPENSSH_MAGIC) and message.get_int() == 1 else None
    except (ValueError, IndexError, paramiko.SSHException):
        return None


def load(file: str) -> paramiko.PKey:
    """A private key of OpenSSH's, PEM or PKCS8 format. Raises UnusableKey."""
    data = _read(file)
    read = pem.load_ssh_private_key if b"BEGIN OPENSSH PRIVATE KEY" in data else pem.load_pem_private_key
    try:
        loaded = read(data, None)
    except TypeError:  # what cryptography raises where a passphrase is needed
        raise UnusableKey(f"{file} is encrypted; load it first: ssh-add {file}") from None
    except UnsupportedAlgorithm as error:
        raise UnusableKey(
            f"{file}: a kind of key that we cannot read ({error}); load it first: ssh-add {file}"
        ) from None
    except Exception as error:  # a damaged file may raise anything
        raise UnusableKey(f"{file}: no private key, or a damaged one ({str(error).partition('.')[0]})") from None
    kinds: dict[type, type[paramiko.PKey]] = {
        ed25519.Ed25519PrivateKey: paramiko.Ed25519Key,
        ec.EllipticCurvePrivateKey: paramiko.ECDSAKey,
        rsa.RSAPrivateKey: paramiko.RSAKey,
    }
    kind = next((ours for theirs, ours in kinds.items() if isinstance(loaded, theirs)), None)
    if kind is None or not hasattr(loaded, "private_bytes"):
        raise UnusableKey(f"{file}: a kind of key that no ssh uses any more; make an ed25519 key: ssh-keygen")
    try:
        text = loaded.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.OpenSSH, pem.NoEncryption()).decode()
        return kind.from_private_key(io.StringIO(text))
    except (paramiko.SSHException, ValueError, UnsupportedAlgorithm) as error:
        raise UnusableKey(f"{file}: a kind of key that we cannot use ({error})") from None


def certifies(certificate: PublicBlob, key: bytes) -> bool:
    """Whether `certificate` belongs to the public key `key`, whose fields it repeats after its type and nonce."""
    of_certificate, of_key = paramiko.Message(certificate.key_blob), paramiko.Message(key)
    kind = of_certificate.get_text()
    of_certificate.get_binary()  # the nonce
    same_kind = kind == of_key.get_text() + CERTIFICATE
    return same_kind and of_certificate.get_remainder().startswith(of_key.get_remainder())


def certified(key: paramiko.PKey, certificate: PublicBlob) -> paramiko.PKey:
    """The same key, which presents its certificate to the host."""
    one: Any = key
    one = paramiko.agent.AgentKey(one.agent, one.blob) if isinstance(one, paramiko.agent.AgentKey) else copy.copy(one)
    one.public_blob = certificate
    return one


class SshKeys:
    """paramiko's strategy: certificates, the agent's keys of IdentityFile, its others unless IdentitiesOnly, files."""

    def __init__(self, host: Host):
        self.host = host
        self.problems: list[str] = []
        """Why keys could not be used, one line per key."""

    def authenticate(self, transport: Transport) -> list[str]:
        """Logs in. Raises AuthenticationFailed when the host refuses what we have, Unreachable when it is lost."""
        refused, wanted = False, ""
        for key in self._keys():
            try:
                more = transport.auth_publickey(self.host.user, key)
            except (paramiko.SSHException, OSError, EOFError) as error:
                self._only_a_refusal(transport, error)
                refused = True
            else:
                if not more:
                    return []
                wanted = ", ".join(more)
        at, why = address(self.host), "".join(f"; {problem}" for problem in self.problems)
        if wanted:
            raise AuthenticationFailed(f"{at}: the host takes our key and wants more ({wanted}), which we cannot give")
        if refused:
            raise AuthenticationFailed(
                f"{at}: the host refused our keys; check IdentityFile, User and ssh-add -l, "
                f"or install one: ssh-copy-id {self.host.target}{why}"
            )
        raise AuthenticationFailed(f"{at}: no key to log in with{why or '; check IdentityFile and ssh-add -l'}")

    def _only_a_refusal(self, transport: Transport, error: Exception) -> None:
        """Returns if the host has answered with a refusal. Raises for any other error."""
        at = address(self.host)
        if "signing" in str(error):  # the transport ends with that
            raise AuthenticationFailed(f"{at}: the ssh-agent does not sign with the key that it holds ({error})")
        if "authentication" in transport.goodbye.lower():  # "Too many authentication failures"
            said = one_line(transport.goodbye[:200])
            raise AuthenticationFailed(f"{at}: the host refused our keys ({said}); set IdentityFile and IdentitiesOnly")
        answered = isinstance(error, paramiko.AuthenticationException) and transport.is_active()
        if not answered or str(error).startswith("Authentication timeout"):
            raise Unreachable(f"{at}: connection lost while logging in; the host has not refused our keys")

    def _keys(self) -> Iterator[paramiko.PKey]:
        """Yields the keys in the order in which they are tried. A file is read only when its turn comes."""
        files = self.host.identity_files
        blobs = {file: public_blob(file) for file in files}
        held, problem = agent_keys(self.host)
        self.problems += [problem] if problem else []
        plain = [key for key in held if not key.public_blob]
        named = [blob for blob in blobs.values() if blob]
        loaded: dict[str, paramiko.PKey | None] = {}

        def of_file(file: str) -> paramiko.PKey | None:
            if file not in loaded:
                try:
                    loaded[file] = load(file)
                except UnusableKey as unusable:
                    loaded[file] = None
                    self.problems.append(str(unusable))
            return loaded[file]

        for path in [*self.host.certificate_files, *(f"{file}-cert.pub" for file in files)]:
            if (certificate := public_line(path)) and certificate.key_type.endswith(CERTIFICATE):
                key = next((key for key in plain if certifies(certificate, key.asbytes())), None)
                file = next((f for f, blob in blobs.items() if blob and certifies(certificate, blob)), None)
                key = key or (of_file(file) if file else None)
                if key:
                    yield certified(key, certificate)
        first = [key for key in held if key.asbytes() in named]
        yield from first
        if self.host.setting("identitiesonly") != "yes":
            yield from (key for key in held if key not in first)
        for file, blob in blobs.items():
            tried = blob in [key.asbytes() for key in held]
            if not tried and os.path.isfile(file) and not public_line(file) and (key := of_file(file)):
                yield key
