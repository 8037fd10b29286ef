"""What a run's events say, gathered: the panel draws this and remembers nothing else."""

from __future__ import annotations

import asyncio
import time

from tui.follow.run_model import RunModel
from tui.follow.timeline import Timeline
from tui.targets.target import ACTIVE, RunUpdate, Target
from tui.targets.threads import in_thread

SILENT_S = 60.0
"""A running job samples its memory every second: without an event or log line for so long it hangs or is stopped."""
LOG_LINES = 5000  # kept in memory; the file has all of them


class Follower:
    """One run of one target, followed from its first event. `poll` reads in a thread; the rest is plain data."""

    def __init__(self, target: Target, run_id: str) -> None:
        self.target, self.run_id = target, run_id
        self.feed = target.feed(run_id)
        self.model = RunModel()
        self.state = "starting"
        self.problem = ""
        """Why the run cannot be followed at the moment."""
        self.damage = ""
        """What could not be read of its files; the rest was."""
        self.timeline = Timeline()
        self.log: list[str] = []
        """The end of the log, as far as it was read."""
        self.looked = False
        """Whether it was read at all."""
        self.version = 0
        """Grows with everything that is new."""
        self._newest_line = 0.0
        self._reading: asyncio.Task[RunUpdate] | None = None

    @property
    def active(self) -> bool:
        """Whether the job may still say something."""
        return self.state in ACTIVE

    @property
    def recording(self) -> bool:
        """Whether it is no run of this workspace but a recording that is played."""
        return bool(self.model.info.get("recording"))

    @property
    def silent_s(self) -> float | None:
        """Seconds without a word from a job that should be running, once they are SILENT_S; else None."""
        newest = max(self.model.newest_t, self._newest_line)
        silence = time.time() - newest
        return silence if self.state == "running" and newest and silence >= SILENT_S else None

    async def poll(self) -> list[str] | None:
        """Reads what is new and returns the new log lines; None when nothing at all changed."""
        before, lines = self._told(), []
        while (update := await self._read()) is not None:
            lines += self._take_in(update)
            if not update.more:
                break
        if update is None:
            return None
        changed = bool(lines) or self._told() != before or not self.looked
        self.looked = True
        self.version += changed
        return lines if changed else None

    async def _read(self) -> RunUpdate | None:
        """One look at the run, in a thread; None when another caller has taken in what it found."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(in_thread(self.feed.read))
        reading = self._reading
        await asyncio.wait({reading})  # who polls may be cancelled by the next second's look; what was read is not lost
        if self._reading is not reading:
            return None
        self._reading = None
        return reading.result()

    def _take_in(self, update: RunUpdate) -> list[str]:
        """Adds what one look found to the model, the timeline and the log; the new log lines."""
        self.model.info = update.info or self.model.info
        self.model.preset = self.model.preset or self.model.info.get("preset")
        if update.earlier:
            self.model.feed_earlier(update.earlier)
        self.model.feed(update.events)
        self.state, self.problem = update.state, update.problem
        self.damage = update.damage or self.model.damage or self.damage
        self.model.ended = not self.active
        if update.lines and self.log:  # the first lines may be old
            self._newest_line = time.time()
        try:
            began = self.model.info.get("started") or 0.0
            self.timeline.add(update.events, update.lines, time.time(), began, update.more)
        except (TypeError, ValueError, AttributeError) as error:  # as another version may write it
            self.damage = self.damage or f"an event cannot be read: {error}"
        self.log += update.lines
        del self.log[:-LOG_LINES]
        return update.lines

    def _told(self) -> tuple[object, ...]:
        return (self.state, self.problem, self.damage, self.model.events)
