"""A run's cost so far, expected total cost and remaining time on a host that is paid by the hour."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from remote.cloud.ledger import Ledger, Record
from remote.ssh.hosts import HostEntry
from surgvqa.errors import SurgvqaError
from surgvqa.terminal.figures import human_seconds
from surgvqa.untrusted import is_kind


def record_of(name: str, entry: HostEntry) -> Record | None:
    """The open record of a host that was rented from here; None for any other host, and without a readable ledger."""
    try:
        record = Ledger().read(name) if entry.host_key_alias else None
    except (SurgvqaError, OSError):
        return None
    return record if record and record.open and record.label == entry.host_key_alias else None


def points_above_majority(scores: Mapping[str, Any]) -> float | None:
    """Label accuracy less the majority accuracy, in points; None if one of them is not known.

    Keyword accuracy stands in where there is no label accuracy.
    """
    known = {name: value for name, value in scores.items() if is_kind(value, "a number")}
    reached = known.get("label_accuracy", known.get("keyword_accuracy"))
    majority = known.get("majority_accuracy")
    return None if reached is None or majority is None else 100 * float(reached - majority)


def cost_per_point(cost: float, scores: Mapping[str, Any]) -> float | None:
    """`cost` divided by `points_above_majority`; None unless both are positive."""
    points = points_above_majority(scores)
    return round(cost / points, 4) if points and points > 0 and cost > 0 else None


class Meter:
    """Reads the events of one run as they come. US dollars, by our clock and the host's: the provider's bill counts."""

    def __init__(self, price_per_hour: float | None, since: float | None = None):
        """`since`: when the host was rented (Unix s); without it the run alone is counted, from its first event."""
        self.price_per_hour, self._since = price_per_hour or 0.0, since
        self._first: tuple[float, float] | None = None
        self._last: tuple[float, float, float] | None = None

    def see(self, event: dict[str, Any]) -> None:
        """An event of the run; those without a time or steps are passed over."""
        at, step, total = event.get("t"), event.get("step"), event.get("total_steps")
        if isinstance(at, (int, float)) and self._since is None:
            self._since = at
        if event.get("kind") == "metric" and all(isinstance(one, (int, float)) for one in (at, step, total)):
            assert at is not None and step is not None and total is not None
            self._first = self._first or (at, step)
            self._last = (at, step, total)

    def left_s(self, now: float) -> float | None:
        """Seconds until the run's last step, at the mean pace; None before two steps."""
        if not self._first or not self._last or self._last[1] <= self._first[1]:
            return None
        at, step, total = self._last
        return max(0.0, (at - self._first[0]) / (step - self._first[1]) * (total - step) - max(0.0, now - at))

    def figures(self, now: float) -> dict[str, float | None]:
        """cost, cost_at_end (None: not known), left_s, price_per_hour."""
        cost, left = max(0.0, now - (self._since or now)) / 3600 * self.price_per_hour, self.left_s(now)
        end = None if left is None else round(cost + left / 3600 * self.price_per_hour, 2)
        return {
            "cost": round(cost, 2),
            "cost_at_end": end,
            "left_s": None if left is None else round(left, 1),
            "price_per_hour": self.price_per_hour,
        }

    def line(self, now: float) -> str:
        """`$0.52 so far, $1.40 at its end, 1 h 10 min left`."""
        found = self.figures(now)
        end = "" if found["cost_at_end"] is None else f", ${found['cost_at_end']:.2f} at its end"
        left = "" if found["left_s"] is None else f", {human_seconds(found['left_s'])} left"
        return f"${found['cost']:.2f} so far{end}{left}"
