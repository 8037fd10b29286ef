"""Faults in sequences, damaged and foreign state, and a provider that changes its mind: money is never hidden by it."""

from __future__ import annotations

import json
import time

import pytest
from lambda_fake import KEY, FakeLambda, VirtualClock
from renting_kit import a_workspace, asked, home  # noqa: F401

from remote.cli import cloud, main, rent
from remote.cloud import renting
from remote.cloud.api_key import ApiKey
from remote.cloud.lambda_cloud import LambdaCloud
from remote.cloud.ledger import Ledger, Record
from remote.cloud.pace import Pace
from remote.cloud.plan import Plan, Plans
from remote.cloud.provider import AnswerLost, CloudError, Unanswered
from remote.jobs import home as homewards
from surgvqa.errors import SurgvqaError, UsageError


class Bench:
    def __init__(self, folder):
        self.clock = VirtualClock()
        self.fake = FakeLambda(self.clock)
        self.cloud = self.with_key(KEY)
        self.cloud.add_key("laptop", "ssh-ed25519 AAAA me")
        self.ledger = Ledger(folder)
        self.offer = self.cloud.offers()[0]

    def with_key(self, key):
        return LambdaCloud(ApiKey(key), self.clock, self.fake.transport())

    def rent(self, name="a"):
        return renting.rent(self.cloud, self.ledger, self.clock, self.offer, "us-east-1", name, "laptop")

    def end(self, forget=False):
        return renting.end(self.cloud, self.ledger, self.clock, "a", list, forget)


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path / "rented")


def test_the_key_of_another_account_after_a_terminate_that_did_nothing_closes_no_record(bench):
    bench.rent()
    bench.fake.faults = [("terminate", "deaf")] * 5
    with pytest.raises(CloudError, match="NOT ENDED"):
        bench.end()
    bench.fake.other_account = True
    with pytest.raises(CloudError, match=r"NOT ENDED: lambda lists no machine i0000, and was not seen ending it"):
        bench.end()
    assert bench.ledger.read("a").open and len(bench.fake.alive()) == 1
    bench.fake.other_account = False
    assert bench.end().state == "ended" and bench.fake.alive() == []


def test_a_machine_that_was_seen_ending_and_is_listed_no_more_has_ended(bench):
    bench.rent()
    bench.cloud.terminate("i0000")
    assert not renting._has_ended(bench.cloud, bench.ledger, bench.clock, bench.ledger.read("a"), 0.0)
    bench.fake.machines.clear()
    assert bench.ledger.read("a").ending and bench.end().state == "ended"


def test_a_key_that_is_revoked_halfway_ends_nothing_and_the_next_one_does(bench):
    bench.rent()
    good, bench.cloud = bench.cloud, bench.with_key("revoked_0123456789")
    with pytest.raises(CloudError, match="HTTP 401 global/invalid-api-key"):
        bench.end()
    assert bench.ledger.read("a").open
    bench.cloud = good
    assert bench.end().state == "ended"


def test_a_clock_that_is_set_forward_makes_no_second_machine(bench):
    bench.fake.faults = [("launch", "lost"), ("instances", "none")]
    real, ask = bench.cloud.machines, []

    def machines():
        ask.append(1)
        return [] if len(ask) < 3 else real()  # it is listed late

    bench.cloud.machines = machines
    bench.clock.now += 0.0
    launch = bench.cloud.launch

    def launched(*words):
        try:
            return launch(*words)
        finally:
            bench.clock.now += 86400.0

    bench.cloud.launch = launched
    assert bench.rent().machine_id == "i0000" and bench.rent().machine_id == "i0000"
    assert len(bench.fake.machines) == 1 and len(ask) == 3


