"""A text that changes often, at the price of what really changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from rich.cells import cell_len
from textual.content import Content
from textual.geometry import Region
from textual.widgets import Static

Drawing = Content | Callable[[int], Content]
"""A text, or what draws it for a width in columns."""
LEAST_WIDTH = 10


class Pane(Static):
    """A Static without markup that is laid out anew only when its number of lines may have changed.

    Laying out a screen costs as much as drawing the chart; most figures change once a second and keep their lines.
    What depends on the width is drawn again whenever that changes, so it never stands there at an old one.
    """

    _only: list[Region] | tuple[Region, ...] = ()
    """Lines that a text changes, while it is being replaced."""

    def __init__(
        self, content: Content | str = "", *, id: str | None = None, classes: str | None = None, fixed: bool = False
    ) -> None:
        """`fixed`: its styles give it its height, so that no text lays the screen out anew."""
        super().__init__(content, id=id, classes=classes, markup=False)
        self.fixed = fixed
        self.drawing: Drawing = Content("")
        self.shown: tuple[object, ...] = ()
        self.height_shown: tuple[int, ...] = ()
        self.lines: list[tuple[str, object]] = []

    def show(self, drawing: Drawing) -> None:
        """Replaces the text, when it differs."""
        self.drawing = drawing
        width = max(LEAST_WIDTH, self.size.width)
        content = drawing(width) if callable(drawing) else drawing
        shown = (content.plain, content.spans)
        if shown == self.shown:
            return
        lines: list[tuple[str, object]] = [(line.plain, line.spans) for line in content.split("\n", allow_blank=True)]
        heights = tuple(-(-max(1, cell_len(plain)) // width) for plain, _ in lines)
        wrapped = any(height > 1 for height in heights)  # by words, so that the count above is not sure
        same = not wrapped and heights == self.height_shown and len(lines) == len(self.lines)
        self._only = [
            Region(0, row, width, 1) for row, (line, old) in enumerate(zip(lines, self.lines)) if same and line != old
        ]
        self.update(content, layout=not self.fixed and not same)
        self._only = []
        self.shown, self.height_shown, self.lines = shown, heights, lines

    def refresh(self, *regions: Region, repaint: bool = True, layout: bool = False, recompose: bool = False) -> Self:
        """Of a text with the lines of the last one only those that changed are sent to the terminal."""
        return super().refresh(*(regions or self._only), repaint=repaint, layout=layout, recompose=recompose)

    def on_resize(self) -> None:
        if callable(self.drawing):
            self.show(self.drawing)
