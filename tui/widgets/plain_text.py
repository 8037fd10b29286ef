"""The last door before the terminal: what a terminal would obey is never drawn, and no colour where none is wanted."""

from __future__ import annotations

from rich.segment import Segment
from textual.color import Color
from textual.filter import LineFilter

from surgvqa.untrusted import OBEYED


class PlainText(LineFilter):
    """Drops control characters, escape sequences' first byte and changes of direction from everything that is drawn.

    They have no width, so the layout stays. Text from outside is also cleaned where it is read; this holds for what
    was forgotten there.
    """

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        return [
            Segment(OBEYED.sub("", text), style) if not control and OBEYED.search(text) else segment
            for segment in segments
            for text, style, control in (segment,)
        ]


class WithoutColor(LineFilter):
    """NO_COLOR (no-color.org): no colour at all. Bold, dim and reverse stay."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        return [Segment(text, style and style.without_color, control) for text, style, control in segments]
