"""`check-data --as_trained`: what an old run heard and saw, and files that are no command line."""

import json
from pathlib import Path

import pytest

from surgvqa.cli.main import main

COMMAND = """# on the A100
python train_vqa.py \\
    --train_data_path test_set/in_v1.jsonl --eval_data_path=test_set/out_v1.jsonl \\
    --frames_dir /home/ubuntu/dataset/frames --audio_dir audio/in_v1 --eval_audio_dir audio/out_v1 --bf16 True
"""


def line(name: str, question: str, video: str = "v1", number: int = 1, kind: str = "tool") -> dict:
    return {
        "id": name,
        "video_id": video,
        "frames": [f"{video}_{number}", f"{video}_{number + 1}"],
        "question": question,
        "question_type": kind,
        "answer": "It is no.",
        "short_answer": "no",
    }


@pytest.fixture
def room(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def check(command: str | dict, files: dict[str, list[dict]], there: dict[str, str], *arguments: str):
        for name, lines in files.items():
            Path(f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        for name, content in there.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(content)
        Path("old").write_text(command if isinstance(command, str) else json.dumps(command))
        code = main(["check-data", *(f"{f}.jsonl" for f in files), "--as_trained", "old", *arguments, "--json"])
        output = capsys.readouterr()
        return code, json.loads(output.out)["as_trained"] if output.out else output.err

    return check


FRAMES = {f"dataset/frames/v1/v1_{n}.jpg": "x" for n in (1, 2)}


def test_all_is_well(room):
    there = FRAMES | {"audio/in_v1/a.mp3": "1", "audio/out_v1/a.mp3": "2"}
    code, found = room(COMMAND, {"in_v1": [line("a", "Tool?")], "out_v1": [line("a", "Any tool?")]}, there)
    assert code == 0 and found["ok"]
    assert [(f["own"], f["audio_dir"]) for f in found["files"]] == [(1, "audio/in_v1"), (1, "audio/out_v1")]
    assert found["files"][0]["frames_dir"] == "dataset/frames"


def test_the_generator_wrote_one_folder_deeper(room):
    """The published run's fault: all of it trained on silence."""
    args = ["--audio_dir", "audio", "--frames_dir", "frames"]
    there = {"audio/in_v1/a.mp3": "1", "audio/b.wav": "1", "audio/c.mp3": "", "frames/v1/v1_1.jpg": "x"}
    lines = [line("a", "Tool?"), line("b", "Tool?", number=8), line("c", "Tool?")]
    code, found = room({"args": args}, {"train": lines}, there)
    (row,) = found["files"]
    assert code == 1 and (row["own"], row["silence"]) == (0, 3), "a .wav and an empty .mp3 were not heard either"
    assert (row["with_black_frames"], row["all_black"], row["black_frames"]) == (3, 1, 4)


def test_another_samples_question(room):
    """One flat recording an id; three videos use the id, two of them ask the same."""
    lines = [line("a", "Tool?"), line("a", "Blood?", "v2"), line("a", "tool? ", "v3"), line("b", "Blood?")]
    flat = {"audio/a.mp3": "1", "audio/b.mp3": "2"}
    row = room("x --audio_dir audio", {"train": lines}, flat, "--frames_dir", ".")[1]["files"][0]
    assert (row["own"], row["unclear"], row["unclear_wrong_at_least"]) == (1, 3, 1)
    deeper = {"audio/out_v2/a.mp3": "1", "audio/in_v1/a.mp3": "0"}  # the same recording says whose it is
    row = room("x --audio_dir audio", {"train": lines}, flat | deeper, "--frames_dir", ".")[1]["files"][0]
    assert (row["own"], row["another"], row["unclear"]) == (2, 2, 0)


def test_a_folder_of_one_video_and_side(room):
    """Without an eval_audio_dir the evaluation hears the training's wording; other videos hear this one's."""
    files = {"in_v1": [line("a", "Tool?")], "out_v1": [line("a", "Any tool?"), line("a", "Blood?", "v2", kind="blood")]}
    there = FRAMES | {"audio/in_v1/a.mp3": "1"}
    first, second = room(COMMAND.replace("--eval_audio_dir audio/out_v1", ""), files, there)[1]["files"]
    assert first["own"] == 1 and (second["other_wording"], second["another"]) == (1, 1)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("", "has neither --audio_dir nor --frames_dir"),
        ("python train.py --audio_dir 'audio", "is a quote missing?"),
        ({"args": "--audio_dir audio"}, "args is not a list of texts"),
        ("{" * 10, "not valid JSON"),
        ('{"args":' + "[" * 100_000, "not valid JSON"),
        ("\x00" * 1_000_001, "over 1 MB"),
        ("x --audio_dir /etc --frames_dir /etc", "/etc of old is not below the current folder"),
        ("x --audio_dir ../.. --frames_dir .", "is not below the current folder"),
        ("x --audio_dir \x1b[31maudio", "\\x1b[31maudio of old is not below"),
    ],
)
def test_a_file_that_is_no_command_line(room, command, told):
    code, error = room(command, {"train": [line("a", "Tool?")]}, {})
    assert code == 2 and told in error and error.count("\n") == 1


def test_a_link_out_of_the_folder_is_not_followed(room, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    Path("audio").symlink_to(outside)
    assert room("x --audio_dir audio", {"train": [line("a", "Tool?")]}, {}, "--frames_dir", ".")[0] == 2


def test_in_words(room, capsys):
    room({"args": ["--audio_dir", "audio"]}, {"train": [line("a", "Tool?")]}, {"audio/in_v1/a.mp3": "1"},
         "--frames_dir", ".")  # fmt: skip
    assert main(["check-data", "train.jsonl", "--as_trained", "old", "--frames_dir", "."]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 100.0 % heard two seconds of silence" in shown and "1 100.0 % saw only black frames" in shown
