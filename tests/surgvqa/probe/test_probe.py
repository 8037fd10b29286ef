"""The whole probe with a very small model, and the sounds that it makes."""

import json

import numpy as np
import pytest
import small

from surgvqa.config.options import PROBE_CONDITIONS, ProbeOptions
from surgvqa.config.settings import settings_of
from surgvqa.data.noise import noise_like
from surgvqa.errors import UsageError
from surgvqa.probe import command
from surgvqa.probe.alter import shuffled
from surgvqa.runs.folder import Run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small.build(tmp_path_factory.mktemp("small"))


def options(world, **changes) -> ProbeOptions:
    given = vars(world.evaluate_options(eval_data_path=str(world.train), max_new_tokens=3))
    known = settings_of(ProbeOptions)
    return ProbeOptions(**{**{name: value for name, value in given.items() if name in known}, **changes})


def probe(options: ProbeOptions, folder):
    command.check(options)
    with Run.create(folder, "probe", workspace=folder) as run:
        outcome = command.run(options, run)
    return outcome, run.folder


def test_noise_is_as_loud_as_the_speech_and_says_nothing():
    wave = (np.random.default_rng(1).normal(0, 0.1, 16000) * np.linspace(0, 1, 16000)).astype(np.float32)
    noise = noise_like(wave)
    assert np.sqrt(np.mean(noise**2)) == pytest.approx(np.sqrt(np.mean(wave**2)), rel=0.05)
    assert abs(np.corrcoef(wave, noise)[0, 1]) < 0.1 and np.array_equal(noise, noise_like(wave))
    assert not noise_like(np.zeros(100, np.float32)).any()


def test_shuffled_frames_are_in_another_order():
    frames = [f"v_{i}" for i in range(4)]
    found = shuffled(frames, "clip")
    assert sorted(found) == frames and found != frames and found == shuffled(frames, "clip")
    assert shuffled(["v_1"], "clip") == ["v_1"] and shuffled(["a", "a"], "clip") == ["a", "a"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"checkpoint": None, "frames_dir": None}, "missing --checkpoint, --frames_dir"),
        (
            {"conditions": ["other_text"]},
            r"none applies to input_mode audio_only: other_text \(audio_text or",
        ),
        ({"train_data_path": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"eval_data_path": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_check_names_what_is_wrong(world, changes, problem):
    with pytest.raises(UsageError, match=problem):
        command.check(options(world, **changes))


@pytest.mark.model
def test_a_probe_asks_once_says_what_it_found_and_goes_on_from_an_earlier_one(world, tmp_path, monkeypatch):
    """Its last answer is lost, as if it had been killed."""
    from surgvqa.model.audio_qwen2vl import AudioQwen2VLForConditionalGeneration as Model

    heard = []
    encode = Model.encode_audio
    monkeypatch.setattr(Model, "encode_audio", lambda self, mels: heard.append(len(mels)) or encode(self, mels))
    outcome, folder = probe(options(world, max_samples=4), tmp_path / "runs")
    report = outcome.data
    assert set(report["conditions"]) == set(PROBE_CONDITIONS) - {"other_text", "other_wording"}
    for row in report["conditions"].values():
        assert row["samples"] == 4 and 0 <= row["influence"] <= 1
        assert {"influence_interval", "accuracy", "difference", "interval"} <= set(row)
    assert set(report["verdicts"]) == {"sound", "frames", "order"} and len(report["conclusion"]) == 3
    assert json.loads((folder / "report.json").read_text())["conditions"] == report["conditions"]
    assert report["conditions"]["same_question"]["influence"] == 0.0  # one recording a type here
    assert report["conditions"]["shuffled"]["influence"] == report["conditions"]["first_frame"]["influence"] == 0.0
    assert sum(heard) == 2 + 1 + 2 + 2  # tones, silence, their noise, the faster ones: each once
    assert report["conditions"]["silence"]["influence"] > 0  # it has ears
    lines = (folder / "answers.jsonl").read_text().splitlines()
    assert report["asked"] == len(lines) < report["answers"] == 4 * 10
    assert not list(folder.glob("altered-*"))

    (folder / "answers.jsonl").write_text("\n".join(lines[:-1]) + '\n{"key": "cut off')
    again, _ = probe(options(world, max_samples=4, resume=folder.name), tmp_path / "runs")
    assert (again.data["asked"], again.data["taken_over"]) == (1, len(lines) - 1)
    assert again.data["conditions"] == report["conditions"]


@pytest.mark.model
def test_a_model_without_ears_is_called_deaf(world, tmp_path, monkeypatch):
    from surgvqa.probe import ask_all

    load = ask_all.load_answerer

    def deafened(options):
        answerer = load(options)
        answerer.base_model.audio_projector.weight.data.zero_()
        return answerer

    monkeypatch.setattr(ask_all, "load_answerer", deafened)
    outcome, _ = probe(options(world, conditions=["other_question", "noise"], max_samples=4), tmp_path / "runs")
    assert outcome.data["verdicts"] == {"sound": "deaf"} and "deaf" in outcome.data["conclusion"][0]
    assert {row["influence"] for row in outcome.data["conditions"].values()} == {0.0}
