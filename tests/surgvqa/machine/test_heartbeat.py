"""Ranks on several machines: silence names the one that is lost, and events travel to rank 0."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from waiting import until

dist = pytest.importorskip("torch.distributed")
from surgvqa.cli.ranks import _name_failed  # noqa: E402
from surgvqa.machine import heartbeat, ranks  # noqa: E402
from surgvqa.machine.heartbeat import Heartbeat, PatientStore  # noqa: E402
from surgvqa.machine.ranks import RankLost, RunOfRank, SharedRanks  # noqa: E402
from surgvqa.runs.events import EventTail  # noqa: E402
from surgvqa.runs.folder import Run  # noqa: E402

pytestmark = pytest.mark.model
PLACES = ((0, "alpha"), (1, "beta"), (1, "beta"))


@pytest.fixture
def three(monkeypatch):
    """Three ranks that have met: the first on one machine, the others on another."""
    monkeypatch.setattr(ranks, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.02)
    monkeypatch.setattr(heartbeat, "SILENT_S", 0.5)
    store = dist.HashStore()
    found = [SharedRanks(store, rank, 3, place=place) for rank, place in enumerate(PLACES)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(SharedRanks.wait_for_all, found))
    for one in found:
        one.heartbeat = Heartbeat(store, one.rank, one.far)
    yield found
    for one in found:
        one.heartbeat.end()


def test_each_knows_its_machine(three):
    assert [one.beside for one in three] == [[0], [1, 2], [1, 2]] and [one.leads for one in three] == [
        True,
        True,
        False,
    ]
    assert three[0].far == [1, 2] and list(three[2].hosts) == ["alpha", "beta", "beta"]


def test_a_machine_that_says_nothing_is_lost_and_named(three):
    first, second, third = three
    for one in (second, third):
        one.heartbeat.end()
    with pytest.raises(RankLost, match="rank 1 of 3 on beta: nothing has been heard of it for"):
        first.share(1, "step")
    assert first.first


def test_when_the_first_machine_is_lost_the_next_one_writes(three):
    first, second, third = three
    first.heartbeat.end()
    with pytest.raises(RankLost, match="rank 0 of 3 on alpha"):
        second.share(1, "step")
    with pytest.raises(RankLost, match="rank 0 of 3 on alpha"):
        third.share(1, "step")
    assert second.first and not third.first


def test_what_another_machine_knows_comes_to_the_run_folder(three, tmp_path):
    first, second, third = three
    here, there = Run.create(tmp_path / "a", "train"), Run.create(tmp_path / "b", "train").folder
    first.heartbeat.emit = here.emit
    with RunOfRank(there, second) as run, RunOfRank(there, third) as other:
        run.emit("gpu", process_bytes=7, used_bytes=float("nan"))
        other.emit("metric", step=1)
    until(lambda: EventTail(here.folder / "events.jsonl").read())
    (event,) = EventTail(here.folder / "events.jsonl").read()
    assert (event["kind"], event["rank"], event["process_bytes"]) == ("gpu", 1, 7)
    kept = [(event["kind"], event.get("rank")) for event in EventTail(there / "events.jsonl").read()]
    assert kept == [("gpu", 1), ("finished", None)]


def test_other_versions_are_refused(monkeypatch):
    store = dist.HashStore()
    one, two = (SharedRanks(store, rank, 2, place=(rank, name)) for rank, name in enumerate(("alpha", "beta")))
    share = two.share
    monkeypatch.setattr(
        two, "share", lambda me, what: share({**me, "versions": {**me["versions"], "torch": "1"}}, what)
    )
    with ThreadPoolExecutor(2) as pool:
        pool.submit(two.wait_for_all)
        with pytest.raises(Exception, match="rank 1 of 2 on beta has torch 1 and rank 0 "):
            one.wait_for_all()


def test_a_store_that_does_not_answer_keeps_nobody(monkeypatch):
    monkeypatch.setattr(heartbeat, "SILENT_S", 0.05)
    ever = threading.Event()

    class Dead:
        def get(self, key):
            ever.wait()

        def check(self, keys):
            return True

    store = PatientStore(Dead())
    assert store.check(["k"])
    with pytest.raises(RuntimeError, match="does not answer"):
        store.get("k")
    monkeypatch.setattr(heartbeat, "SILENT_S", 60)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="does not answer"):
        store.check(["k"])
    assert time.monotonic() - began < 30  # not waited for again
    ever.set()


def test_the_torchrun_of_a_killed_rank_names_it_to_the_other_machines():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    one, two = (SharedRanks(ranks.common(server), rank, 2, place=(rank, f"h{rank}")) for rank in (0, 1))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(SharedRanks.wait_for_all, (one, two)))
    two.store.set("failed 7", "said so itself")
    failures = {rank: SimpleNamespace(exitcode=code) for rank, code in ((1, -9), (5, -15), (6, 1), (7, -9))}
    _name_failed(failures, f"127.0.0.1:{server.port}")
    with pytest.raises(RankLost, match=r"rank 1 of 2 on h1: was killed \(SIGKILL; out of host memory"):
        one.share(1, "step")
    assert not one.store.check(["failed 5"]) and not one.store.check(["failed 6"])
    assert one.store.get("failed 7") == b"said so itself"
