"""`surgvqa speak`: each sample in its own words, held-out ones held out; a run cut short goes on as if never cut."""

import errno
import json
import os
import random
import signal
import subprocess
import sys

import edge_fake
import numpy as np
import pytest

from surgvqa.cli.main import main
from surgvqa.data.audio_container import missing_part
from surgvqa.data.lookup import AudioIndex, composite_name
from surgvqa.data.noise import with_noise
from surgvqa.data.samples import read_samples, wording_of
from surgvqa.prepare import edge, speak
from surgvqa.prepare.espeak import Espeak

WORDINGS = """
[wordings]
moving = ["Is it moving?", "Does it move at all?", "Any motion here?"]
light = ["Which light is on?", "What is the light now?"]

[held_out]
moving = ["Would you say that it moves?"]
light = ["Name the light."]
"""


def record(video, id, kind="moving", first=100):
    return {
        "id": id,
        "video_id": video,
        "frames": [f"{video}_{first + 4 * n}" for n in range(2)],
        "question": f"As written: {kind}?",
        "question_type": kind,
        "answer": "It is: yes.",
        "short_answer": "yes",
        "support_frames": 2,
    }


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


ROWS = [
    record(video, f"q{n}", kind, 100 * n) for video in ("v1", "v2") for n in range(4) for kind in ("moving", "light")
]
"""Each id stands for a question of each type in each video."""
QUICK = ("--voices", "en-us+m1", "en+linda", "--held_out_voices", "en-us+Andy", "--speeds", "1", "1.4")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with train.jsonl and wordings.toml, to be in."""
    write_lines(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "wordings.toml").write_text(WORDINGS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def said(monkeypatch):
    """What was synthesised."""
    utterances, say = [], Espeak.say

    def listen(self, *utterance):
        utterances.append(utterance)
        return say(self, *utterance)

    monkeypatch.setattr(Espeak, "say", listen)
    return utterances


def run(capsys, *arguments):
    """(exit code, stdout or its JSON, stderr)."""
    code = main(["speak", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, json.loads(out) if "--json" in arguments and out else out, err


def spoken(capsys, *arguments):
    code, report, err = run(capsys, "train.jsonl", *QUICK, "--json", *arguments)
    assert (code, err) == (0, "")
    return report


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def rows_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# --- what is made -----------------------------------------------------------------------------------------------------


def test_every_sample_is_asked_in_its_own_words_and_what_is_held_out_is_nowhere_else(place, capsys, said):
    report = spoken(capsys, "--wordings", "wordings.toml")
    assert (report["samples"], report["warnings"]) == (16, [])
    known, held_out = (rows_of(place / "spoken" / f"{name}.jsonl") for name in ("train", "train_held_out"))
    for rows, texts, voices in (
        (known, {"moving": 3, "light": 2}, {"en-us+m1", "en+linda"}),
        (held_out, {"moving": 1, "light": 1}, {"en-us+Andy"}),
    ):
        assert [{**row, "question": 0} | dict.fromkeys(("voice", "speed", "noise_db")) for row in rows] == [
            {**row, "question": 0} | dict.fromkeys(("voice", "speed", "noise_db")) for row in ROWS
        ], "every other field of every line as it was"
        for kind, count in texts.items():
            asked = {row["question"] for row in rows if row["question_type"] == kind}
            assert 1 <= len(asked) <= count and "As written" not in str(asked)
        assert {row["voice"] for row in rows} <= voices
        assert {row["speed"] for row in rows} <= {1.0, 1.4} and {row["noise_db"] for row in rows} <= {None, 20.0, 10.0}
    assert not {wording_of(r["question"]) for r in known} & {wording_of(r["question"]) for r in held_out}
    assert len(said) == len(set(said)), "the same words in the same voice are synthesised once"


def test_check_data_finds_every_recording_and_each_holds_its_own_question(place, capsys):
    spoken(capsys, "--wordings", "wordings.toml")
    for name in ("train", "train_held_out"):
        file, folder = place / "spoken" / f"{name}.jsonl", place / "spoken" / name
        assert main(["check-data", str(file), "--audio_dir", str(folder), "--deep", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["missing_audio"], found["same_audio_list"], found["long_audio_list"]) == (0, [], [])
        samples, rows = read_samples(file), rows_of(file)
        audio = AudioIndex(folder, samples)
        sound = [audio.find(sample).read_bytes() for sample in samples]
        assert all(audio.find(sample) == folder / f"{composite_name(sample)}.mp3" for sample in samples)
        how = [(r["question"], r["voice"], r["speed"], r["noise_db"]) for r in rows]
        assert len({*zip(how, sound)}) == len(set(how)) == len(set(sound)), "one recording for each way, and no other"


def test_the_recordings_of_another_wording_are_refused(place, capsys):
    """The names are the same in both folders, and those of the file that was spoken."""
    spoken(capsys, "--wordings", "wordings.toml")
    for file, folder in (("train_held_out", "train"), ("train", "train_held_out")):
        assert main(["check-data", f"spoken/{file}.jsonl", "--audio_dir", f"spoken/{folder}"]) == 2
        assert f"put its recordings into spoken/{file}, not into spoken/{folder}" in capsys.readouterr().err
    for file, folder, wrong in (
        ("train_held_out", "train", 16),
        ("train", "train", 0),
    ):
        (place / "copy.jsonl").write_bytes((place / "spoken" / f"{file}.jsonl").read_bytes())
        main(["check-data", "copy.jsonl", "--audio_dir", f"spoken/{folder}", "--json"])
        errors = json.loads(capsys.readouterr().out)["errors"]
        assert len(errors) == wrong
        assert all(f"`surgvqa speak` made spoken/{folder} for another file" in error["text"] for error in errors)


def test_without_paraphrases_the_questions_stay_and_a_warning_says_what_is_not_held_out(place, capsys):
    report = spoken(capsys, "--noise_db", "none")
    assert [row["question"] for row in rows_of(place / "spoken" / "train_held_out.jsonl")] == [
        row["question"] for row in ROWS
    ]
    assert "its voices are held out, its wordings are not" in report["warnings"][0]
    report = spoken(capsys, "--noise_db", "none", "--held_out_voices", "none", "--output", "alone")
    assert report["warnings"] == ["nothing is held out: neither wordings nor voices"]
    assert sorted(os.listdir("alone")) == ["train", "train.jsonl"]


def test_neither_order_nor_other_lines_change_how_a_sample_is_spoken_but_the_seed_does(place, capsys):
    def ways(*arguments):
        spoken(capsys, "--wordings", "wordings.toml", "--held_out_voices", "none", "--force", *arguments)
        names = ("question", "voice", "speed", "noise_db")
        rows = rows_of(place / "spoken" / "train.jsonl")
        return {(r["video_id"], r["id"], r["question_type"]): [r[name] for name in names] for r in rows}

    first, reseeded = ways(), ways("--speak_seed", "1")
    write_lines(place / "train.jsonl", random.Random(2).sample(ROWS, 9))
    fewer = ways()
    assert fewer == {key: first[key] for key in fewer} and len(fewer) == 9
    assert reseeded != first


# --- cut short and again ----------------------------------------------------------------------------------------------

DIES = """
import os, signal, sys
from surgvqa.cli.main import main
replace, made, armed = os.replace, [], [True]
def dies(source, target):
    made.append(target)
    if len(made) > 6 and str(target).endswith(".mp3") and armed and armed.pop():
        os.kill(os.getpid(), signal.SIGNAL)
    return replace(source, target)
