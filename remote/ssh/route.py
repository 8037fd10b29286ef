"""The TCP connection to a host as ssh_config has it: AddressFamily, BindAddress and BindInterface."""

from __future__ import annotations

import socket
from typing import Any

from remote.ssh import timeouts
from remote.ssh.hosts import Host

FAMILIES = {"inet": socket.AF_INET, "inet6": socket.AF_INET6}


def is_chosen(host: Host) -> bool:
    """Whether ssh_config chooses how packets leave this computer; paramiko's own sockets know nothing of that."""
    return bool(
        host.setting("addressfamily") in FAMILIES or host.setting("bindaddress") or host.setting("bindinterface")
    )


def connected(host: Host) -> socket.socket:
    """A socket connected to the first address of the host that answers. Raises OSError where none does."""
    failed: OSError = OSError(f"no address of {host.hostname} can be reached")
    for found, kind, protocol, _, address in _addresses(host):
        one = socket.socket(found, kind, protocol)
        try:
            one.settimeout(timeouts.CONNECT_TIMEOUT_S)
            _bind(one, host)
            one.connect(address)
            return one
        except OSError as error:
            one.close()
            failed = error
    raise failed


def _addresses(host: Host) -> list[tuple[Any, ...]]:
    """The addresses of the host of the chosen family, as getaddrinfo gives them."""
    chosen = host.setting("addressfamily")
    try:
        return [*socket.getaddrinfo(host.hostname, host.port, FAMILIES.get(chosen, 0), socket.SOCK_STREAM)]
    except socket.gaierror:
        socket.getaddrinfo(host.hostname, host.port)  # raises where the name itself is unknown
        raise OSError(f"AddressFamily {chosen} of ssh's configuration: {host.hostname} has no such address") from None


def _bind(one: socket.socket, host: Host) -> None:
    """Gives the socket the address or the interface that it shall leave by."""
    for keyword in ("BindAddress", "BindInterface"):
        if not (value := host.setting(keyword.lower())):
            continue
        try:
            if keyword == "BindInterface":
                one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, value.encode())
            else:
                one.bind(socket.getaddrinfo(value, 0, one.family, one.type)[0][4])
        except (OSError, AttributeError) as error:  # no SO_BINDTODEVICE on macOS
            why = getattr(error, "strerror", None) or error
            raise OSError(f"{keyword} {value} of ssh's configuration cannot be used: {why}") from None
