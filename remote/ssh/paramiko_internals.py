"""Every private name of paramiko that we rely on. (Of Fabric we use none.)

tests/remote/ssh/test_keys.py asserts that each exists with the signature that is relied on.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Any

import paramiko
from paramiko import agent


class Transport(paramiko.Transport):
    """With the host's own reason for a disconnection; paramiko only logs it."""

    goodbye = ""
    """What the host said as it ended the connection; empty when it was cut."""

    def _parse_disconnect(self, m: Any) -> None:
        m.get_int()  # a code, which OpenSSH has the same for all reasons
        self.goodbye = m.get_text()


class AgentAt(paramiko.agent.AgentSSH):
    """The ssh-agent behind a socket; paramiko's own knows that of SSH_AUTH_SOCK alone."""

    def __init__(self, path: str):
        super().__init__()
        conn = socket.socket(socket.AF_UNIX)
        conn.settimeout(10)
        conn.connect(path)
        self._connect(conn)

    def _connect(self, conn: socket.socket) -> None:
        """As paramiko's, which gives up the whole agent for one key that it does not know, or a comment in Latin-1."""
        self._conn = conn
        kind, answer = self._send_message(agent.cSSH2_AGENTC_REQUEST_IDENTITIES)  # type: ignore[attr-defined]  # not in the stubs
        if kind != agent.SSH2_AGENT_IDENTITIES_ANSWER:
            raise paramiko.SSHException("it lists no keys")
        keys = []
        for _ in range(answer.get_int()):
            blob, _comment = answer.get_binary(), answer.get_binary()
            if not blob:
                break
            with contextlib.suppress(ValueError, OverflowError, paramiko.SSHException):
                keys.append(agent.AgentKey(self, blob))
        self._keys = tuple(keys)


def host_key_kinds() -> tuple[str, ...]:
    """The kinds of host keys that paramiko asks a host for, as names of signature algorithms."""
    return paramiko.Transport._preferred_keys  # type: ignore[attr-defined]  # not in the stubs
