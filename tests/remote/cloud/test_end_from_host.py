"""`--end_from host`: results elsewhere first, verified; then the end; the key in one memory alone."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from lambda_fake import KEY as FAKE_KEY
from lambda_fake import FakeLambda, VirtualClock
from local_server import LocalServer
from renting_kit import STUB_EVALUATE, a_workspace, asked
from sshd import laptop, start, stub_train, why_not  # noqa: F401
from waiting import until

from remote.agent import ending
from remote.cli import cloud, then
from remote.cloud import renting
from remote.cloud.api_key import ApiKey
from remote.cloud.lambda_cloud import LambdaCloud
from remote.cloud.ledger import Ledger
from surgvqa.errors import SurgvqaError, UsageError

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=f"no sshd: {why_not()}")]

KEY = "Bearer secret_of_the_account_0123456789"


class Provider(LocalServer):
    """Says terminated once it was asked twice to terminate; the first time it fails."""

    def __init__(self, results):
        super().__init__()
        self.results, self.asked = results, []

    def answer(self, request):
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        assert request.headers["Authorization"] == KEY
        if request.command == "POST":
            self.asked.append((json.loads(body), sorted(f.name for f in self.results.rglob("*") if f.is_file())))
        status = 500 if request.command == "POST" and len(self.asked) == 1 else 200
        data = json.dumps({"data": {"status": "terminated" if len(self.asked) > 1 else "active"}}).encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)


@pytest.fixture
def results():
    """A folder on another file system than the workspace."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


def places_of_the_key(root):
    """Files below `root`, and processes of this machine by what others may read of them."""
    found = [file for file in root.rglob("*") if file.is_file() and KEY[7:].encode() in file.read_bytes()]
    for entry in os.listdir("/proc"):
        for name in ("cmdline", "environ") if entry.isdigit() else ():
            try:
                content = Path("/proc", entry, name).read_bytes()
            except OSError:
                continue
            found += [f"{entry}/{name}"] * (KEY[7:].encode() in content)
    return found


@pytest.mark.parametrize(("steps", "limit_s"), [("60", 1.0), ("2", None)])
def test_results_are_elsewhere_before_the_machine_is_ended(laptop, results, steps, limit_s):  # noqa: F811
    stub_train(laptop)
    with open(laptop.root / "site" / "sitecustomize.py", "a") as site:
        site.write(STUB_EVALUATE)
    provider = Provider(results)
    with laptop.connect() as remote:
        run = start(remote, "--max_steps", steps)
        words = ["evaluate", "--checkpoint", run, "--eval_data_path=train.jsonl", "--frames_dir=frames"]
        asked = {"venv": remote.host.entry.venv, "run": run, "evaluate": [*words, "--audio_dir=audio"],
                 "token": "0a", "limit_s": limit_s,
                 "machine_id": "i1", "url": f"{provider.url}/api/v1", "authorization": KEY}  # fmt: skip
        with pytest.raises(UsageError, match="lies on the disk of this machine"):
            remote.call("end_from_here", results=str(laptop.root), **asked)
        with pytest.raises(SurgvqaError, match="rsync to nosuch"):
            remote.call("end_from_here", results="nosuch.invalid:x", **asked)
        first = remote.call("end_from_here", results=str(results), **asked)
        assert remote.call("end_from_here", results=str(results), **asked)["pid"] == first["pid"]
        assert remote.call("ending")["alive"]
    assert places_of_the_key(laptop.root) == []
    until(lambda: provider.asked)
    (words, there), *_ = provider.asked
    assert words == {"instance_ids": ["i1"]} and "exit.json" in there
    assert ("predictions.jsonl" in there) == (limit_s is None)  # over its limit it is stopped, and not evaluated
    copied = results / "runs" / run
    assert (copied / "events.jsonl").read_bytes() == (laptop.there / "runs" / run / "events.jsonl").read_bytes()
    noted_file = laptop.there / ".surgvqa" / "ending.json"
    noted = until(lambda: (seen := json.loads(noted_file.read_text()))["problem"] and seen)
    assert "HTTP 500" in noted["problem"] and places_of_the_key(laptop.root) == []
    os.kill(noted["pid"], 9)
    provider.close()


def test_a_copy_is_verified_and_rsync_too(tmp_path, results, monkeypatch):
    file = tmp_path / "runs" / "r" / "adapter.bin"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    (tmp_path / "runs" / "r" / "start.json").write_text("secret")
    ending.copy_results(str(tmp_path / "runs"), str(results))
    there = results / "runs" / "r" / "adapter.bin"
    there.write_bytes(b"WEIGHTS")  # damaged, and of the same size
    ending.copy_results(str(tmp_path / "runs"), str(results))
    assert there.read_bytes() == b"weights" and os.listdir(there.parent) == ["adapter.bin"]
    there.unlink()
    there.mkdir()
    with pytest.raises(SurgvqaError, match=r"adapter\.bin"):
        ending.copy_results(str(tmp_path / "runs"), str(results))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "ssh").write_text('#!/bin/sh\nwhile [ "$1" != there ]; do shift; done; shift; exec sh -c "$*"\n')
    (tmp_path / "ssh").chmod(0o755)
    ending.copy_results(str(tmp_path / "runs"), f"there:{results}/far")
    far = results / "far" / "runs" / "r"
    assert (far / "adapter.bin").read_bytes() == b"weights" and os.listdir(far) == ["adapter.bin"]


def test_the_laptop_hands_over_and_looks_again(home, monkeypatch):
    """Against the fake provider; what the machine does is tested above."""
    clock = VirtualClock()
    fake = FakeLambda(clock)
    provider = LambdaCloud(ApiKey(FAKE_KEY), clock, fake.transport())
    monkeypatch.setattr(cloud, "provider_of", lambda name="lambda": provider)
    provider.add_key("k", "ssh-ed25519 AAAA me")
    record = renting.rent(provider, Ledger(), clock, provider.offers()[0], "us-east-1", "a", "k")
    a_workspace()
    handed, problems = [], [""]
    monkeypatch.setattr(then._OnHost, "__init__", lambda self, *_: None)
    monkeypatch.setattr(then._OnHost, "launch", lambda *_: "20260101-000000-train-aaaa")
    monkeypatch.setattr(then._OnHost, "hand_over", lambda self, plan, limit_s: handed.append((plan.results, limit_s)))
    monkeypatch.setattr(then._OnHost, "handed", lambda self: problems[0])
    words = ("launch", "a", "train", "--then", "fetch,terminate", "--end_from", "host")
    assert "needs --then" in asked(*words, code=2)
    assert "is a URL" in asked(*words, "--results", "s3://bucket/runs", code=2)
    assert "--results: is for --end_from host" in asked(*words[:-2], "--results", "/nfs/x", code=2)
    said = asked(*words, "--results", "/nfs/x", "--max_hours", "2e6")
    assert said["handed"] and not said["ended"] and handed[0][0] == "/nfs/x" and 0 < handed[0][1] <= 2e6 * 3600
    problems[0] = "terminate: HTTP 500"
    asked("launch", "a", code=1)
    assert len(handed) == 1 and Ledger().read("a").open
    fake.machines[record.machine_id]["ends"] = 0.0
    assert asked("launch", "a")["ended"] and not Ledger().read("a").open
