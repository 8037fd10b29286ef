"""The panel on a GPU host: over a real sshd; and its link over connections that break."""

from __future__ import annotations

import os
import time

import pytest
from panels import go, panel, settle, text, timeline, training
from sshd import TRAIN, Relay, laptop, processes_naming, stub_train  # noqa: F401
from textual.widgets import OptionList
from waiting import until

from remote.ssh.errors import Unreachable
from surgvqa.config import workspace
from surgvqa.errors import SurgvqaError
from surgvqa.machine import gpu
from surgvqa.memory.budget import NO_GPU
from surgvqa.runs.folder import Run
from surgvqa.runs.state import read_run_json, state_of
from tui.dialogs.hosts import RENT, HostKey, HostPicker
from tui.screens.monitor import MonitorScreen
from tui.targets.connection_state import Detached
from tui.targets.host import HostTarget
from tui.targets.link import Link
from tui.widgets.chart import Chart

pytestmark = pytest.mark.slow


@pytest.fixture
def link(laptop):  # noqa: F811
    one = Link("gpuhost", laptop.workspace)
    yield one
    one.end()


# --- the link --------------------------------------------------------------------------------------------------------


def test_many_threads_ask_over_one_connection(laptop, link):  # noqa: F811
    from concurrent.futures import ThreadPoolExecutor

    until(lambda: link.connection.kind == "connected")
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: link.call("probe", venv="venv")["workspace"], range(24)))
    assert set(answers) == {str(laptop.there)}
    assert len(laptop.server.sessions()) <= 3  # listener's child, its session: one connection
    with pytest.raises(SurgvqaError, match=r"no such run|no runs"):
        link.call("runs", run="none")
    assert link.connection.kind == "connected"


def test_a_lost_connection_is_unreachable_since_and_comes_back(laptop, link):  # noqa: F811
    until(lambda: link.connection.kind == "connected")
    laptop.server.stop()
    until(lambda: link.connection.kind == "unreachable")
    since = link.connection.since
    with pytest.raises(Unreachable):
        link.call("runs")
    time.sleep(1.5)
    assert link.connection.since == since
    laptop.server.start()
    until(lambda: link.connection.kind == "connected")
    assert link.call("runs")["runs"] == []


def test_a_dead_link_is_noticed_and_a_follower_goes_on_where_it_was(laptop, monkeypatch):  # noqa: F811
    monkeypatch.setattr("remote.ssh.timeouts.SILENCE_S", 5.0)  # test_remote_jobs waits as long as the user does
    monkeypatch.setattr("remote.ssh.timeouts.CHANNEL_TIMEOUT_S", 3)
    relay = Relay(laptop.server.port)
    laptop.server.write_config(port=relay.port)
    run = remote_run(laptop)
    target = HostTarget("gpuhost", workspace.load_workspace(laptop.workspace))
    try:
        until(lambda: target.connection.kind == "connected")
        feed = target.feed(run.id)
        seen: list = []
        until(lambda: seen.extend(feed.read().events) or len(seen) == 4)
        relay.freeze()  # nothing is said any more, nothing is closed
        run.emit("metric", step=4, total_steps=100, loss=0.25)
        until(lambda: target.connection.kind == "unreachable", 40)
        assert feed.read().state == "running"
        relay.cut()
        relay.thaw()
        until(lambda: seen.extend(feed.read().events) or len(seen) == 5, 60)
        assert [e.get("step") for e in seen] == [None, 1, 2, 3, 4]
        feed.close()
        with pytest.raises(Detached):
            feed._port.call("probe", venv="venv")
    finally:
        target.end()
        relay.close()


