"""A run that is fetched from a real sshd."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from sshd import (
    TRAIN,
    Relay,
    laptop,  # noqa: F401
    stub_train,
)

from remote.jobs import launch, run_events
from remote.jobs.fetch import fetch
from surgvqa.runs.folder import Run

pytestmark = pytest.mark.slow


def test_a_run_comes_home_verified_and_resumed(laptop):  # noqa: F811
    stub_train(laptop)
    relay = Relay(laptop.server.port)
    laptop.server.write_config(port=relay.port)
    target = laptop.workspace / "home"
    with laptop.connect() as remote:
        command, *argv = [*TRAIN, "--max_steps", "2"]
        run = launch.launch(remote, command, argv, needs=[])["run"]
        list(run_events.RunEvents(remote, run))
        big = laptop.there / "runs" / run / "adapter" / "adapter_model.safetensors"
        big.write_bytes(os.urandom(30_000_000))
        progress = Run.create(laptop.workspace / "runs", "fetch")
        emit, cuts = progress.progress, []

        def cut(phase, done, total, unit, **more):
            emit(phase, done, total, unit, **more)
            if done > 10_000_000 and not cuts:
                cuts.append(done)
                relay.cut()

        progress.progress = cut
        answer = fetch(remote, f"runs/{run}", target / run, progress)
    assert cuts and answer["received_bytes"] < 31_000_000 + 2_000_000
    assert (target / run / "adapter" / big.name).read_bytes() == big.read_bytes()
    assert not (target / run / ".partial").exists() and not (target / run / "adapter" / "optimizer.pt").exists()
    relay.close()
    laptop.server.write_config()
    again = laptop.here("fetch", "gpuhost", "last", "--to", str(target))
    assert again["received_bytes"] == 0 and again["files"] == answer["files"]
    everything = laptop.here("fetch", "gpuhost", "last", "--to", str(target), "--all")
    assert everything["files"] > again["files"] and (target / run / "adapter" / "optimizer.pt").exists()


@pytest.mark.parametrize("banner", ["printf no-newline", "seq 200000"])
def test_a_run_comes_home_past_a_talkative_login_shell(laptop, banner):  # noqa: F811
    laptop.server.stop()
    laptop.server.extra = f'ForceCommand {banner}; eval "$SSH_ORIGINAL_COMMAND"'
    laptop.server.start()
    folder = laptop.there / "runs" / "20260101-000000-train-abc"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"id": folder.name, "command": "train", "started": 1}))
    assert laptop.here("fetch", "gpuhost", "last")["files"] == 1


def test_a_run_that_goes_on_comes_home_as_it_was_listed(laptop):  # noqa: F811
    """While files come, one grows and a checkpoint is rotated away; the next fetch brings what was added."""
    folder = laptop.there / "runs" / "20260101-000000-train-abc"
    (folder / "checkpoint-10").mkdir(parents=True)
    for name in ("checkpoint-10/adapter.bin", "events.jsonl", "run.json", "start.json"):
        (folder / name).write_text("{}\n")
    target = laptop.workspace / "home"
    progress = Run.create(laptop.workspace / "runs", "fetch")
    with laptop.connect() as remote:
        call = remote.call

        def then_it_goes_on(op, **params):
            answer = call(op, **params)
            (folder / "checkpoint-10" / "adapter.bin").unlink()
            (folder / "events.jsonl").write_text("{}\n{}\n")
            return answer

        remote.call = then_it_goes_on
        fetch(remote, f"runs/{folder.name}", target, progress, everything=True)
    assert sorted(f.name for f in target.rglob("*") if f.is_file()) == ["events.jsonl", "run.json"]
    assert (target / "events.jsonl").read_text() == "{}\n"
    assert "checkpoint-10/adapter.bin is gone there meanwhile" in (progress.folder / "events.jsonl").read_text()
    with laptop.connect() as remote:
        fetch(remote, f"runs/{folder.name}", target, progress, everything=True)
    assert (target / "events.jsonl").read_text() == "{}\n{}\n"


def test_a_disk_that_is_full_here_is_one_line(laptop):  # noqa: F811
    """A limit on the size of files stands in for it."""
    folder = laptop.there / "runs" / "20260101-000000-train-abc"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"id": folder.name, "command": "train", "started": 1}))
    (folder / "big").write_bytes(bytes(3_000_000))
    words = f"ulimit -f 1000; exec {sys.executable} -m remote fetch gpuhost last"
    done = subprocess.run(["bash", "-c", words], cwd=laptop.workspace, capture_output=True, text=True, timeout=60)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert last.startswith("surgvqa-remote fetch: ") and "File too large" in last and "big" in last


def test_fetch_reads_what_is_here_already(laptop):  # noqa: F811
    """A file of the right size and time is not believed: its hash is asked for, no byte of a good one is sent."""
    there = laptop.there / "runs" / "20260101-000000-train-abc"
    there.mkdir(parents=True)
    (there / "run.json").write_text('{"id": "20260101-000000-train-abc", "command": "train", "started": 1}')
    (there / "adapter.safetensors").write_bytes(b"x" * 100_000)
    laptop.here("fetch", "gpuhost", there.name)
    assert laptop.here("fetch", "gpuhost", there.name)["received_bytes"] == 0
    here = laptop.workspace / "runs" / there.name / "adapter.safetensors"
    status = here.stat()
    here.write_bytes(b"y" * 100_000)
    os.utime(here, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert laptop.here("fetch", "gpuhost", there.name)["received_bytes"] == 100_000
    assert here.read_bytes() == b"x" * 100_000
