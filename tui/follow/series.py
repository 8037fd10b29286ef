"""The points of a curve, and the marks on it."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from dataclasses import dataclass, field


@dataclass
class Series:
    """One line: points in the order of x."""

    name: str
    component: str
    """The component class that colours it."""
    dots: bool = False
    """Whether only its points are drawn: for series with few points."""
    noisy: bool = False
    """Whether its running mean is drawn over it: for what jumps from step to step."""
    smooth_only: bool = False
    """Whether the mean alone is drawn: where several runs share a chart."""
    xs: array[float] = field(default_factory=lambda: array("d"))
    ys: array[float] = field(default_factory=lambda: array("d"))

    def add(self, x: float, y: float) -> None:
        """Appends a point. An x at or before the last one takes back what came after it: those steps are redone."""
        if self.xs and x <= self.xs[-1]:
            keep = bisect_left(self.xs, x)
            del self.xs[keep:], self.ys[keep:]
        self.xs.append(x)
        self.ys.append(y)

    def highest(self, x: float, y: float) -> None:
        """As `add`, but of the values at one x the highest is kept."""
        if self.xs and self.xs[-1] == x and self.ys[-1] == self.ys[-1]:
            self.ys[-1] = max(self.ys[-1], y)
        else:
            self.add(x, y)

    def near(self, x: float) -> tuple[float, float] | None:
        """The point whose x is nearest; None without points."""
        if not self.xs:
            return None
        right = min(bisect_left(self.xs, x), len(self.xs) - 1)
        left = max(0, right - 1)
        index = left if abs(self.xs[left] - x) <= abs(self.xs[right] - x) else right
        return self.xs[index], self.ys[index]

    def last(self) -> float | None:
        """The newest value that is a number."""
        return next((y for y in reversed(self.ys) if y == y), None)


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step: a vertical line with a word."""

    x: float
    text: str
    component: str = "chart--mark"
