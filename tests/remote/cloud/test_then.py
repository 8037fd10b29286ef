"""A plan carried out against the fake provider and a machine of the tests, with faults, killed at every step."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lambda_fake import KEY, FakeLambda, VirtualClock

from remote.agent.protocol import IDLE_S
from remote.cloud.api_key import ApiKey
from remote.cloud.lambda_cloud import LambdaCloud
from remote.cloud.ledger import Ledger
from remote.cloud.plan import Plan, Plans
from remote.cloud.provider import CloudError
from remote.cloud.renting import end, rent
from remote.cloud.then import Ended, MachineGone, carry_out
from surgvqa.errors import SurgvqaError, UsageError

JOB_S, EVALUATION_S = 3600.0, 600.0
ALL = ["evaluate", "fetch", "terminate"]


class Killed(BaseException):
    """The laptop's process, at any point."""


class Report:
    def __init__(self):
        self.said = []

    def phase(self, name, text=""):
        self.said.append(name)

    def warning(self, text):
        self.said.append(text)

    def emit(self, kind, **fields): ...

    def progress(self, *_, **__): ...


class Machine:
    """What runs on the rented machine, and survives the laptop's process. `outcome` is how the job ends by itself."""

    def __init__(self, clock, fake, outcome="finished"):
        self.clock, self.fake, self.outcome = clock, fake, outcome
        self.runs: dict[str, dict] = {}
        self.home: set[str] = set()
        self.faults: list[str] = []
        self.idle = self.silent = False
        self.fetch_s = 0.0
        self.waits: list[str] = []
        self.others: list[str] = []
        self.dies = float("inf")

    def __call__(self, guard):
        self.guard = guard
        return self

    def _reached(self):
        while self.faults and self.faults[0] == "unreachable":
            self.faults.pop(0)
            self.clock.sleep(90)
            self.guard.away("no route")
        if self.faults and self.faults[0] == "refuses":
            self.faults.pop(0)
            raise SurgvqaError("gpuhost: disk full")
        for m in self.fake.machines.values():
            if self.clock.now >= self.dies:
                m["ends"] = self.dies
        while not [m for m in self.fake.alive() if "ends" not in m]:
            self.clock.sleep(90)
            self.guard.away("no route")

    def launch(self, words, needs, token, share):
        self._reached()
        run = f"{words[0]}-{token}"
        lasts = JOB_S if words[0] == "train" else EVALUATION_S
        self.runs.setdefault(run, {"ends": self.clock.now + lasts, "words": words, "stopped": False})
        if self.faults and self.faults[0] == "killed":
            self.faults.pop(0)
            raise Killed
        return run

    def watch(self, run, guard):
        one = self.runs[run]
        while self.clock.now < one["ends"] and not one["stopped"]:
            self._reached()
            self.clock.sleep(60)
            guard.tick()
            if not (self.silent and words_of(one) == "evaluate"):
                guard.see({"kind": "gpu", "t": self.clock.now, "utilization_percent": 1 if self.idle else 99})
            one["stopped"] = bool(guard.reason())
        state = "stopped" if one["stopped"] else self.outcome if one["words"][0] == "train" else "finished"
        return Ended(state, state == "finished", {"keyword_accuracy": 0.5, "majority_accuracy": 0.25})

    def going(self, discard):
        self._reached()
        return [self.others.pop(0)] if self.others else []

    def gpu_works(self):
        return not self.idle

    def bring_home(self, discard, fetched):
        until = self.clock.now + self.fetch_s
        while self.clock.now < until:
            self.clock.sleep(600)
            self.guard.tick()
        for run in self.runs:
            self._reached()
            if run not in discard:
                self.home.add(run)
                fetched.append(run)
        return []


def words_of(run):
    return run["words"][0]


class Bench:
    def __init__(self, folder, outcome="finished", **options):
        self.clock = VirtualClock()
        self.fake = FakeLambda(self.clock)
        self.cloud = LambdaCloud(ApiKey(KEY), self.clock, self.fake.transport())
        self.cloud.add_key("laptop", "ssh-ed25519 AAAA me")
        self.ledger = Ledger(folder)
        self.plans = Plans(self.ledger)
        offer = self.cloud.offers()[0]
        self.record = rent(self.cloud, self.ledger, self.clock, offer, "us-east-1", "a", "laptop")
        job = ["train", "--eval_data_path", "e.jsonl", "--seed=1", "--audio_dir=a"]
        made = Plan("a", self.record.label, "/ws", job, [], ALL, "0a")
        self.plans.write(replace(made, **options))
        self.machine, self.report = Machine(self.clock, self.fake, outcome), Report()

    @property
    def plan(self):
        return self.plans.of(self.record)

    def go(self):
        return carry_out(self.plan, self.plans, self.cloud, self.ledger, self.clock, self.machine, self.report)


@pytest.fixture
def bench(tmp_path):
    return lambda outcome="finished", **options: Bench(tmp_path / "rented", outcome, **options)


