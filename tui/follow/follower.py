"""What a run's events say, gathered: the panel draws this and remembers nothing else."""

from __future__ import annotations

import asyncio
import time

from tui.follow.run_model import RunModel
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
        self.log: list[str] = []
        """The end of the log, as far as it was read."""
        self._newest_line = 0.0
        self._reading: asyncio.Task[RunUpdate] | None = None

    @property
    def active(self) -> bool:
        """Whether the job may still say something."""
        return self.state in ACTIVE

    @property
    def silent_s(self) -> float | None:
        """Seconds without a word from a job that should be running, once they are SILENT_S; else None."""
        newest = max(self.model.newest_t, self._newest_line)
        silence = time.time() - newest
        return silence if self.state == "running" and newest and silence >= SILENT_S else None

    async def poll(self) -> list[str] | None:
        """Reads what is new and returns the new log lines; None when nothing at all changed."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(in_thread(self.feed.read))
        reading = self._reading
        await asyncio.wait({reading})  # who polls may be cancelled by the next second's look; what was read is not lost
        if self._reading is not reading:  # another look has taken it in
            return None
        self._reading = None
        news = reading.result()
        before = self._told()
        self.model.info = news.info or self.model.info
        self.model.preset = self.model.preset or self.model.info.get("preset")
        if news.earlier:
            self.model.feed_earlier(news.earlier)
        self.model.feed(news.events)
        self.state, self.problem = news.state, news.problem
        self.damage = news.damage or self.model.damage or self.damage
        self.model.ended = not self.active
        if news.lines and self.log:  # the first lines may be old
            self._newest_line = time.time()
        self.log += news.lines
        del self.log[:-LOG_LINES]
        return news.lines if news.lines or self._told() != before else None

    def _told(self) -> tuple[object, ...]:
        return (self.state, self.problem, self.damage, self.model.events)
