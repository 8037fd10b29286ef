"""The Monitor's figures of a run."""

from types import SimpleNamespace

from tui.content.facts import how_far, money, out_of_memory, time_left, waiting
from tui.follow import run_model
from tui.follow.run_model import RunModel


def test_a_starved_gpu_is_visible():
    follower = SimpleNamespace(model=RunModel())
    assert waiting(follower) == ""
    follower.model.feed([{"kind": "metric", "t": 1.0, "step": 1, "loss": 2.0, "data_wait": 0.376}])
    assert waiting(follower) == waiting(follower, least=0.1) == "38 % waiting for data"
    follower.model.feed([{"kind": "metric", "t": 2.0, "step": 2, "loss": 2.0, "data_wait": 0.004}])
    assert waiting(follower) == "0 % waiting for data" and waiting(follower, least=0.1) == ""


def test_what_was_done_about_a_lack_of_memory_comes_first():
    oom = {"step": 40, "text": "tried to allocate 0.62 GB: going on with fewer", "action": "going on with fewer"}
    assert out_of_memory(oom) == ["out of GPU memory at step 40: going on with fewer; tried to allocate 0.62 GB"]
    assert out_of_memory({"step": None, "text": "batch of 8: tried"}) == ["out of GPU memory: batch of 8: tried"]
    assert out_of_memory(None) == []


def test_what_a_phase_has_done_is_not_what_the_training_has(monkeypatch):
    """Before the first step: the time left is the phase's, and a phase that is over is no bar at 100 %."""
    now = 3.0
    monkeypatch.setattr(run_model.time, "time", lambda: now)
    model = RunModel({"command": "train"})
    follower = SimpleNamespace(model=model, active=True, silent_s=None)
    model.feed([{"kind": "phase", "name": "encode", "text": "frames"}])
    model.feed([{"kind": "progress", "phase": "encode", "t": t, "done": 10 * t, "total": 40} for t in (1.0, 3.0)])
    assert how_far(follower)[0] == 0.75 and time_left(follower) == "1 s left to encode"
    model.feed([{"kind": "phase", "name": "train", "text": "100 steps"}])
    assert how_far(follower) == (None, "") and time_left(follower) == ""
    model.feed([{"kind": "metric", "t": 9.0 + step, "step": step, "total_steps": 100, "loss": 2.0} for step in (1, 2)])
    now = 11.0
    assert how_far(follower)[0] == 0.02 and time_left(follower) == "1 min 38 s left"
    model.feed([{"kind": "metric", "t": 99.0, "step": 100, "total_steps": 100}, {"kind": "phase", "name": "evaluate"}])
    assert time_left(follower) == ""  # the last evaluation is still to come
    model.feed([{"kind": "progress", "phase": "evaluate", "t": t, "done": t, "total": 120} for t in (100.0, 110.0)])
    now = 110.0
    assert time_left(follower) == "10 s left"
    now = 121.0
    assert time_left(follower) == ""  # its time is up, and it is not done
    ended = RunModel({"command": "evaluate"})
    ended.feed([{"kind": "progress", "phase": "generate", "done": 9, "total": 9}, {"kind": "phase", "name": "score"}])
    ended.feed([{"kind": "finished", "state": "finished"}])
    assert how_far(SimpleNamespace(model=ended, active=False))[0] == 1


def test_what_a_run_costs_now_and_at_its_end_where_a_price_is_known(monkeypatch):
    monkeypatch.setattr(run_model.time, "time", lambda: 1803.0)
    model = RunModel({"command": "train", "started": 3.0})
    model.feed([{"kind": "metric", "t": 3.0 + 18 * n, "step": n, "total_steps": 200, "loss": 2.0} for n in range(101)])
    rented = SimpleNamespace(model=model, active=True, target=SimpleNamespace(price_per_hour=2.0))
    assert money(rented) == "$1.00, $2.00 at its end"
    answers = {"kind": "answers", "step": 100, "label_accuracy": 0.75, "majority_accuracy": 0.5, "collapsed_types": []}
    model.feed([answers])
    assert money(rented) == "$1.00, $2.00 at its end, $0.04 a point above the majority"
    model.feed([answers | {"label_accuracy": 0.5}])
    assert money(rented) == "$1.00, $2.00 at its end, accuracy not above the majority"
    model.feed([answers | {"majority_accuracy": None}])
    assert money(rented) == "$1.00, $2.00 at its end"
    rented.target.price_per_hour = None
    assert money(rented) == ""
