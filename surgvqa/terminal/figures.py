"""Formats figures for people."""

from __future__ import annotations

from rich.filesize import decimal as human_bytes


def human_seconds(seconds: float) -> str:
    """3 s, 4 min 05 s, 2 h 10 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def amount(done: float, unit: str) -> str:
    """A progress figure with its unit."""
    return human_bytes(int(done)) if unit == "bytes" else f"{done:,.0f}"


def counted(number: int, noun: str) -> str:
    """1 shard, 2 shards."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
