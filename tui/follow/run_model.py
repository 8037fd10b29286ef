"""What a run's events add up to."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from tui import words
from tui.follow.series import Mark, Series

KEPT = 50
"""Warnings and errors kept in memory."""
MOST_RANKS = 1024


@dataclass
class Progress:
    """How far one phase is. Rate and time left are derived from the last half minute of its events."""

    phase: str
    unit: str = ""
    done: float = 0.0
    total: float | None = None
    first: float | None = None
    """What was done when it began: of an upload, what the host had already."""
    recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=200))
    """(time, done), newest last."""

    def update(self, event: dict[str, Any]) -> None:
        """Takes in one `progress` event."""
        done = event.get("done") or 0
        self.first = done if self.first is None else self.first
        if done < self.done:
            self.recent.clear()
        self.done, self.total, self.unit = done, event.get("total"), event.get("unit", "")
        self.recent.append((event.get("t", 0.0), done))
        while len(self.recent) > 2 and self.recent[-1][0] - self.recent[0][0] > 30:
            self.recent.popleft()

    @property
    def fraction(self) -> float | None:
        """0..1, None while the total is not known."""
        return self.done / self.total if self.total else None

    @property
    def rate(self) -> float | None:
        """Units a second."""
        if len(self.recent) < 2:
            return None
        (t0, d0), (t1, d1) = self.recent[0], self.recent[-1]
        return (d1 - d0) / (t1 - t0) if t1 > t0 and d1 > d0 else None

    @property
    def left_s(self) -> float | None:
        """Seconds left at this rate."""
        return (self.total - self.done) / self.rate if self.total and self.rate else None


@dataclass
class Device:
    """One GPU, or the host when there is none: the newest sample and the peak of the run."""

    sample: dict[str, Any] = field(default_factory=dict)
    peak_bytes: float = 0.0

    @property
    def used_bytes(self) -> float:
        """What the run itself takes: its process where the driver tells, else what its allocator holds."""
        return used_bytes(self.sample)

    @property
    def is_host(self) -> bool:
        return self.sample.get("backend") == "host"


def used_bytes(sample: dict[str, Any]) -> float:
    """The run's memory in a `gpu` event."""
    for key in ("process_bytes", "reserved_bytes", "allocated_bytes", "used_bytes"):
        if sample.get(key) is not None:
            return float(sample[key])
    return 0.0


