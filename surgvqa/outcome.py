"""What a command returns to its caller: the command line, the demo or a test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Outcome:
    """`data` is printed with --json, `show` prints the same for people, and `ok` decides the exit code."""

    data: dict[str, Any]
    ok: bool = True
    show: Callable[[Any], None] | None = None
    """Called with a rich Console on stdout."""
