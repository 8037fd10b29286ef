"""A run on a host, as the panel follows it."""

from __future__ import annotations

import logging
import threading
from typing import Any

from remote.jobs.run_events import RunEvents
from remote.ssh.patience import pause_s
from surgvqa.errors import SurgvqaError
from tui.targets.connection_state import Detached
from tui.targets.link import Link, Port
from tui.targets.run_files import LOG_TAIL_BYTES, LogLines, curve_events, resumed_from
from tui.targets.target import ACTIVE, RunUpdate

log = logging.getLogger(__name__)


class HostFeed:
    """remote's RunEvents of one run, in a thread of its own; `read` hands on what it has heard and never waits."""

    def __init__(self, link: Link, run_id: str) -> None:
        self.link, self.run_id = link, run_id
        self._port = Port(link)
        self._lock = threading.Lock()
        self._info: dict[str, Any] = {}
        self._state = next((r.state for r in link.listed or () if r.id == run_id), "starting")
        self._earlier: list[dict[str, Any]] = []
        self._events: list[dict[str, Any]] = []
        self._lines: list[str] = []
        self._problem = ""
        self._learned = False
        """Whether run.json was complete; what the runs before this one recorded is read once, with it."""
        self._offsets: dict[str, int] = {}
        """Bytes of events and log that were read: following goes on there after an error."""
        threading.Thread(target=self._run, name=f"follow {run_id}", daemon=True).start()

    def read(self) -> RunUpdate:
        with self._lock:
            news = RunUpdate(self._info, self._state, self._earlier, self._events, self._lines, self._problem)
            self._earlier, self._events, self._lines = [], [], []
        return news

    def close(self) -> None:
        self._port.detach()

    # --- its own thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Follows until the run ends or nobody reads; any other end is shown, and following starts again."""
        attempt = 0
        while not self._port.closed:
            read_before = dict(self._offsets)
            try:
                self._follow()
                return
            except Detached:
                return
            except Exception as error:  # a thread that ended unseen would leave the last state on the screen
                text = str(error) if isinstance(error, SurgvqaError) else f"{type(error).__name__}: {error}"
                log.warning("cannot follow %s", self.run_id, exc_info=error)
            attempt = 0 if self._offsets != read_before else attempt
            pause = pause_s(attempt)
            with self._lock:
                self._state, self._problem = "unknown", f"{text}; trying again every {pause} s"
            self._port.wait(pause)
            attempt += 1

    def _follow(self) -> None:
        self._learn()
        log_lines = LogLines()
        if "log.txt" not in self._offsets:
            self._offsets["log.txt"] = self._log_size()
        for event in RunEvents(self._port, self.run_id, self._offsets):  # type: ignore[arg-type]  # as a Remote
            if event["kind"] in ("connection", "log"):
                lines = log_lines.feed(event["text"].encode()) if event["kind"] == "log" else []
                with self._lock:
                    self._lines += lines
                continue
            if not self._info.get("pid"):
                self._learn()
            with self._lock:
                self._problem = ""
                if event["kind"] == "state":
                    self._state = event["state"]
                else:
                    self._events.append(self._in_our_time(event))
        self.link.look()

    def _learn(self) -> None:
        """run.json, once the job has written its own; with it what the runs before this one said."""
        info = self._run_json(self.run_id)[0]
        earlier = [] if self._learned or not info.get("pid") else self._read_earlier(info)
        with self._lock:
            self._info, self._earlier = info, self._earlier + earlier
            self._learned = self._learned or bool(info.get("pid"))

    def _run_json(self, run_id: str) -> tuple[dict[str, Any], str]:
        answer = self._port.call("runs", run=run_id)
        info = answer["run"]
        if "started" in info:
            info["started"] -= self.link.ahead_s
        return info, answer["state"]

    def _read_earlier(self, info: dict[str, Any]) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        known = {run.id for run in self.link.listed or ()} - {self.run_id}
        while parent := next((name for name in resumed_from(info) if name in known), None):
            known.discard(parent)
            info, state = self._run_json(parent)
            if state in ACTIVE:
                break
            ended = RunEvents(self._port, parent, {"log.txt": self._log_size(parent, tail=0)})  # type: ignore[arg-type]  # a stand-in for a target
            events = [self._in_our_time(e) for e in curve_events(list(ended))] + events
        return events

    def _log_size(self, run_id: str | None = None, tail: int = LOG_TAIL_BYTES) -> int:
        """Where the last `tail` bytes of the log begin."""
        files = self._port.call("listing", folder=f"runs/{run_id or self.run_id}")["files"]
        return max(0, next((size for path, size, _ in files if path == "log.txt"), 0) - tail)

    def _in_our_time(self, event: dict[str, Any]) -> dict[str, Any]:
        if self.link.ahead_s and "t" in event:
            event["t"] -= self.link.ahead_s
        return event
