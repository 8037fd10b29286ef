"""The points of a curve, and the marks on it."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field


@dataclass
class Series:
    """One line: points in the order of x."""

    name: str
    component: str
    """The component class that colours it."""
    dots: bool = False
    """Whether each point is marked: for series with few points."""
    noisy: bool = False
    """Whether its running mean is drawn over it: for what jumps from step to step."""
    xs: list[float] = field(default_factory=list)
    ys: list[float] = field(default_factory=list)

    def add(self, x: float, y: float) -> None:
        """Appends a point. An x at or before the last one takes back what came after it: those steps are redone."""
        if self.xs and x <= self.xs[-1]:
            keep = bisect_left(self.xs, x)
            del self.xs[keep:], self.ys[keep:]
        self.xs.append(x)
        self.ys.append(y)

    def last(self) -> float | None:
        """The newest value that is a number."""
        return next((y for y in reversed(self.ys) if y == y), None)


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step: a vertical line with a word."""

    x: float
    text: str
    component: str = "chart--mark"
