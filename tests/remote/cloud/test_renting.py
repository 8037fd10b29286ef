import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lambda_fake import KEY, FakeLambda, VirtualClock

from remote.cloud.api_key import ApiKey
from remote.cloud.lambda_cloud import SETTLES_S, LambdaCloud
from remote.cloud.ledger import Ledger
from remote.cloud.pace import Pace
from remote.cloud.provider import AnswerLost, CloudError, NoCapacity
from remote.cloud.renting import end, reconcile, rent, wait_active
from surgvqa.errors import SurgvqaError, UsageError


class Bench:
    def __init__(self, folder):
        self.clock = VirtualClock()
        self.fake = FakeLambda(self.clock)
        self.cloud = LambdaCloud(ApiKey(KEY), self.clock, self.fake.transport())
        self.cloud.add_key("laptop", "ssh-ed25519 AAAA me")
        self.folder, self.ledger = folder, Ledger(folder)
        self.offer = self.cloud.offers()[0]

    def rent(self, name="a"):
        return rent(self.cloud, self.ledger, self.clock, self.offer, "us-east-1", name, "laptop")

    def end(self, name="a", unfetched=(), forget=False):
        return end(self.cloud, self.ledger, self.clock, name, lambda: list(unfetched), forget)


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path / "rented")


def test_rented_waited_for_ended_and_billed(bench):
    record = bench.rent()
    assert wait_active(bench.cloud, bench.clock, record, 600).address == "192.0.2.7"
    assert bench.rent() == record and len(bench.fake.machines) == 1
    bench.clock.sleep(3600)
    ended = bench.end()
    assert ended.state == "ended" and bench.fake.alive() == []
    assert 0.75 < ended.cost(bench.clock.now + 1e6) < 0.90


def test_a_lost_launch_is_found_again_by_its_name(bench):
    bench.fake.faults = [("launch", "lost")]
    assert bench.rent().machine_id == "i0000"
    assert len(bench.fake.machines) == 1


def test_a_launch_that_may_have_worked_is_not_sent_again(bench):
    bench.fake.faults = [("launch", "dropped")]
    for _ in range(2):
        with pytest.raises(AnswerLost, match="it may still come"):
            bench.rent()
    assert [what for _, what in bench.fake.asked].count("launch") == 1
    assert reconcile(bench.cloud, bench.ledger).rented[0][1] is None


def test_a_launch_that_did_not_happen_settles_and_frees_its_name(bench):
    bench.fake.faults = [("launch", "dropped")]
    with pytest.raises(AnswerLost):
        bench.rent()
    bench.clock.sleep(SETTLES_S)
    lost = bench.end()
    assert (lost.state, lost.cost(bench.clock.now)) == ("lost", 0.0)
    assert bench.rent().state == "rented" and len(bench.fake.machines) == 1


def test_a_machine_that_came_after_all_is_found_however_late(bench):
    bench.fake.faults = [("launch", "lost"), *[("instances", "500")] * 6]
    with pytest.raises(CloudError):
        bench.rent()
    bench.clock.sleep(10 * SETTLES_S)
    assert bench.rent().machine_id == "i0000" and len(bench.fake.machines) == 1


def test_one_answer_that_it_is_unknown_does_not_count_as_its_end(bench):
    bench.rent()
    bench.fake.faults = [("terminate", "deaf"), ("instances", "none"), *[("instances", "unknown")] * 2]
    assert bench.end().state == "ended" and bench.fake.alive() == []


def test_with_the_key_of_another_account_nothing_counts_as_ended(bench):
    bench.rent()
    bench.fake.other_account = True
    with pytest.raises(CloudError, match="is this the key of the account that rented it"):
        bench.end()
    assert bench.ledger.read("a").open and len(bench.fake.alive()) == 1
    assert bench.end(forget=True).state == "ended"


def test_processes_on_one_account_share_the_pace(tmp_path):
    clock, file = VirtualClock(), tmp_path / "state" / "pace"
    for _ in range(3):
        Pace(clock, file).wait({"request": 1.0, "launch": 12.0})
    assert clock.now - VirtualClock().now == 24
    file.write_text("launch nonsense\nrequest 1e99\nrequest")
    Pace(clock, file).wait({"request": 1.0, "launch": 12.0})
    clock.now -= 1e6  # the clock was set back
    before = clock.now
    Pace(clock, file).wait({"launch": 12.0})
    assert clock.now - before == 12 and file.stat().st_mode & 0o077 == 0


