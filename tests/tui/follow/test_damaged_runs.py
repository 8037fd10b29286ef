"""A vanished run folder and events of the wrong type are said, and the rest is shown."""

import shutil

from panels import go, panel, settle, text, training

from tui.follow.run_model import RunModel
from tui.screens.monitor import MonitorScreen


async def test_a_run_folder_that_vanishes_is_said_and_what_was_read_stays(root):
    with training(root) as run:
        pass
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await go(app, pilot, "monitor")
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and "finished" in text(app, "#facts"))
        shutil.rmtree(run.folder)
        await settle(pilot, lambda: "the run folder is gone" in " ".join(text(app, "#facts").split()))
        assert app.screen.follower.model.train.xs[-1] == 30


async def test_an_event_of_the_wrong_type_is_said_and_the_rest_is_shown(root):
    run = training(root, steps=3)
    with open(run.folder / "events.jsonl", "a") as file:
        file.write('{"v": 1, "t": 1.0, "kind": "metric", "step": "abc", "loss": 1.0}\n')
    run.emit("metric", step=5, total_steps=100, loss=0.5)
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await go(app, pilot, "monitor")
        await settle(pilot, lambda: "step is" in " ".join(text(app, "#facts").split()))
        assert app.screen.follower.model.train.xs[-1] == 5


def test_the_model_goes_on_after_an_event_that_it_cannot_read():
    model = RunModel()
    model.feed([
        {"kind": "metric", "t": 1.0, "step": 1, "loss": 2.0},
        {"kind": "progress", "t": 1.0, "phase": "x", "done": "much"},
        {"kind": "gpu", "t": 1.0, "process_bytes": [1]},
        {"kind": "metric", "t": 2.0, "step": 2, "loss": 1.0},
    ])  # fmt: skip
    assert model.train.xs.tolist() == [1, 2] and "progress" in model.damage


def test_the_speed_of_an_ended_run_is_that_of_the_whole_run():
    model = RunModel()
    model.feed([{"kind": "metric", "t": float(i), "step": i, "samples_per_s": s} for i, s in enumerate((4.0, 2.0), 1)])
    assert model.samples_per_s == 2.0 and model.mean_samples_per_s == 3.0
    model.feed([{"kind": "finished", "t": 9.0, "state": "finished", "result": {"samples_per_s": 2.5}}])
    assert model.mean_samples_per_s == 2.5


def test_a_time_left_that_is_over_is_not_shown(monkeypatch):
    model = RunModel()
    model.feed([{"kind": "phase", "t": 0.0, "name": "encode"}])
    for t in range(5):
        model.feed([{"kind": "progress", "t": 100.0 + t, "phase": "encode", "done": 10 * t, "total": 60, "unit": "x"}])
    monkeypatch.setattr("time.time", lambda: 105.0)
    assert model.left_s == 1.0
    monkeypatch.setattr("time.time", lambda: 160.0)
    assert model.left_s is None