os.replace = dies
sys.exit(main(["speak", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_a_run_cut_short_leaves_whole_recordings_and_goes_on_to_the_same_files(place, capsys, name):
    arguments = ["train.jsonl", *QUICK, "--wordings", "wordings.toml"]
    cut = subprocess.run(
        [sys.executable, "-c", DIES.replace("SIGNAL", name), *arguments], cwd=place, capture_output=True, text=True
    )
    assert cut.returncode == (-signal.SIGKILL if name == "SIGKILL" else 1), cut.stderr
    assert "Traceback" not in cut.stderr
    there = list((place / "spoken").rglob("*.mp3"))
    assert there and all(missing_part(file.read_bytes()) is None and file.stat().st_size for file in there)
    assert not list((place / "spoken").glob("*.jsonl")), "samples are there when all their recordings are"
    left = {file: file.stat().st_mtime_ns for file in there}
    spoken(capsys, "--wordings", "wordings.toml")
    assert {file: file.stat().st_mtime_ns for file in there} == left, "what was spoken is kept"
    spoken(capsys, "--wordings", "wordings.toml", "--output", "uncut")
    assert contents(place / "spoken") == contents(place / "uncut")


def test_again_nothing_is_made_and_an_emptied_recording_is_made_anew(place, capsys, said):
    spoken(capsys)
    before = contents(place / "spoken")
    said.clear()
    assert spoken(capsys)["recordings_made"] == 0 and said == []
    file = place / "spoken" / "train" / "v1_q0_light.mp3"
    file.unlink()
    file.write_bytes(b"")
    spoken(capsys)
    assert contents(place / "spoken") == before


def test_other_settings_are_refused_and_force_replaces_all_of_it(place, capsys):
    spoken(capsys)
    before = contents(place / "spoken")
    code, _, err = run(capsys, "train.jsonl", *QUICK, "--noise_db", "none")
    assert (code, err) == (
        2,
        "surgvqa speak: spoken/train was made with other settings (noise_db changed); name another --output, or "
        "replace it with --force\n",
    )
    write_lines(place / "train.jsonl", ROWS[:3])
    code, _, err = run(capsys, "train.jsonl", *QUICK)
    assert code == 2 and "(samples changed)" in err and contents(place / "spoken") == before
    spoken(capsys, "--force")
    assert len(list((place / "spoken" / "train").glob("*.mp3"))) == 3


def test_what_is_not_of_speak_stays(place, capsys):
    (place / "spoken" / "train").mkdir(parents=True)
    (place / "spoken" / "train" / "mine.txt").write_text("mine")
    code, _, err = run(capsys, "train.jsonl", *QUICK, "--force")
    assert code == 2 and "spoken/train already exists and was not made by `speak`" in err
    assert contents(place / "spoken") == {"train/mine.txt": b"mine"}
    code, _, err = run(capsys, "train.jsonl", *QUICK, "--output", ".", "--force")
    assert code == 2 and "is the file to speak" in err and rows_of(place / "train.jsonl") == ROWS
    code, _, err = run(capsys, "train.jsonl", *QUICK, "--output", "wordings.toml")
    assert code == 2 and "is a file, expected a folder" in err


def test_a_full_disk_leaves_no_part_of_a_recording(place, capsys, monkeypatch):
    def full(self, content):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full)
        code, _, err = run(capsys, "train.jsonl", *QUICK)
    assert code == 1 and err.endswith("cannot be written: No space left on device; the same command continues\n")
    assert set(contents(place / "spoken")) == {"train/speak.json", "train_held_out/speak.json"}
    spoken(capsys)


def test_where_a_file_system_has_no_links_each_sample_has_a_copy(place, capsys, monkeypatch):
    spoken(capsys, "--output", "linked")
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    spoken(capsys)
    assert contents(place / "spoken") == contents(place / "linked")


def test_a_file_name_that_is_no_utf8_is_a_name(place, capsys):
    os.rename("train.jsonl", b"tr\xffin.jsonl")
    assert run(capsys, os.fsdecode(b"tr\xffin.jsonl"), *QUICK)[0] == 0
    assert os.path.isfile(b"spoken/tr\xffin.jsonl")


def test_only_one_speaks_into_a_folder(place, capsys):
    spoken(capsys)
    with speak._locked(place / "spoken" / "train"):
        code, _, err = run(capsys, "train.jsonl", *QUICK)
    assert code == 2 and "another `surgvqa speak` is working there" in err


# --- names and words that cannot be -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        (
            [record("v", "q"), {**record("v", "q"), "question": "Another?"}],
            "train.jsonl:2: the recording would be named",
        ),
        (
            [record("v_1", "q"), {**record("v", "1_q"), "question": "Another?"}],
            "would be named 'v_1_q_moving'.mp3",
        ),
        ([record("v", "Q"), record("v", "q")], "train.jsonl:2: the recording would be named"),
        ([record("v", "q" * 250)], "train.jsonl:1: video_id, id and question_type give a file name of over 255 bytes"),
        ([{**record("v", "q"), "question": "?!"}], "train.jsonl:1: question is '?!', expected pronounceable words"),
        (
            [{**record("v", "q"), "question": "Is\x00 it?"}],
            "train.jsonl:1: question is 'Is\\x00 it?', expected pronounceable",
        ),
        ([{**record("v", "q"), "question": "word " * 200}], "expected at most the audio encoder's window of 30 s"),
    ],
)
def test_what_cannot_be_spoken_or_named_is_refused_with_its_line(place, capsys, rows, fault):
    write_lines(place / "train.jsonl", rows)
    code, _, err = run(capsys, "train.jsonl", *QUICK)
    assert code == 2 and fault in err and err.count("\n") == 1
    assert not list(place.rglob("*.mp3")) and not list((place / "spoken").glob("*.jsonl"))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("moving = [", "not TOML"),
        ("[wordings]\nmoving = ['Is it?']", "[wordings] has no question type light, as train.jsonl:2 is"),
        (WORDINGS.replace("[held_out]\nmoving", "[held_out]\nmovin"), "[held_out] has no question type moving"),
        (WORDINGS.replace("Name the light.", "which  light is ON?"), "is in [wordings] and in [held_out]"),
        (WORDINGS.replace("What is the light now?", "Which light is on?"), "has 'Which light is on?' twice"),
        (WORDINGS.replace('["Name the light."]', '"Name the light."'), "[held_out] light is text, expected a list"),
        (WORDINGS.replace('["Name the light."]', "[]"), "[held_out] light is empty, expected a list of wordings"),
        (WORDINGS.replace('["Name the light."]', "[3]"), "[held_out] light holds a number, expected text"),
        (WORDINGS.replace('["Name the light."]', '["…"]'), "[held_out] light holds '…', expected pronounceable words"),
        ("wordings = 3", "wordings is a number, expected a table"),
        ("[held_out]", "the table [wordings] is missing"),
        ("[wording]", "unknown key 'wording'"),
    ],
)
def test_a_file_of_wordings_that_is_not_one_is_refused(place, capsys, text, fault):
    (place / "wordings.toml").write_text(text)
    code, _, err = run(capsys, "train.jsonl", *QUICK, "--wordings", "wordings.toml")
    assert code == 2 and err.startswith("surgvqa speak: wordings.toml: ") and fault in err and err.count("\n") == 1
    assert not (place / "spoken").exists()


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--voices", "en-us+lindaa"], "no variant lindaa (voice en-us+lindaa); did you mean linda?"),
        (["--voices", "xx+m1"], "no voice xx+m1"),
        (["--voices", "en-us+whisper"], "whisper never speaks the same twice"),
        (["--voices", "en-us+m1", "en-us+m1"], "voices: a value is given twice"),
        (["--voices", "none"], "voices: none, expected one voice"),
        (["--voices", "en-us+Andy", "--held_out_voices", "en-us+Andy"], "is in voices and in held_out_voices"),
        (["--speeds", "0.2"], "speeds is 0.2, expected at least 0.5 and less than 2"),
        (["--speeds"], "speeds is empty"),
        (["--noise_db", "loud"], "noise_db: 'loud', expected none, or by how many dB"),
        (["--noise_db", "nan"], "noise_db: 'nan'"),
    ],
)
def test_voices_speeds_and_noise_that_cannot_be_are_refused(place, capsys, arguments, fault):
    code, _, err = run(capsys, "train.jsonl", *arguments)
    assert code == 2 and fault in err and not (place / "spoken").exists()


