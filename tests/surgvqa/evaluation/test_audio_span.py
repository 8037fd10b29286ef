"""A model trained with what is spoken: evaluated so, merged so, trained on so; and not otherwise unless --force."""

import json

import pytest
import small

from surgvqa.cli import main
from surgvqa.runs.folder import Run
from surgvqa.training import command as train

pytestmark = pytest.mark.model
SPOKEN = {"audio_span": "spoken", "audio_margin_s": 0.1}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small.build(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def adapter(world):
    options = world.train_options(**SPOKEN, max_steps=1, save_strategy="no")
    with Run.create(world.root / "runs", "train") as run:
        train.run(options, run)
    return run.folder / "checkpoints"


@pytest.fixture(scope="module")
def merged(world, adapter):
    folder = world.root / "merged"
    arguments = ["--stage1_model_path", world.checkpoint, "--stage2_adapter_path", adapter, "--output_path", folder]
    assert main.main(["merge", *map(str, arguments), "--json"]) == 0
    return folder


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_it_is_evaluated_as_it_was_trained_and_refused_otherwise(world, kind, request, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    checkpoint = request.getfixturevalue(kind)
    asked = ["--checkpoint", checkpoint, "--eval_data_path", world.eval, "--frames_dir", world.root / "frames"]
    asked += ["--audio_dir", world.root / "audio", "--device", "cpu", "--max_new_tokens", "2", "--json"]
    asked += ["--num_frames", "2", "--image_size", "84"]
    assert main.main(["evaluate", *map(str, asked)]) == 0
    (run,) = (tmp_path / "runs").glob("*-evaluate-*")
    options = json.loads((run / "run.json").read_text())["options"]
    assert {name: options[name]["value"] for name in SPOKEN} == SPOKEN
    assert options["audio_span"]["from"].startswith("trained with")
    capfd.readouterr()
    assert main.main(["evaluate", *map(str, asked), "--audio_span", "full"]) == 2
    assert "trained with audio_span spoken, but these options ask with full; use --force" in capfd.readouterr().err
    assert main.main(["evaluate", *map(str, asked), "--audio_span", "full", "--force"]) == 0


def test_a_training_that_begins_with_the_merged_one_goes_on_so(world, merged, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ["--model_name_or_path", merged, "--train_data_path", world.train, "--frames_dir", world.root / "frames"]
    asked += ["--audio_dir", world.root / "audio", "--device", "cpu", "--max_steps", "1", "--num_frames", "2"]
    asked += ["--image_size", "84", "--lora_r", "4", "--save_strategy", "no"]
    assert main.main(["train", *map(str, asked)]) == 0
    assert main.main(["train", *map(str, asked), "--audio_span", "full"]) == 0
    infos = [json.loads(file.read_text()) for file in (tmp_path / "runs").glob("*-train-*/run.json")]
    heard = [info["options"] for info in sorted(infos, key=lambda info: info["started"])]  # ids of a second are random
    assert [options["audio_span"]["value"] for options in heard] == ["spoken", "full"]
    assert heard[0]["audio_margin_s"] == {"value": 0.1, "from": f"trained with ({merged})"}
