"""`surgvqa check-data` on small workspaces, each with one thing wrong, and on the real files."""

import json
from pathlib import Path

import pytest
from places import REAL_DATA

from surgvqa.cli.main import main


def line(
    id="qa_1", video="v1", frames=("v1_1", "v1_2"), question="Is a tool visible?", kind="tool", label="no"
) -> dict:
    return {
        "id": id,
        "video_id": video,
        "frames": list(frames),
        "question": question,
        "question_type": kind,
        "answer": f"It is {label}.",
        "short_answer": label,
    }


@pytest.fixture
def room(tmp_path, monkeypatch, capsys):
    """A workspace with files; `room(...)` runs check-data on it and gives (exit code, JSON)."""
    monkeypatch.chdir(tmp_path)
    for name in ("frames/v1/v1_1.jpg", "frames/v1/2.jpg", "audio/v1/qa_1.wav", "audio/v1/qa_2.mp3"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()

    def check(*arguments: str, frames="frames", audio="audio", **files):
        for name, lines in files.items():
            text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
            Path(f"{name}.jsonl").write_text(text)
        names = [f"{name}.jsonl" for name in files]
        code = main(["check-data", *names, "--frames_dir", frames, "--audio_dir", audio, *arguments, "--json"])
        output = capsys.readouterr()
        return code, json.loads(output.out) if output.out else output.err

    return check


def test_good_data(room):
    code, data = room(train=[line(), line("qa_2", label="yes")])
    assert code == 0 and data["ok"] is True
    assert (data["samples"], data["majority_accuracy"]) == (2, 0.5)
    for none in ("id_collisions", "shared_clips", "missing_frames", "missing_audio"):
        assert data[none] == 0
    assert data["errors"] == [] and data["files"][0]["labels"] == {"tool": {"no": 1, "yes": 1}}


def test_every_bad_line_is_listed(room):
    code, data = room(train=["{", line(), line() | {"question": ""}])
    assert code == 1 and data["ok"] is False and data["samples"] == 1
    assert [(e["file"], e["line"]) for e in data["errors"]] == [("train.jsonl", 1), ("train.jsonl", 3)]
    assert data["errors"][1]["text"] == "question is empty, expected text"


def test_missing_files_are_listed_once(room):
    gone = line("qa_3", frames=["v1_1", "v1_9"])
    code, data = room(train=[line(), gone, gone | {"id": "qa_2"}])
    assert code == 1 and (data["missing_frames"], data["missing_audio"]) == (1, 1)
    assert data["missing_frames_list"] == ["v1_9"] and "v1/qa_3" in data["missing_audio_list"][0]
    assert data["errors"] == []


def test_collisions_and_shared_clips_are_told_but_not_wrong(room):
    other = line(video="v2", frames=["v2_1"], question="Is blood visible?")
    for name in ("frames/v2/1.png", "audio/v2/qa_1.ogg"):
        Path(name).parent.mkdir(parents=True)
        Path(name).touch()
    code, data = room(train=[line(), other], eval=[line("qa_2"), line("qa_1")])
    assert code == 0 and data["id_collisions"] == 1 and data["colliding_ids"] == ["qa_1"]
    assert data["shared_clips"] == 1 and data["shared_frames"] == 2
    assert [file["id_collisions"] for file in data["files"]] == [1, 0]


def test_a_flat_folder_for_an_id_of_two_questions_is_an_error(room):
    Path("flat").mkdir()
    Path("flat/qa_1.mp3").touch()
    code, data = room(train=[line(), line(question="Is blood visible?")], audio="flat")
    assert code == 1 and data["missing_audio"] == 0
    assert [e["line"] for e in data["errors"]] == [1, 2]
    assert "Is blood visible?" in data["errors"][0]["text"] and "train.jsonl:2" in data["errors"][0]["text"]


def test_later_files_may_have_audio_of_their_own(room):
    Path("audio2/v1").mkdir(parents=True)
    Path("audio2/v1/qa_7.wav").touch()
    files = {"train": [line()], "eval": [line("qa_7")]}
    assert room(**files)[1]["missing_audio"] == 1
    assert room("--eval_audio_dir", "audio2", **files)[0] == 0
    Path("surgvqa.toml").write_text('eval_data_path = "eval.jsonl"\neval_audio_dir = "audio2"\n')
    assert room(eval=[line("qa_7")])[0] == 0
    assert room(train=[line()])[0] == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"frames": "nowhere", "train": [line()]}, "nowhere: no such folder of frames"),
        ({"audio": "nowhere", "train": [line()]}, "nowhere: no such folder of spoken questions"),
        ({"train": []}, "train.jsonl: empty, expected one JSON object a line"),
    ],
)
def test_what_cannot_be_asked(room, arguments, told):
    code, error = room(**arguments)
    assert code == 2 and error == f"surgvqa check-data: {told}" + error[len(f"surgvqa check-data: {told}") :]
    assert error.count("\n") == 1


@pytest.mark.model  # no model, but librosa, which takes seconds to import
def test_deep_decodes_everything(room):
    image, soundfile, numpy = (pytest.importorskip(m) for m in ("PIL.Image", "soundfile", "numpy"))
    image.new("RGB", (64, 48), "red").save("frames/v1/v1_1.jpg")
    image.new("RGB", (64, 48), "red").save("frames/v1/2.jpg")
    soundfile.write("audio/v1/qa_1.wav", numpy.ones(800) / 2, 16_000)
    soundfile.write("audio/v1/qa_2.mp3", numpy.zeros(8000), 16_000)
    lines = [line(), line("qa_2")]
    code, data = room("--deep", train=lines)
    assert code == 0 and data["silent_audio_list"] == ["audio/v1/qa_2.mp3"]
    Path("frames/v1/2.jpg").write_bytes(Path("frames/v1/2.jpg").read_bytes()[:200])
    Path("audio/v1/qa_1.wav").write_bytes(b"RIFF")
    code, data = room("--deep", train=lines)
    assert code == 1 and [e["text"].split(" cannot be decoded")[0] for e in data["errors"]] == [
        "frame frames/v1/2.jpg",
        "audio audio/v1/qa_1.wav",
    ]


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no shared/data")
def test_the_real_files_without_their_frames(tmp_path, capsys):
    files = [str(REAL_DATA / f"{side}_002-001.jsonl") for side in ("in", "out")]
    code = main(["check-data", *files, "--frames_dir", str(tmp_path), "--audio_dir", str(tmp_path)])
    shown = capsys.readouterr().out
    assert code == 1
    for text in (
        "396 missing frames",
        "and 386 more",
        "100 samples without a spoken question",
        "majority accuracy (a blind guess by question type): 84.0 %",
        "ids that stand for more than one question: 43, 0 of them inside one file",
        "clips in more than one file: 50",
        "question types with a single label in in_002-001.jsonl: 7 of 14",
    ):
        assert text in " ".join(shown.split())


def test_the_bar_shows_the_shares():
    from surgvqa.data.check import _bar

    assert _bar([3]) == "━" * 20
    assert _bar([3, 1]) == "━" * 15 + "╍" * 5
    assert _bar([10, 5, 3, 1, 1]) == "━" * 10 + "╍" * 5 + "┈" * 3 + "·" * 2
