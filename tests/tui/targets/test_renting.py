"""A machine rented from the panel: offers, price, all stages to Monitor, its end; on a real sshd."""

from __future__ import annotations

import time

import pytest
from panels import panel, settle, text
from renting_kit import a_venv_of_stubs, a_workspace, alive, asked, home  # noqa: F401
from sshd import why_not
from textual.widgets import OptionList

from remote.cloud.ledger import Ledger, Record
from remote.cloud.plan import Plan, Plans
from tui.dialogs.confirm import Confirm
from tui.dialogs.hosts import RENT, HostPicker
from tui.dialogs.offers import Offers
from tui.screens.monitor import MonitorScreen

pytestmark = pytest.mark.slow


@pytest.mark.skipif(why_not() is not None, reason=f"no sshd: {why_not()}")
async def test_rented_shown_idle_and_ended(home):  # noqa: F811
    a_workspace()
    app = panel(home / "ws")
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: app.front is not None and app.front.is_mounted)
        await pilot.press("h")
        await settle(
            pilot, lambda: isinstance(app.screen, HostPicker) and app.screen.query_one(OptionList).option_count
        )
        listed = app.screen.query_one(OptionList)
        listed.highlighted = listed.get_option_index(RENT)
        await pilot.press("enter")
        await settle(pilot, lambda: isinstance(app.screen, Offers) and app.focused)
        assert "no API key" in text(app, ".detail")
        await pilot.press("m")
        await settle(pilot, lambda: isinstance(app.screen, Confirm))
        assert "$0.00 an hour from now until it is ended" in text(app, ".detail")
        assert alive() == []
        await pilot.press("y")
        await settle(pilot, lambda: app.session.host is not None and app.session.host.name == "local", 40)
        await settle(pilot, lambda: "local $0.00/h, $0.00 so far: idle, x ends it" in text(app, "#busy"))
        assert app.front.MODE == "upload" and len(alive()) == 1
        await pilot.press("x")
        await settle(pilot, lambda: isinstance(app.screen, Confirm))
        assert "Every run is verified first" in text(app, ".detail")
        await pilot.press("y")
        await settle(pilot, lambda: app.session.host is None and alive() == [], 40)
        await settle(pilot, lambda: "local has ended" in text(app, "#notice") and text(app, "#busy") == "")


@pytest.mark.skipif(why_not() is not None, reason=f"no sshd: {why_not()}")
async def test_the_whole_way_ends_on_monitor_and_then_here(home, monkeypatch):  # noqa: F811
    """What `rent` does for the panel is begun as `setup` ends: here a venv of stubs is given."""
    a_workspace()
    asked("rent", "local", "--name", "local")
    a_venv_of_stubs(home)
    app = panel(home / "ws")
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: app.front is not None and app.front.is_mounted)
        app.session.renting = "local"
        await app.session.here.launch("upload", "local", "--what", "merged", module="remote")
        await app.choose("local")
        await settle(pilot, lambda: app.session.host and app.session.host.connection.kind == "connected")
        words = ("launch", "local", "train", "--max_steps", "200", "--then", "fetch,terminate")
        await settle(pilot, lambda: (home / "state/surgvqa/local" / alive()[0].name / "home/surgvqa/merged").is_dir())
        await app.session.here.launch(*words, module="remote")
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and app.screen.follower is not None)
        assert app.screen.follower.target is app.session.host and not app.session.idle()
        await settle(pilot, lambda: app.session.host is None and alive() == [], 40)
        assert list((home / "ws" / "runs").glob("*-train-*/adapter"))


async def test_a_machine_that_does_not_end_is_shouted_in_the_head(home):  # noqa: F811
    ledger = Ledger()
    with ledger.locked("a"):
        record = Record("a", "lambda", "surgvqa-x-a", "gpu_1x_a10", "us", 0.75, time.time() - 7200, "rented", "i1")
        ledger.write(record)
    a_workspace()
    app = panel(home / "ws")
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: app.front is not None and "a $0.75/h, $1.50 so far" in text(app, "#busy"))
        late = Plan("a", record.label, "/ws", ["train"], [], ["fetch"], "0a", stage="fetch", busy_at=time.time() - 3000)
        Plans(ledger).write(late)
        await settle(pilot, lambda: "a $0.75/h, $1.50 so far: IDLE for 50 min" in text(app, "#busy"))
        await settle(pilot, lambda: "a is idle for 50 min" in text(app, "#notice"))
        record.end_asked = time.time()
        ledger.write(record)
        await settle(pilot, lambda: "NOT ENDED" in text(app, "#busy"))