def test_noise_is_as_much_quieter_as_asked():
    wave = np.random.default_rng(0).normal(0, 0.05, 20000).astype(np.float32)
    for decibels in (0.0, 10.0, 30.0):
        noise = with_noise(wave, decibels) - wave
        ratio = 10 * np.log10((wave**2).mean() / (noise**2).mean())
        assert ratio == pytest.approx(decibels, abs=0.1)
    assert with_noise(wave, None) is wave
    assert np.abs(with_noise(wave * 18, -10.0)).max() <= 1


# --- edge-tts ---------------------------------------------------------------------------------------------------------

EDGE = ("train.jsonl", "--engine", "edge", "--voices", "en-US-AriaNeural", "--held_out_voices", "en-GB-RyanNeural")


@pytest.fixture
def service(monkeypatch):
    """Puts the stand-in of edge-tts in its place."""
    monkeypatch.setattr(edge, "WAITS_S", (0.0, 0.0))

    def start(failures=0):
        package = edge_fake.package(failures)
        monkeypatch.setitem(sys.modules, "edge_tts", package)
        return package

    return start


def test_edge_speaks_each_text_once_in_its_voices_and_speeds(place, capsys, service):
    package = service(failures=2)
    code, _, err = run(capsys, *EDGE, "--speeds", "0.9", "1.2", "--json")
    assert (code, err) == (0, "") and len(package.asked) == len(set(package.asked))
    assert {voice for _, voice, _ in package.asked} == {"en-US-AriaNeural", "en-GB-RyanNeural"}
    assert {rate for _, _, rate in package.asked} <= {"-10%", "+20%"}
    assert main(["check-data", "spoken/train.jsonl", "--audio_dir", "spoken/train", "--deep"]) == 0


def test_a_service_that_fails_or_lacks_a_voice_is_one_line_and_what_was_spoken_stays(place, capsys, service):
    service(failures=3)
    code, _, err = run(capsys, *EDGE)
    assert code == 1 and "edge-tts: the service does not answer (Cannot connect to host" in err
    service()
    code, _, err = run(capsys, "train.jsonl", "--engine", "edge", "--voices", "en-US-AriaNeurl", "--speeds", "1")
    assert code == 2 and "edge-tts has no voice en-US-AriaNeurl; did you mean en-US-AriaNeural?" in err
    write_lines(place / "train.jsonl", [record("v", "q0"), {**record("v", "q1"), "question": "Nothing?"}])
    code, _, err = run(capsys, *EDGE, "--speeds", "1", "--noise_db", "none")
    assert code == 1 and "No audio was received" in err and "the same command continues" in err
    assert not list((place / "spoken").glob("*.jsonl"))


def test_without_the_package_the_extra_is_named(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "edge_tts", None)
    code, _, err = run(capsys, *EDGE)
    assert code == 1 and "pip install 'surgvqa[edge-tts]'" in err
