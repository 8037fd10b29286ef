"""The recorded GPU run of the demo: it plays, it is marked, nothing acts on it."""

import time

from panels import settle, text

from surgvqa.config.workspace import load_workspace
from tui.app import Panel
from tui.screens.monitor import MonitorScreen
from tui.targets import recording
from tui.targets.recording import RUN_ID, SPEED, DemoTarget, RecordedFeed, recorded_events


def test_the_recording_is_small_and_in_order():
    events = recorded_events()
    assert len(events) < 400 and [e["t"] for e in events] == sorted(e["t"] for e in events)
    assert events[-1]["kind"] == "finished" and sum(e["kind"] == "metric" for e in events) == 144


def test_events_come_when_their_time_has_come(monkeypatch):
    feed = RecordedFeed(began=1000.0)
    monkeypatch.setattr(recording.time, "time", lambda: 1005.0)
    first = feed.read()
    assert first.state == "running" and 0 < len(first.events) < 200
    assert all(event["t"] <= 1005.0 for event in first.events) and feed.read().events == []
    monkeypatch.setattr(recording.time, "time", lambda: 1000.0 + 300 / SPEED)
    last = feed.read()
    assert last.state == "finished" and len(first.events) + len(last.events) == len(recorded_events())


async def test_the_demo_shows_it_as_a_recording(root):
    target = DemoTarget(load_workspace(root))
    target.began = time.time() - 12.0
    app = Panel(target)
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and app.screen.follower is not None)
        assert app.screen.follower.run_id == RUN_ID
        await settle(pilot, lambda: "a recording of a run on an H100" in text(app, "#facts"))
        await settle(pilot, lambda: "H100" in text(app, "#gauge") and "28.5 GB budget" in text(app, "#gauge"))
        assert not any(app.screen.check_action(name, ()) for name in ("stop", "resume", "evaluate", "fetch"))
