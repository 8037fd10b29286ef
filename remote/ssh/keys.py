"""Logging in with the keys that ssh would try: of the agent and of IdentityFile, in ssh's order."""

from __future__ import annotations

import io
import os
from pathlib import Path

import paramiko
from cryptography.hazmat.primitives import serialization as pem

from remote.ssh.hosts import Host
from remote.ssh.transport import AgentAt


def agent_keys(host: Host) -> list[paramiko.PKey]:
    """What the ssh-agent of IdentityAgent or SSH_AUTH_SOCK holds; none where there is no agent."""
    named = (host.ssh.get("identityagent") or ["SSH_AUTH_SOCK"])[0]
    if named == "none":
        return []
    path = os.environ.get("SSH_AUTH_SOCK", "") if named == "SSH_AUTH_SOCK" else os.path.expandvars(named)
    try:
        return list(AgentAt(os.path.expanduser(path)).get_keys()) if path else []
    except (OSError, paramiko.SSHException):
        return []


def public_blob(file: str) -> bytes | None:
    """The public key beside a private one, or in `file` itself (IdentityFile x.pub)."""
    for path in (file, f"{file}.pub"):
        try:
            kind, blob = Path(path).read_text(encoding="utf-8", errors="replace").split()[:2]
            if kind.startswith(("ssh-", "ecdsa-", "sk-")):
                return paramiko.pkey.PublicBlob.from_string(f"{kind} {blob}").key_blob
        except (OSError, ValueError):
            continue
    return None


def load(file: str) -> paramiko.PKey:
    """A private key of OpenSSH's, PEM or PKCS8 format. Raises PasswordRequiredException for an encrypted one."""
    data = Path(file).read_bytes()
    if b"BEGIN ENCRYPTED PRIVATE KEY" in data:
        raise paramiko.PasswordRequiredException("Private key file is encrypted")
    if b"BEGIN PRIVATE KEY" in data:
        loaded = pem.load_pem_private_key(data, None)
        data = loaded.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.OpenSSH, pem.NoEncryption())
    failure: Exception = paramiko.SSHException(f"{file}: no private key")
    for kind in (paramiko.Ed25519Key, paramiko.ECDSAKey, paramiko.RSAKey):
        try:
            key = kind.from_private_key(io.StringIO(data.decode()))
        except paramiko.PasswordRequiredException:
            raise
        except (paramiko.SSHException, ValueError) as error:
            failure = error
            continue
        if os.path.isfile(f"{file}-cert.pub"):
            key.load_certificate(f"{file}-cert.pub")
        return key
    raise paramiko.SSHException(str(failure))


class SshKeys:
    """paramiko's strategy: the agent's keys of IdentityFile, its others unless IdentitiesOnly, then the files."""

    def __init__(self, host: Host):
        self.host = host

    def authenticate(self, transport: paramiko.Transport) -> list[str]:
        """Raises paramiko's error of the last key that was tried."""
        files = self.host.identity_files
        named = [blob for file in files if (blob := public_blob(file))]
        held = agent_keys(self.host)
        first = [key for key in held if key.asbytes() in named]
        others = [key for key in held if key not in first] if self.host.setting("identitiesonly") != "yes" else []
        failure: Exception = paramiko.SSHException("No authentication methods available")
        tried: list[paramiko.PKey | str] = [*first, *others, *files]
        for one in tried:
            try:
                if isinstance(one, str):
                    if public_blob(one) in [key.asbytes() for key in held] or not os.path.isfile(one):
                        continue  # tried already, or only its public half is here
                    key = load(one)
                else:
                    key = one
                if not transport.auth_publickey(self.host.user, key):
                    return []
                failure = paramiko.AuthenticationException("the host wants more than a key")
            except (paramiko.SSHException, OSError, ValueError) as error:
                failure = error
        raise failure
