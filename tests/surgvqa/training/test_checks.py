"""What is checked before a model loads."""

import shutil
import sys
from dataclasses import replace

import pytest

from surgvqa.config.options import TrainOptions
from surgvqa.config.workspace import load_workspace
from surgvqa.errors import UsageError
from surgvqa.runs.folder import Run
from surgvqa.training import checkpoints, command, results, schedule


def options_for(**changes) -> TrainOptions:
    names = ("model_name_or_path", "train_data_path", "frames_dir", "audio_dir")
    return TrainOptions(**{**dict.fromkeys(names, "x"), "eval_data_path": "e", **changes})


@pytest.mark.parametrize(
    ("given", "planned", "notes"),
    [
        ({}, {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}, 0),
        (  # the instructions' own command
            {"eval_strategy": "steps", "eval_steps": 10, "save_strategy": "steps", "save_steps": 50},
            {"eval_steps": 10, "save_steps": 50, "load_best_model_at_end": True},
            0,
        ),
        ({"eval_strategy": "steps", "save_strategy": "steps"}, {"eval_steps": 50, "save_steps": 50}, 0),
        ({"eval_strategy": "steps", "eval_steps": 20}, {"save_strategy": "steps", "save_steps": 60}, 2),
        (
            {"eval_strategy": "steps", "eval_steps": 20, "save_strategy": "steps", "load_best_model_at_end": False},
            {"save_steps": 50},
            0,
        ),
        ({"save_strategy": "no"}, {"save_strategy": "epoch"}, 1),
        ({"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 7}, {"save_strategy": "best"}, 0),
        (
            {"eval_data_path": None},
            {"eval_strategy": "no", "load_best_model_at_end": False, "metric_for_best_model": None},
            1,
        ),
        ({"do_eval": False, "save_strategy": "best"}, {"eval_strategy": "no", "save_strategy": "epoch"}, 2),
    ],
)
def test_schedule_agrees_with_itself(given, planned, notes):
    values, said = schedule.schedule(options_for(**given))
    assert planned.items() <= values.items()
    assert len(said) == notes


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"warmup_ratio": 1.0}, "warmup_ratio"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"budget_gb": -1.0}, "budget_gb is -1, expected more than 0"),
        ({"checkpointed_layers": -1}, "checkpointed_layers is -1, expected 0 to 2"),
        ({"checkpointed_layers": 99}, "checkpointed_layers is 99, expected 0 to 2"),
        ({"seed": -3}, "seed"),
        ({"report_to": "wandb,nonsense"}, "report_to is wandb,nonsense; installed and enabled here"),
        ({"lora_target_modules": "("}, "lora_target_modules"),
        ({"model_name_or_path": "nowhere"}, "nowhere"),
        ({"train_data_path": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"eval_data_path": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"frames_dir": "nowhere"}, "nowhere"),
        ({"audio_dir": "nowhere"}, "nowhere"),
        ({"eval_audio_dir": "nowhere", "eval_data_path": "eval"}, "nowhere"),
        ({"metric_for_best_model": "bleu", "eval_data_path": "eval"}, "metric_for_best_model"),
        ({"num_train_epochs": 0.0, "max_steps": -1}, "nothing to train"),
    ],
)
def test_check_names_what_is_wrong(world, changes, problem):
    if changes.get("eval_data_path") == "eval":
        changes = changes | {"eval_data_path": str(world.eval)}
    with pytest.raises(UsageError) as caught:
        command.check(world.train_options(**changes))
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def test_check_finds_a_missing_frame_and_a_missing_question(world, tmp_path):
    shutil.copytree(world.root / "frames", tmp_path / "frames")
    (tmp_path / "frames/v1/v1_301.jpg").unlink()
    with pytest.raises(UsageError, match=r"train.jsonl:4: .*v1_301"):
        command.check(world.train_options(frames_dir=str(tmp_path / "frames")))
    shutil.copytree(world.root / "audio", tmp_path / "audio")
    (tmp_path / "audio/v1/qa_5.wav").unlink()
    with pytest.raises(UsageError, match=r"train.jsonl:6: .*qa_5"):
        command.check(world.train_options(audio_dir=str(tmp_path / "audio")))


def test_check_keeps_other_runs_results(world, tmp_path):
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(UsageError, match="--resume"):
        command.check(world.train_options(output_dir=str(tmp_path)))
    with pytest.raises(UsageError, match="checkpoint itself"):
        command.check(world.train_options(output_dir=str(world.checkpoint)))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="a file"):
        command.check(world.train_options(output_dir=str(tmp_path / "file")))


def test_check_wants_room_on_the_disk(world, monkeypatch):
    from surgvqa.checkpoint.folder import open_checkpoint

    size = command.adapter_size(open_checkpoint(world.checkpoint), world.train_options())
    assert size == 11520  # r=4 on seven projections of two layers, and the projector
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 900, 100))
    with pytest.raises(UsageError, match="100 bytes free"):
        command.check(world.train_options())


def test_a_checkpoint_that_is_not_whole_is_told(tmp_path):
    assert checkpoints.newest_complete_checkpoint(tmp_path) == (None, [])
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    checkpoint, skipped = checkpoints.newest_complete_checkpoint(tmp_path)
    assert checkpoint is None
    assert skipped == ["checkpoint-3: adapter_model.safetensors is missing"]


def test_an_unknown_run_is_an_error(tmp_path):
    workspace = load_workspace(tmp_path)
    with pytest.raises(UsageError, match="nor is it a folder"):
        results.find("20260101", workspace)
    with pytest.raises(UsageError, match="no such folder"):
        results.find("./nothing/here", workspace)
    with Run.create(workspace.runs_dir, "train") as training:
        pass
    with Run.create(workspace.runs_dir, "merge") as run:
        pass
    assert results.find("last", workspace).run == training.id
    with pytest.raises(UsageError, match="merge run"):
        results.find(run.id, workspace)
    with pytest.raises(UsageError, match="so its options are unknown"):
        results.inherit("train", {"resume": str(tmp_path)}, workspace)


@pytest.mark.model
@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ({"lr_schedular_type": "cosine"}, "did you mean lr_scheduler_type"),
        ({"evaluation_strategy": "steps"}, "did you mean eval"),
        ({"weight_decay": "much"}, "weight_decay"),
        ({"lr_scheduler_type": "spiral"}, "spiral"),
        ({"resume_from_checkpoint": "x"}, "--resume"),
        ({"label_smoothing_factor": "0.1"}, "label_smoothing_factor"),
        ({"remove_unused_columns": "true"}, "remove_unused_columns"),
        ({"fp16": "true", "bf16": "true"}, "fp16"),
    ],
)
def test_wrong_extra_options_fail_before_the_model_loads(world, extra, problem):
    options = world.train_options()
    options.extra = extra
    for check in (command.check, command.check_before_launch):
        with pytest.raises(UsageError) as caught:
            check(options)
        assert problem in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.model
def test_a_launch_asks_torch_only_where_it_must(world, monkeypatch):
    """Importing transformers takes seconds, and the job does it once more."""
    monkeypatch.setitem(sys.modules, "surgvqa.training.arguments", None)  # importing it raises
    options = world.train_options(device="auto", bf16=True, optim="auto", report_to="none")
    command.check_before_launch(options)
    for changes in ({"device": "cpu"}, {"optim": "adafactor"}, {"report_to": "tensorboard"}, {"bf16": False}):
        with pytest.raises(ImportError):
            command.check_before_launch(replace(options, **changes))
    with pytest.raises(UsageError, match="nowhere"):
        command.check_before_launch(replace(options, frames_dir="nowhere"))
