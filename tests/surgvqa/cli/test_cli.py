"""The command line's contract: exit codes, one-line errors, JSON alone on stdout, nothing heavy imported."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys

import pytest

from surgvqa.cli import commands, main, parser
from surgvqa.outcome import Outcome
from surgvqa.runs import events, folder


def surgvqa(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "surgvqa", *map(str, arguments)], capture_output=True, text=True, cwd=cwd
    )


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in commands.COMMANDS)])
def test_help_has_an_example(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main.main(arguments)
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert arguments == ["--help"] or f"example: surgvqa {arguments[0]}" in text.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "arguments are required: COMMAND"),
        (["mrege"], "invalid choice"),
        (["merge", "--ouput_path", "x"], "did you mean output_path?"),
        (["merge"], "missing --stage1_model_path"),
        (["train", "--learning-rate", "fast"], "learning_rate is 'fast', expected a number"),
        (["train", "stray"], "unexpected argument 'stray'"),
        (["runs", "--workspace", "/nowhere"], "/nowhere: no such folder"),
        (["follow", "x"], "no runs in"),
    ],
)
def test_a_usage_error_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert main.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and said in captured.err
    assert captured.err.startswith("surgvqa") and captured.err.count("\n") == 1
    assert not (tmp_path / "runs").exists(), "a question that could not be asked leaves nothing"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n\n  bad \x1b[2J value\nand more"), r"ValueError: bad \x1b[2J value (--debug shows where"),
        (KeyError("a"), "KeyError: 'a'"),
        (RuntimeError(), "RuntimeError: no reason given"),
        (RecursionError("deep"), "RecursionError: deep"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates"), "UnicodeEncodeError: 'utf-8' codec"),
        (FileNotFoundError(2, "No such file or directory", b"caf\xe9"), r"caf\udce9: No such file or directory"),
        (OSError("something that a library calls so"), "OSError: something that a library calls so"),
    ],
)
def test_no_error_leaves_a_command_as_a_traceback(tmp_path, monkeypatch, capsys, error, line):
    def fails(*_):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("surgvqa.memory.presets.presets", fails)
    assert main.main(["presets"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"surgvqa presets: {line}") and said.count("\n") == 1
    assert main.main(["presets", "--debug"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "in fails" in said and "--debug" not in said


def test_a_launched_job_that_fails_before_it_begins_records_any_error(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise ZeroDivisionError("while resolving")

    run = tmp_path / "runs" / "20260101-000000-audit-abc"
    run.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("surgvqa.cli.main.dispatch", fails)
    assert main.main(["merge", "--run_id", run.name]) == 1
    error, finished = events.EventTail(run / "events.jsonl").read()
    assert "ZeroDivisionError: while resolving" in error["text"] and finished["state"] == "failed"


@pytest.mark.parametrize(
    ("words", "debug", "rest"),
    [
        (["audit", "--debug", "x"], True, ["audit", "x"]),
        (["train", "--debug", "underflow_overflow"], False, ["train", "--debug", "underflow_overflow"]),
        (["train", "--debug", "underflow_overflow", "--debug"], True, ["train", "--debug", "underflow_overflow"]),
    ],
)
def test_debug_is_ours_unless_it_is_trainingarguments(words, debug, rest):
    assert parser.take_debug(words) == (debug, rest)


def test_json_is_one_document_on_stdout(tmp_path):
    answer = surgvqa("presets", "--json", cwd=tmp_path)
    assert answer.returncode == 0
    assert {p["name"] for p in json.loads(answer.stdout)["presets"]} >= {"baseline-8f-512px", "oom-6f-384px"}
    assert json.loads(surgvqa("runs", "--json", cwd=tmp_path).stdout) == {"runs": []}


def test_dashes_are_underscores_but_values_keep_theirs():
    assert parser.normalise(["check-data", "a-b.jsonl", "--frames-dir=x-y", "--audio-dir", "p-q", "--", "--a-b"]) == [
        "check-data", "a-b.jsonl", "--frames_dir=x-y", "--audio_dir", "p-q", "--", "--a-b",
    ]  # fmt: skip


def test_options_of_training_arguments_pass_through():
    assert parser.extra_options("train", ["--weight_decay", "0.1", "--tf32", "--optim_args=a=b"]) == {
        "weight_decay": "0.1",
        "tf32": "true",
        "optim_args": "a=b",
    }


ROOMS = sorted({command.room.split(":")[0] for command in commands.COMMANDS.values()})


@pytest.mark.parametrize("module", ["surgvqa.cli.main", *ROOMS])
def test_no_room_imports_the_heavy_libraries(module):
    check = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'numpy', 'peft') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert answer.stdout.strip() == "[]", answer.stdout + answer.stderr


@pytest.mark.parametrize("given, expected", [(False, "expandable_segments:True"), (True, None)])
def test_the_allocator_is_set_before_torch_is_there_unless_the_user_did(given, expected):
    """torch reads the setting when it is imported: later it would do nothing, and did nothing once."""
    code = """
