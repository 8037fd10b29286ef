"""paramiko's transport, which remembers why the host ended the connection."""

from __future__ import annotations

from typing import Any

import paramiko


class Transport(paramiko.Transport):
    """With the host's own reason for a disconnection; paramiko only logs it."""

    goodbye = ""
    """What the host said as it ended the connection; empty when it was cut."""

    def _parse_disconnect(self, m: Any) -> None:
        m.get_int()  # a code, which OpenSSH has the same for all reasons
        self.goodbye = m.get_text()