@pytest.mark.parametrize("behind_s", [0, 3600, -3600])
def test_a_host_with_another_clock(laptop, monkeypatch, behind_s):  # noqa: F811
    """Ours goes an hour behind the host's, or before it; the host's times are given in ours."""
    run = remote_run(laptop)
    started = time.time()
    monkeypatch.setattr(time, "time", lambda real=time.time: real() - behind_s)
    target = HostTarget("gpuhost", workspace.load_workspace(laptop.workspace))
    try:
        listed = until(target.runs)[0]
        assert listed.id == run.id and listed.state == "running"
        assert abs(listed.started - (started - behind_s)) < 30
        heard = []
        feed = target.feed(run.id)
        until(lambda: heard.extend(feed.read().events) or heard)
        assert abs(heard[0]["t"] - (started - behind_s)) < 30
    finally:
        target.end()


def test_a_resumed_run_brings_the_curve_of_the_first(laptop):  # noqa: F811
    with remote_run(laptop) as first:
        pass
    resumed = {"resume": {"value": str(first.folder / "checkpoints")}}
    again = Run.create(laptop.there / "runs", "train", options=resumed)
    again.emit("metric", step=4, total_steps=100, loss=0.2)
    target = HostTarget("gpuhost", workspace.load_workspace(laptop.workspace))
    try:
        until(lambda: len(target.runs()) == 2)
        feed = target.feed(again.id)
        heard = [feed.read()]
        until(lambda: heard.append(feed.read()) or any(news.events for news in heard))
        steps = [e.get("step") for news in heard for e in [*news.earlier, *news.events]]
        assert steps == [1, 2, 3, 4] and heard[-1].info["id"] == again.id
    finally:
        target.end()


# --- the panel -------------------------------------------------------------------------------------------------------


def remote_run(laptop, steps: int = 3) -> Run:  # noqa: F811
    """A run folder on the host of a training that this very process seems to do."""
    run = Run.create(laptop.there / "runs", "train", options={"budget_gb": {"value": 28.5}})
    run.phase("train", "steps")
    for step in range(1, steps + 1):
        run.emit("metric", step=step, total_steps=100, loss=1.0 / step)
    (run.folder / "log.txt").write_text("loading\n")
    return run


async def open_picker(app, pilot) -> None:
    await pilot.press("h")
    await settle(pilot, lambda: isinstance(app.screen, HostPicker) and isinstance(app.focused, OptionList))


async def test_the_picker_lists_this_machine_first_and_keeps_both_connections(laptop):  # noqa: F811
    run = remote_run(laptop)
    here = Run.create(laptop.workspace / "runs", "train")
    app = panel(laptop.workspace)
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and app.screen.follower is not None)
        assert app.screen.follower.run_id == here.id
        await open_picker(app, pilot)
        assert [o.id for o in app.screen.query_one(OptionList).options] == ["this machine", "gpuhost", RENT]
        await pilot.press("down", "enter")
        await settle(pilot, lambda: "gpuhost ● connected" in text(app, "#where"))
        await settle(pilot, lambda: app.screen.follower and app.screen.follower.run_id == run.id)
        await settle(pilot, lambda: app.screen.query_one(Chart).series[0].xs.tolist() == [1, 2, 3])
        assert "running" in text(app, "#facts") and "loading" in timeline(app)
        run.emit("gpu", device=0, backend="cuda", process_bytes=20e9, total_bytes=80e9)
        await settle(pilot, lambda: "20.0 GB of 28.5 GB" in text(app, "#gauge"))
        await open_picker(app, pilot)
        await pilot.press("home", "enter")
        await settle(pilot, lambda: app.screen.follower and app.screen.follower.run_id == here.id)
        assert app.session.hosts["gpuhost"].connection.kind == "connected"
        run.emit("metric", step=4, total_steps=100, loss=0.2)  # heard meanwhile
        await open_picker(app, pilot)
        await pilot.press("down", "enter")
        await settle(pilot, lambda: app.screen.query_one(Chart).series[0].xs.tolist() == [1, 2, 3, 4])


