"""How long the connection waits, and for what."""

from __future__ import annotations

CONNECT_TIMEOUT_S = 10
CHANNEL_TIMEOUT_S = 8
KEEPALIVE_S = 5
TCP_USER_TIMEOUT_MS = 15_000  # unacknowledged data ends a dead link after this
LOGIN_S = 60.0  # for the login shell there to start the agent; hosts.toml: login_timeout_s
SILENCE_S = 12.0  # the agent speaks every 2 s; longer silence is a lost connection
