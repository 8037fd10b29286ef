"""What happens to runs that one should be told, on whichever screen one is, or away."""

from __future__ import annotations

from dataclasses import dataclass

from tui import words
from tui.follow.follower import Follower

KINDS = {"finished": "success", "failed": "error", "died": "error", "stopped": "warning"}
MEANS = {"finished": "finished", "failed": "failed", "died": "its process ended without a message (killed?)",
         "stopped": "stopped"}  # fmt: skip


@dataclass(frozen=True)
class RunNotice:
    """Something new about a run, to be shown."""

    text: str
    kind: str
    """success, warning or error."""


def name_of(follower: Follower) -> str:
    """What the user calls the run."""
    return str(follower.model.option("run_name") or follower.run_id)


def headline(follower: Follower) -> str:
    """`62 % · loss 0.41 · 12 min 00 s left`: a run in a terminal's title."""
    model = follower.model
    share = model.step / model.total_steps if model.total_steps else model.current.fraction if model.current else None
    loss = model.train.last()
    parts = ["" if share is None else f"{100 * share:.0f} %", "" if loss is None else f"loss {loss:.3g}"]
    if follower.silent_s is not None:
        parts.append("silent")
    elif model.left_s is not None:
        parts.append(words.seconds(model.left_s))
    return " · ".join(part for part in parts if part) or f"{model.command} {follower.state}"


class RunNotices:
    """Finds what is new about each run. Nothing is new at the first look."""

    def __init__(self, money: float | None = None) -> None:
        """`money`: a run that has cost so much is told."""
        self.money = money
        self._told: dict[tuple[str, str], set[str]] = {}

    def look(self, follower: Follower) -> list[RunNotice]:
        """What is new of a run since the last look."""
        if not follower.looked:
            return []
        run = (follower.target.name, follower.run_id)
        now = self._conditions(follower)
        told = self._told.get(run)
        self._told[run] = set(now) if told is None else (told | set(now)) - ({"silent"} - set(now))
        return [] if told is None else [notice for key, notice in now.items() if key not in told]

    def _conditions(self, follower: Follower) -> dict[str, RunNotice]:
        model, name = follower.model, name_of(follower)
        found: dict[str, RunNotice] = {}
        if model.oom:
            step = "" if model.oom.get("step") is None else f" at step {model.oom['step']}"
            found[f"oom {model.oom.get('t')}"] = RunNotice(f"{name}: out of GPU memory{step}", "warning")
        if follower.silent_s is not None:
            found["silent"] = RunNotice(f"{name} is silent: no news for {words.seconds(follower.silent_s)}", "warning")
        if model.train.ys and model.train.ys[-1] != model.train.ys[-1]:
            found["not finite"] = RunNotice(f"{name}: the loss is not finite since step {model.step:,}", "error")
        if follower.state in KINDS:
            why = f": {model.errors[-1]}" if follower.state == "failed" and model.errors else ""
            found[follower.state] = RunNotice(f"{name}: {MEANS[follower.state]}{why}", KINDS[follower.state])
        collapsed = model.result.get("collapsed_types")
        if isinstance(collapsed, list) and collapsed:
            types = ", ".join(map(str, collapsed[:5]))
            found["collapsed"] = RunNotice(f"{name}: almost always the same answer in {types}", "warning")
        price, seconds = follower.target.price_per_hour, model.elapsed_s
        if self.money and price and seconds and price * seconds / 3600 >= self.money:
            found["money"] = RunNotice(f"{name} has cost {words.price(price * seconds / 3600)}", "warning")
        return found
