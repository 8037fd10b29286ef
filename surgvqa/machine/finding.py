"""What the doctor finds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line. `status`: ok, info (nothing to mend), warn (works, but could be better), bad (does not work)."""

    name: str
    status: str
    text: str
    mend: str = ""
