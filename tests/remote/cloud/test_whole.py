"""From nothing to a result, and the machine is gone: on real parts, the laptop's side killed at every stage."""

from __future__ import annotations

import json
import os

import pytest
from renting_kit import a_venv_of_stubs, a_workspace, alive, asked, killed_at
from sshd import why_not
from waiting import until

from remote.cli import commands, then
from remote.cloud import host_entry, local, plan
from remote.cloud.ledger import Ledger
from remote.jobs import home as homewards
from remote.jobs import launch as jobs
from remote.upload import command as upload_command
from surgvqa.outcome import Outcome
from surgvqa.runs.events import finished_event

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=f"no sshd: {why_not()}")]

TRAIN = ("launch", "a", "train", "--max_steps", "3", "--then", "evaluate,fetch,terminate")
STAGES = [  # in the order in which they come; each is gone on with from where the one before left it
    (plan.Plans, "write", False),
    (plan.Plans, "write", True),
    (jobs, "launch", True),
    (then._OnHost, "watch", False),
    (then._OnHost, "watch", True),
    (jobs, "launch", True),  # of the evaluation
    (then._OnHost, "watch", True),
    (homewards, "bring_home", False),
    (homewards, "fetch_run", True),
    (homewards, "bring_home", True),
    (local.LocalMachines, "terminate", False),
    (local.LocalMachines, "terminate", True),
    (host_entry, "remove", False),
]


def test_from_nothing_to_a_result_killed_at_every_stage(home):
    a_workspace()
    assert killed_at(local.LocalMachines, "launch", True, "rent", "local", "--name", "a")
    asked("rent", "local", "--name", "a")
    a_venv_of_stubs(home)
    assert killed_at(upload_command, "send_item", True, "upload", "a", "--what", "merged")
    asked("upload", "a", "--what", "merged")
    (machine,) = alive()
    there = home / "state" / "surgvqa" / "local" / machine.name / "home" / "surgvqa" / "runs"
    run = ""
    for owner, function, after in STAGES:
        words = TRAIN if owner is plan.Plans else ("launch", "a")
        assert killed_at(owner, function, after, *words), (function, after)
        if there.exists():  # not terminated
            runs = sorted(os.listdir(there))
            assert [r.split("-")[2] for r in runs] in ([], ["train"], ["evaluate", "train"], ["train", "evaluate"])
            run = next((r for r in runs if "train" in r), run)
    assert not there.exists() and alive() == []
    bill = asked("launch", "a")
    assert (bill["run"], bill["state"], bill["ended"], bill["cut"]) == (run, "finished", True, "")
    assert bill["evaluation"]["keyword_accuracy"] == 0.75 and bill["cost"] == 0.0
    here = home / "ws" / "runs"
    assert (here / run / "adapter" / "adapter_model.safetensors").stat().st_size == 3_000_000
    assert run in (here / bill["evaluation"]["run"] / "predictions.jsonl").read_text()
    assert "[a]" not in (home / ".config" / "surgvqa" / "hosts.toml").read_text()
    assert asked("rented")["rented"] == [] and not Ledger().read("a").open
    assert "ended already" in asked(*TRAIN, code=2)


def test_one_command_does_it_all_and_said_again_after_its_last_step_it_rents_nothing(home, monkeypatch):
    a_workspace()
    monkeypatch.setattr(commands, "set_up", lambda *_: a_venv_of_stubs(home) or Outcome({}))
    words = ("rent", "local", "--name", "a", "train", "--max_steps", "2", "--then", "evaluate,fetch,terminate")
    assert killed_at(host_entry, "remove", False, *words)
    monkeypatch.setattr(local.LocalMachines, "launch", lambda *_: pytest.fail("rented again"))
    bill = asked(*words)
    assert bill["state"] == "finished" and bill["ended"] and alive() == []
    assert (home / "ws" / "runs" / bill["run"] / "adapter" / "adapter_model.safetensors").exists()


@pytest.fixture
def rented(home):
    a_workspace()
    asked("rent", "local", "--name", "a")
    a_venv_of_stubs(home)
    asked("upload", "a", "--what", "merged")
    return home


def test_what_is_made_comes_home_meanwhile_and_a_machine_that_dies_takes_little_with_it(rented):
    words = ("--then", "fetch,terminate", "--sync", "--run_name", "saves", "--detach")
    started = asked("launch", "a", "train", *words)
    (here := rented / "ws" / "runs").mkdir(exist_ok=True)
    until(lambda: [f.read_bytes() for f in here.glob("*-train-*/checkpoint-1/adapter_model.safetensors")] == [b"saved"])
    (machine,) = alive()
    assert "a" in [row["name"] for row in asked("rented")["rented"]]
    local.LocalMachines().terminate(machine.id)
    until(lambda: finished_event(here / started["run"]))
    assert "has ended it; lost is what was not fetched of 2" in (here / started["run"] / "events.jsonl").read_text()
    assert asked("rented")["rented"] == []


def test_over_its_limit_the_job_is_stopped_and_comes_home(rented):
    asked("launch", "a", "train", "--then", "evaluate,fetch,terminate", "--max_hours", "0.0001", code=1)
    (run,) = (rented / "ws" / "runs").glob("*-train-*")
    assert finished_event(run)["state"] == "stopped" and alive() == []
    (plan_file,) = (Ledger().folder / "plans").glob("a.json")
    assert json.loads(plan_file.read_text())["cut"] == "rented for 0.0 hours, --max_hours 0.0001"


def test_a_plan_that_makes_no_sense_is_refused_before_anything_starts(home):
    assert "not rented from here" in asked(*TRAIN, code=2)
    assert "--max_cost: needs --then" in asked("launch", "a", "train", "--max_cost", "5", code=2)
    assert "--max_cost: needs --then" in asked("rent", "local", "--max_cost", "5", code=2)
    assert "--then: name the job" in asked("rent", "local", "--then", "fetch", code=2)
    assert "name the command to launch" in asked("launch", "a", code=2)
    assert "terminate without fetch would lose" in asked("launch", "a", "train", "--then", "terminate", code=2)
    assert "'sell': expected some of evaluate,fetch,terminate" in asked("launch", "a", "--then", "sell", code=2)
    asked("rent", "local", "--name", "a")
    a_workspace()
    assert "no job with --then is under way" in asked("launch", "a", code=2)
    assert "follows train, not merge" in asked("launch", "a", "merge", "--then", "evaluate", code=2)
    a_venv_of_stubs(home)
    assert killed_at(plan.Plans, "write", True, *TRAIN)
    assert "train is under way there" in asked(*TRAIN, "--seed", "7", code=2)
    assert "another command" not in asked("end", "a")
