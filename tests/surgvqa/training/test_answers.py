"""What is answered while a model trains, and the loss by question type."""

import json

import pytest
import small

from surgvqa.config.options import TrainOptions
from surgvqa.errors import UsageError
from surgvqa.evaluation import train
from surgvqa.runs.folder import Run
from surgvqa.training import command

model = pytest.mark.model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small.build(tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"metric_for_best_model": "label_accuracy", "eval_generate": 0}, "which needs answers"),
        ({"metric_for_best_model": "bleu"}, "expected eval_loss or label_accuracy or keyword_accuracy"),
    ],
)
def test_check_names_what_is_wrong(world, changes, problem):
    with pytest.raises(UsageError, match=problem):
        command.check(world.train_options(eval_data_path=str(world.eval), **changes))


@pytest.mark.parametrize(
    ("labels", "predicted", "few"),
    [
        ({"yes": 3, "no": 3}, {"no": 5, "maybe": 1}, ["no"]),
        ({"yes": 3, "no": 3}, {"no": 5, "yes": 1}, None),
        ({"yes": 1, "no": 1}, {"no": 2}, None),  # too few to tell
        ({"up": 2, "down": 2, "left": 1, "right": 1, "stable": 1}, {"left": 5, "stable": 2}, ["left", "stable"]),
        ({"up": 2, "down": 2, "left": 1, "right": 1, "stable": 1}, {"left": 5, "up": 1, "stable": 1}, None),
        ({"yes": 9}, {"yes": 9}, None),
        ({"yes": 2, "no": 2}, {"well": 4}, []),
    ],
)
def test_a_type_that_lost_most_of_its_labels_is_told(labels, predicted, few):
    from surgvqa.training.answers import collapsed_labels

    assert collapsed_labels({"n": sum(labels.values()), "labels": labels, "predicted": predicted}) == few


@model
def test_answers_are_scored_at_each_evaluation_and_decide_what_is_best(world, tmp_path):
    events = []
    options: TrainOptions = world.train_options(
        eval_data_path=str(world.train),
        eval_generate=8,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        max_steps=6,
        learning_rate=0.01,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=3,
        metric_for_best_model="label_accuracy",
        early_stopping_patience=9,
    )
    with Run.create(tmp_path, "train", observer=events.append) as run:
        result = train.run(options, run).data
    answered = [event for event in events if event["kind"] == "answers"]
    evaluated = [event for event in events if event["kind"] == "eval"]
    assert [event["step"] for event in answered] == [event["step"] for event in evaluated] == [2, 4, 6]
    for event, loss in zip(answered, evaluated):
        assert event["samples"] == 8 and set(event["by_type"]) == {"colour", "is_red"}
        assert event["by_type"]["colour"]["n"] == 4 and "collapsed" in event["by_type"]["colour"]
        assert loss["eval_label_accuracy"] == event["label_accuracy"] and 0 <= event["label_accuracy"] <= 1
        assert set(loss["loss_by_type"]) == {"colour", "is_red"}
        assert min(loss["loss_by_type"].values()) <= loss["eval_loss"] <= max(loss["loss_by_type"].values())
    told = [event["text"] for event in events if event["kind"] == "warning" and "collapsed" in event["text"]]
    assert told[0].startswith("step 2: answers have collapsed") and "is_red: only " in told[0]
    # of equally good states the first; the record has its loss, not its accuracy
    best = max(range(3), key=lambda i: (answered[i]["label_accuracy"], -i))
    assert result["best_checkpoint"].endswith(f"-{answered[best]['step']}")
    assert result["label_accuracy"] == answered[best]["label_accuracy"]
    assert result["eval_loss"] == evaluated[best]["eval_loss"]
    record = json.loads((run.folder / "checkpoints" / "surgvqa.json").read_text())
    assert (record["step"], record["eval_loss"]) == (answered[best]["step"], evaluated[best]["eval_loss"])


@model
def test_an_answer_is_the_one_that_evaluate_gives_and_memory_halves_the_batch(world, tmp_path, monkeypatch):
    import torch

    from surgvqa.data.dataset import ClipDataset
    from surgvqa.data.samples import read_samples
    from surgvqa.evaluation.answerer import load_answerer
    from surgvqa.evaluation.score import score
    from surgvqa.model.generation import Generator
    from surgvqa.training.answers import HeldOut

    options = world.evaluate_options(max_new_tokens=32)
    answerer = load_answerer(options)
    samples = read_samples(options.eval_data_path)
    dataset = ClipDataset(samples, options.frames_dir, options.audio_dir, answerer.processors, options)
    events, seen = [], []
    run = Run.create(tmp_path, "train", observer=events.append)
    held_out = HeldOut(dataset, 4, lambda predictions: seen.extend(predictions) or score(predictions), run)
    original = Generator.answer

    def cramped(self, batch, **keywords):
        if len(batch["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, batch, **keywords)

    monkeypatch.setattr(Generator, "answer", cramped)
    found = held_out.answers(answerer.base_model, answerer.device, False, lambda: None)
    held_out.report([found[::2], found[1::2]], 7)  # as from two ranks
    dataset.with_answer = False
    expected = answerer.answer(answerer.batch([dataset[0], dataset[1]]))
    assert [p["predicted_answer"] for p in seen][:2] == expected and held_out.at_once == 2
    assert [e["text"] for e in events if e["kind"] == "warning"] == [
        "out of memory with 4 samples: answering 2 at once"
    ]
    monkeypatch.setattr(Generator, "answer", lambda *_, **__: cramped(None, {"input_ids": "abc"}))
    with pytest.raises(torch.OutOfMemoryError):
        held_out.answers(answerer.base_model, answerer.device, False, lambda: None)


@model
def test_answering_needs_no_more_memory_than_training_the_real_model():
    from types import SimpleNamespace

    from surgvqa.config.options import DataOptions
    from surgvqa.memory import predict
    from surgvqa.model.sizes import Sizes
    from surgvqa.training.answers import AT_ONCE, largest_batch

    assert largest_batch(SimpleNamespace(prediction=None), None) == (AT_ONCE, f"{AT_ONCE} at once")
    sizes = Sizes()
    for frames, recomputing in ((8, 28), (8, 0), (2, 28)):
        shown = DataOptions(num_frames=frames)
        c = predict.configuration(sizes, shown, checkpointed_layers=recomputing, cached_features=True,
                                  encoders_resident=False, compiled=True)  # fmt: skip
        training = predict.predict(sizes, c)
        count, text = largest_batch(SimpleNamespace(prediction=training), SimpleNamespace(sizes=sizes, weights=None))
        needed = float(text.split(", ")[1].split()[0])
        assert 1 <= count <= AT_ONCE and needed <= training.predicted_peak_gb, (frames, recomputing, text)
