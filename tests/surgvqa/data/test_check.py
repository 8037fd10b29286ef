"""`surgvqa check-data` on small workspaces, each with one thing wrong, and on the real files."""

import json
import os
import subprocess
import sys
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

    def check(*arguments: str, frames: str | None = "frames", audio: str | None = "audio", **files):
        for name, lines in files.items():
            text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
            Path(f"{name}.jsonl").write_text(text)
        names = [f"{name}.jsonl" for name in files]
        folders = [*(["--frames_dir", frames] if frames else []), *(["--audio_dir", audio] if audio else [])]
        code = main(["check-data", *names, *folders, *arguments, "--json"])
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
        ({"train": []}, "train.jsonl: empty, expected one JSON object per line"),
    ],
)
def test_what_cannot_be_asked(room, arguments, told):
    code, error = room(**arguments)
    assert code == 2 and error == f"surgvqa check-data: {told}" + error[len(f"surgvqa check-data: {told}") :]
    assert error.count("\n") == 1


@pytest.mark.model  # no model, but librosa, which takes seconds to import
def test_deep_decodes_everything(room):
    image, soundfile, numpy = (pytest.importorskip(m) for m in ("PIL.Image", "soundfile", "numpy"))
    for name in ("v1_1", "2"):
        image.effect_noise((64, 48), 90).save(f"frames/v1/{name}.jpg")
    soundfile.write("audio/v1/qa_1.wav", numpy.sin(numpy.arange(8000)) / 2, 16_000)
    soundfile.write("audio/v1/qa_2.mp3", numpy.zeros(8000), 16_000)
    lines = [line(), line("qa_2")]
    code, data = room("--deep", train=lines)
    assert code == 0 and data["silent_audio_list"] == ["audio/v1/qa_2.mp3"]
    assert [data[name] for name in data if name.endswith(("audio_list", "frames_list"))] == [
        *([], []),  # missing
        *(["audio/v1/qa_2.mp3"], [], [], []),  # silent, short, long, same
        *([], []),  # blank, odd sizes
    ]
    soundfile.write("audio/v1/qa_1.wav", numpy.sin(numpy.arange(31 * 16_000)) / 2, 16_000)
    Path("audio/v1/qa_2.mp3").rename("kept.mp3")
    Path("audio/v1/qa_2.wav").write_bytes(Path("audio/v1/qa_1.wav").read_bytes())
    code, data = room("--deep", train=[line(), line("qa_2", question="Something else?")])
    assert code == 0 and len(data["long_audio_list"]) == 2
    assert "31.0 s, but only 30 s are heard" in data["long_audio_list"][0]
    assert len(data["same_audio_list"]) == 1 and "ask different questions" in data["same_audio_list"][0]
    assert room("--deep", train=lines)[1]["same_audio_list"] == [], "the same question may sound the same"
    Path("audio/v1/qa_2.wav").unlink()
    Path("kept.mp3").rename("audio/v1/qa_2.mp3")
    Path("frames/v1/2.jpg").write_bytes(Path("frames/v1/2.jpg").read_bytes()[:200])
    Path("audio/v1/qa_1.wav").write_bytes(b"RIFF")
    code, data = room("--deep", train=lines)
    assert code == 1 and [e["text"].split(" cannot be decoded")[0] for e in data["errors"]] == [
        "frame frames/v1/2.jpg",
        "audio audio/v1/qa_1.wav",
    ]


@pytest.mark.model  # no model, but librosa
def test_deep_points_out_what_decodes_and_yet_is_odd(room):
    """A frame of one colour, one of another size (a turned one too), silence that is no zero, and the same sound in
    another container."""
    image, exif, soundfile, numpy = (
        pytest.importorskip(m) for m in ("PIL.Image", "PIL.ExifTags", "soundfile", "numpy")
    )
    names = [f"v1_{n}" for n in range(1, 6)]
    for name in names:
        image.effect_noise((64, 48), 90).save(f"frames/v1/{name}.jpg")
    turn = image.Exif()
    turn[exif.Base.Orientation] = 6
    image.effect_noise((64, 48), 90).save("frames/v1/v1_2.jpg", exif=turn)
    image.effect_noise((1, 1), 90).save("frames/v1/v1_4.jpg")
    image.new("RGB", (64, 48), (3, 2, 1)).save("frames/v1/v1_5.jpg")
    tone = (numpy.sin(numpy.arange(8000)) * 9000).astype("int16")
    soundfile.write("audio/v1/qa_1.wav", tone, 16_000)
    soundfile.write("audio/v1/qa_2.flac", tone, 16_000)
    Path("audio/v1/qa_2.mp3").unlink()
    soundfile.write("audio/v1/qa_3.wav", numpy.full(8000, 0.5), 16_000)
    soundfile.write("audio/v1/qa_4.wav", tone[:160], 16_000)
    asked = [line(f"qa_{n}", frames=names, question=f"Question {n}?") for n in range(1, 5)]
    code, data = room("--deep", train=asked)
    assert code == 0
    assert data["blank_frames_list"] == ["frames/v1/v1_4.jpg", "frames/v1/v1_5.jpg"]
    assert data["odd_size_frames_list"] == [
        "frames/v1/v1_2.jpg: 48×64 pixels, 3 of the video's 5 are 64×48",
        "frames/v1/v1_4.jpg: 1×1 pixels, 3 of the video's 5 are 64×48",
    ]
    assert data["silent_audio_list"] == ["audio/v1/qa_3.wav"]
    assert data["short_audio_list"] == ["audio/v1/qa_4.wav: 0.01 s"]
    assert data["same_audio_list"] == [
        "audio/v1/qa_2.flac has the same sound as audio/v1/qa_1.wav, but train.jsonl:2 and train.jsonl:1 ask different "
        "questions"
    ]


