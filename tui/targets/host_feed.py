"""A run on a host, as the panel follows it."""

from __future__ import annotations

import threading
from typing import Any

from remote.jobs.follower import Follower
from surgvqa.errors import SurgvqaError
from tui.targets.light import Detached
from tui.targets.link import Link, Port
from tui.targets.run_files import LOG_TAIL_BYTES, LogLines, curve_events, resumed_from
from tui.targets.target import ACTIVE, News


class HostFeed:
    """remote's Follower of one run, in a thread of its own; `read` hands on what it has heard and never waits."""

    def __init__(self, link: Link, run_id: str) -> None:
        self.link, self.run_id = link, run_id
        self._port = Port(link)
        self._lock = threading.Lock()
        self._info: dict[str, Any] = {}
        self._state = next((r.state for r in link.listed or () if r.id == run_id), "starting")
        self._earlier: list[dict[str, Any]] = []
        self._events: list[dict[str, Any]] = []
        self._lines: list[str] = []
        threading.Thread(target=self._run, name=f"follow {run_id}", daemon=True).start()

    def read(self) -> News:
        with self._lock:
            news = News(self._info, self._state, self._earlier, self._events, self._lines)
            self._earlier, self._events, self._lines = [], [], []
        return news

    def close(self) -> None:
        self._port.detach()

    # --- its own thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._learn()
            log = LogLines()
            follower = Follower(self._port, self.run_id, {"log.txt": self._log_size() or 0})  # type: ignore[arg-type]  # a stand-in for a target
            for event in follower:
                if event["kind"] in ("connection", "log"):
                    lines = log.feed(event["text"].encode()) if event["kind"] == "log" else []
                    with self._lock:
                        self._lines += lines
                    continue
                if not self._info.get("pid"):
                    self._learn()
                with self._lock:
                    if event["kind"] == "state":
                        self._state = event["state"]
                    else:
                        self._events.append(self._in_our_time(event))
            self.link.look()
        except Detached:
            return
        except SurgvqaError as error:
            with self._lock:
                self._state = "unknown"
                self._lines.append(str(error))

    def _learn(self) -> None:
        """run.json, once the job has written its own; with it what the runs before this one said."""
        info = self._run_json(self.run_id)[0]
        earlier = self._read_earlier(info) if info.get("pid") else []
        with self._lock:
            self._info, self._earlier = info, earlier

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
            follower = Follower(self._port, parent, {"log.txt": self._log_size(parent, tail=0)})  # type: ignore[arg-type]  # a stand-in for a target
            events = [self._in_our_time(e) for e in curve_events(list(follower))] + events
        return events

    def _log_size(self, run_id: str | None = None, tail: int = LOG_TAIL_BYTES) -> int:
        """Where the last `tail` bytes of the log begin."""
        files = self._port.call("listing", folder=f"runs/{run_id or self.run_id}")["files"]
        return max(0, next((size for path, size, _ in files if path == "log.txt"), 0) - tail)

    def _in_our_time(self, event: dict[str, Any]) -> dict[str, Any]:
        if self.link.ahead_s and "t" in event:
            event["t"] -= self.link.ahead_s
        return event
