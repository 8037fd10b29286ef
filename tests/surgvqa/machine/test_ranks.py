"""What ranks tell each other, and how one that is gone is named: here threads with a store in memory."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

dist = pytest.importorskip("torch.distributed")
from surgvqa.errors import SurgvqaError, UsageError  # noqa: E402
from surgvqa.machine import ranks as ranks_module  # noqa: E402
from surgvqa.machine.ranks import RankLost, RunOfRank, SharedRanks  # noqa: E402
from surgvqa.runs.events import EventTail  # noqa: E402
from surgvqa.runs.folder import Run  # noqa: E402
from surgvqa.runs.ranks import Ranks, rank_and_count  # noqa: E402

pytestmark = pytest.mark.model


@pytest.fixture
def pair(monkeypatch):
    """Two ranks that have met; the second one's process lives while its identity is in `living`."""
    monkeypatch.setattr(ranks_module, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(ranks_module, "ANSWER_S", 0.05)
    store, living = dist.HashStore(), {"one", "two"}

    def of(name):
        return lambda pid: name if name in living else None

    found = [SharedRanks(store, rank, 2, patience_s=30.0) for rank in (0, 1)]
    for one, name in zip(found, ("one", "two")):
        one.identity = of(name)
    together(*(one.wait_for_all for one in found))
    for one, name in zip(found, ("two", "one")):
        one.identity = of(name)  # from now on it is the other one's that is asked for
    return *found, living


def together(*calls):
    """The result, or the error, of each."""

    def caught(call):
        try:
            return call()
        except SurgvqaError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(caught, calls))


def test_all_hear_what_each_says_in_the_order_of_the_ranks(pair):
    one, two, _ = pair
    for n in range(3):
        said = together(lambda: one.share({"n": n, "loss": float("inf")}, "x"), lambda: two.share(None, "x"))  # noqa: B023
        assert said == [[{"n": n, "loss": float("inf")}, None]] * 2
    assert Ranks().share(7, "x") == [7] and Ranks().name(0) == "" and two.name(1) == "rank 1: "


def test_ranks_at_different_places_are_no_agreement(pair):
    one, two, _ = pair
    errors = together(lambda: one.share(1, "save"), lambda: two.share(1, "evaluate"))
    assert all(isinstance(error, RankLost) and "'evaluate'" in str(error) for error in errors)
    assert one.disconnected and two.disconnected


class Passes:
    """Of a divided model; counts."""

    def __init__(self):
        self.taken, self.completed = [], 0

    def take_part(self, backward):
        self.taken.append(backward)

    def complete(self):
        self.completed += 1


def test_a_rank_without_a_sample_takes_part_in_the_passes_of_the_others(pair):
    one, two, _ = pair
    one.passes, two.passes = Passes(), Passes()

    def works():
        return [one.begin_pass(True), one.begin_pass(True), one.begin_pass(False), one.share(1, "step")]

    assert together(works, lambda: [two.begin_pass(True), two.share(2, "step")]) == [
        [True, True, False, [1, 2]],
        [True, [1, 2]],
    ]
    assert two.passes.taken == [True, False] and one.passes.taken == []
    assert two.passes.completed == 3  # before each meeting but those of its own passes
    assert together(lambda: one.begin_pass(False), lambda: two.begin_pass(True)) == [True, True]
    errors = together(lambda: one.share(1, "save"), lambda: two.share(1, "step"))
    assert all(isinstance(error, RankLost) for error in errors)


def test_a_loss_is_noticed_while_the_main_thread_waits_for_the_gpu(pair):
    one, _, living = pair
    aborted = threading.Event()
    one.watch(aborted.set)
    assert not aborted.wait(0.1)
    living.discard("two")
    assert aborted.wait(5)
    said = str(one.cause_of(RuntimeError("NCCL communicator was aborted")))
    assert said.startswith("rank 1 of 2: its process is gone")
    with pytest.raises(RankLost, match="rank 1 of 2: its process is gone"):
        one.begin_pass(False)


def test_nobody_is_missed_at_the_end(pair):
    one, two, living = pair
    aborted = threading.Event()
    one.watch(aborted.set)
    assert together(lambda: one.last(1), lambda: two.last(2)) == [[1, 2], [1, 2]]
    living.discard("two")
    assert not aborted.wait(0.2)


def test_a_rank_that_fails_is_named_with_its_reason(pair):
    one, two, _ = pair
    (error, _) = together(lambda: one.share(1, "step"), lambda: two.leave("f1.jpg: cannot be decoded"))
    assert str(error) == "rank 1 of 2: f1.jpg: cannot be decoded" and one.disconnected
    with pytest.raises(RankLost):
        one.share(1, "step")
    assert one.first and not two.first


def test_a_rank_that_is_killed_is_named_and_the_next_one_writes(pair, tmp_path):
    _, two, living = pair
    folder = Run.create(tmp_path, "train").folder
    run = RunOfRank(folder, two)
    run.emit("metric", step=1)
    run.emit("oom", text="t")
    living.discard("one")
    with pytest.raises(RankLost, match="rank 0 of 2: its process is gone"), run:
        two.share(1, "step")
    assert two.first
    events = EventTail(folder / "events.jsonl").read()
    assert [(event["kind"], event.get("rank")) for event in events] == [("oom", 1), ("error", None), ("finished", None)]


def test_a_rank_that_does_not_come_is_named_in_time(pair):
    one, _, _ = pair
    one.patience_s = 0.05
    with pytest.raises(RankLost, match="rank 1 of 2 has not come to 'save'"):
        one.share(1, "save")


def test_a_collective_that_fails_is_the_fault_of_the_rank_that_does_not_notice(pair):
    one, two, _ = pair
    error = RuntimeError("Connection closed by peer")
    assert "rank 1 of 2 does not answer: Connection closed" in str(one.cause_of(error))
    assert two.cause_of(error) is error  # rank 0 has noticed
    usage = UsageError("u")
    assert one.cause_of(usage) is usage


def test_only_what_torchrun_says_makes_a_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert rank_and_count() == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "8")  # a scheduler's
    assert rank_and_count() == (0, 1)
    for name, value in (("RANK", "3"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert rank_and_count() == (3, 8)
