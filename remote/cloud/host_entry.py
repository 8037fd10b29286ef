"""A rented machine as a host: its table in the user's hosts.toml, and its key in known_hosts."""

from __future__ import annotations

from pathlib import Path

from remote.cloud.ledger import Record
from remote.cloud.provider import Machine
from remote.ssh.host_keys import UnknownHostKey
from remote.ssh.hosts import USER_HOSTS_FILE, read_hosts_files, resolve
from surgvqa.errors import UsageError
from surgvqa.files import read_text, write_synced

PUBLIC_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")


def identity(given: str | None) -> tuple[Path, str]:
    """The private key's file, as `given` or the first that ssh would use, and its public half."""
    files = [Path(given).expanduser()] if given else [Path("~/.ssh", name).expanduser() for name in PUBLIC_KEYS]
    for file in files:
        public = file.with_name(file.name + ".pub")
        if public.is_file():
            text = read_text(public).strip()
            if len(text.splitlines()) != 1 or len(text.split()) < 2:
                raise UsageError(f"{public}: expected one public key in one line")
            return file.absolute(), text
    tried = ", ".join(f"{file}.pub" for file in files)
    raise UsageError(f"no public key to log in with ({tried}); make one: ssh-keygen -t ed25519, or --identity_file")


def check_free(name: str, workspace: Path) -> None:
    """Raises UsageError if hosts.toml has another host of this name."""
    wrong: dict[str, UsageError] = {}
    entry = read_hosts_files(workspace, wrong).get(name)
    if name in wrong or (entry is not None and entry.host_key_alias is None):
        raise UsageError(f"{name}: hosts.toml has a host of this name; rent under another: --name")


def write(record: Record, machine: Machine, user: str, key_file: Path) -> None:
    """Writes or renews the table of `record`; keys that somebody added stay.

    The host's key is known by the machine's label: addresses are reused.
    """
    import tomlkit

    file = USER_HOSTS_FILE.expanduser()
    document = tomlkit.parse(read_text(file)) if file.is_file() else tomlkit.document()
    table = document.setdefault(record.name, tomlkit.table())
    if table.get("host_key_alias") != record.label:  # what an earlier machine of this name was is not this one
        table.clear()
    values = {"address": f"{user}@{machine.address}", "port": machine.port, "identity_file": str(key_file),
              "host_key_alias": record.label, "price_per_hour": record.price_per_hour}  # fmt: skip
    for key, value in values.items():
        table[key] = value
    _replace(file, tomlkit.dumps(document))


def remove(record: Record) -> None:
    """Removes the table of `record`, if it still belongs to that machine."""
    import tomlkit

    file = USER_HOSTS_FILE.expanduser()
    if not file.is_file():
        return
    document = tomlkit.parse(read_text(file))
    table = document.get(record.name)
    if isinstance(table, dict) and table.get("host_key_alias") == record.label:
        del document[record.name]
        _replace(file, tomlkit.dumps(document))


def vouch(name: str, workspace: Path, public_key: str) -> None:
    """Adds the key published by the provider to known_hosts, so that no other key is accepted at first contact."""
    import paramiko
    from paramiko.hostkeys import HostKeyEntry

    host = resolve(name, workspace)
    entry = HostKeyEntry.from_line(f"{host.key_name} {' '.join(public_key.split()[:2])}")
    assert entry is not None and isinstance(entry.key, paramiko.PKey)
    UnknownHostKey(host, entry.key).remember()


def _replace(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(file.name + ".new")
    write_synced(new, text.encode())
    new.replace(file)
