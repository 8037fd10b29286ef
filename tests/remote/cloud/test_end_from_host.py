"""`--end_from host`: results elsewhere first, verified; then the end; the key in one memory alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import ClassVar

import pytest
from lambda_fake import KEY as FAKE_KEY
from lambda_fake import FakeLambda, VirtualClock
from local_server import LocalServer
from rclone_fake import GIVEN, SECRET, FakeRclone
from renting_kit import STUB_EVALUATE, a_workspace, asked
from sshd import laptop, start, stub_train, why_not  # noqa: F401
from waiting import until

from remote.agent import ending
from remote.agent.protocol import IDLE_S
from remote.cli import cloud, then
from remote.cloud import renting
from remote.cloud.api_key import ApiKey
from remote.cloud.lambda_cloud import LambdaCloud
from remote.cloud.ledger import Ledger
from surgvqa.errors import SurgvqaError, UsageError

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=f"no sshd: {why_not()}")]

KEY = "Bearer secret_of_the_account_0123456789"


class Provider(LocalServer):
    """Says terminated once it was asked twice to terminate; the first time it fails. Notes what `results` has then."""

    def __init__(self, results):
        super().__init__()
        self.results, self.asked = results, []
        self.revoked = False

    def answer(self, request):
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        assert request.headers["Authorization"] == KEY
        if request.command == "POST":
            self.asked.append((json.loads(body), sorted(f.name for f in self.results.rglob("*") if f.is_file())))
        status = 401 if self.revoked else 500 if request.command == "POST" and len(self.asked) == 1 else 200
        data = json.dumps({"data": {"status": "terminated" if len(self.asked) > 1 else "active"}}).encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)


def places_of_the_key(root):
    """Files below `root`, and processes of this machine by what others may read of them. A running rclone may have the
    secret in its environment: docs/cloud.md says so."""
    secrets = (KEY[7:].encode(), SECRET.encode())
    files = [f for f in root.rglob("*") if f.is_file() and f.name != "rclone"]  # the fake knows what it expects
    found = [file for file in files if any(secret in file.read_bytes() for secret in secrets)]
    for entry in os.listdir("/proc"):
        for name in ("cmdline", "environ") if entry.isdigit() else ():
            try:
                content = Path("/proc", entry, name).read_bytes()
                copies = name == "environ" and b"rclone" in Path("/proc", entry, "cmdline").read_bytes()
            except OSError:
                continue
            if copies:
                continue
            found += [f"{entry}/{name}"] * any(secret in content for secret in secrets)
    return found


@pytest.mark.parametrize(("steps", "limit_s"), [("60", 1.0), ("2", None)])
def test_results_are_in_s3_before_the_machine_is_ended(laptop, tmp_path, steps, limit_s):  # noqa: F811
    (tmp_path / "bin").mkdir()
    rclone = FakeRclone(tmp_path / "bin")
    laptop.server.environment = f"PATH={rclone.path}"
    laptop.server.stop()
    laptop.server.start()
    stub_train(laptop)
    with open(laptop.root / "site" / "sitecustomize.py", "a") as site:
        site.write(STUB_EVALUATE)
    provider = Provider(rclone.bucket)
    with laptop.connect() as remote:
        there = {"given": GIVEN, "machine_id": "i1", "url": f"{provider.url}/api/v1", "authorization": KEY}
        with pytest.raises(UsageError, match="lies on this machine's own disk"):
            remote.call("can_end", target=str(laptop.root), **there)
        with pytest.raises(SurgvqaError, match="rsync: "):
            remote.call("can_end", target="nosuch.invalid:x", **there)
        there["target"] = "s3://bucket/a"
        provider.revoked = True
        with pytest.raises(SurgvqaError, match=r"cannot ask the provider, so it cannot end itself: .*HTTP 401"):
            remote.call("can_end", **there)
        provider.revoked = False
        assert remote.call("can_end", **there) == {} and provider.asked == []
        run = start(remote, "--max_steps", steps)
        words = ["evaluate", "--checkpoint", run, "--eval_data_path=train.jsonl", "--frames_dir=frames"]
        asked = {"venv": remote.host.entry.venv, "run": run, "evaluate": [*words, "--audio_dir=audio"],
                 "token": "0a", "limit_s": limit_s, **there}  # fmt: skip
        first = remote.call("end_from_here", **asked)
        assert remote.call("end_from_here", **asked)["pid"] == first["pid"]
        found = remote.call("ending")
        assert found["alive"] and found["idle_s"] < 60
    assert places_of_the_key(laptop.root) == []
    until(lambda: provider.asked)
    (words, there), *_ = provider.asked
    assert words == {"instance_ids": ["i1"]} and "exit.json" in there
    assert ("predictions.jsonl" in there) == (limit_s is None)  # over its limit it is stopped, and not evaluated
    copied = rclone.bucket / "a" / "runs" / run
    assert (copied / "events.jsonl").read_bytes() == (laptop.there / "runs" / run / "events.jsonl").read_bytes()
    noted_file = laptop.there / ".surgvqa" / "ending.json"
    noted = until(lambda: (seen := json.loads(noted_file.read_text()))["problem"] and seen)
    assert "HTTP 500" in noted["problem"] and noted["busy_at"] and places_of_the_key(laptop.root) == []
    os.kill(noted["pid"], 9)
    provider.close()


class Bench:
    """A machine's workspace, its GPU and its clock. `runs`: when each ends by itself; "" is what the copy meets."""

    def __init__(self, folder, monkeypatch, runs):
        self.now, self.gpu, self.stages, self.copies, self.faults = 1e9, [], [], [], []
        self.ends, self.stopped = dict(runs), {}
        self.workspace = folder
        (folder / "runs").mkdir()
        for name in ("monotonic", "time"):
            monkeypatch.setattr(ending.time, name, lambda: self.now)
        monkeypatch.setattr(ending.time, "sleep", self.sleep)
        monkeypatch.setattr(ending, "_listed", lambda _: sorted(self.ends))
        monkeypatch.setattr(ending, "_active", lambda _, run: run not in self.stopped and self.now < self.ends[run])
        monkeypatch.setattr(ending, "stop", lambda _, ws, run, grace_s: self.stopped.setdefault(run, self.now))
        monkeypatch.setattr(ending, "nvidia_smi", lambda *_: [[cell] for cell in self.gpu] or None)
        monkeypatch.setattr(ending.jobs, "launch", self.launch)
        monkeypatch.setattr(ending.results, "copy", self.copy)

    def sleep(self, seconds):
        self.now += seconds

    def launch(self, channel, workspace, venv, command, *_):
        self.ends[command] = self.now + 1e6
        return {"run": command}

    def copy(self, workspace, folders, target, given):
        if self.faults:
            raise SurgvqaError(self.faults.pop(0))
        self.copies.append((sorted(self.ends), folders))
        if len(self.copies) == 1:
            self.ends |= self.late

    late: ClassVar[dict] = {}

    def finish(self, limit_s=None, evaluate=()):
        bench = self

        class Note(ending._Note):
            def __call__(self, stage, problem=""):
                super().__call__(stage, problem)
                bench.stages.append((stage, problem))

        self.note = Note(self.workspace / "ending.json")
        self.note("job")
        ending._finish(str(self.workspace), "", "train", list(evaluate), "0a", "/nfs", {}, limit_s, self.note)


