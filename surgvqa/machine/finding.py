"""A finding of the doctor."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line. `status` is ok, info (nothing to repair), warn (works, but could be better) or bad (does not work)."""

    name: str
    status: str
    text: str
    mend: str = ""
