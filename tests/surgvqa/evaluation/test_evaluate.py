"""Evaluation and single questions, with a very small model that has learned its training samples by heart."""

import json
import shutil
from pathlib import Path

import pytest
import small
from places import REAL_DATA

from surgvqa.cli import main
from surgvqa.config.options import AskOptions, EvaluateOptions
from surgvqa.config.workspace import load_workspace
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.evaluation import ask, model_folders
from surgvqa.evaluation import command as evaluate
from surgvqa.runs.folder import Run
from surgvqa.training import command as train
from surgvqa.training import results

model = pytest.mark.model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small.build(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def learned(world):
    """The run folder of a training on the colours; the workspace is the world's folder."""
    options = world.train_options(
        max_steps=120,
        learning_rate=0.01,
        lora_r=16,
        lora_dropout=0.0,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        save_strategy="no",
    )
    with Run.create(world.root / "runs", "train", options=_record(options)) as run:
        train.run(options, run)
    return run


def _record(options):
    return {name: {"value": value, "from": "test"} for name, value in vars(options).items()}


def _evaluate(options: EvaluateOptions, folder: Path):
    events = []
    evaluate.check(options)
    with Run.create(folder, "evaluate", observer=events.append) as run:
        outcome = evaluate.run(options, run)
    lines = (run.folder / "predictions.jsonl").read_text().splitlines()
    return outcome, [json.loads(line) for line in lines], events


def _ask_options(world, learned, **changes) -> AskOptions:
    row = json.loads(world.train.read_text().splitlines()[0])
    frames = [str(world.root / "frames" / "v1" / f"{name}.jpg") for name in row["frames"]]
    audio = str(world.root / "audio" / "v1" / f"{row['id']}.wav")
    values = {
        "checkpoint": str(learned.folder / "checkpoints"),
        "frames": frames,
        "audio": audio,
        "num_frames": 2,
        "image_size": 84,
        "device": "cpu",
    }
    return AskOptions(**{**values, **changes})


# --- without a model --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"{REAL_DATA} is not here")
def test_the_published_figure_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = str(REAL_DATA / "predictions_qwen2_zeroshot.jsonl")
    assert main.main(["evaluate", "--predictions", file, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["samples"] == 1000 and report["keyword_accuracy"] == pytest.approx(0.36)
    assert not (tmp_path / "runs").exists()
    assert main.main(["evaluate", "--predictions", file]) == 0
    shown = capsys.readouterr().out
    assert "36.0" in shown and "lesion_motion_direction" in shown and "collapsed" in shown


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"checkpoint": None}, "missing --checkpoint"),
        ({"eval_data_path": None, "frames_dir": None}, "missing --eval_data_path, --frames_dir"),
        ({"checkpoint": "nowhere"}, "nowhere: no such folder"),
        ({"frames_dir": "nowhere"}, "nowhere"),
        ({"batch_size": 0}, "batch_size"),
        ({"predictions": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_check_names_what_is_wrong(world, changes, problem):
    with pytest.raises(UsageError, match=problem):
        evaluate.check(world.evaluate_options(**changes))


def test_an_adapter_needs_its_base(world, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "far/away"}')
    with pytest.raises(UsageError, match="far/away is not here"):
        evaluate.check(world.evaluate_options(checkpoint=str(tmp_path)))
    options = world.evaluate_options(checkpoint=str(tmp_path), model_name_or_path=str(world.checkpoint))
    assert model_folders.model_folders(options) == (world.checkpoint, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no \*\.safetensors"):
        evaluate.check(world.evaluate_options(checkpoint=str(tmp_path / "empty")))
    (tmp_path / "empty" / results.RECORD).write_text('{"options": {}}')
    with pytest.raises(UsageError, match="has not saved an adapter yet"):
        evaluate.check(world.evaluate_options(checkpoint=str(tmp_path / "empty")))


def test_ask_checks_its_files(world):
    options = AskOptions(checkpoint=str(world.checkpoint), frames=["nowhere.jpg"], audio="nowhere.wav")
    with pytest.raises(UsageError, match=r"nowhere\.jpg"):
        ask.check(options)
    options.frames = [str(world.train)]
    with pytest.raises(UsageError, match=r"nowhere\.wav"):
        ask.check(options)
    options.audio, options.input_mode = str(world.train), "audio_text"
    with pytest.raises(UsageError, match="--question"):
        ask.check(options)


# --- with a model -----------------------------------------------------------------------------------------------------


@model
def test_a_trained_adapter_answers_what_it_learned(world, learned, tmp_path):
    outcome, predictions, events = _evaluate(
        world.evaluate_options(checkpoint=str(learned.folder / "checkpoints"), eval_data_path=str(world.train)),
        tmp_path,
    )
    report = outcome.data
    assert report["samples"] == 8 and set(report["by_type"]) == {"colour", "is_red"}
    assert report["label_accuracy"] > report["majority_accuracy"]
    assert report["label_accuracy"] >= 0.75
    keys = (
        "question_id video_id question_type question ground_truth short_answer predicted_answer inference_time_ms"
        " exact_match correct"
    )
    assert {*keys.split(), "keyword_correct", "word_correct", "label_correct"} == set(predictions[0])
    assert [p["question_id"] for p in predictions] == [f"qa_{i}" for i in range(8)]
    done = [e["done"] for e in events if e["kind"] == "progress" and e["phase"] == "generate"]
    assert done[0] == 0 and done[-1] == 8
    assert any(e["kind"] == "gpu" for e in events)


@model
def test_batches_and_left_padding_change_no_answer(world, learned, tmp_path):
    """Frames of two shapes give prompts of different lengths."""
    from PIL import Image

    shutil.copytree(world.root / "frames", tmp_path / "frames")
    for path in (tmp_path / "frames" / "v1").glob("v1_2*.jpg"):
        Image.open(path).resize((84, 84)).save(path)
    answers = [
        [
            p["predicted_answer"]
            for p in _evaluate(
                world.evaluate_options(
                    checkpoint=str(learned.folder / "checkpoints"),
                    eval_data_path=str(world.train),
                    frames_dir=str(tmp_path / "frames"),
                    batch_size=size,
                ),
                tmp_path / "runs",
            )[1]
        ]
        for size in (1, 5)
    ]
    assert answers[0] == answers[1] and all(answers[0])


@model
def test_the_base_checkpoint_itself_is_evaluated(world, tmp_path):
    outcome, predictions, _ = _evaluate(world.evaluate_options(), tmp_path)
    assert outcome.data["samples"] == 4 and len(predictions) == 4


@model
def test_a_frame_that_cannot_be_read_is_an_error_and_no_score(world, tmp_path):
    shutil.copytree(world.root / "frames", tmp_path / "frames")
    broken = tmp_path / "frames" / "v1" / "v1_400.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(UsageError, match="v1_400"):
        _evaluate(world.evaluate_options(frames_dir=str(tmp_path / "frames")), tmp_path / "runs")
    assert not list((tmp_path / "runs").glob("*/predictions.jsonl"))


@model
def test_out_of_memory_halves_the_batch(world, tmp_path, monkeypatch):
    import torch

    from surgvqa.evaluation.answerer import Answerer

    original = Answerer.answer

    def answer(self, batch, largest=2):
        if len(batch["input_ids"]) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, batch)

    monkeypatch.setattr(Answerer, "answer", answer)
    outcome, _, events = _evaluate(world.evaluate_options(batch_size=4), tmp_path)
    assert outcome.data["samples"] == 4 and outcome.data["batch_size"] == 2
    (oom,) = [e for e in events if e["kind"] == "oom"]
    assert (oom["phase"], oom["requested_bytes"], oom["action"]) == ("generate", 2 * 2**30, "answering 2 at once")
    monkeypatch.setattr(Answerer, "answer", lambda self, batch: answer(self, batch, largest=0))
    with pytest.raises(SurgvqaError, match="single sample"):
        _evaluate(world.evaluate_options(), tmp_path)


@model
def test_as_many_are_answered_at_once_as_fit_the_budget(world, tmp_path, monkeypatch):
    """A prediction of 1 GB a sample beside 2 GB, and what the options ask for all the same."""
    from types import SimpleNamespace

    from surgvqa.evaluation import generate
    from surgvqa.memory import fit

    def predicted(batch):
        return SimpleNamespace(predicted_peak_gb=2 + batch, fits=lambda budget_gb: 2 + batch <= budget_gb)

    def told(**options):
        outcome, _, events = _evaluate(world.evaluate_options(**options), tmp_path)
        (phase,) = [e["text"] for e in events if e["kind"] == "phase" and e["name"] == "generate"]
        return outcome.data["batch_size"], phase

    assert told(batch_size=None)[0] == 8  # a CPU
    monkeypatch.setattr(generate, "_predict", lambda *_: predicted)
    tight = 5 * (1 + fit.MARGIN / 2)  # 5 GB would leave no margin
    count, text = told(batch_size=None, budget_gb=tight)
    assert count == 2 and f"2 at once (4.0 of {tight:.1f} GB predicted)" in text
    assert told(batch_size=None, budget_gb=28.5)[0] == 4  # all there are
    assert told(batch_size=None, budget_gb=5.2)[0] == 2  # 3 would fit, but then 1 would be left
    assert told(batch_size=None, budget_gb=1)[0] == 1
    count, text = told(batch_size=4, budget_gb=5.1)
    assert count == 4 and "the batch is halved if memory runs out" in text


@model
def test_the_prediction_of_an_evaluation_knows_adapter_frames_and_cache(world, learned, tmp_path):
    from types import SimpleNamespace

    from surgvqa.data.dataset import ClipDataset
    from surgvqa.data.samples import read_samples
    from surgvqa.evaluation import generate
    from surgvqa.evaluation.answerer import load_answerer

    options = world.evaluate_options(checkpoint=str(learned.folder / "checkpoints"))
    answerer = load_answerer(options)
    samples = read_samples(options.eval_data_path)
    dataset = ClipDataset(
        samples, options.frames_dir, options.audio_dir, answerer.processors, options, with_answer=False
    )
    assert generate._predict(answerer, dataset, options, cached=True) is None
    on_gpu = SimpleNamespace(base=answerer.base, model=answerer.model, device=SimpleNamespace(type="cuda"))
    cached, encoding = (generate._predict(on_gpu, dataset, options, cached=flag) for flag in (True, False))
    assert cached(1).peak_bytes < cached(2).peak_bytes and cached(1).peak_bytes < encoding(1).peak_bytes
    configuration = cached(3).configuration
    assert (configuration.batch, configuration.lora.lora_r, configuration.clip.frames) == (3, 16, 2)


@model
def test_a_run_id_brings_its_settings_along(world, learned, monkeypatch, capfd):
    monkeypatch.chdir(world.root)
    data = f"--eval_data_path {world.eval} --frames_dir {world.root}/frames --audio_dir {world.root}/audio"
    assert main.main(f"evaluate --checkpoint {learned.id} {data} --max_new_tokens 4 --device cpu --json".split()) == 0
    report = json.loads(capfd.readouterr().out)
    recorded = json.loads((world.root / "runs" / report["run"] / "run.json").read_text())["options"]
    assert recorded["num_frames"]["value"] == 2 and recorded["image_size"]["value"] == 84
    assert recorded["image_size"]["from"] == f"trained with ({learned.id})"
    assert recorded["model_name_or_path"]["value"] == str(world.checkpoint)
    # What is named on the command line wins.
    given = {"checkpoint": learned.id, "num_frames": 1}
    inherited = results.inherit("evaluate", given, load_workspace(world.root))
    assert inherited.values["num_frames"] == 2 and given["checkpoint"] == str(learned.folder / "checkpoints")


@model
def test_ask_prints_the_answer_alone(world, learned, capfd):
    options = _ask_options(world, learned)
    ask.check(options)
    outcome = ask.run(options, load_workspace(world.root))
    assert outcome.data["answer"] and outcome.data["seconds"] > 0 and outcome.data["frames"] == 2
    row = json.loads(world.train.read_text().splitlines()[0])
    command = ["ask", "--checkpoint", options.checkpoint, "--frames", *options.frames, "--audio", options.audio]
    capfd.readouterr()
    assert main.main([*command, "--num_frames", "2", "--image_size", "84", "--device", "cpu"]) == 0
    assert capfd.readouterr().out.strip() == outcome.data["answer"]
    assert row["short_answer"] in outcome.data["answer"]