@pytest.mark.parametrize(
    ("gpu", "stopped"), [(["3", "0"], True), (["3", "10"], False), (["[N/A]"], False), ([], False)]
)
def test_a_run_that_leaves_the_gpu_idle_after_the_job_is_stopped(tmp_path, monkeypatch, gpu, stopped):
    """An evaluation, and another run of the machine; never the job itself."""
    bench = Bench(tmp_path, monkeypatch, {"train": 1e9 + 7200, "other": 1e9 + 1e6})
    bench.gpu = gpu
    bench.finish(evaluate=["evaluate"], limit_s=2e4)
    assert set(bench.stopped) == ({"evaluate", "other"}) and bench.copies[-1][0] == ["evaluate", "other", "train"]
    after = bench.stopped["evaluate"] - (1e9 + 7200)
    assert (IDLE_S <= after <= IDLE_S + 60) if stopped else after > 1e4


def test_a_run_that_begins_while_others_are_copied_is_waited_for_and_copied_too(tmp_path, monkeypatch):
    bench = Bench(tmp_path, monkeypatch, {"train": 1e9 + 60})
    bench.gpu, bench.late = ["99"], {"late": 1e9 + 9000}
    bench.finish()
    assert [names for names, _ in bench.copies] == [["train"], ["late", "train"]] and bench.now >= 1e9 + 9000
    assert bench.stopped == {} and ("wait for late", "") in bench.stages


