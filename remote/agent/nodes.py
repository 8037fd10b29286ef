"""What several hosts need to train together: that they have the same content, and a way from one to the other."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import socket
import struct
import time
from typing import Any

from remote.agent.files import records, sha256_of, unchanged, walk, within
from surgvqa.errors import SurgvqaError

MEET_S = 60.0
"""How long the first host waits for the others, each of which tries every address."""
TRY_S = 3.0
"""For one address."""
SIOCGIFADDR = 0x8915
"""ioctl: the IPv4 address of an interface (netdevice(7))."""


def contents(channel: Any, workspace: str, paths: list[str], rows: bool = False) -> dict[str, Any]:
    """A digest of the names and hashes of the files at and below each of `paths`, with their number (0: none there);
    with `rows` also [name, sha256] of each file.

    What an upload's record knows and nobody touched since is not read again.
    """
    known: dict[str, list[Any]] = {}
    for record in records(workspace):
        prefix = record["name"] + "/" if record["kind"] == "folder" else ""
        known.update({prefix + path: entry for path, entry in record["files"].items()})
    found = []
    for path in paths:
        full = within(workspace, path)
        names = sorted(walk(full)) if os.path.isdir(full) else [""] if os.path.exists(full) else []
        files = [[name, _sha256(f"{full}/{name}" if name else full, known.get(f"{path}/{name}".rstrip("/")))]
                 for name in names]  # fmt: skip
        text = "\0".join(f"{name}\0{sha256}" for name, sha256 in files)
        digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
        found.append({"path": path, "digest": digest, "files": len(files), "rows": files if rows else []})
    return {"contents": found}


def _sha256(path: str, entry: list[Any] | None) -> str:
    """Of a file; `entry` is [size, sha256, mtime_ns, …] as it was published."""
    if entry and unchanged(path, entry[0], entry[2]):
        return str(entry[1])
    return sha256_of(path)


def listen(channel: Any, workspace: str, word: str) -> dict[str, Any]:
    """Waits at a free port, which it says first with this host's addresses, until one comes who ends it. Whoever says
    `word` is given it back, so that nobody takes another host for this one."""
    with socket.create_server(("", 0)) as server:
        here = {"port": server.getsockname()[1], "addresses": _addresses()}
        channel.say(here)
        deadline = time.monotonic() + MEET_S
        while time.monotonic() < deadline:
            server.settimeout(max(0.1, deadline - time.monotonic()))
            with contextlib.suppress(OSError), server.accept()[0] as guest:
                guest.settimeout(TRY_S)
                said = guest.recv(200).decode("ascii", "replace").split()
                if said[:1] == [word]:
                    guest.sendall(word.encode())
                    guest.recv(1)  # the guest closes first, so that the port is free
                    if said[1:] == ["end"]:
                        return here
    raise SurgvqaError(f"no other host came to port {here['port']} within {MEET_S:g} s; does a firewall keep it out?")


def reach(channel: Any, workspace: str, addresses: list[str], port: int, word: str, end: bool) -> dict[str, Any]:
    """Those of `addresses` at which the host that listens is reached from here, and this host's interface on that way;
    `end`: it need not listen any longer."""
    found = []
    names = {one["address"]: one["interface"] for one in _addresses()}
    for address in addresses:
        with contextlib.suppress(OSError), socket.create_connection((address, port), TRY_S) as way:
            way.sendall(f"{word} end".encode() if end else word.encode())
            if way.recv(200).decode("ascii", "replace") == word:
                found.append({"address": address, "interface": names.get(way.getsockname()[0], "")})
    return {"reached": found}


def _addresses() -> list[dict[str, str]]:
    """The IPv4 addresses of this host with their interfaces, the loopback last."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(asked.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.append({"address": socket.inet_ntoa(answer[20:24]), "interface": name})
    return sorted(found, key=lambda one: one["address"].startswith("127."))