class RunModel:
    """Events in, what is shown out. Unknown kinds and missing fields are passed over."""

    def __init__(self, info: dict[str, Any] | None = None) -> None:
        self.info = info or {}
        self.phase = ""
        self.phase_text = ""
        self.progress: dict[str, Progress] = {}
        self.shards: dict[str, Progress] = {}
        """Of a merge: each shard that was begun."""
        self.items: dict[str, Progress] = {}
        """Of an upload: each checkpoint folder, and the data."""
        self.plan: dict[str, Any] = {}
        self.sending: dict[str, Any] = {}
        """Of an upload: its newest progress."""
        self.output: deque[str] = deque(maxlen=200)
        """Of a setup: what the programs on the host said last."""
        self.step = 0
        self.total_steps: int | None = None
        self.metric: dict[str, Any] = {}
        self.evaluation: dict[str, Any] = {}
        self.answers: dict[str, Any] = {}
        """Of a training: what its newest answers to held-out samples were worth."""
        self.samples_per_s: float | None = None
        self._speeds: list[float] = [0.0, 0.0]
        """Sum and number of the steps' samples a second."""
        self.train = Series("train", "chart--train", noisy=True)
        self.eval = Series("eval", "chart--eval", dots=True)
        self.learning_rate = Series("learning rate", "chart--train")
        self.grad_norm = Series("grad norm", "chart--train", noisy=True)
        self.accuracy = Series("accuracy", "chart--eval", dots=True)
        self.speed = Series("samples/s", "chart--train", noisy=True)
        self.memory = Series("memory GB", "chart--train")
        """The highest of each step."""
        self.marks: list[Mark] = []
        self.saved: list[Mark] = []
        """Checkpoints, by step."""
        self.devices: dict[str, Device] = {}
        """By rank; "0" is that of a run of one process."""
        self.hosts: list[str] = []
        """Of a run on several machines: that of each rank."""
        self.predicted: dict[str, float] = {}
        """Bytes of each component at the predicted peak, as the run goes now."""
        self.fit = ""
        """How it was fitted to the budget, and why; until the run steps down."""
        self.checkpoints: list[str] = []
        self.preset: str | None = self.info.get("preset")
        self.warnings: list[str] = []
        self.errors: list[str] = []
        """The last KEPT of either; the timeline and the files have the others."""
        self.oom: dict[str, Any] | None = None
        self.oom_survived = True
        """Whether steps were done after the last out-of-memory error."""
        self.finished: dict[str, Any] | None = None
        self.damage = ""
        """The first event that could not be read; the rest was."""
        self.events = 0
        self.newest_t = 0.0
        """Time of the newest event, unix seconds."""
        self.ended = False
        """Whether the job is over, with or without a `finished` event."""
        self.first_step: tuple[int, float] | None = None
        self.last_step: tuple[int, float] | None = None

    # --- settings of the run -----------------------------------------------------------------------------------------

    def option(self, name: str) -> Any:
        """A resolved setting of the run, from its run.json."""
        entry = (self.info.get("options") or {}).get(name)
        return entry.get("value") if isinstance(entry, dict) else entry

    @property
    def command(self) -> str:
        return str(self.info.get("command", ""))

    @property
    def result(self) -> dict[str, Any]:
        """What the job handed back when it ended."""
        return (self.finished or {}).get("result") or {}

    # --- derived -----------------------------------------------------------------------------------------------------

    @property
    def current(self) -> Progress | None:
        """The progress of the current phase; of an ended job, that of the last phase that had any."""
        last = list(self.progress.values())[-1] if self.progress and self.finished else None
        return self.progress.get(self.phase) or last

    @property
    def left_s(self) -> float | None:
        """Seconds left: by the pace of the optimiser steps while some are to come, else by the phase's progress."""
        more = self.total_steps - self.step if self.total_steps else 0
        if more > 0 and self.first_step and self.last_step and self.last_step[0] > self.first_step[0]:
            pace = (self.last_step[1] - self.first_step[1]) / (self.last_step[0] - self.first_step[0])
            return _still_left(more * pace, self.last_step[1])
        current = self.current
        return _still_left(current.left_s, current.recent[-1][0]) if current and current.recent else None

    @property
    def elapsed_s(self) -> float | None:
        """Seconds since the job began, or that it took; a job that died took until its last event."""
        began = self.info.get("started")
        if not began:
            return None
        end = self.finished.get("t", began) if self.finished else self.newest_t if self.ended else time.time()
        return max(0.0, end - began)

    @property
    def mean_samples_per_s(self) -> float | None:
        """Of the whole run: as its result says, else the mean of its steps."""
        said = self.result.get("samples_per_s")
        if isinstance(said, (int, float)):
            return float(said)
        return self._speeds[0] / self._speeds[1] if self._speeds[1] else None

    @property
    def rank_waits(self) -> list[float]:
        """Of each rank the share of the last step that it waited for the slowest one, 0..1; [] for one process."""
        waits = self.metric.get("rank_wait")
        return [_number(wait) for wait in waits] if isinstance(waits, list) else []

    def best_eval(self) -> tuple[int, float] | None:
        """(step, loss) of the lowest evaluation loss."""
        known = [(y, x) for x, y in zip(self.eval.xs, self.eval.ys) if y == y]
        return (round(min(known)[1]), min(known)[0]) if known else None

    @property
    def way_on(self) -> tuple[str, list[str]] | None:
        """What an out-of-memory error that ended the run proposes: in words, and as arguments."""
        oom = self.oom or {}
        settings, preset = oom.get("next_settings"), oom.get("next_preset")
        if self.oom_survived or not settings:
            return None
        named = ", ".join(f"{name} {words.value(value)}" for name, value in settings.items())
        text = f"as in preset {preset}: {named}" if preset else f"with {named}"
        return text, [f"--{name}={words.value(value)}" for name, value in settings.items()]

    # --- events ------------------------------------------------------------------------------------------------------

    def feed(self, events: list[dict[str, Any]]) -> None:
        """Takes in new events, in order."""
        for event in events:
            self.events += 1
            self.newest_t = max(self.newest_t, event.get("t") or 0.0)
            handler = getattr(self, f"_on_{event['kind']}", None)
            if handler:
                try:
                    handler(event)
                except (TypeError, ValueError, AttributeError, KeyError) as error:  # as another version may write it
                    self.damage = self.damage or f"an event {event['kind']!r} cannot be read: {error}"

    def feed_earlier(self, events: list[dict[str, Any]]) -> None:
        """What the run that this one goes on from said of its steps: the curve is one, the pace begins anew."""
        self.feed(events)
        self.first_step = self.last_step = self.samples_per_s = None

    def _on_phase(self, event: dict[str, Any]) -> None:
        self.phase, self.phase_text = str(event.get("name", "")), str(event.get("text", ""))
        self.predicted = event.get("predicted") or self.predicted
        self.fit = str(event.get("fit") or self.fit)
        if self.phase == "upload":
            item = self.phase_text.rpartition(": ")[0]
            self.items[item] = Progress(item)

    def _on_plan(self, event: dict[str, Any]) -> None:
        self.plan = event

    def _on_output(self, event: dict[str, Any]) -> None:
        self.output.append(str(event.get("text", "")))

    def _on_progress(self, event: dict[str, Any]) -> None:
        phase = str(event.get("phase", ""))
        self.progress.setdefault(phase, Progress(phase)).update(event)
        if phase == "upload" and self.items:
            self.sending = event
            self.items[list(self.items)[-1]].update(event)
        shard = event.get("shard")
        if shard:
            part = {**event, "done": event.get("shard_done"), "total": event.get("shard_total")}
            self.shards.setdefault(shard, Progress(str(shard))).update(part)

    def _on_shard(self, event: dict[str, Any]) -> None:
        shard, size = str(event.get("file", "")), event.get("bytes")
        whole = {"t": event.get("t", 0.0), "done": size, "total": size, "unit": "bytes"}
        self.shards.setdefault(shard, Progress(shard)).update(whole)

    def _on_metric(self, event: dict[str, Any]) -> None:
        if "step" not in event:  # it was damaged: at step 0 it would take back the whole curve
            return
        step = int(event["step"])
        self.oom_survived = True
        if step < self.step:  # resumed, or redone after an out-of-memory error
            self.first_step = None
        self.step = step
        self.metric.update({k: v for k, v in event.items() if v is not None})
        self.total_steps = event.get("total_steps") or self.total_steps
        if event.get("samples_per_s"):
            self.samples_per_s = float(event["samples_per_s"])
            self.speed.add(step, self.samples_per_s)
            self._speeds = [self._speeds[0] + self.samples_per_s, self._speeds[1] + 1]
        self.first_step = self.first_step or (step, event.get("t", 0.0))
        self.last_step = (step, event.get("t", 0.0))
        if "loss" in event:
            self.train.add(step, _number(event["loss"]))
        for name, series in (("learning_rate", self.learning_rate), ("grad_norm", self.grad_norm)):
            if name in event:  # null: it was no number, which is a gap
                series.add(step, _number(event[name]))

    def _on_eval(self, event: dict[str, Any]) -> None:
        self.evaluation = event
        if "step" not in event:
            return
        if "eval_loss" in event:
            self.eval.add(int(event["step"]), _number(event["eval_loss"]))
        named = next((name for name in event if name.endswith("accuracy")), None)
        if named:
            self.accuracy.add(int(event["step"]), _number(event[named]))

    def _on_answers(self, event: dict[str, Any]) -> None:
        """Types whose answers have become all alike since the last time are marked on the curve."""
        collapsed = [str(kind) for kind in event.get("collapsed_types") or []]
        if self.answers and set(collapsed) - set(self.answers["collapsed_types"]):
            self.marks.append(Mark(int(event.get("step") or self.step), "collapsed", "chart--oom"))
        self.answers = {**event, "collapsed_types": collapsed}

    def _on_gpu(self, event: dict[str, Any]) -> None:
        rank = int(event.get("rank") or 0)
        if not 0 <= rank < MOST_RANKS:
            return
        device = self.devices.setdefault(str(rank), Device())
        device.sample = event
        device.peak_bytes = max(device.peak_bytes, used_bytes(event), float(event.get("peak_bytes") or 0))
        if self.step:
            self.memory.highest(self.step, used_bytes(event) / 1e9)

    def _on_ranks(self, event: dict[str, Any]) -> None:
        self.hosts = [str(host) for host in event.get("hosts") or []][:MOST_RANKS]

    def _on_checkpoint(self, event: dict[str, Any]) -> None:
        path = str(event.get("path", ""))
        self.checkpoints.append(path)
        self.saved.append(Mark(int(event.get("step") or self.step), path.rstrip("/").rpartition("/")[2]))

    def _on_retreat(self, event: dict[str, Any]) -> None:
        self.predicted, self.fit = event.get("predicted") or {}, ""
        named = ", ".join(f"{name} {words.value(value)}" for name, value in (event.get("settings") or {}).items())
        self.marks.append(Mark(int(event.get("step") or self.step), f"step down: {named}" if named else "step down"))

    def _on_preset(self, event: dict[str, Any]) -> None:
        self.preset = event.get("name")
        self.predicted, self.fit = event.get("predicted") or {}, ""
        if self.step:
            self.marks.append(Mark(self.step, str(event.get("name", "preset"))))

    def _on_oom(self, event: dict[str, Any]) -> None:
        self.oom, self.oom_survived = event, False
        self.marks.append(Mark(int(event.get("step") or self.step), "OOM", "chart--oom"))

    def _on_warning(self, event: dict[str, Any]) -> None:
        self.warnings = [*self.warnings[1 - KEPT :], str(event.get("text", ""))]

    def _on_error(self, event: dict[str, Any]) -> None:
        self.errors = [*self.errors[1 - KEPT :], str(event.get("text", ""))]

    def _on_finished(self, event: dict[str, Any]) -> None:
        self.finished = event


def _still_left(seconds: float | None, since: float) -> float | None:
    """What is left now of an estimate made at `since`; None when its time is up and the work is not done."""
    left = None if seconds is None else seconds - max(0.0, time.time() - since)
    return left if left is not None and left > 0 else None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")
