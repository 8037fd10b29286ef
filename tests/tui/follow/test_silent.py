"""A job that hangs, and one that died, are not shown as if they were at work."""

import json
import time

from panels import die, panel, settle, text, training

from tui.screens.monitor import MonitorScreen
from tui.widgets.run_list import RunList


def grow_old(run, seconds: float) -> None:
    """As if run and events were that much older."""
    file = run.folder / "events.jsonl"
    events = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**event, "t": event["t"] - seconds}) + "\n" for event in events))
    info = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps({**info, "started": info["started"] - seconds - 10}))


async def test_a_run_without_news_is_silent_until_it_speaks(root):
    run = training(root)
    grow_old(run, 90)
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and "silent" in text(app, "#facts"))
        facts = text(app, "#facts")
        assert "no news for 1 min" in facts and "left" not in facts and "samples/s" not in facts
        assert app.screen.query_one("#gauge").has_class("-old")
        await settle(pilot, lambda: text(app, "#busy") == "◌ train silent")
        await settle(pilot, lambda: "◌" in str(app.screen.query_one(RunList).get_option_at_index(0).prompt))
        run.emit("metric", step=31, total_steps=100, loss=0.1, t=time.time())
        await settle(pilot, lambda: "● running" in text(app, "#facts"))
        await settle(pilot, lambda: not app.screen.query_one("#gauge").has_class("-old"))
        await settle(pilot, lambda: text(app, "#busy") == "● train running")
        await settle(pilot, lambda: "●" in str(app.screen.query_one(RunList).get_option_at_index(0).prompt))


async def test_a_run_that_died_took_until_its_last_event(root):
    run = training(root)
    grow_old(run, 7200)
    die(run)
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: app.front is not None)
        await pilot.press("4")
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and app.screen.follower is not None)
        await settle(pilot, lambda: "died" in text(app, "#facts"))
        took = app.screen.follower.model.elapsed_s
        assert took is not None and 9 <= took < 60