def test_a_refused_launch_costs_nothing_and_may_be_tried_again(bench):
    bench.fake.faults = [("launch", "capacity")]
    with pytest.raises(NoCapacity):
        bench.rent()
    assert not bench.ledger.read("a").open
    assert bench.rent().state == "rented"


def test_nothing_is_ended_while_results_are_unfetched(bench):
    bench.rent()
    with pytest.raises(SurgvqaError, match="not fetched yet: run1"):
        bench.end(unfetched=["run1"])
    assert len(bench.fake.alive()) == 1 and "terminate" not in [what for _, what in bench.fake.asked]


@pytest.mark.parametrize("fault", ["500", "lost", "deaf", "429"])
def test_a_failed_terminate_is_asked_again(bench, fault):
    bench.rent()
    bench.fake.faults = [("terminate", fault)] * 2
    assert bench.end().state == "ended" and bench.fake.alive() == []


def test_a_machine_that_does_not_end_is_shouted_and_stays_in_the_ledger(bench):
    bench.rent()
    bench.fake.faults = [("terminate", "deaf")] * 99
    with pytest.raises(CloudError, match=r"NOT ENDED, it goes on costing \$0.75 an hour"):
        bench.end()
    assert bench.ledger.read("a").open


def test_an_unhealthy_machine_is_said_and_a_late_address_waited_for(bench):
    bench.fake.faults = [("launch", "unhealthy"), ("launch", "late_ip")]
    with pytest.raises(SurgvqaError, match="unhealthy; end it: surgvqa-remote end a"):
        wait_active(bench.cloud, bench.clock, bench.rent(), 600)
    assert wait_active(bench.cloud, bench.clock, bench.rent("b"), 600).address


def test_a_machine_that_no_record_knows_is_an_orphan(bench):
    bench.rent()
    (bench.folder / "a.json").unlink()
    assert [m.id for m in reconcile(bench.cloud, bench.ledger).orphans] == ["i0000"]


def test_a_damaged_record_is_one_clear_line_and_a_name_cannot_leave_the_folder(bench):
    bench.rent()
    with pytest.raises(UsageError, match="expected a to z"):
        bench.rent("../a")
    (bench.folder / "a.json").write_text('{"name": 3}')
    with pytest.raises(UsageError, match=r"a\.json: name is a number, expected text"):
        bench.ledger.read("a")


def test_two_commands_do_not_rent_one_name(bench):
    with bench.ledger.locked("a"), pytest.raises(SurgvqaError, match="another command"):
        bench.rent()


FAULTS = st.tuples(
    st.sampled_from(["launch", "terminate", "instances", "*"]),
    st.sampled_from(["429", "500", "lost", "dropped", "garbage", "capacity", "unhealthy", "deaf", "unknown"]),
)
STEPS = st.lists(st.one_of(st.sampled_from(["rent", "end", "end unfetched", "later"]), FAULTS), max_size=14)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_whatever_fails_one_machine_at_most_and_all_of_them_listed(steps):
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for step in steps:
            if isinstance(step, tuple):
                bench.fake.faults.append(step)
                continue
            if step == "later":
                bench.clock.sleep(SETTLES_S)
                continue
            before = {m["id"] for m in bench.fake.machines.values() if "ends" in m}
            try:
                if step == "rent":
                    bench.rent()
                else:
                    bench.end(unfetched=["run1"] if "unfetched" in step else ())
            except SurgvqaError:
                pass
            if step == "end unfetched":
                assert {m["id"] for m in bench.fake.machines.values() if "ends" in m} == before
            asked_to_live = [m for m in bench.fake.machines.values() if "ends" not in m]
            assert len(asked_to_live) <= 1
            labels = {r.label for r in bench.ledger.records() if r.open}
            assert {m["name"] for m in bench.fake.alive()} <= labels
        assert not any(KEY.encode() in file.read_bytes() for file in Path(folder).rglob("*") if file.is_file())
