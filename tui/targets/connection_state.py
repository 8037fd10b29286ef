"""The state of the connection, as the panel shows it."""

from __future__ import annotations

from dataclasses import dataclass

from remote.ssh.host_keys import UnknownHostKey
from surgvqa.errors import SurgvqaError


class Detached(SurgvqaError):
    """Whoever asked does not want the answer any more, or the link was ended."""


@dataclass(frozen=True)
class ConnectionState:
    """How it stands with a connection."""

    kind: str
    """connecting, connected, unreachable, unknown key or refused."""
    text: str = ""
    """Why, in one line."""
    since: float = 0.0
    """When the host was last reached or first sought, unix seconds; of `unreachable`."""
    key: UnknownHostKey | None = None