def test_a_machine_that_is_listed_late_or_asked_for_through_a_fault_is_waited_for(bench):
    record = bench.rent()
    bench.fake.faults = [("instances", "unknown")] * 2 + [("instances", "500")] * 7
    assert renting.wait_active(bench.cloud, bench.clock, record, 1200).state == "active"
    bench.fake.machines.clear()
    with pytest.raises(SurgvqaError, match="a: the machine is not listed by the provider; end it"):
        renting.wait_active(bench.cloud, bench.clock, record, 1200)


def test_a_price_that_changes_is_the_provider_s_and_told(home, monkeypatch):  # noqa: F811
    bench = Bench(None)
    record = bench.rent()
    machine = renting.wait_active(bench.cloud, bench.clock, record, 1200)
    assert not renting.reprice(bench.ledger, record, machine)
    kind = bench.fake._type("gpu_1x_a10")
    kind["instance_type"]["price_cents_per_hour"] = 129
    monkeypatch.setattr(bench.fake, "_type", lambda name: kind)
    monkeypatch.setattr(cloud, "provider_of", lambda name="lambda": bench.cloud)
    monkeypatch.setattr(rent, "_first_contact", lambda *_: "")
    monkeypatch.setattr(rent, "SystemClock", lambda: bench.clock)
    assert asked("rent", "gpu_1x_a10", "--name", "a", "--max_price", "1")["price_per_hour"] == 1.29
    (log,) = (home / "ws" / "runs").glob("*-rent-*/events.jsonl")
    assert "a costs $1.29 an hour" in log.read_text() and "more than --max_price 1: end it" in log.read_text()
    assert bench.ledger.read("a").price_per_hour == 1.29


def test_a_machine_that_was_renamed_is_ours_by_its_id_and_without_a_record_listed(bench):
    bench.rent()
    bench.fake.machines["i0000"]["name"] = "my-gpu"
    found = renting.reconcile(bench.cloud, bench.ledger)
    assert found.rented[0][1].name == "my-gpu" and found.others == found.orphans == []
    (bench.ledger.folder / "a.json").unlink()
    found = renting.reconcile(bench.cloud, bench.ledger)
    assert [m.name for m in found.others] == ["my-gpu"] and found.orphans == []


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        ("{", "a.json"),
        ('{"name": 3}', "name is a number, expected text"),
        ("[]", "a.json"),
        (
            '{"state": "paused"}',
            "state is 'paused', expected one of asked, rented, ended, refused, lost; was it written",
        ),
        ('{"name": "b"}', "name is 'b', expected 'a'"),
        ('{"asked": -1}', "asked"),
        ('{"price_per_hour": NaN}', "a.json"),
        ("folder", "a.json"),
    ],
)
def test_a_damaged_record_hides_no_other_and_is_told_by_every_command(home, capsys, damage, match):  # noqa: F811
    ledger = Ledger()
    for name in ("a", "b"):
        with ledger.locked(name):
            ledger.write(
                Record(name, "local", f"l-{name}", "gpu", "x", 0.75, time.time() - 7200, "rented", f"l-{name}")
            )
    file = ledger.folder / "a.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | {"invented_later": [1]}))
    assert ledger.damaged() == [] and ledger.read("a").open  # a newer version's field is no damage
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        change = damage.startswith('{"') and "NaN" not in damage
        file.write_text(json.dumps(whole | json.loads(damage)) if change else damage)
    assert [record.name for record in ledger.records()] == ["b"] and len(ledger.damaged()) == 1
    assert match in ledger.damaged()[0] and len(ledger.damaged()[0].splitlines()) == 1
    monkey = main.main(["hosts"])
    said = capsys.readouterr().err
    assert monkey == 0 and match in said and "it may cost money" in said and "b is rented: $0.75 an hour" in said


