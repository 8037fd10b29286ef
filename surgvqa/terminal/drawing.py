"""Bars, and the terminal that they are drawn on."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from surgvqa.untrusted import printable


def plain(value: object) -> Text:
    """Text that may come from outside, as it is: no markup, and nothing that a terminal would obey."""
    return Text(printable(str(value)))


def bought(text: str, saves_gb: float) -> str:
    """One line: a choice and how many GB (1e9 bytes) it saves or adds at the peak (memory.choices)."""
    return f"  {abs(saves_gb):5.1f} GB {'less' if saves_gb >= 0 else 'more'}: {text}"


def bar(fraction: float, width: int = 30, alarm: bool = True) -> Text:
    """A bar in eighths of a cell; with `alarm` it turns yellow from 85 % and red from 100 %. Above 100 % it is full."""
    eighths = round(min(max(fraction, 0.0), 1.0) * width * 8)
    full, rest = divmod(eighths, 8)
    colour = "red" if alarm and fraction > 1 else "yellow" if alarm and fraction > 0.85 else "green"
    filled = "█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")
    return Text.assemble((filled, colour), ("─" * (width - len(filled)), "dim"))


def terminal() -> Console:
    """A console on stdout that shows text literally: no markup, no emoji codes."""
    return Console(highlight=False, markup=False, emoji=False)
