"""One question after another: for a program and for a person."""

import io
import json

import pytest
import small

from surgvqa.config.options import AskOptions
from surgvqa.data.samples import read_samples
from surgvqa.evaluation.interactive import labels_of, serve, talk

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small.build(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def asker(world):
    from surgvqa.evaluation.asker import Asker

    given = vars(world.evaluate_options(max_new_tokens=4))
    names = ("checkpoint", "eval_data_path", "frames_dir", "audio_dir", "num_frames", "image_size", "device")
    return Asker(AskOptions(**{name: given[name] for name in names}, max_new_tokens=4, interactive=True))


def request(world, **changes):
    sample = read_samples(world.eval)[0]
    frames = [str(world.root / "frames" / "v1" / f"{frame}.jpg") for frame in sample.frames]
    audio = str(world.root / "audio" / "v1" / f"{sample.id}.wav")
    return json.dumps({"frames": frames, "audio": audio, **changes}) + "\n"


def test_a_program_asks_line_by_line(world, asker):
    labels = labels_of(read_samples(world.train), "colour")
    assert list(labels) == sorted(small.COLOURS) and labels["red"] == "The colour is red."
    lines = [
        request(world, labels=labels),
        "no JSON\n",
        request(world, frames="x"),
        request(world, audio="nowhere.wav"),
        request(world),
    ]
    replies = io.StringIO()
    assert serve(asker, io.StringIO("".join(lines)), replies) == 2
    ready, first, *errors, last = [json.loads(line) for line in replies.getvalue().splitlines()]
    assert ready["ready"] and ready["load_seconds"] > 0
    assert set(first["probabilities"]) == set(labels) and sum(first["probabilities"].values()) == pytest.approx(1)
    assert first["answer"] == last["answer"] and "probabilities" not in last and last["seconds"] > 0
    texts = [error["error"] for error in errors]
    assert "expected a JSON object" in texts[0] and "frames: expected a list" in texts[1] and "nowhere.wav" in texts[2]


def test_the_answer_is_the_one_that_evaluate_gives_and_the_probabilities_are_the_sentences(world, asker):
    """The encoders' outputs in the place of pixels and mels change nothing."""
    import torch

    from surgvqa.data.dataset import ClipDataset

    options = world.evaluate_options()
    samples = read_samples(options.eval_data_path)[:1]
    answerer = asker.answerer
    shown = ClipDataset(samples, options.frames_dir, options.audio_dir, answerer.processors, options, with_answer=False)
    labels = {"a": samples[0].answer, "b": "No, it is not."}
    found = asker.ask(shown.frame_paths[0], shown.audio_paths[0], None, labels)
    assert found["answer"] == answerer.answer(answerer.batch([shown[0]]))[0]
    shown.with_answer, losses = True, []
    for answer in labels.values():
        object.__setattr__(shown.samples[0], "answer", answer)
        inputs = answerer.batch([shown[0]])
        inputs.pop("tokens")
        with torch.inference_mode():
            losses.append(float(answerer.base_model(**inputs).loss) * len(inputs["supervised"]))
    expected = torch.tensor(losses).neg().softmax(0).tolist()
    assert list(found["probabilities"].values()) == pytest.approx(expected, rel=1e-3)


def test_a_person_chooses_samples(world, asker):
    said, written = iter(["", "qa_2", "99", "audio nowhere.wav", "say Is it red?", "q"]), []
    assert talk(asker, asker.options, lambda prompt: next(said), written.append) == 3
    text = "\n".join(written)
    assert written[0].startswith("4 samples. number or id") and "1  qa_0  colour: What colour is it?" in text
    assert "2  qa_2  colour" in text and "99: no such sample" in text and "nowhere.wav is missing" in text
    assert "2  qa_2  colour: Is it red?" in text and " %  blue" in text and "the label is red" in text