@pytest.mark.parametrize("made", ["pipe", "folder", "dangling link", "link to itself", "endless file"])
def test_what_is_no_regular_file_is_missing_and_nobody_waits_for_it(room, made):
    def put(path: str) -> None:
        Path(path).unlink(missing_ok=True)
        if made == "pipe":
            os.mkfifo(path)
        elif made == "folder":
            Path(path).mkdir()
        else:
            target = {"dangling link": "gone", "link to itself": Path(path).name, "endless file": "/dev/zero"}[made]
            Path(path).symlink_to(target)

    put("frames/v1/v1_1.jpg")
    put("audio/v1/qa_1.wav")
    code, data = room(train=[line(frames=["v1_1"])])
    assert code == 1 and (data["missing_frames"], data["missing_audio"]) == (1, 1)
    put("train.jsonl")
    assert main(["check-data", "train.jsonl"]) == 2


def test_the_same_question_about_the_same_frames_with_another_label_is_told(room, capsys):
    data = room(frames=None, audio=None, train=[line(), line("qa_2"), line("qa_3", label="yes")])[1]
    assert data["duplicates_list"] == ["train.jsonl:2", "train.jsonl:3"]
    assert data["contradictions_list"] == ["train.jsonl:3"]
    assert main(["check-data", "train.jsonl"]) == 0
    assert "samples among these with a different label: 1, as train.jsonl:3" in capsys.readouterr().out


def test_deep_on_the_base_install_names_the_extra(room, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, error = room("--deep", train=[line()])
    assert code == 1 and "numpy, librosa not installed here; check-data --deep needs: pip install" in error


def test_the_text_alone_is_enough(room, capsys):
    code, data = room(frames=None, audio=None, train=[line(), line("qa_2", label="yes")])
    assert code == 0 and data["ok"] and data["not_checked"] == ["frames", "audio"]
    assert data["missing_frames"] is None and data["missing_audio"] is None
    assert room(audio=None, train=[line()])[1]["not_checked"] == ["audio"]
    assert room(frames=None, audio=None, train=["{"])[0] == 1
    assert main(["check-data", "train.jsonl"]) == 1
    assert "not looked at: frames and audio" in " ".join(capsys.readouterr().out.split())
    code, error = room("--deep", frames=None, audio=None, train=[line()])
    assert code == 2 and "--deep decodes frames and recordings" in error


def test_wordings_clusters_and_odd_samples(room):
    train = [
        line("qa_1", frames=("v1_1", "v1_9")),
        line("qa_2", frames=("v1_20", "v1_30"), question="Any tool?"),
        line("qa_3", frames=("v1_200", "v1_190")),
        line("qa_4", frames=("v1_1", "v1_9")) | {"answer": "It is clean."},
        line("qa_5", frames=("v1_900",), kind="size", question="How big?", label="5"),
    ]
    later = [line("qa_6", frames=("v1_1", "v1_9"), question="A tool?"), line("qa_7", video="v2", frames=("v2_1",))]
    data = room(frames=None, audio=None, train=train, eval=later)[1]
    first, second = data["files"]
    assert first["clusters"] == 3 and second["clusters"] == 2
    assert first["wordings"] == {"size": 1, "tool": 2} and data["wordings"] == {"size": 1, "tool": 3}
    assert data["unseen_wordings"] == {"tool": 1}
    assert data["duplicates_list"] == ["train.jsonl:4"] == data["answers_without_label_list"]
    assert data["frames_out_of_order_list"] == ["train.jsonl:3"]
    assert data["shared_clips_examples"] == ["v1 v1_1"] and data["shared_frames_examples"] == ["v1_1", "v1_9"]


def test_thousands_of_lines_are_checked_without_anything_heavy(tmp_path):
    """5,200 lines took 0.4 s on two cores; what would make it slow, torch or numpy, is not imported at all."""
    rows = [line(f"qa_{n}", frames=[f"v1_{100 * n + i}" for i in range(8)], label="no") for n in range(5200)]
    (tmp_path / "big.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = (
        "import sys; from surgvqa.cli.main import main; code = main(['check-data', 'big.jsonl', '--json']);"
        "sys.exit(code or 3 * bool({'torch', 'numpy', 'PIL', 'librosa'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"][0]["clusters"] == 5200


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
        "independent clips of in_002-001.jsonl: 40 clusters of 50 samples",
    ):
        assert text in " ".join(shown.split())


def test_the_bar_shows_the_shares():
    from surgvqa.data.check_view import _bar

    assert _bar([3]) == "━" * 20
    assert _bar([3, 1]) == "━" * 15 + "╍" * 5
    assert _bar([10, 5, 3, 1, 1]) == "━" * 10 + "╍" * 5 + "┈" * 3 + "·" * 2
