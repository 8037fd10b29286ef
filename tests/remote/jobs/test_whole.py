"""The whole way on the demo: setup, upload, merge there, launch, follow, kill, stop, resume, fetch, evaluate."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sshd import laptop, venv_there  # noqa: F401

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


def test_the_whole_way_equals_the_local_one(laptop):  # noqa: F811
    workspace = laptop.workspace
    venv_there(laptop)
    hosts = (workspace / "hosts.toml").read_text()
    shutil.rmtree(workspace)
    surgvqa(laptop.root, "demo", str(workspace))
    (workspace / "hosts.toml").write_text(hosts)
    lines = (workspace / "train.jsonl").read_text().splitlines()[:16]
    (workspace / "train.jsonl").write_text("\n".join(lines) + "\n")
    (workspace / "eval.jsonl").write_text("\n".join((workspace / "eval.jsonl").read_text().splitlines()[:8]) + "\n")

    assert laptop.json("setup", "gpuhost", "--extra", "")["doctor"]["ok"]
    sent = laptop.json("upload", "gpuhost", "--what", "adapter")
    assert sent["merged_on_host"]["state"] == "finished"
    run = laptop.json("launch", "gpuhost", "train", *SMALL)["run"]
    words = [sys.executable, "-m", "remote", "follow", "gpuhost", run]
    panel = subprocess.Popen(words, cwd=workspace, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    events = laptop.there / "runs" / run / "events.jsonl"
    deadline = time.monotonic() + 240
    while '"checkpoint"' not in (events.read_text() if events.exists() else ""):
        assert time.monotonic() < deadline and laptop.json("runs", "gpuhost")["runs"][0]["state"] != "died"
        time.sleep(0.2)
    panel.kill()  # whoever watches may go
    panel.wait()
    state = laptop.json("stop", "gpuhost", run)["state"]
    last = run
    if state == "stopped":  # a fast machine may have finished before
        last = laptop.json("resume", "gpuhost", run)["run"]
        assert laptop.json("follow", "gpuhost", last)["state"] == "finished"
    fetched = laptop.json("fetch", "gpuhost", last)
    laptop.there.rename(laptop.root / "given back")  # here the paths of the host mean nothing
    result = Path(fetched["folders"][-1])
    there = adapter(result)

    surgvqa(workspace, "merge")
    local = surgvqa(workspace, "train", *SMALL)
    here = adapter(workspace / "runs" / local["run"])
    assert there.keys() == here.keys()
    for name, tensor in here.items():
        assert tensor.equal(there[name]), name

    report = surgvqa(workspace, "evaluate", "--checkpoint", last)
    same = surgvqa(workspace, "evaluate", "--checkpoint", local["run"])
    assert report["samples"] == same["samples"] == 8
    assert report["by_type"] == same["by_type"]