def test_a_copy_is_tried_for_ever_and_the_idle_machine_is_told(tmp_path, monkeypatch):
    bench = Bench(tmp_path, monkeypatch, {"train": 1e9 + 60})
    bench.faults = ["s3://bucket: rclone: AccessDenied"] * 100
    monkeypatch.setattr(ending, "_note_file", lambda _: tmp_path / "ending.json")
    told = []
    monkeypatch.setattr(ending.time, "sleep", lambda s: (Bench.sleep(bench, s), told.append(ending.ending(None, ""))))
    bench.finish()
    assert len(bench.copies) == 1 and told[0]["idle_s"] == 0.0  # while the job runs
    assert told[-1]["idle_s"] == 3000.0 and told[-1]["alive"]
    assert (told[-1]["stage"], told[-1]["problem"]) == ("copy to /nfs", "s3://bucket: rclone: AccessDenied")


def test_what_a_run_wrote_outside_of_runs_is_copied_too(tmp_path):
    for name in ("runs/a", "runs/b", "out/a", "disk"):
        (tmp_path / name).mkdir(parents=True)
    for run, output in (("a", "out/a"), ("b", "runs/a")):
        info = {"id": run, "cwd": str(tmp_path), "options": {"output_dir": {"value": output}}}
        (tmp_path / "runs" / run / "run.json").write_text(json.dumps(info))
    assert ending._folders(str(tmp_path)) == ["runs", "out/a"]


def fail(text):
    raise SurgvqaError(text)


def test_the_laptop_hands_over_and_looks_again(home, monkeypatch):
    """Against the fake provider; what the machine does is tested above."""
    clock = VirtualClock()
    fake = FakeLambda(clock)
    provider = LambdaCloud(ApiKey(FAKE_KEY), clock, fake.transport())
    monkeypatch.setattr(cloud, "provider_of", lambda name="lambda": provider)
    provider.add_key("k", "ssh-ed25519 AAAA me")
    record = renting.rent(provider, Ledger(), clock, provider.offers()[0], "us-east-1", "a", "k")
    a_workspace()
    handed, problems, checked = [], [""], [lambda: fail("no bucket"), lambda: None]
    monkeypatch.setattr(then._OnHost, "__init__", lambda self, *_: None)
    monkeypatch.setattr(then._OnHost, "launch", lambda *_: "20260101-000000-train-aaaa")
    monkeypatch.setattr(then._OnHost, "check_end", lambda self, plan: checked.pop(0)())
    monkeypatch.setattr(then._OnHost, "hand_over", lambda self, plan, limit_s: handed.append((plan.results, limit_s)))
    monkeypatch.setattr(then._OnHost, "handed", lambda self: problems[0])
    words = ("launch", "a", "train", "--then", "fetch,terminate", "--end_from", "host")
    assert "needs --then" in asked(*words, code=2)
    assert "is a URL of another kind" in asked(*words, "--results", "https://bucket/runs", code=2)
    assert "--results: is for --end_from host" in asked(*words[:-2], "--results", "/nfs/x", code=2)
    assert "no bucket" in asked(*words, "--results", "s3://bukket/x", code=1) and handed == []
    said = asked(*words, "--results", "/nfs/x", "--max_hours", "2e6")  # nothing is left of the plan that was refused
    assert "is under way there" in asked(*words, "--results", "/nfs/y", code=2)
    assert said["handed"] and not said["ended"] and handed[0][0] == "/nfs/x" and 0 < handed[0][1] <= 2e6 * 3600
    problems[0] = "terminate: HTTP 500"
    asked("launch", "a", code=1)
    assert len(handed) == 1 and Ledger().read("a").open
    fake.machines[record.machine_id]["ends"] = 0.0
    assert asked("launch", "a")["ended"] and not Ledger().read("a").open
