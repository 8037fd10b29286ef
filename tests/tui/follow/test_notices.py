"""What there is to tell of runs: once each, and nothing that was so before."""

from types import SimpleNamespace

from tui.follow.notices import RunNotices, headline
from tui.follow.run_model import RunModel


def follower(**more):
    model = RunModel({"command": "train", "started": 1000.0, "options": {"run_name": {"value": "sweep"}}})
    target = SimpleNamespace(name="here", price_per_hour=2.0)
    fields = {"state": "running", "silent_s": None, "looked": True, "run_id": "r1", "target": target, "model": model}
    return SimpleNamespace(**{**fields, **more})


def said(notices, run):
    return [(notice.text, notice.kind) for notice in notices.look(run)]


def test_what_was_so_at_the_first_look_is_no_news():
    run, notices = follower(state="finished"), RunNotices()
    assert said(notices, run) == [] and said(notices, run) == []


def test_each_thing_is_told_once():
    run, notices = follower(), RunNotices()
    assert said(notices, run) == []
    run.model.feed([{"kind": "oom", "t": 1.0, "step": 7, "text": "lack"}])
    assert said(notices, run) == [("sweep: out of GPU memory at step 7", "warning")] and said(notices, run) == []
    run.model.feed([{"kind": "metric", "t": 2.0, "step": 8, "loss": None}])
    assert said(notices, run) == [("sweep: the loss is not finite since step 8", "error")]
    run.silent_s = 75.0
    assert said(notices, run) == [("sweep is silent: no news for 1 min 15 s", "warning")]
    run.silent_s = None
    assert said(notices, run) == []
    run.silent_s = 61.0  # again
    assert len(said(notices, run)) == 1
    run.silent_s, run.state = None, "failed"
    run.model.feed([{"kind": "error", "t": 3.0, "text": "disk full"},
                    {"kind": "finished", "t": 3.0, "state": "failed",
                     "result": {"collapsed_types": ["phase"]}}])  # fmt: skip
    assert said(notices, run) == [("sweep: failed: disk full", "error"),
                               ("sweep: almost always the same answer in phase", "warning")]  # fmt: skip


def test_the_money_that_a_run_has_cost_is_told():
    run, notices = follower(), RunNotices(money=10.0)
    run.model.ended, run.model.newest_t = True, 4600.0
    assert said(notices, run) == []
    run.model.newest_t = 19_000.0
    assert said(notices, run) == [("sweep has cost $10.00", "warning")]


def test_the_headline_says_share_loss_and_time():
    run = follower()
    run.model.feed([{"kind": "metric", "t": 1.0, "step": 31, "total_steps": 50, "loss": 0.412}])
    assert headline(run) == "62 % · loss 0.412"
    run.silent_s = 70.0
    assert headline(run).endswith("silent")
