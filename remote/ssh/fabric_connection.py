"""A Fabric connection as ssh would make it: jump hosts, keys, timeouts."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

from remote.ssh import route, timeouts
from remote.ssh.errors import ChangedHostKey
from remote.ssh.host_keys import UnknownHostKey, has_authority, known_keys, known_without_port
from remote.ssh.hosts import Host, ssh_settings
from surgvqa.errors import UsageError

if TYPE_CHECKING:
    import paramiko
    from fabric import Connection


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


def chain_to(host: Host, beyond: tuple[str, ...] = ()) -> list[tuple[Host, Connection]]:
    """The jumps to `host` and the host itself, each with a connection through the one before; none is open yet.

    `beyond`: what is reached through `host`; to be jumped to again would never end.
    """
    if host.target in beyond:
        raise UsageError(f"{host.name}: ProxyJump goes in a circle; give that host 'ProxyJump none' in ~/.ssh/config")
    chain: list[tuple[Host, Connection]] = []
    for hop in host.jump.split(",") if host.jump else []:
        hop_host = jump_host(hop.strip(), host.name)
        chain += [(hop_host, _fabric(hop_host, chain[-1][1]))] if chain else chain_to(hop_host, (*beyond, host.target))
    return [*chain, (host, _fabric(host, chain[-1][1] if chain else None))]


def _fabric(host: Host, gateway: Any) -> Connection:
    """A Fabric connection, not yet open, with strict host keys."""
    import paramiko
    from fabric import Config

    from remote.ssh.keys import SshKeys
    from remote.ssh.paramiko_internals import Transport, host_key_kinds
    from remote.ssh.proxy import Connection

    log = logging.getLogger("paramiko")  # its tracebacks would land on the panel's screen
    log.setLevel(logging.CRITICAL)
    log.propagate = False

    if gateway is None:
        gateway = host.proxy_command or False
    accepted, revoked = known_keys(host)
    accepted = [key for key in accepted if key not in revoked]
    kinds = {key.get_name() for key in accepted}
    kinds |= {"rsa-sha2-512", "rsa-sha2-256"} if "ssh-rsa" in kinds else set()
    connect: dict[str, Any] = {
        "transport_factory": Transport,
        "auth_strategy": SshKeys(host),
        "banner_timeout": timeouts.CONNECT_TIMEOUT_S,
        "auth_timeout": timeouts.CONNECT_TIMEOUT_S,
        "channel_timeout": timeouts.CHANNEL_TIMEOUT_S,
    }
    if kinds:  # let the host show a key of a kind that we know
        connect["disabled_algorithms"] = {"keys": [k for k in host_key_kinds() if k not in kinds]}
    connection = Connection(
        host.hostname,
        user=host.user,
        port=host.port,
        gateway=gateway,
        connect_timeout=timeouts.CONNECT_TIMEOUT_S,
        connect_kwargs=connect,
        config=Config(lazy=True, overrides={"load_ssh_configs": False}),
    )
    if not gateway and route.is_chosen(host):
        connection.connected = functools.partial(route.connected, host)
    under = host.hostname if host.port == 22 else f"[{host.hostname}]:{host.port}"
    for key in accepted:
        connection.client.get_host_keys().add(under, key.get_name(), key)

    class Strict(paramiko.MissingHostKeyPolicy):
        def missing_host_key(self, client: Any, hostname: str, key: paramiko.PKey) -> None:
            known, bad = known_keys(host, key)
            if key in bad:
                raise ChangedHostKey(f"{host.name}: this host key is marked @revoked in known_hosts; refused")
            if key not in known and not known_without_port(host, key):
                raise UnknownHostKey(host, key, has_authority(host))

    connection.client.set_missing_host_key_policy(Strict())
    return connection