def test_rented_shows_the_others_and_fails_when_a_record_is_damaged(home, monkeypatch, capsys):  # noqa: F811
    bench = Bench(None)
    monkeypatch.setattr(cloud, "provider_of", lambda name="lambda": bench.cloud)
    bench.rent("a")
    bench.rent("b")
    (bench.ledger.folder / "a.json").write_text("{")
    assert main.main(["rented", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["rented"][0]["name"] == "b" and len(found["damaged"]) == 1
    assert found["orphans"][0]["id"] == "i0000"  # its machine is shouted as one without a record
    assert main.main(["rented"]) == 1 and "A RECORD CANNOT BE READ" in capsys.readouterr().out


def test_a_plan_of_a_newer_version_is_read_and_an_idle_machine_is_told_by_every_command(home, capsys):  # noqa: F811
    ledger = Ledger()
    record = Record("a", "lambda", "l-a", "gpu", "x", 0.75, time.time() - 7200, "rented", "i1")
    with ledger.locked("a"):
        ledger.write(record)
    plans = Plans(ledger)
    plan = Plan("a", "l-a", "/ws", ["train"], [], ["fetch"], "0a", stage="fetch", busy_at=time.time() - 3000)
    plans.write(plan)
    file = plans.folder / "a.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"invented_later": 1}))
    assert plans.of(record) == plan and main.main(["hosts"]) == 0
    assert "a is rented and IDLE since its job ended (50 min 0" in capsys.readouterr().err
    plans.write(Plan("a", "l-a", "/ws", ["train"], [], ["fetch"], "0a", stage="job"))
    assert main.main(["hosts"]) == 0 and "a is rented: $0.75" in capsys.readouterr().err


def test_a_damaged_pace_file_stops_no_command(tmp_path):
    file = tmp_path / "pace"
    file.write_bytes(b"request \xff\xfe\nlaunch 1")
    clock = VirtualClock()
    Pace(clock, file).wait({"request": 1.0})
    assert clock.now == VirtualClock().now and b"request 17000" in file.read_bytes()


def test_one_run_that_cannot_be_fetched_keeps_no_other_from_coming_home(monkeypatch):
    class Remote:
        def call(self, op):
            return {"runs": [{"id": run, "state": "finished"} for run in ("c", "b", "a")]}

    def fetch_run(remote, run, *_, **__):
        if run == "b":
            raise SurgvqaError("a name that is not one")
        if run == "gone":
            raise Unanswered("the machine")

    monkeypatch.setattr(homewards, "fetch_run", fetch_run)
    fetched: list[str] = []
    left = homewards.bring_home(Remote(), None, None, set(), fetched)
    assert left == ["b (a name that is not one)"] and fetched == ["c", "a"]
    monkeypatch.setattr(homewards, "fetch_run", lambda *_, **__: (_ for _ in ()).throw(Unanswered("all of it")))
    with pytest.raises(Unanswered):
        homewards.bring_home(Remote(), None, None, set(), [])


def test_waiting_for_capacity_outlives_a_fault_of_the_provider(home, monkeypatch):  # noqa: F811
    bench = Bench(None)
    bench.fake.faults = [("instance-types", "500")] * 7
    monkeypatch.setattr(cloud, "provider_of", lambda name="lambda": bench.cloud)
    monkeypatch.setattr(rent, "LOOK_FOR_CAPACITY_EVERY_S", 0.01)
    monkeypatch.setattr(rent, "_first_contact", lambda *_: "")
    monkeypatch.setattr(rent, "SystemClock", lambda: bench.clock)
    assert "gave up after 6 tries" in asked("rent", "gpu_1x_a10", "--name", "a", code=1)
    bench.fake.faults = [("instance-types", "500")] * 7
    assert asked("rent", "gpu_1x_a10", "--name", "a", "--wait", "30")["name"] == "a"
    assert len(bench.fake.alive()) == 1


def test_a_launch_whose_answer_and_machine_are_lost_is_one_line_of_what_to_do(bench):
    bench.fake.faults = [("launch", "dropped")]
    with pytest.raises(AnswerLost, match=r"^a: the launch got no answer, and no machine surgvqa-\S+ is listed yet"):
        bench.rent()
    with pytest.raises(UsageError, match="expected a to z"):
        bench.rent("../../etc")
