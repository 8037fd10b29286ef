"""A live line chart, drawn line by line: ten thousand points a second cost a few per cent of a core.

The view follows the newest point until the user zooms; then it stays where it was put.
"""

from __future__ import annotations

import math
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.geometry import Region, Size
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget

from tui.follow.series import Mark, Series
from tui.widgets.canvas import Canvas, Column, decimate, log_ticks, logarithms, nice_ticks, running_mean, tick_text

LABEL_WIDTH = 8
MEAN_FROM = 60
"""Points in view from which a noisy series is drawn with its mean."""
MEAN_PART = 40
"""The mean reaches this part of the view to either side."""
CHECKPOINT = "▴"
ROOM = 8
"""The room at the right is at most this part of the curve."""


def extent_of(series: list[Series], span: tuple[float, float] | None = None) -> tuple[float, float] | None:
    """First and last x of these lines, `span` included; None without points."""
    ends = [(s.xs[0], s.xs[-1]) for s in series if s.xs]
    ends += [span] if ends and span else []
    return (min(e[0] for e in ends), max(e[1] for e in ends)) if ends else None


def changed_part(y: int, old: Strip, new: Strip) -> Region:
    """The columns of row `y` in which two strips differ."""
    cells = [[(character, style) for text, style, _ in strip for character in text] for strip in (old, new)]
    differ = [x for x, (a, b) in enumerate(zip(*cells)) if a != b] or [0]
    if len(cells[0]) != len(cells[1]):
        return Region(0, y, max(old.cell_length, new.cell_length), 1)
    return Region(differ[0], y, differ[-1] - differ[0] + 1, 1)


