"""Host keys: which are known, and what an unknown one looks like."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import subprocess
from typing import TYPE_CHECKING

from remote.ssh.hosts import Host
from surgvqa.errors import SurgvqaError, UsageError

if TYPE_CHECKING:
    import paramiko


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

    accepted: list[paramiko.PKey] = []
    revoked: list[paramiko.PKey] = []
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
                if entry and entry.key:
                    (revoked if marker == "@revoked" else accepted).append(entry.key)
    return accepted, revoked
