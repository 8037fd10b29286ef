"""Job files for other tools: their words as the shell takes them, and their own parsers where those are installed."""

from __future__ import annotations

import json
import subprocess

import pytest
import yaml
from renting_kit import a_workspace, asked

from remote.cli import export

NASTY = 'it\'s $(touch gone) `x` "é" #: - |'


@pytest.fixture
def made(home, monkeypatch):
    """The files that a tool's export made, with the words of its job."""
    a_workspace()
    (wheel := home / "surgvqa-1-py3-none-any.whl").write_bytes(b"a wheel")
    monkeypatch.setattr(export, "build_wheel", lambda folder: wheel)

    def make(tool, *words):
        data = asked("export", f"--{tool}", *words)
        assert (home / "ws" / data["wheel"]).exists() and "torch==" in (home / "ws" / data["constraints"]).read_text()
        return open(data["file"]).read()

    make.root = home / "ws"
    return make


def ran(root, script):
    """The words that a script hands to surgvqa, run without pip."""
    bin = root / "venv" / "bin"
    bin.mkdir(parents=True, exist_ok=True)
    words = 'import json, sys; print(json.dumps(sys.argv[1:])); sys.exit(sys.argv[1] == "train")'
    (bin / "surgvqa").write_text(f"#!/usr/bin/env python3\n{words}\n")
    (bin / "surgvqa").chmod(0o755)
    done = subprocess.run(["bash", "-c", script], cwd=root, capture_output=True, text=True)
    assert not (root / "gone").exists() and done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()], done.returncode


EXPECTED = {"--model_name_or_path=merged", "--train_data_path=train.jsonl", "--frames_dir=frames", "--audio_dir=audio"}


def scripts(tool, text):
    if tool == "slurm":
        return text
    document = yaml.safe_load(text)
    if tool == "skypilot":
        assert document["resources"] == {"accelerators": "A100-80GB:1"} and document["workdir"] == "."
        assert "./surgvqa-1-py3-none-any.whl[train]" in document["setup"]
        return document["run"]
    assert document["type"] == "task" and document["resources"]["gpu"] == {"name": "A100-80GB", "count": 1}
    assert document["max_duration"] == "114m"
    (command,) = document["commands"]
    return "\n".join(
        line for line in command.splitlines() if not line.startswith(("python3 -m venv", "venv/bin/pip", "cp "))
    )


@pytest.mark.parametrize("tool", ["skypilot", "dstack", "slurm"])
def test_each_file_trains_and_evaluates_with_the_very_words(made, tool):
    words = ("--gpu", "A100-80GB", "--hours", "1.5", "train", "--run_name", NASTY, "--num_train_epochs", "3")
    text = made(tool, *words)
    if tool == "slurm":
        assert "#SBATCH --gres=gpu:a100-80gb:1\n#SBATCH --time=01:54:00\n" in text
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    found, code = ran(made.root, scripts(tool, text))
    train, evaluate = found
    assert train[:3] == ["train", "--run_name", NASTY] and set(train) >= EXPECTED and "train" in train[-1]
    assert evaluate[-2:] == ["--checkpoint", train[-1]] and train[-2] == "--run_id"  # never another run's
    assert "--eval_data_path=train.jsonl" in evaluate
    assert code == 1  # the training failed, and was evaluated all the same


def test_what_cannot_be_written_is_refused_and_nothing_is_left(made):
    before = sorted(made.root.iterdir())
    for words, said in (
        (("--slurm", "--name", "a b"), "--name 'a b': expected a to z"),
        (("--slurm", "--gpu", "H100;x"), "--gpu 'H100;x': expected a name"),
        (("--slurm", "--hours", "0"), "--hours 0: expected more than 0"),
        (("--slurm", "train", "--run_name", "a\nb"), "a line break or a control character"),
        (("--slurm", "train", "--train_data_path", "/etc/nosuch.jsonl"), "nosuch.jsonl: not in"),
        (("train",), "one of the arguments --skypilot --dstack --slurm is required"),
    ):
        assert said in asked("export", *words, code=2), words
    assert sorted(made.root.iterdir()) == before


def test_skypilots_own_parser_takes_it(made):
    sky = pytest.importorskip("sky", reason="pip install skypilot")
    task = sky.Task.from_yaml_config(yaml.safe_load(made("skypilot")))
    assert next(iter(task.resources)).accelerators == {"H100": 1}


def test_dstacks_own_parser_takes_it(made):
    models = pytest.importorskip("dstack._internal.core.models.configurations", reason="pip install dstack")
    assert models.parse_run_configuration(yaml.safe_load(made("dstack"))).type == "task"
