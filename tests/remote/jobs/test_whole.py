"""The whole way on the demo: setup, upload, merge there, launch, follow, kill, stop, resume, fetch, evaluate."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sshd import laptop, venv_there  # noqa: F401
from waiting import until

from surgvqa.demo import workspace as demo

pytestmark = [pytest.mark.slow, pytest.mark.model]

SMALL = ("--max_steps", "6", "--num_frames", "2", "--eval_strategy", "no", "--save_strategy", "steps")
SMALL += ("--save_steps", "2", "--load_best_model_at_end", "false", "--seed", "7")


def surgvqa(folder: Path, *words: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "surgvqa", *words, "--json"], cwd=folder, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def adapter(folder: Path) -> dict:
    from safetensors.torch import load_file

    files = [f for f in sorted(folder.rglob("adapter_model.safetensors")) if "checkpoint-" not in f.parent.name]
    assert len(files) == 1, files
    return load_file(files[0])


def small_demo(folder: Path, monkeypatch) -> None:
    """A demo workspace of a few clips."""
    splits = tuple(demo.Split(s.file, s.video_id, s.wording, 1, 4) for s in demo.SPLITS)
    monkeypatch.setattr(demo, "SPLITS", splits)
    monkeypatch.setattr(demo, "WORD_LISTS", 20)
    demo.make_workspace(folder, 0)


def test_the_whole_way_equals_the_local_one(laptop, monkeypatch):  # noqa: F811
    workspace = laptop.workspace
    venv_there(laptop)
    hosts = (workspace / "hosts.toml").read_text()
    shutil.rmtree(workspace)
    small_demo(workspace, monkeypatch)
    (workspace / "hosts.toml").write_text(hosts)
    lines = (workspace / "train.jsonl").read_text().splitlines()[:16]
    (workspace / "train.jsonl").write_text("\n".join(lines) + "\n")
    (workspace / "eval.jsonl").write_text("\n".join((workspace / "eval.jsonl").read_text().splitlines()[:8]) + "\n")

    assert laptop.here("setup", "gpuhost", "--extra", "")["doctor"]["ok"]
    sent = laptop.here("upload", "gpuhost", "--what", "adapter")
    assert sent["merged_on_host"]["state"] == "finished"
    run = laptop.here("launch", "gpuhost", "train", *SMALL)["run"]
    words = [sys.executable, "-m", "remote", "follow", "gpuhost", run]
    panel = subprocess.Popen(words, cwd=workspace, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    events = laptop.there / "runs" / run / "events.jsonl"
    until(lambda: '"checkpoint"' in (events.read_text() if events.exists() else ""), 240)
    panel.kill()  # whoever watches may go
    panel.wait()
    state = laptop.here("stop", "gpuhost", run)["state"]
    last = run
    if state == "stopped":  # a fast machine may have finished before
        last = laptop.here("resume", "gpuhost", run)["run"]
        assert laptop.here("follow", "gpuhost", last)["state"] == "finished"
    fetched = laptop.here("fetch", "gpuhost", last)
    laptop.there.rename(laptop.root / "given back")  # here the paths of the host mean nothing
    result = Path(fetched["folders"][-1])
    there = adapter(result)

    surgvqa(workspace, "merge")
    local = surgvqa(workspace, "train", *SMALL)
    here = adapter(workspace / "runs" / local["run"])
    assert there.keys() == here.keys()
    for name, tensor in here.items():
        assert tensor.equal(there[name]), name

    assert surgvqa(workspace, "evaluate", "--checkpoint", last)["samples"] == 8  # what came home can be used
