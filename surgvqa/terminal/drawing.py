"""Bars, and consoles that are safe for untrusted text."""

from __future__ import annotations

from typing import IO

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment
from rich.text import Text

from surgvqa.untrusted import printable


def plain(value: object) -> Text:
    """Untrusted text, shown literally: without markup or control characters."""
    return Text(printable(str(value)))


def choice_line(text: str, saves_gb: float) -> str:
    """A line with a choice and the GB (1e9 bytes) that it saves or adds at the peak (memory.choices)."""
    return f"  {abs(saves_gb):5.1f} GB {'less' if saves_gb >= 0 else 'more'}: {text}"


def bar(fraction: float, width: int = 30, alarm: bool = True) -> Text:
    """A bar in eighths of a cell; with `alarm` it turns yellow from 85 % and red from 100 %. Above 100 % it is full."""
    eighths = round(min(max(fraction, 0.0), 1.0) * width * 8)
    full, rest = divmod(eighths, 8)
    colour = "red" if alarm and fraction > 1 else "yellow" if alarm and fraction > 0.85 else "green"
    filled = "█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")
    return Text.assemble((filled, colour), ("─" * (width - len(filled)), "dim"))


class _OnlyText(RenderHook):
    """Escapes all control characters in text, but keeps styles and rich's own cursor movements."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Printable(renderable) for renderable in renderables]


class _Printable:
    def __init__(self, renderable: ConsoleRenderable):
        self.renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text, style, control in console.render(self.renderable, options):
            yield Segment(text if control else printable(text), style, control)


def console_on(stream: IO[str] | None = None, markup: bool = False) -> Console:
    """A console on `stream` (default: stdout) on which no text can control the terminal."""
    console = Console(file=stream, highlight=False, markup=markup, emoji=False)
    console.push_render_hook(_OnlyText())
    return console


def terminal() -> Console:
    """A console on stdout that shows text literally: no markup, no emoji codes, no escape sequences."""
    return console_on()