def test_the_job_is_evaluated_fetched_and_the_machine_ended(bench):
    b = bench()
    ended = b.go()
    assert ended.state == "ended" and b.fake.alive() == []
    assert b.machine.home == {"train-0a", "evaluate-0ae"}
    assert b.machine.runs["evaluate-0ae"]["words"] == [
        "evaluate", "--checkpoint", "train-0a", "--eval_data_path", "e.jsonl", "--audio_dir=a"
    ]  # fmt: skip
    plan = b.plan
    assert (plan.stage, plan.state, plan.evaluation_state, plan.cut) == ("done", "finished", "finished", "")
    assert plan.scores["keyword_accuracy"] == 0.5
    assert 0.75 < ended.cost(b.clock.now + 1e6) < 1.1


@pytest.mark.parametrize("outcome", ["failed", "died", "stopped"])
def test_a_job_that_ended_badly_comes_home_too(bench, outcome):
    b = bench(outcome)
    assert b.go().state == "ended" and b.plan.state == outcome and "train-0a" in b.machine.home


@pytest.mark.parametrize(
    ("limit", "why"), [({"max_cost": 0.5}, "it has cost $0.5"), ({"max_hours": 0.5}, "rented for")]
)
def test_a_limit_stops_the_job_and_no_evaluation_begins(bench, limit, why):
    b = bench(**limit)
    assert b.go().state == "ended"
    plan = b.plan
    assert plan.state == "stopped" and why in plan.cut and plan.evaluation_state == "not started"
    assert b.machine.home == {"train-0a"} and b.clock.now - b.record.asked < 2700


def test_an_evaluation_that_leaves_the_gpu_idle_is_stopped(bench, monkeypatch):
    monkeypatch.setitem(globals(), "EVALUATION_S", 1e5)
    b = bench()
    b.machine.idle = True  # while it trains, that is no reason
    assert b.go().state == "ended"
    assert b.plan.state == "finished" and "under 10 % for 30 minutes" in b.plan.cut
    assert b.plan.evaluation_state == "stopped" and b.clock.now - b.record.asked < JOB_S + 2700


def test_an_evaluation_that_says_nothing_is_stopped_and_a_laptop_that_slept_is_no_silence(bench, monkeypatch):
    monkeypatch.setitem(globals(), "EVALUATION_S", 1e5)
    b = bench()
    b.machine.silent = True
    assert b.go().state == "ended" and "it said nothing for 30 minutes" in b.plan.cut
    assert b.plan.evaluation_state == "stopped" and IDLE_S <= b.clock.now - b.record.asked - JOB_S < 2700
    guard = b.machine.guard
    guard.follows()
    guard.watches_idle = True
    for _ in range(20):  # it slept ten hours between two looks, and the machine did not answer for as long
        b.clock.sleep(36000)
        guard.tick()
    assert guard.reason() == ""
    for _ in range(20):
        guard.tick()
        b.clock.sleep(59)
    assert "it said nothing" in guard.reason()
    with pytest.raises(MachineGone):  # it has ended
        guard.away("no route")
    assert guard.reason() == ""


def shouted(b):
    return [text for text in b.report.said if text.startswith("a is idle for")]


def test_a_machine_that_is_idle_after_its_job_is_shouted_at_every_stage_and_not_ended_unfetched(bench):
    """A slow fetch, another run with an idle GPU, a network that is gone: told every 30 minutes, and in the bill."""
    slow = bench()
    slow.machine.fetch_s = 2 * 3600
    assert slow.go().state == "ended" and slow.machine.home == {"train-0a", "evaluate-0ae"}
    assert [text.split(", and its step ")[1].split()[0] for text in shouted(slow)] == ["fetch"] * 4
    assert "for $0.75 an hour, $" in shouted(slow)[0] and "end a --discard all" in shouted(slow)[0]
    assert slow.plan.idle == "idle for 2 h 00 min after its job" and slow.plan.idle_s(slow.clock.now) == 0.0

    other = bench()
    other.machine.idle, other.machine.others = True, ["other"] * 200
    assert other.go().state == "ended" and 2 <= len(shouted(other)) <= 4
    busy = bench()
    busy.machine.others = ["other"] * 200
    assert busy.go().state == "ended" and shouted(busy) == [] and busy.plan.idle == ""

    away = bench()
    away.machine.others = ["other"]
    away.machine.faults = ["unreachable"] * 40
    away.plans.write(replace(away.plan, stage="fetch", run="train-0a", busy_at=away.clock.now))
    assert away.go().state == "ended" and 1 <= len(shouted(away)) <= 2


def test_how_long_it_is_idle_outlives_the_laptop_s_process(bench):
    b = bench()
    b.machine.faults = ["refuses"]
    b.plans.write(replace(b.plan, stage="fetch", run="train-0a", busy_at=b.clock.now))
    with pytest.raises(SurgvqaError, match="disk full"):
        b.go()
    b.clock.sleep(5 * 3600)
    assert b.plan.idle_s(b.clock.now) == 5 * 3600
    b.machine.fetch_s = 600
    assert b.go().state == "ended" and len(shouted(b)) == 1 and "idle for 5 h 10 min" in shouted(b)[0]


