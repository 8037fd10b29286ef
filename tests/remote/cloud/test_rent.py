"""`surgvqa-remote rent local` and `end`: real sshds on loopback, the laptop's side killed at every stage."""

from __future__ import annotations

import contextlib
import json
import os
import time

import pytest
from lambda_fake import KEY, FakeLambda, VirtualClock
from renting_kit import alive, asked, killed_at
from sshd import why_not

from remote.cli import cloud, commands, main, rent
from remote.cloud import host_entry, local
from remote.cloud.api_key import ApiKey
from remote.cloud.lambda_cloud import LambdaCloud
from remote.cloud.ledger import Ledger, Record
from surgvqa.outcome import Outcome
from surgvqa.runs.process import descendants, process_identity

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=f"no sshd: {why_not()}")]

STAGES_OF_RENT = [(Ledger, "write"), (local.LocalMachines, "launch"), (host_entry, "write"), (host_entry, "vouch")]
STAGES_OF_END = [(local.LocalMachines, "terminate"), (Ledger, "write"), (host_entry, "remove")]


def run_there(home, run="20260101-000000-train-aaaa", state="finished"):
    """A run that ended on the machine, as its own supervisor left it."""
    (there,) = (home / "state" / "surgvqa" / "local").glob("*/home")
    folder = there / "surgvqa" / "runs" / run
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"id": run, "command": "train", "options": {}}))
    (folder / "events.jsonl").write_text(json.dumps({"time": 1.0, "kind": "state", "state": state}) + "\n")
    (folder / "predictions.jsonl").write_text("results\n")
    return folder


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_every_stage_one_machine_and_its_results_come_home(home, after):
    for owner, function in STAGES_OF_RENT:
        assert killed_at(owner, function, after, "rent", "local", "--name", "a"), function
        assert {m.name for m in alive()} <= {record.label for record in Ledger().records() if record.open}
        assert len(alive()) <= 1
    first = asked("rent", "local", "--name", "a")
    assert first["name"] == "a" and "host key" in first["host_key"]
    assert len(alive()) == 1 and [row["name"] for row in asked("rented")["rented"]] == ["a"]
    folder = run_there(home)
    for owner, function in STAGES_OF_END:
        assert killed_at(owner, function, after, "end", "a")
        fetched = home / "ws" / "runs" / folder.name / "predictions.jsonl"
        assert folder.exists() or fetched.read_text() == "results\n"
    ended = asked("end", "a")
    assert ended["state"] == "ended" and alive() == [] and not folder.exists()
    assert fetched.read_text() == "results\n"
    assert "[a]" not in (home / ".config" / "surgvqa" / "hosts.toml").read_text()
    assert asked("rented") == {"rented": [], "orphans": [], "others": [], "damaged": []}


def test_what_runs_or_cannot_be_asked_is_not_ended_and_what_is_discarded_is(home, monkeypatch):
    monkeypatch.setenv("LAMBDA_API_KEY", "a_secret_of_the_account")
    asked("rent", "local", "--name", "a")
    (machine,) = alive()
    read = 0
    for pid in local.LocalMachines()._processes(machine.id):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/environ", "rb") as environ:
            assert b"a_secret_of_the_account" not in environ.read()  # one that has just ended has no environment
            read += 1
    assert read
    folder = run_there(home)
    (folder / "events.jsonl").unlink()
    me = {"pid": os.getpid(), "identity": process_identity(os.getpid())}
    (folder / "run.json").write_text(json.dumps({"id": folder.name, "command": "train", "options": {}, **me}))
    assert f"not fetched yet: {folder.name} (it is running)" in asked("end", "a", code=1)
    assert [m.state for m in alive()] == ["active"]
    hosts = home / ".config" / "surgvqa" / "hosts.toml"
    kept = hosts.read_text()
    hosts.write_text(kept.replace("port = ", "port = 1 #"))
    monkeypatch.setattr(rent, "PATIENCE_S", 0.0)
    assert "NOT ENDED" in asked("end", "a", code=1) and alive()
    hosts.write_text("")  # the name may be another host's now, of ssh's configuration
    assert "hosts.toml does not have it" in asked("end", "a", code=1) and alive()
    hosts.write_text(kept)
    assert asked("end", "a", "--discard", folder.name)["fetched"] == [] and not alive()


def test_the_usual_mistakes_are_one_line(home):
    (home / "ws" / "hosts.toml").write_text('[taken]\naddress = "me@192.0.2.1"\n')
    assert "hosts.toml has a host of this name" in asked("rent", "local", "--name", "taken", code=2)
    assert "none is free in mars" in asked("rent", "local", "--region", "mars", code=1)
    assert "nothing of this name was rented" in asked("end", "nosuch", code=2)
    (home / ".ssh" / "id_ed25519.pub").unlink()
    assert "no public key to log in with" in asked("rent", "local", code=2)
    assert alive() == [] and Ledger().records() == []


def test_a_price_over_the_limit_and_an_unknown_type_rent_nothing(home, monkeypatch):
    clock = VirtualClock()
    fake = FakeLambda(clock)
    provider = LambdaCloud(ApiKey(KEY), clock, fake.transport())
    monkeypatch.setattr(cloud, "provider_of", lambda name="lambda": provider)
    assert "costs $0.75 an hour, more than --max_price 0.5" in asked("rent", "gpu_1x_a10", "--max_price", "0.5", code=1)
    assert "gpu_1x_h100_pcie: none is free anywhere now" in asked("rent", "gpu_1x_h100_pcie", code=1)
    assert "not on the price list: gpu_1x_a10, gpu_1x_h100_pcie" in asked("rent", "gpu_9x", code=2)
    assert fake.machines == {} and Ledger().records() == []


def test_every_command_says_what_costs_money_and_a_damaged_ledger_stops_none(home, capsys):
    ledger = Ledger()
    with ledger.locked("a"):
        for name, state in (("a", "rented"), ("b", "ended")):
            ledger.write(Record(name, "lambda", f"l-{name}", "gpu_1x_a10", "x", 0.75, time.time() - 7200, state, "i1"))
    assert main.main(["hosts"]) == 0
    said = capsys.readouterr().err
    assert "a is rented: $0.75 an hour, $1.50 so far; its end: surgvqa-remote end a" in said and "b is" not in said
    (ledger.folder / "a.json").write_text("{")
    assert main.main(["hosts"]) == 0 and "cannot be read" in capsys.readouterr().err


def test_setup_and_upload_follow_in_this_order_and_a_failed_one_is_a_failure(home, monkeypatch):
    done = []
    for name, good in (("set_up", True), ("upload", False)):
        monkeypatch.setattr(commands, name, lambda a, w, name=name, good=good: done.append((name, a.host)) or
                            Outcome({}, ok=good))  # fmt: skip
    asked("rent", "local", "--name", "a", "--setup", "--upload", code=1)
    assert done == [("set_up", "a"), ("upload", "a")] and len(alive()) == 1


def test_what_ends_the_renting_process_does_not_end_the_machine(home):
    asked("rent", "local", "--name", "a")
    (machine,) = alive()
    sshds = local.LocalMachines()._processes(machine.id)
    assert sshds and not set(sshds) & set(descendants(os.getpid()))
