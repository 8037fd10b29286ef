"""What a chart is drawn with: points reduced to dot columns, ticks, and a canvas of braille dots.

Each terminal cell holds 2×4 dots. Points are decimated to their minimum and maximum in each dot column, so that a spike
is never lost. NaN is a gap.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.segment import Segment
from rich.style import Style

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Braille bit of a dot, by row (0..3) and column (0..1) in its cell: Unicode chapter 21.1."""


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


def decimate(xs: Sequence[float], ys: Sequence[float], x0: float, x1: float, columns: int) -> list[Column]:
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


def logarithms(columns: list[Column]) -> list[Column]:
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

    def vertical(self, column: int, text: str, row: int, component: str, glyph: str = "┊") -> None:
        """A line from top to bottom with a word beside it in `row`, seen where no dot is."""
        for cell in range(column, self.width * self.height, self.width):
            self.glyphs[cell] = (glyph, component)
        start = column + 1 if column + 1 + len(text) <= self.width else max(0, column - len(text))
        for i, character in enumerate(text[: self.width - start]):
            self.glyphs[row * self.width + start + i] = (character, component)

    def line(self, columns: list[Column], bounds: tuple[float, float], component: str, dots: bool) -> None:
        """One series through its columns, or its points alone; `bounds` are the values at the bottom and the top."""
        low, high = bounds
        rows = self.height * 4
        scale = (rows - 1) / (high - low)

        def row_of(value: float) -> int:
            return max(0, min(rows - 1, rows - 1 - round((value - low) * scale)))

        previous: Column | None = None
        for column in columns:
            if dots:
                if 0 <= column.index < self.width * 2:
                    self.points[(row_of(column.last) // 4) * self.width + column.index // 2] = component
                continue
            if previous is not None and column.joined:
                self._join(previous, column, row_of, component)
            self._stroke(column.index, row_of(column.high), row_of(column.low), component)
            previous = column

    def _join(self, left: Column, right: Column, row_of: Callable[[float], int], component: str) -> None:
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

    def strips(
        self, style_of: Callable[[str], Style], blank: Style, signs: dict[str, str] | None = None
    ) -> list[list[Segment]]:
        """The rows as segments, neighbours of one style joined; `signs`: points that are no dot, by component."""
        styles = {name: style_of(name) for name in {*self.owner, *(c for _, c in self.glyphs.values())} if name}
        styles.update({name: style_of(name) for name in self.points.values()})
        rows = []
        for row in range(self.height):
            segments: list[Segment] = []
            text: list[str] = []
            current = ""
            for cell in range(row * self.width, (row + 1) * self.width):
                if cell in self.points:
                    component = self.points[cell]
                    character = (signs or {}).get(component, "●")
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