def test_a_refused_launch_leaves_no_plan_and_a_failed_evaluation_holds_nothing_up(bench):
    b = bench()
    b.machine.faults = ["refuses"]
    with pytest.raises(SurgvqaError, match="disk full"):
        b.go()
    assert b.plan is None and len(b.fake.alive()) == 1
    b.plans.write(Plan("a", b.record.label, "/ws", ["train"], [], ALL, "0b", stage="evaluate", run="train-0b"))
    b.machine.faults = ["refuses"]
    assert b.go().state == "ended" and b.plan.evaluation_state == "failed"


def test_another_run_of_the_machine_is_waited_for_within_the_limit(bench):
    b = bench()
    b.machine.others = ["other"] * 3
    assert b.go().state == "ended" and "a ends when other is over" in b.report.said
    late = bench(max_hours=1.0)
    late.machine.others = ["other"] * 999
    with pytest.raises(SurgvqaError, match="a: NOT ENDED: other still at work there; rented for"):
        late.go()
    assert late.fake.alive() and late.plan.stage == "fetch"


def test_a_machine_that_the_provider_ended_is_said_with_what_is_lost(bench):
    b = bench()
    b.machine.dies = b.clock.now + 600
    with pytest.raises(MachineGone, match=r"has ended it; lost is what was not fetched of train-0a; \$0\.1"):
        b.go()
    assert b.plan.stage == "done" and not b.ledger.read("a").open
    with pytest.raises(MachineGone):  # ended by another command, while this one was away
        c = bench()
        end(c.cloud, c.ledger, c.clock, "a", list)
        c.go()


def test_an_end_that_fails_is_shouted_and_goes_on_when_asked_again(bench):
    b = bench()
    b.fake.faults = [("terminate", "deaf")] * 5
    with pytest.raises(CloudError, match="NOT ENDED, it goes on costing"):
        b.go()
    assert b.plan.stage == "terminate" and len(b.machine.runs) == 2
    assert b.go().state == "ended" and b.fake.alive() == [] and len(b.machine.runs) == 2


def test_without_terminate_the_machine_stays(bench):
    b = bench(then=["fetch"])
    assert b.go().open and b.machine.home == {"train-0a"} and b.plan.stage == "done"


def test_a_damaged_plan_is_one_clear_line(bench):
    b = bench()
    file = b.plans.folder / "a.json"
    file.write_text(file.read_text().replace('"launch"', '"lunch"'))
    with pytest.raises(UsageError, match=r"a\.json: stage 'lunch'"):
        b.go()


FAULTS = st.one_of(
    st.tuples(st.just("cloud"), st.sampled_from(["terminate", "instances", "*"]),
              st.sampled_from(["429", "500", "lost", "dropped", "garbage", "deaf", "unknown"])),
    st.tuples(st.just("there"), st.sampled_from(["unreachable", "refuses", "killed"])),
    st.tuples(st.just("kill"), st.integers(0, 12), st.booleans()),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(FAULTS, max_size=8), st.sampled_from(["finished", "failed", "died"]))
def test_whatever_fails_and_whenever_it_is_killed_nothing_is_repeated_or_lost(faults, outcome):
    with tempfile.TemporaryDirectory() as folder:
        b = Bench(Path(folder), outcome)
        real, ended = b.plans.write, []
        asked = b.cloud.terminate

        def terminate(machine_id):
            assert set(b.machine.runs) <= b.machine.home, "terminated with results on the machine alone"
            ended.append(machine_id)
            asked(machine_id)

        b.cloud.terminate = terminate
        kills = [(at, after) for kind, at, after in (f for f in faults if f[0] == "kill")]
        b.fake.faults = [(f[1], f[2]) for f in faults if f[0] == "cloud"]
        b.machine.faults = [f[1] for f in faults if f[0] == "there"]
        for at, after in [*kills, *[(None, False)] * 12]:
            writes = []

            def write(plan, at=at, after=after, writes=writes):
                writes.append(1)
                if after:
                    real(plan)
                if at == len(writes) - 1:
                    raise Killed
                real(plan)

            b.plans.write = write
            with contextlib.suppress(SurgvqaError, Killed):
                b.go()
            b.plans.write = real
            if b.plan is None:  # refused at its launch: the user asks again
                real(Plan("a", b.record.label, "/ws", ["train"], [], ALL, "0a"))
            if not b.plan.going:
                break
        assert b.plan.stage == "done" and b.fake.alive() == [] and not b.ledger.read("a").open
        assert ended and [w["words"][0] for w in b.machine.runs.values()].count("train") == 1
        assert len(b.machine.runs) <= 2 and set(b.machine.runs) <= b.machine.home
