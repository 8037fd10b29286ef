"""A live line chart in braille dots, drawn line by line: ten thousand points a second cost a few per cent of a core.

Each terminal cell holds 2×4 dots. Points are decimated to their minimum and maximum in each dot column, so that a spike
is never lost. NaN is a gap. The view follows the newest point until the user zooms; then it stays where it was put.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip
from textual.widget import Widget

from tui.follow.series import Mark, Series

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Braille bit of a dot, by row (0..3) and column (0..1) in its cell: Unicode chapter 21.1."""
LABEL_WIDTH = 8
MEAN_FROM = 60
"""Points in view from which a noisy series is drawn with its mean."""
MEAN_PART = 40
"""The mean reaches this part of the view to either side."""


@dataclass
class Column:
    """What falls into one dot column."""

    index: int
    low: float
    high: float
    first: float
    last: float
    joined: bool
    """Whether a line leads here from the column before (no gap between)."""
    total: float
    count: int
    """Sum and number of the points."""


def decimate(xs: list[float], ys: list[float], x0: float, x1: float, columns: int) -> list[Column]:
    """The points of [x0, x1] and one neighbour on either side, reduced to one `Column` for each dot column they meet.

    Neighbours get an index outside 0..columns-1, so that lines leave the window at the right slope.
    """
    start = max(0, bisect_left(xs, x0) - 1)
    stop = min(len(xs), bisect_right(xs, x1) + 1)
    scale = (columns - 1) / (x1 - x0) if x1 > x0 else 0.0
    found: list[Column] = []
    joined = False
    while start < stop:
        index = round((xs[start] - x0) * scale)
        end = bisect_left(xs, x0 + (index + 0.5) / scale, start + 1, stop) if scale else stop
        part = ys[start:end]  # slices, min and max run at the speed of C: most columns hold many points
        known = part if sum(part) == sum(part) else [y for y in part if y == y]
        if known:
            joined = joined and part[0] == part[0]
            found.append(Column(index, min(known), max(known), known[0], known[-1], joined, sum(known), len(known)))
        joined = part[-1] == part[-1]
        start = end
    return found


def running_mean(columns: list[Column], reach: int) -> list[Column]:
    """The mean of all points at most `reach` dot columns away, at each column."""
    found: list[Column] = []
    start = stop = count = 0
    total = 0.0
    for column in columns:
        while stop < len(columns) and columns[stop].index <= column.index + reach:
            total, count, stop = total + columns[stop].total, count + columns[stop].count, stop + 1
        while columns[start].index < column.index - reach:
            total, count, start = total - columns[start].total, count - columns[start].count, start + 1
        mean = total / count
        found.append(Column(column.index, mean, mean, mean, mean, column.joined, mean, 1))
    return found


def nice_ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) within [low, high]."""
    if not high > low or wanted < 1:
        return [low]
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    ticks: list[float] = []
    for step in (m * power for m in (10, 5, 2, 1, 0.5, 0.2)):  # the coarsest that gives what is wanted, and at least 2
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if len(ticks) >= 2 and last - first + 1 > wanted + 1:
            break
        ticks = [k * step for k in range(first, last + 1)]
    return ticks


def log_ticks(low: float, high: float, wanted: int) -> list[float]:
    """Ticks for a logarithmic axis over [low, high] > 0: 1-2-5 series, or round values when that gives too few."""
    series = [
        m * 10.0**e
        for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for m in (1, 2, 5)
        if low <= m * 10.0**e <= high
    ]
    if len(series) > 2 * wanted:
        series = [t for t in series if abs(math.log10(t) - round(math.log10(t))) < 1e-9]
    return series if len(series) >= 2 else nice_ticks(low, high, wanted)


def tick_text(value: float) -> str:
    """A tick's label in at most seven characters."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}"