async def test_a_lost_host_is_unreachable_and_its_run_is_not_dead(laptop):  # noqa: F811
    run = remote_run(laptop)
    app = panel(laptop.workspace, "gpuhost")
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot, lambda: app.screen.query(Chart) and len(app.screen.query_one(Chart).series[0].xs) == 3)
        laptop.server.stop()
        await settle(pilot, lambda: "unreachable since" in text(app, "#where"))
        await settle(pilot, lambda: "unreachable since" in text(app, "#facts"))
        await pilot.press("s")
        await pilot.press("y")
        await settle(pilot, lambda: "could not be stopped" in text(app, "#notice"))
        run.emit("metric", step=4, total_steps=100, loss=0.2)
        laptop.server.start()
        await settle(pilot, lambda: app.screen.query_one(Chart).series[0].xs.tolist() == [1, 2, 3, 4], 40)
        await settle(pilot, lambda: "running" in text(app, "#facts"))
        assert app.screen.follower.state == "running"


def test_an_error_that_nobody_expected_is_tried_again(laptop, monkeypatch):  # noqa: F811
    """As a cut is: only an answer of the host stays."""
    connect = Link._connect

    def fails(self):
        monkeypatch.setattr(Link, "_connect", connect)
        raise RuntimeError("dictionary changed size during iteration")

    monkeypatch.setattr(Link, "_connect", fails)
    one = Link("gpuhost", laptop.workspace)
    until(lambda: one.connection.kind == "unreachable")
    assert "RuntimeError" in one.connection.text
    until(lambda: one.connection.kind == "connected")
    one.end()


async def test_an_unknown_host_key_is_shown_and_asked_once(laptop):  # noqa: F811
    laptop.server.known_hosts.write_text("")
    app = panel(laptop.workspace, "gpuhost")
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: isinstance(app.screen, HostKey))
        assert app.screen.key.fingerprint.startswith("SHA256:")
        await pilot.press("enter")  # is no answer
        await pilot.press("n")
        await settle(pilot, lambda: "refused" in text(app, "#where"))
        assert laptop.server.known_hosts.read_text() == ""
        await open_picker(app, pilot)
        await pilot.press("enter")
        await settle(pilot, lambda: isinstance(app.screen, HostKey))
        await pilot.press("y")
        await settle(pilot, lambda: "connected" in text(app, "#where"))
        assert "ssh-ed25519" in laptop.server.known_hosts.read_text()


async def test_another_machine_shows_nothing_of_this_one(laptop):  # noqa: F811
    """Neither its memory on Monitor nor, on Train, that it has no GPU."""
    training(laptop.workspace)
    laptop.server.known_hosts.write_text("")
    app = panel(laptop.workspace)
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen))
        await settle(pilot, lambda: "1.5 GB of 28.5 GB budget" in text(app, "#gauge"))
        await pilot.press("3")
        await settle(pilot, lambda: "predicted of 28.5 GB" in text(app, "#memory"))
        assert (NO_GPU in " ".join(text(app, "#memory").split())) == (not gpu.any_gpu())
        await open_picker(app, pilot)
        await pilot.press("down", "enter")
        await settle(pilot, lambda: isinstance(app.screen, HostKey))
        await pilot.press("n")
        await settle(pilot, lambda: "refused" in text(app, "#where"))
        await settle(pilot, lambda: NO_GPU not in " ".join(text(app, "#memory").split()))
        await pilot.press("4")
        await settle(pilot, lambda: text(app, "#gauge") == "no memory figures yet")
        await pilot.press("2")
        await settle(pilot, lambda: "h tries it again" in text(app, "#host-text"))


async def test_a_changed_host_key_is_refused_with_the_reason(laptop):  # noqa: F811
    laptop.server.stop()
    laptop.server.new_host_key()
    laptop.server.start()
    app = panel(laptop.workspace, "gpuhost")
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: "refused" in text(app, "#where"))
        await settle(pilot, lambda: "THE HOST KEY HAS CHANGED" in text(app, "#notice"))
        assert not isinstance(app.screen, HostKey)