import os, sys
from surgvqa.cli import main as cli
from surgvqa.memory import allocator
there, ask = [], allocator.grow_segments
def watched():
    there.append("torch" in sys.modules)
    ask()
allocator.grow_segments = watched
cli.main(["evaluate"])
print(there, os.environ.get("PYTORCH_ALLOC_CONF"))
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTORCH")}
    if given:
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "backend:native"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == f"[False] {expected}", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("command", "extra"), [("demo", "train"), ("merge", "merge"), ("train", "train"), ("evaluate", "train")]
)
def test_what_needs_torch_says_so_in_one_line(monkeypatch, capsys, command, extra):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))
    assert main.main([command]) == 1
    shown = capsys.readouterr().err
    assert shown == f"surgvqa {command}: torch not installed here; {command} needs: pip install 'surgvqa[{extra}]'\n"


def test_an_impossible_budget_is_refused_by_presets_too(tmp_path, monkeypatch, capsys):
    (tmp_path / "surgvqa.toml").write_text("budget_gb = -5")
    monkeypatch.chdir(tmp_path)
    assert main.main(["presets"]) == 2
    assert "budget_gb is -5, expected more than 0" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["presets", "budget", "doctor"])
def test_a_terminal_that_has_no_bars_is_no_crash(tmp_path, command):
    """A Latin-1 locale cannot show block characters."""
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1:strict"}
    words = [sys.executable, "-m", "surgvqa", command]
    done = subprocess.run(words, capture_output=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_an_example_can_be_asked(name):
    """Only the files that it names may be missing, and "…" is no file's name."""
    _, *argv = shlex.split(commands.COMMANDS[name].example)
    arguments, unknown = parser.build_parser().parse_known_args(argv)
    assert arguments.command == name and not unknown and "…" not in commands.COMMANDS[name].example


NAMED = "a [x][/] [bold]b :x:"


def test_names_are_shown_as_they_are(tmp_path, monkeypatch, capsys):
    """Brackets are rich's markup, and :x: its emoji: a run name with them vanished in part, or ended in a traceback."""
    monkeypatch.chdir(tmp_path)
    options = {"run_name": {"value": NAMED, "from": "command line"}}
    with folder.Run.create(tmp_path / "runs", "train", options=options):
        pass
    monkeypatch.setenv("COLUMNS", "200")
    assert main.main(["runs"]) == 0 and NAMED in capsys.readouterr().out
    other = NAMED.replace("/", "")
    (tmp_path / other).mkdir()
    assert main.main(["runs", "--workspace", other]) == 0 and other in capsys.readouterr().out


def test_json_has_no_nan(capsys):
    """Which is no JSON: jq and every browser refuse it."""
    main.answer(Outcome({"train_loss": float("nan"), "by": [{"x": float("inf")}]}), as_json=True)
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"train_loss": None, "by": [{"x": None}]}


def test_a_folder_that_is_gone_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main.main(["runs"]) == 1
    assert capsys.readouterr().err == "surgvqa runs: No such file or directory\n"


@pytest.mark.parametrize("named", [["--workspace", "w"], ["--workspace=w"]])
def test_a_job_that_could_not_be_asked_says_so_in_its_own_folder(tmp_path, monkeypatch, named):
    """The last --run_id counts, as it does for argparse."""
    monkeypatch.chdir(tmp_path)
    for run in ("old", "new"):
        (tmp_path / "w" / "runs" / run).mkdir(parents=True)
    assert main.main(["evaluate", *named, "--run_id", "old", "--predictions", "none", "--run_id=new"]) == 2
    assert events.finished_event(tmp_path / "w" / "runs" / "new")["exit_code"] == 2
    assert events.finished_event(tmp_path / "w" / "runs" / "old") is None
