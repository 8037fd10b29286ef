"""A text that changes often, at the price of what really changed."""

from __future__ import annotations

from textual.content import Content
from textual.widgets import Static


class Pane(Static):
    """A Static without markup that is laid out anew only when its number of lines may have changed.

    Laying out a screen costs as much as drawing the chart; most figures change once a second and keep their lines.
    """

    def __init__(self, content: Content | str = "", *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(content, id=id, classes=classes, markup=False)
        self.shown: tuple[object, ...] = ()
        self.height_shown: tuple[int, ...] = ()

    def show(self, content: Content) -> None:
        """Replaces the text, when it differs."""
        shown = (content.plain, content.spans)
        if shown == self.shown:
            return
        width = max(1, self.size.width)
        heights = tuple(-(-max(1, line.cell_length) // width) for line in content.split("\n", allow_blank=True))
        wrapped = any(height > 1 for height in heights)  # by words, so that the count above is not sure
        self.update(content, layout=wrapped or heights != self.height_shown)
        self.shown, self.height_shown = shown, heights