class Chart(Widget):
    """Lines over steps. Feed `series`, then call `redraw`; it draws only what changed, when it is visible."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "chart--train",
        "chart--noise",
        "chart--eval",
        "chart--second",
        "chart--third",
        "chart--axis",
        "chart--grid",
        "chart--mark",
        "chart--oom",
        "chart--cursor",
        "chart--checkpoint",
        "chart--empty",
    }

    class Pointed(Message):
        """The mouse points at a step; None: it left."""

        def __init__(self, x: float | None) -> None:
            super().__init__()
            self.x = x

    class Wheel(Message):
        """The wheel zooms about a step."""

        def __init__(self, factor: float, about: float) -> None:
            super().__init__()
            self.factor, self.about = factor, about

    def __init__(self, series: list[Series], *, empty: str = "", id: str | None = None) -> None:
        super().__init__(id=id)
        self.series = series
        self.marks: list[Mark] = []
        self.checkpoints: list[Mark] = []
        """Marked below the curve; their names are in the legend, at the cursor."""
        self.empty = empty
        self.logarithmic = False
        self.live = False
        """Whether more points will come."""
        self.span: tuple[float, float] | None = None
        """Steps that are in view besides its own: those of the charts beside it."""
        self.window: tuple[float, float] | None = None
        self.cursor: float | None = None
        """The step whose values are read."""
        self._strips: list[Strip] = []
        self._drawn_at: Size | None = None
        """The size for which the strips were drawn; None when they are not those of the data."""

    # --- what the user may do ----------------------------------------------------------------------------------------

    def redraw(self) -> None:
        """The data changed: the rows that are other ones now are sent to the terminal."""
        size, old = self.size, self._strips
        if self._drawn_at != size or not size:
            self._drawn_at = None
            self.refresh()
            return
        self._strips = self._draw(size.width, size.height)
        changed = [changed_part(y, a, b) for y, (a, b) in enumerate(zip(old, self._strips)) if a != b]
        if len(old) != len(self._strips):
            self.refresh()
        elif changed:
            self.refresh(*changed)

    def toggle_log(self) -> None:
        """Linear or logarithmic y axis."""
        self.logarithmic = not self.logarithmic
        self.redraw()

    def zoom(self, factor: float, about: float | None = None) -> None:
        """Narrows (factor < 1) or widens the window, about a step that keeps its place, else about the middle; wide
        enough is the whole run again."""
        whole = self.extent()
        if whole is None:
            return
        x0, x1 = self.window or whole
        width = max((x1 - x0) * factor, 2.0)
        if width >= whole[1] - whole[0]:
            self.window = None
        elif about is not None:
            left = about - (about - x0) / ((x1 - x0) or 1.0) * width
            left = max(whole[0], min(left, whole[1] - width))
            self.window = (left, left + width)
        elif self.window is None and factor < 1:  # what one looks at is the newest part
            self.window = (x1 - width, x1)
        else:
            middle = (x0 + x1) / 2
            self.window = (middle - width / 2, middle + width / 2)
        self.redraw()

    def pan(self, share: float) -> None:
        """Moves the window by a share of its width, within the run."""
        whole = self.extent()
        if whole is None or self.window is None:
            return
        x0, x1 = self.window
        shift = max(whole[0] - x0, min((x1 - x0) * share, whole[1] - x1))
        self.window = (x0 + shift, x1 + shift)
        self.redraw()

    def follow(self) -> None:
        """The whole run again, following the newest point."""
        self.window = None
        self.redraw()

    def extent(self) -> tuple[float, float] | None:
        """First and last x of all series; None without points."""
        return extent_of(self.series, self.span)

    def view(self) -> tuple[float, float] | None:
        """The steps at the left and the right edge. While the run goes on there is room at the right, so that a new
        point moves no other."""
        whole = self.window or self.extent()
        if whole and self.live and self.window is None and whole[1] > whole[0]:
            grain = 2.0 ** math.floor(math.log2(whole[1] - whole[0])) / ROOM
            return whole[0], whole[0] + math.ceil((whole[1] - whole[0]) / grain) * grain
        if whole is None or whole[1] > whole[0]:
            return whole
        return whole[0] - 0.5, whole[1] + 0.5

    def step_at(self, column: int) -> float | None:
        """The step that a column of the widget stands for."""
        view, width = self.view(), self.size.width - LABEL_WIDTH
        if view is None or width < 2:
            return None
        share = max(0.0, min(1.0, (column - LABEL_WIDTH) / (width - 1)))
        return view[0] + share * (view[1] - view[0])

    def on_mouse_move(self, event: events.MouseMove) -> None:
        x = self.step_at(event.x)
        if x is not None:
            self.post_message(self.Pointed(x))

    def on_leave(self) -> None:
        self.post_message(self.Pointed(None))

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        self._wheel(0.7, event)

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        self._wheel(1 / 0.7, event)

    def _wheel(self, factor: float, event: events.MouseEvent) -> None:
        about = self.step_at(event.x)
        if about is not None:
            event.stop()
            self.post_message(self.Wheel(factor, about))

    # --- drawing -----------------------------------------------------------------------------------------------------

    def notify_style_update(self) -> None:
        super().notify_style_update()
        self._drawn_at = None

    def render_line(self, y: int) -> Strip:
        if self._drawn_at != self.size:  # also before the Resize event has come
            self._strips, self._drawn_at = self._draw(self.size.width, self.size.height), self.size
        return self._strips[y] if y < len(self._strips) else Strip.blank(self.size.width, self.rich_style)

    def _style(self, component: str) -> Style:
        return self.get_component_rich_style(component)

    def _draw(self, width: int, height: int) -> list[Strip]:
        plot_width, plot_height = width - LABEL_WIDTH, height - 1
        view = self.view()
        if plot_width < 10 or plot_height < 3:
            return []
        if view is None:
            return self._draw_empty(width, height)
        x0, x1 = view
        drawn = [
            (component, columns, series.dots or len(columns) == 1)
            for series in self.series
            for component, columns in self._lines(series, x0, x1, plot_width * 2)
        ]
        drawn.sort(key=lambda line: line[0] != "chart--noise")  # what is smoothed lies on top
        bounds = self._bounds([c for _, columns, _ in drawn for c in columns if 0 <= c.index < plot_width * 2])
        canvas = Canvas(plot_width, plot_height)
        ticks = self._y_ticks(bounds, plot_height)

        def column_of(x: float) -> int:
            return round((x - x0) / (x1 - x0) * (plot_width - 1))

        for row in ticks:
            canvas.horizontal(row, "chart--grid")
        for level, mark in enumerate(m for m in self.marks if x0 <= m.x <= x1):
            canvas.vertical(column_of(mark.x), mark.text, level % min(4, plot_height), mark.component)
        if self.cursor is not None and x0 <= self.cursor <= x1:
            canvas.vertical(column_of(self.cursor), "", 0, "chart--cursor", "│")
        for component, columns, dots in drawn:
            canvas.line(columns, bounds, component, dots)
        for mark in self.checkpoints:
            if x0 <= mark.x <= x1:
                canvas.points.setdefault((plot_height - 1) * plot_width + column_of(mark.x), "chart--checkpoint")
        rows = canvas.strips(self._style, self.rich_style, {"chart--checkpoint": CHECKPOINT})
        axis, blank = self._style("chart--axis"), self.rich_style
        strips = []
        for row, segments in enumerate(rows):
            label = f"{ticks[row]:>{LABEL_WIDTH - 2}} ┤" if row in ticks else " " * (LABEL_WIDTH - 1) + "│"
            strips.append(Strip([Segment(label, axis), *segments], width))
        strips.append(Strip([Segment(self._x_labels(x0, x1, plot_width), axis)], width))
        strips += [Strip.blank(width, blank)] * (height - len(strips))
        return strips

    def _draw_empty(self, width: int, height: int) -> list[Strip]:
        lines = self.empty.splitlines()
        top = max(0, (height - len(lines)) // 2)
        blank = Strip.blank(width, self.rich_style)
        shown = [
            Strip([Segment(f"{line:^{width}}"[:width], self._style("chart--empty"))], width) for line in lines[:height]
        ]
        return [blank] * top + shown + [blank] * (height - top - len(shown))

    def _lines(self, series: Series, x0: float, x1: float, columns: int) -> list[tuple[str, list[Column]]]:
        """What is drawn of a series, by component: the points, and over a noisy one's the mean of those about it."""
        found = decimate(series.xs, series.ys, x0, x1, columns)
        lines = [(series.component, found)]
        if series.noisy and sum(c.count for c in found) >= MEAN_FROM:
            lines = [(series.component, running_mean(found, columns // MEAN_PART))]
            if not series.smooth_only:
                lines.insert(0, ("chart--noise", found))
        return [(component, logarithms(c) if self.logarithmic else c) for component, c in lines]

    @staticmethod
    def _bounds(columns: list[Column]) -> tuple[float, float]:
        if not columns:
            return (0.0, 1.0)
        low, high = min(c.low for c in columns), max(c.high for c in columns)
        margin = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
        return (low - margin, high + margin)

    def _y_ticks(self, bounds: tuple[float, float], rows: int) -> dict[int, str]:
        low, high = bounds
        wanted = max(2, rows // 3)
        if self.logarithmic:
            values = [(math.log10(t), t) for t in log_ticks(10**low, 10**high, wanted) if t > 0]
        else:
            values = [(t, t) for t in nice_ticks(low, high, wanted)]
        ticks: dict[int, str] = {}
        for at, value in sorted(values):
            row = (rows * 4 - 1 - round((at - low) / (high - low) * (rows * 4 - 1))) // 4
            if 0 <= row < rows and row not in ticks and row + 1 not in ticks:
                ticks[row] = tick_text(value)
        return ticks

    @staticmethod
    def _x_labels(x0: float, x1: float, width: int) -> str:
        line = [" "] * (width + LABEL_WIDTH)
        end = -1
        for tick in nice_ticks(x0, x1, max(2, width // 14)):
            if abs(tick - round(tick)) > 1e-6:
                continue
            text = f"{round(tick):,}"
            at = LABEL_WIDTH + round((tick - x0) / (x1 - x0) * (width - 1)) - len(text) // 2
            at = max(LABEL_WIDTH - 1, min(at, len(line) - len(text)))
            if at > end:
                line[at : at + len(text)] = text
                end = at + len(text)
        step = "step"
        if all(c == " " for c in line[: LABEL_WIDTH - 1]):
            line[LABEL_WIDTH - 2 - len(step) : LABEL_WIDTH - 2] = step
        return "".join(line)