class Chart(Widget):
    """Lines over steps. Feed `series`, then call `redraw`; it draws only what changed, when it is visible."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "chart--train",
        "chart--noise",
        "chart--eval",
        "chart--axis",
        "chart--grid",
        "chart--mark",
        "chart--oom",
        "chart--empty",
    }

    def __init__(self, series: list[Series], *, empty: str = "", id: str | None = None) -> None:
        super().__init__(id=id)
        self.series = series
        self.marks: list[Mark] = []
        self.empty = empty
        self.logarithmic = False
        self.window: tuple[float, float] | None = None
        self._strips: list[Strip] = []

    # --- what the user may do ----------------------------------------------------------------------------------------

    def redraw(self) -> None:
        """The data changed."""
        self._strips = []
        self.refresh()

    def toggle_log(self) -> None:
        """Linear or logarithmic y axis."""
        self.logarithmic = not self.logarithmic
        self.redraw()

    def zoom(self, factor: float) -> None:
        """Narrows (factor < 1) or widens the window about its middle; wide enough is the whole run again."""
        whole = self.extent()
        if whole is None:
            return
        x0, x1 = self.window or whole
        middle, half = (x0 + x1) / 2, max((x1 - x0) * factor, 2.0) / 2
        if self.window is None and factor < 1:  # what one looks at is the newest part
            self.window = (x1 - 2 * half, x1)
        elif 2 * half >= whole[1] - whole[0]:
            self.window = None
        else:
            self.window = (middle - half, middle + half)
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
        ends = [(s.xs[0], s.xs[-1]) for s in self.series if s.xs]
        return (min(e[0] for e in ends), max(e[1] for e in ends)) if ends else None

    # --- drawing -----------------------------------------------------------------------------------------------------

    def on_resize(self) -> None:
        self._strips = []

    def notify_style_update(self) -> None:
        super().notify_style_update()
        self._strips = []

    def render_line(self, y: int) -> Strip:
        if not self._strips:
            self._strips = self._draw(self.size.width, self.size.height)
        return self._strips[y] if y < len(self._strips) else Strip.blank(self.size.width, self.rich_style)

    def _style(self, component: str) -> Style:
        return self.get_component_rich_style(component)

    def _draw(self, width: int, height: int) -> list[Strip]:
        plot_width, plot_height = width - LABEL_WIDTH, height - 1
        whole = self.extent()
        if plot_width < 10 or plot_height < 3:
            return []
        if whole is None:
            return self._draw_empty(width, height)
        x0, x1 = self.window or whole
        if x1 <= x0:
            x0, x1 = x0 - 0.5, x0 + 0.5
        drawn = [
            (component, columns, series.dots or len(columns) == 1)
            for series in self.series
            for component, columns in self._lines(series, x0, x1, plot_width * 2)
        ]
        bounds = self._bounds([c for _, columns, _ in drawn for c in columns if 0 <= c.index < plot_width * 2])
        canvas = Canvas(plot_width, plot_height)
        ticks = self._y_ticks(bounds, plot_height)
        for row in ticks:
            canvas.horizontal(row, "chart--grid")
        for level, mark in enumerate(m for m in self.marks if x0 <= m.x <= x1):
            column = round((mark.x - x0) / (x1 - x0) * (plot_width - 1))
            canvas.vertical(column, mark.text, level % min(4, plot_height), mark.component)
        for component, columns, dots in drawn:
            canvas.line(columns, bounds, component, dots)
        rows = canvas.strips(self._style, self.rich_style)
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
            lines = [("chart--noise", found), (series.component, running_mean(found, columns // MEAN_PART))]
        return [(component, _logarithms(c) if self.logarithmic else c) for component, c in lines]

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


def _logarithms(columns: list[Column]) -> list[Column]:
    kept = []
    for c in columns:
        if c.high <= 0:
            continue
        floor = min(v for v in (c.low, c.first, c.last, c.high) if v > 0)
        low, high, first, last = (math.log10(v if v > 0 else floor) for v in (c.low, c.high, c.first, c.last))
        kept.append(Column(c.index, low, high, first, last, c.joined and c.low > 0, c.total, c.count))
    return kept


class Canvas:
    """A grid of cells with braille dots, lines behind them, and words over them."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.bits = [0] * (width * height)
        self.owner: list[str] = [""] * (width * height)
        self.glyphs: dict[int, tuple[str, str]] = {}
        self.points: dict[int, str] = {}

    def horizontal(self, row: int, component: str) -> None:
        """A faint line across, seen where no dot is."""
        for cell in range(row * self.width, (row + 1) * self.width):
            self.glyphs[cell] = ("┈", component)

    def vertical(self, column: int, text: str, row: int, component: str) -> None:
        """A line from top to bottom with a word beside it in `row`, seen where no dot is."""
        for cell in range(column, self.width * self.height, self.width):
            self.glyphs[cell] = ("┊", component)
        start = column + 1 if column + 1 + len(text) <= self.width else max(0, column - len(text))
        for i, character in enumerate(text[: self.width - start]):
            self.glyphs[row * self.width + start + i] = (character, component)

    def line(self, columns: list[Column], bounds: tuple[float, float], component: str, dots: bool) -> None:
        """One series through its columns; `bounds` are the values at the bottom and the top."""
        low, high = bounds
        rows = self.height * 4
        scale = (rows - 1) / (high - low)

        def row_of(value: float) -> int:
            return max(0, min(rows - 1, rows - 1 - round((value - low) * scale)))

        previous: Column | None = None
        for column in columns:
            if previous is not None and column.joined:
                self._join(previous, column, row_of, component)
            self._stroke(column.index, row_of(column.high), row_of(column.low), component)
            if dots and 0 <= column.index < self.width * 2:
                self.points[(row_of(column.last) // 4) * self.width + column.index // 2] = component
            previous = column

    def _join(self, left: Column, right: Column, row_of, component: str) -> None:
        a, b = row_of(left.last), row_of(right.first)
        span = right.index - left.index
        before = a
        for step in range(max(1, -left.index), span + 1):
            index = left.index + step
            if index >= self.width * 2:
                break
            row = round(a + (b - a) * step / span)
            self._stroke(index, min(before, row), max(before, row), component)
            before = row

    def _stroke(self, column: int, top: int, bottom: int, component: str) -> None:
        if not 0 <= column < self.width * 2:
            return
        x, side = column >> 1, column & 1
        for row in range(top, bottom + 1):
            cell = (row >> 2) * self.width + x
            if self.owner[cell] != component:  # a cell has one colour: the line on top has it for itself
                self.owner[cell], self.bits[cell] = component, 0
            self.bits[cell] |= DOTS[row & 3][side]

    def strips(self, style_of, blank: Style) -> list[list[Segment]]:
        """The rows as segments, neighbours of one style joined."""
        styles = {name: style_of(name) for name in {*self.owner, *(c for _, c in self.glyphs.values())} if name}
        styles.update({name: style_of(name) for name in self.points.values()})
        rows = []
        for row in range(self.height):
            segments: list[Segment] = []
            text: list[str] = []
            current = ""
            for cell in range(row * self.width, (row + 1) * self.width):
                if cell in self.points:
                    character, component = "●", self.points[cell]
                elif self.bits[cell]:
                    character, component = chr(0x2800 + self.bits[cell]), self.owner[cell]
                else:
                    character, component = self.glyphs.get(cell, (" ", ""))
                if component != current and text:
                    segments.append(Segment("".join(text), styles.get(current, blank)))
                    text = []
                current = component
                text.append(character)
            segments.append(Segment("".join(text), styles.get(current, blank)))
            rows.append(segments)
        return rows
