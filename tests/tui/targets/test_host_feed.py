"""A run on a host as the panel follows it, with the connection replaced: what happens when following fails."""

import types

import pytest
from waiting import until

from surgvqa.errors import SurgvqaError
from tui.targets import host_feed
from tui.targets.host_feed import HostFeed


class Port:
    """Answers what a feed asks before it follows."""

    def __init__(self, link):
        self.closed = False

    def call(self, op, **_):
        return {"run": {"id": "r", "pid": 1}, "state": "running", "files": []}

    def wait(self, seconds):
        pass

    def detach(self):
        self.closed = True


@pytest.mark.parametrize("error", [ValueError("no such thing"), SurgvqaError("no such thing")])
def test_a_feed_that_fails_shows_why_and_goes_on_where_it_was(monkeypatch, error):
    begun = []

    class RunEvents:
        def __init__(self, port, run, offsets):
            begun.append(dict(offsets))
            self.offsets = offsets

        def __iter__(self):
            if len(begun) == 1:
                yield {"kind": "state", "state": "running"}
                self.offsets["events.jsonl"] = 7
                yield {"kind": "metric", "step": 1, "t": 1.0}
                raise error
            gate.wait(10)
            yield {"kind": "metric", "step": 2, "t": 2.0}
            yield {"kind": "state", "state": "finished"}

    import threading

    gate = threading.Event()
    monkeypatch.setattr(host_feed, "RunEvents", RunEvents)
    monkeypatch.setattr(host_feed, "Port", Port)
    feed = HostFeed(types.SimpleNamespace(listed=None, ahead_s=0.0, look=lambda: None), "r")
    events = []
    until(lambda: events.extend(feed.read().events) or feed.read().problem)
    shown = feed.read()
    assert shown.state == "unknown" and "no such thing" in shown.problem
    gate.set()
    until(lambda: feed.read().state == "finished" if len(begun) > 1 else False)
    assert not feed.read().problem and begun[1]["events.jsonl"] == 7
