"""Finds known host keys and describes unknown ones."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remote.ssh.hosts import Host
from surgvqa.errors import SurgvqaError, UsageError

if TYPE_CHECKING:
    import paramiko


SEARCH_S = 20
LARGEST_ANSWER = 4 << 20


class UnknownHostKey(SurgvqaError):
    """The host's key is not known yet. Call `remember` after a person has compared the fingerprint."""

    def __init__(self, host: Host, key: paramiko.PKey, authority: bool = False):
        self.host, self.key = host, key
        self.fingerprint = fingerprint(key)
        trusted = "; known_hosts has a certificate authority for it, which only OpenSSH can check" if authority else ""
        super().__init__(
            f"{host.name}: unknown host key, {key.get_name()} {self.fingerprint}{trusted}; compare it with the "
            "provider's console, then run again with --accept-new-host-key"
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


def known_keys(host: Host, shown: paramiko.PKey | None = None) -> tuple[list[paramiko.PKey], list[paramiko.PKey]]:
    """The accepted and the revoked keys of `host`: of the files, and of KnownHostsCommand, which may want to know the
    key that was `shown`. OpenSSH itself searches (hashed names, wildcards, several files)."""
    accepted, revoked = [], []
    for file in host.known_hosts_files:
        if file.is_file():
            found = _search(file, host.key_name)
            accepted += found[0]
            revoked += found[1]
    if said := _known_hosts_command(host, shown):
        with tempfile.NamedTemporaryFile(suffix=".known_hosts") as listed:
            listed.write(said)
            listed.flush()
            found = _search(Path(listed.name), host.key_name)
        accepted += found[0]
        revoked += found[1]
    return accepted, revoked


def known_without_port(host: Host, key: paramiko.PKey) -> bool:
    """Whether `key` is known under the host's name without port, where OpenSSH looks next if [host]:port is unknown."""
    if host.setting("hostkeyalias") or host.port == 22:
        return False
    return any(key in _search(file, host.hostname)[0] for file in host.known_hosts_files if file.is_file())


def has_authority(host: Host) -> bool:
    """Whether a known_hosts file has an @cert-authority for the host."""
    return any("@cert-authority" in _found(file, host.key_name) for file in host.known_hosts_files if file.is_file())


def _known_hosts_command(host: Host, shown: paramiko.PKey | None) -> bytes:
    """The output of KnownHostsCommand: lines as in a known_hosts file."""
    of_key = {"I": "HOSTNAME", "f": fingerprint(shown), "K": shown.get_base64(), "t": shown.get_name()} if shown else {}
    words = host.known_hosts_command(**of_key)
    if not words:
        return b""
    try:
        done = subprocess.run(words, capture_output=True, stdin=subprocess.DEVNULL, timeout=SEARCH_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"{host.name}: KnownHostsCommand {words[0]} failed: {error}") from None
    return done.stdout[:LARGEST_ANSWER] if done.returncode == 0 else b""


def _search(file: Path, name: str) -> tuple[list[paramiko.PKey], list[paramiko.PKey]]:
    """The accepted and the revoked keys of `name` in a known_hosts file."""
    from paramiko.hostkeys import HostKeyEntry

    accepted: list[paramiko.PKey] = []
    revoked: list[paramiko.PKey] = []
    for line in _found(file, name).splitlines():
        fields = line.split()
        marker = fields.pop(0) if fields and fields[0].startswith("@") else ""
        if line.startswith("#") or len(fields) < 3 or marker == "@cert-authority":
            continue
        with contextlib.suppress(Exception):  # a kind of key that paramiko does not know
            entry = HostKeyEntry.from_line(f"{name} {fields[1]} {fields[2]}")
            if entry and entry.key:
                (revoked if marker == "@revoked" else accepted).append(entry.key)
    return accepted, revoked


def _found(file: Path, name: str) -> str:
    """The lines of a known_hosts file for `name`."""
    words = ["ssh-keygen", "-F", name, "-f", str(file)]
    options: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace", "timeout": SEARCH_S}
    return str(subprocess.run(words, stdin=subprocess.DEVNULL, **options).stdout)
