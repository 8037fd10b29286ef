"""What is printed is text: nothing from outside steers the terminal."""

import io
import json

import pytest
from rich.table import Table
from rich.text import Text

from surgvqa.cli import main
from surgvqa.terminal.drawing import console_on

EVIL = "a\x1b]52;c;cm0=\x07b\x1b[2J\x9b31m\u202ec"


def is_clean(text: str) -> bool:
    return not any(c in text for c in "\x1b\x07\x9b\u202e")


def rows(text: str) -> Table:
    table = Table("name")
    table.add_row(Text(text))
    return table


@pytest.mark.parametrize("show", [str, Text, rows], ids=["a string", "rich text", "a table"])
def test_escape_sequences_are_written_out(show):
    console = console_on(stream := io.StringIO())
    console.width = 200
    console.print(show(EVIL))
    assert is_clean(stream.getvalue()) and "a\\x1b]52;c;cm0=" in stream.getvalue()


def test_styles_of_our_own_still_colour_a_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    console = console_on(stream := io.StringIO())
    console.print(Text("\x1b[5mtext", "red"))
    assert stream.getvalue() == "\x1b[31m\\x1b[5mtext\x1b[0m\n"


def predictions(folder):
    line = {"question_type": EVIL, "short_answer": "no", "predicted_answer": "no"}
    (folder / "p.jsonl").write_text(json.dumps(line) + "\n")
    return ["evaluate", "--predictions", "p.jsonl"]


def preset(folder):
    (folder / "presets").mkdir()
    text = f"reason = {json.dumps(EVIL)}\ngives_up = 'x'\nrung = 0\n[settings]\nnum_frames = 2\n"
    (folder / "presets" / f"{EVIL.replace('/', '')}.toml").write_text(text)
    return ["presets"]


def workspace_key(folder):
    (folder / "surgvqa.toml").write_text(f"{json.dumps(EVIL)} = 1\n")
    return ["runs"]


def option(folder):
    return ["runs", f"--{EVIL}"]


def samples(folder):
    (folder / f"{EVIL}.jsonl").write_text(json.dumps({"id": EVIL}) + "\n")
    return ["check-data", f"{EVIL}.jsonl", "--frames_dir", ".", "--audio_dir", EVIL]


def checkpoint(folder):
    return ["audit", EVIL]


def run_folder(folder):
    (folder / "runs" / EVIL).mkdir(parents=True)
    (folder / "runs" / EVIL / "run.json").write_text(json.dumps({"command": EVIL, "host": EVIL, "id": EVIL}))
    return ["runs"]


@pytest.mark.parametrize("arrange", [predictions, preset, workspace_key, option, samples, checkpoint, run_folder])
def test_no_command_lets_a_name_steer_the_terminal(tmp_path, monkeypatch, capsys, arrange):
    monkeypatch.chdir(tmp_path)
    main.main(arrange(tmp_path))
    captured = capsys.readouterr()
    assert captured.out + captured.err
    assert is_clean(captured.out) and is_clean(captured.err)
