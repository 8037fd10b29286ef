"""Follows a run on the host over connections that may break."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remote.ssh.connection import Remote
from remote.ssh.errors import Unreachable, not_understood
from remote.ssh.patience import Patience
from surgvqa.errors import SurgvqaError
from surgvqa.runs.events import EventTail
from surgvqa.runs.reporter import Reporter

MAX_FILE = 1 << 40
"""Bytes that no log reaches."""


def _new_tail() -> EventTail:
    return EventTail(Path("events.jsonl"))


@dataclass
class RunEvents:
    """Events and log of one run, as they come, over any number of lost connections.

    Iterating yields the run's own events, and three more kinds: `log` {text, not cleaned}, `state` {state, run}, and
    `connection` {state: "unreachable" with since, text | "connected"}. It ends when the run has ended. An unreachable
    host says nothing about the run: only the host itself says that a job has died. Raises what `patience` raises.
    """

    remote: Remote
    run: str
    offsets: dict[str, int] = field(default_factory=dict)
    """Bytes of events.jsonl and log.txt that were seen; give them back to go on later."""
    patience: Patience = field(default_factory=lambda: Patience(math.inf))
    state: str = "unknown"
    unreachable_since: float | None = None
    outcome: dict[str, Any] = field(default_factory=dict)
    restarts: int = 0
    _tail: EventTail = field(default_factory=_new_tail)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            try:
                for message in self.remote.stream("follow", run=self.run, offsets=self.offsets):
                    self.patience.answered()
                    if self.unreachable_since is not None:
                        self.unreachable_since = None
                        yield {"kind": "connection", "state": "connected"}
                    try:
                        events = list(self._events_of(message))
                    except (KeyError, TypeError, ValueError, AttributeError) as error:
                        raise not_understood(self.remote.host, f"{type(error).__name__}: {error}") from None
                    yield from events
                if self.outcome:
                    return
                raise not_understood(self.remote.host, "the run's end without its state")
            except Unreachable as error:
                self.remote.close()
                self._tail = _new_tail()
                pause = self.patience.next_pause_s(error)
                self.unreachable_since = self.unreachable_since or time.time()
                away = {"state": "unreachable", "since": self.unreachable_since, "text": str(error)}
                yield {"kind": "connection", **away}
                time.sleep(pause)

    def _events_of(self, message: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if "finished" in message:
            self.outcome = message
            if message["state"] != self.state:
                self.state = message["state"]
                yield {"kind": "state", "state": self.state, "run": self.run}
        elif "state" in message:
            self.run, self.state = message["run"], message["state"]
            yield {"kind": "state", "state": self.state, "run": self.run}
        elif message.get("restart"):
            self.restarts += 1
            self.offsets[message["file"]] = 0
            if message["file"] == "events.jsonl":
                self._tail = _new_tail()
        else:
            data = message["text"].encode("utf-8", "surrogateescape")
            if not 0 <= message["at"] <= MAX_FILE:
                raise ValueError(f"at {message['at']}")
            if message["file"] == "events.jsonl":
                events = self._tail.feed(data)
                self.offsets["events.jsonl"] = message["at"] + len(data) - self._tail.pending  # the start of a line
                yield from events
            else:
                self.offsets["log.txt"] = message["at"] + len(data)
                yield {"kind": "log", "text": data.decode("utf-8", "replace")}


def wait(remote: Remote, run_id: str, run: Reporter) -> dict[str, Any]:
    """Follows a run on the host until it ends, passing its phases and progress on. Raises when it failed."""
    events, failure = RunEvents(remote, run_id, patience=remote.patience), ""
    for event in events:
        kind = event["kind"]
        if kind in ("phase", "progress", "warning"):
            run.emit(kind, **{k: v for k, v in event.items() if k not in ("v", "t", "kind")})
        elif kind == "error":
            failure = event["text"]
    finished = events.outcome.get("finished") or {}
    if events.state != "finished" or finished.get("exit_code"):
        raise SurgvqaError(f"{remote.host.name}: {run_id} {events.state}: {failure or 'see its log'}")
    return {"run": run_id, "state": events.state, **(finished.get("result") or {})}
