"""A laptop that rents `local` machines: real sshds on loopback, and commands that are killed where a test says."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from sshd import STUB_TRAIN, end_processes_below

from remote.cli import main
from remote.cloud import local


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A laptop with a key pair and nothing else."""
    (tmp_path / "ws").mkdir()
    (tmp_path / ".ssh").mkdir(mode=0o700)
    key = tmp_path / ".ssh" / "id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    config = tmp_path / "ssh_config"
    config.write_text(f"UserKnownHostsFile {tmp_path}/.ssh/known_hosts\nGlobalKnownHostsFile /dev/null\n")
    for name, value in {"HOME": tmp_path, "XDG_STATE_HOME": tmp_path / "state", "SURGVQA_SSH_CONFIG": config}.items():
        monkeypatch.setenv(name, str(value))
    for name in ("LAMBDA_API_KEY", "SSH_AUTH_SOCK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path / "ws")
    yield tmp_path
    end_processes_below(tmp_path)


def asked(*words, code=0):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        got = main.main([*words, "--json"])
    assert got == code, err.getvalue()
    return json.loads(out.getvalue()) if code == 0 else err.getvalue()


def killed_at(owner, function, after, *words):
    """Runs the command in a process that kills itself (-9) before or after its first call of `function`."""
    child = os.fork()
    if child == 0:
        real = getattr(owner, function)

        def dies(*arguments, **options):
            if after:
                real(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, function, dies)
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
                main.main([*words])
        finally:
            os._exit(7)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def alive():
    return local.LocalMachines().machines()


STUB_EVALUATE = """
def evaluate(options, run):
    from surgvqa.outcome import Outcome
    (run.folder / "predictions.jsonl").write_text("answers of " + str(options.checkpoint))
    return Outcome({"samples": 4, "keyword_accuracy": 0.75, "majority_accuracy": 0.5})

module = types.ModuleType("surgvqa.evaluation.command")
module.run = evaluate
sys.modules["surgvqa.evaluation.command"] = module
"""


def a_workspace() -> None:
    Path("merged").mkdir()
    Path("merged/config.json").write_text("{}")
    Path("frames/v1").mkdir(parents=True)
    Path("frames/v1/v1_1.jpg").write_bytes(b"a frame")
    Path("audio/v1").mkdir(parents=True)
    Path("audio/v1/q1.wav").write_bytes(b"a question")
    sample = {"id": "q1", "video_id": "v1", "frames": ["v1_1"], "question": "Is it?", "question_type": "t"}
    Path("train.jsonl").write_text(json.dumps({**sample, "answer": "Yes.", "short_answer": "yes"}) + "\n")
    paths = {"model_name_or_path": "merged", "train_data_path": "train.jsonl", "eval_data_path": "train.jsonl",
             "frames_dir": "frames", "audio_dir": "audio"}  # fmt: skip
    Path("surgvqa.toml").write_text("".join(f'{key} = "{value}"\n' for key, value in paths.items()))


def a_venv_of_stubs(home):
    """The rented machine's Python: all is real but what trains and evaluates."""
    site = home / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(STUB_TRAIN + STUB_EVALUATE)
    python = home / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site}:{ROOT} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    hosts = home / ".config" / "surgvqa" / "hosts.toml"
    hosts.write_text(hosts.read_text() + f'venv = "{home / "venv"}"\npython = "{sys.executable}"\n')