async def test_launch_stop_continue_and_fetch_on_the_host(laptop):  # noqa: F811
    stub_train(laptop)
    for folder in ("merged", "frames", "audio"):
        (laptop.workspace / folder).mkdir()
    (laptop.workspace / "train.jsonl").write_text("")
    settings = [f'{name[2:]} = "{value}"' for name, value in zip(TRAIN[1::2], TRAIN[2::2])]
    (laptop.workspace / "surgvqa.toml").write_text("\n".join(settings) + "\n")
    app = panel(laptop.workspace, "gpuhost")
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: app.session.host and app.session.host.connection.kind == "connected")
        await go(app, pilot, "train")
        app.screen.settings.edit("run_name", "it's $(id) here")
        await pilot.press("l")
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and app.screen.follower is not None, 60)
        run = app.screen.follower.run_id
        await settle(pilot, lambda: app.screen.follower.model.train.xs, 60)
        argv = read_run_json(laptop.there / "runs" / run)["argv"]
        assert "--model_name_or_path=merged" in argv and "--run_name=it's $(id) here" in argv
        await pilot.press("s", "y")
        await settle(pilot, lambda: app.screen.follower.state == "stopped", 60)
        await settle(pilot, lambda: app.screen.check_action("fetch", ()))
        await pilot.press("f")
        await settle(pilot, lambda: "verified" in text(app, "#notice"), 60)
        assert (laptop.workspace / "runs" / run / "events.jsonl").is_file()
        again = await app.session.host.resume(run, "--image_size=384")
        assert read_run_json(laptop.there / "runs" / again)["argv"][-3:] == ["--image_size=384", "--resume", run]


async def test_the_plan_and_the_upload_that_outlives_the_panel(laptop):  # noqa: F811
    root = laptop.workspace
    (root / "merged").mkdir()
    (root / "merged" / "config.json").write_text("{}")
    (root / "merged" / "model.safetensors").write_bytes(os.urandom(30_000_000))
    (root / "surgvqa.toml").write_text('[train]\nmodel_name_or_path = "merged"\n')
    app = panel(root, "gpuhost")
    async with app.run_test(size=(120, 36)) as pilot:
        await pilot.press("2")
        await settle(pilot, lambda: "cheapest" in text(app, "#plan-text"), 60)  # not the table shown until it connects
        shown = text(app, "#plan-text")
        assert "the merged checkpoint" in shown and "30.0 MB" in shown and "u sends" in shown
        await pilot.press("u")
        await settle(pilot, lambda: list((root / "runs").glob("*-upload-*/run.json")), 60)
    folder = next((root / "runs").glob("*-upload-*"))
    until(lambda: state_of(folder) not in ("starting", "running"), 60)
    assert state_of(folder) == "finished"
    assert (laptop.there / "merged" / "model.safetensors").stat().st_size == 30_000_000
    app = panel(root, "gpuhost")
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("2")
        await settle(pilot, lambda: "all of it is there" in text(app, "#plan-text"), 60)


async def test_a_host_without_us_is_set_up_by_one_key(laptop):  # noqa: F811
    laptop.host(venv="venv")
    app = panel(laptop.workspace, "gpuhost")
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: "v sets it up" in text(app, "#notice"))
        with pytest.raises(SurgvqaError, match="not installed there; v sets it up"):
            await app.session.host.launch("train")
        await pilot.press("v")
        await settle(pilot, lambda: app.current_mode == "upload" and app.screen.query_one("#job-text").display, 60)
        folder = next((laptop.workspace / "runs").glob("*-setup-*"))
        await settle(pilot, lambda: "wheel" in text(app, "#job-text") or "venv" in text(app, "#job-text"), 60)
        await pilot.press("s", "y")
        await settle(pilot, lambda: state_of(folder) not in ("starting", "running"), 60)
        assert state_of(folder) == "stopped"
        await settle(pilot, lambda: "stopped" in text(app, "#job-text"))
    until(lambda: not processes_naming(laptop.there / "venv"))  # what it had started there
