"""paramiko's transport, which remembers why the host ended the connection, and its agent: all private names."""

from __future__ import annotations

import socket
from typing import Any

import paramiko


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
        self._connect(conn)  # type: ignore[attr-defined]  # not in the stubs
