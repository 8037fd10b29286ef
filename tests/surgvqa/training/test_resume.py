"""Resuming: what goes on, what the new options say, what a stop cut short, and who may write into the output folder."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from watched import Watched, assert_same_adapter

from surgvqa.config.workspace import load_workspace
from surgvqa.data.dataset import ClipDataset
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.evaluation import resume as evaluation_resume
from surgvqa.runs.folder import Run
from surgvqa.training import checkpoints, command, results

pytestmark = pytest.mark.model

EPOCHS = {"eval_strategy": "epoch", "max_steps": 8, "learning_rate": 0.01}
"""Two epochs of four steps."""


@pytest.fixture
def again(world, tmp_path):
    """again(first, **changes): goes on in a copy of the first run's output folder."""

    def resume(first: Watched, **changes) -> Watched:
        output = tmp_path / "again"
        shutil.copytree(first.output, output)
        options = {**first.options, "output_dir": str(output), "resume": str(output), **changes}
        return Watched(world.train_options(**options), tmp_path / "runs")

    return resume


@pytest.fixture(scope="module")
def four_steps(world, tmp_path_factory):
    options = {"eval_data_path": str(world.eval), "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    options |= {"max_steps": 4, "learning_rate": 0.01}
    first = Watched(world.train_options(**options), tmp_path_factory.mktemp("four"))
    first.options = options
    return first


def rates(run: Watched) -> dict[int, float]:
    return {event["step"]: event["learning_rate"] for event in run.of("metric")}


# --- what the options say now -----------------------------------------------------------------------------------------


def test_a_new_learning_rate_holds_and_a_longer_schedule_goes_on_where_it_would_be(four_steps, again, tmp_path):
    longer = again(four_steps, max_steps=8)
    assert rates(longer) == pytest.approx({5: 0.005, 6: 0.00375, 7: 0.0025, 8: 0.00125})
    shutil.rmtree(tmp_path / "again")
    lower = again(four_steps, max_steps=8, learning_rate=0.001)
    assert rates(lower) == pytest.approx({step: rate / 10 for step, rate in rates(longer).items()})
    assert lower.losses()[5] == longer.losses()[5] and lower.losses()[6] > longer.losses()[6]


def test_new_steps_between_evaluations_and_checkpoints_hold(four_steps, again):
    run = again(four_steps, max_steps=8, eval_steps=1, save_steps=3, save_total_limit=9, greater_is_better=True)
    assert [event["step"] for event in run.of("eval")] == [5, 6, 7, 8]
    assert {6, 8} <= {event["step"] for event in run.of("checkpoint")}


def test_early_stopping_can_begin_and_become_more_patient(four_steps, again, tmp_path):
    never_better = {"max_steps": 9, "learning_rate": 1e-12, "eval_steps": 1, "save_steps": 1}
    began = again(four_steps, early_stopping_patience=2, **never_better)
    assert began.result["steps"] == 6
    checkpoint = next(iter(checkpoints.checkpoints(began.output)))
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["EarlyStoppingCallback"]["attributes"] == {"early_stopping_patience_counter": 2}
    options = {**four_steps.options, **never_better, "early_stopping_patience": 4}
    output = {"output_dir": str(began.output), "resume": str(began.output)}
    assert Watched(world_options(began, **options, **output), tmp_path / "runs").result["steps"] == 8


def world_options(run: Watched, **changes):
    return command.TrainOptions(**{**results.read(run.output).options, **changes})


def test_states_of_another_optimiser_are_told(four_steps, again):
    with pytest.raises(UsageError, match=r"checkpoint-4: .*another optimiser.*--optim"):
        raise again(four_steps, max_steps=8, optim="adafactor").error


def test_another_number_of_samples_a_step_is_warned_of(four_steps, again):
    run = again(four_steps, max_steps=6, per_device_train_batch_size=2)
    assert any("4 samples, but had 2" in event["text"] for event in run.of("warning"))


# --- what was cut short -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def epochs(world, tmp_path_factory):
    return Watched(world.train_options(eval_data_path=str(world.eval), **EPOCHS), tmp_path_factory.mktemp("epochs"))


@pytest.mark.parametrize("step", [4, 8])
@pytest.mark.parametrize("place", ["training_step", "prediction_step"])
def test_an_evaluation_that_a_stop_cut_short_is_made_up_for(
    world,
    epochs,
    tmp_path,
    monkeypatch,
    place,
    step,
):
    """Stopped in the last micro step of an epoch, or in the evaluation after it."""
    from surgvqa.training.trainer import EventTrainer

    original = getattr(EventTrainer, place)

    def stops(self, *arguments, **keywords):
        found = original(self, *arguments, **keywords)
        last = self.state.global_step == step - 1 and len(self.window.batches) == 2
        if last if place == "training_step" else self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    options = {"eval_data_path": str(world.eval), "output_dir": str(tmp_path / "out"), **EPOCHS}
    with monkeypatch.context() as patched:
        patched.setattr(EventTrainer, place, stops)
        first = Watched(world.train_options(**options), tmp_path / "runs")
    assert first.result["state"] == "stopped" and first.result["steps"] == step
    second = Watched(world.train_options(**options, resume=str(tmp_path / "out")), tmp_path / "runs")
    evaluations = [(event["step"], event["eval_loss"]) for event in (*first.of("eval"), *second.of("eval"))]
    assert evaluations == [(event["step"], event["eval_loss"]) for event in epochs.of("eval")]
    assert first.losses() | second.losses() == epochs.losses()
    assert second.result["best_checkpoint"].endswith("checkpoint-8")
    assert second.result["eval_loss"] == epochs.result["eval_loss"]
    assert_same_adapter(second.output, epochs.output)


def test_an_error_between_steps_costs_no_step(world, tmp_path, monkeypatch):
    """Here a file that a worker process cannot read; checkpoints come at the end of an epoch only."""
    from surgvqa.training.trainer import EventTrainer

    load, report = ClipDataset.__getitem__, EventTrainer.end_of_step
    broken = tmp_path / "from now on"

    def breaks(self, index):
        if broken.exists():
            raise SurgvqaError("the frame is gone")
        return load(self, index)

    def third_step(self):
        report(self)
        if self.state.global_step == 3:
            broken.touch()

    monkeypatch.setattr(ClipDataset, "__getitem__", breaks)
    monkeypatch.setattr(EventTrainer, "end_of_step", third_step)
    options = world.train_options(max_steps=40, gradient_accumulation_steps=1, save_strategy="epoch")
    options.extra = {"dataloader_num_workers": "1", "dataloader_prefetch_factor": "1"}
    run = Watched(options, tmp_path / "runs")
    assert str(run.error) == "the frame is gone"
    checkpoint, _ = checkpoints.newest_complete_checkpoint(run.output)
    assert int(checkpoint.name.partition("-")[2]) == max(run.losses()) >= 3


def test_steps_that_are_not_finite_leave_the_last_good_one(world, tmp_path, monkeypatch):
    from surgvqa.training.trainer import EventTrainer

    compute = EventTrainer.compute_loss

    def compute_loss(self, *arguments, **keywords):
        loss = compute(self, *arguments, **keywords)
        return loss * math.nan if self.state.global_step >= 3 else loss

    monkeypatch.setattr(EventTrainer, "compute_loss", compute_loss)
    run = Watched(world.train_options(max_steps=8, save_strategy="no"), tmp_path)
    checkpoint, _ = checkpoints.newest_complete_checkpoint(run.output)
    assert "steps 4 to 6 are not finite" in str(run.error) and f"checkpoint: {checkpoint};" in str(run.error)


# --- the output folder ------------------------------------------------------------------------------------------------


def test_going_back_needs_a_folder_of_its_own(four_steps, world, tmp_path):
    """The newer checkpoint would stay for the newest one, and those to come be removed."""
    output = tmp_path / "out"
    shutil.copytree(four_steps.output, output)
    back = {**four_steps.options, "resume": str(output / "checkpoint-2"), "save_total_limit": 1, "max_steps": 3}
    with pytest.raises(UsageError, match=r"checkpoint-4: is from a later step than checkpoint-2.*output_dir"):
        command.check(world.train_options(**back, output_dir=str(output)))
    other = world.train_options(**back, output_dir=str(tmp_path / "other"))
    command.check(other)
    assert Watched(other, tmp_path / "runs").result["resumed_from"] == str(output / "checkpoint-2")

    (output / "checkpoint-4/optimizer.pt").unlink()
    command.check(world.train_options(**back, output_dir=str(output)))
    damaged = Watched(world.train_options(**back, output_dir=str(output)), tmp_path / "runs")
    assert (output / "damaged-checkpoint-4").is_dir()
    assert "checkpoint-3" in [path.name for path in checkpoints.checkpoints(damaged.output)]


def test_what_was_trained_is_not_begun_anew(four_steps, world, tmp_path):
    """As when a run was fetched without its optimiser, or kept no checkpoint."""
    output = tmp_path / "out"
    shutil.copytree(four_steps.output, output)
    options = world.train_options(**four_steps.options, output_dir=str(output), resume=str(output))
    command.check(options)
    for file in output.glob("checkpoint-*/optimizer.pt"):
        file.unlink()
    with pytest.raises(UsageError, match=r"no checkpoint to resume from \(checkpoint-4: optimizer.pt is missing\)"):
        command.check(options)
    for checkpoint in checkpoints.checkpoints(output):
        shutil.rmtree(checkpoint)
    with pytest.raises(UsageError, match="none was kept"):
        command.check(options)
    (output / checkpoints.ADAPTER).unlink()
    with pytest.raises(UsageError, match="none was kept"):  # --resume never begins at step 0
        command.check(options)


def test_a_moved_folder_still_has_its_best_state_and_a_lost_one_is_told(four_steps, again, tmp_path):
    best = four_steps.result["best_checkpoint"]
    assert best.endswith("checkpoint-4")
    moved = tmp_path / "moved"
    shutil.copytree(four_steps.output, moved)
    state = moved / "checkpoint-4/trainer_state.json"
    state.write_text(state.read_text().replace(str(four_steps.output), "/nowhere"))
    done = Watched(world_options(four_steps, output_dir=str(moved), resume=str(moved)), tmp_path / "runs")
    assert done.result["best_checkpoint"] == str(moved / "checkpoint-4")
    assert done.result["eval_loss"] == four_steps.result["eval_loss"]

    document = json.loads(state.read_text())
    state.write_text(json.dumps(document | {"best_global_step": 3, "best_metric": 0.001}))
    lost = Watched(world_options(four_steps, output_dir=str(moved), resume=str(moved)), tmp_path / "runs")
    assert any("checkpoint-3, the best so far, is missing" in event["text"] for event in lost.of("warning"))
    assert lost.result["eval_loss"] != 0.001 and lost.result["best_checkpoint"] is None


def test_a_run_that_goes_on_where_another_ended_is_not_taken_for_its_result(world, tmp_path, monkeypatch):
    from surgvqa.evaluation import model_folders
    from surgvqa.training.trainer import EventTrainer

    saving = {"save_strategy": "steps", "save_steps": 1}
    first = Watched(world.train_options(max_steps=1, **saving), tmp_path)
    asked = world.evaluate_options(checkpoint=str(first.output))
    assert model_folders.model_folders(asked) == (world.checkpoint, first.output)
    report = EventTrainer.end_of_step

    def stops(self):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        report(self)

    monkeypatch.setattr(EventTrainer, "end_of_step", stops)
    output = {"output_dir": str(first.output), "resume": str(first.output)}
    second = Watched(world.train_options(max_steps=4, **saving, **output), tmp_path)
    assert second.result["state"] == "stopped"
    assert model_folders.model_folders(asked) == (world.checkpoint, first.output / "checkpoint-2")


def test_two_trainings_do_not_share_an_output_folder(world, tmp_path, monkeypatch):
    output = tmp_path / "out"
    output.mkdir()
    code = "import fcntl, os, sys; d = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(d, fcntl.LOCK_EX); "
    code += "print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, output], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        monkeypatch.setattr(results, "BUSY_S", 0.3)
        options = world.train_options(output_dir=str(output), max_steps=1)
        with pytest.raises(UsageError, match="working there"):
            command.check(options)
        with Run.create(tmp_path / "runs", "train") as run, pytest.raises(UsageError, match="working there"):
            command.run(options, run)
        assert not list(output.iterdir())
        other.stdin.close()
    command.check(options)
    assert Watched(options, tmp_path / "runs").result["steps"] == 1


# --- resumed runs that ended before they began ------------------------------------------------------------------------


def begun_and_ended(runs: Path, run_id: str, *argv: str) -> Path:
    """A detached run whose input was refused: it has the run.json of whoever launched it, and an end."""
    folder = runs / run_id
    folder.mkdir(parents=True)
    info = {"v": 1, "id": run_id, "command": "train", "argv": ["train", *argv], "pid": None, "started": time.time()}
    (folder / "run.json").write_text(json.dumps(info))
    event = {"v": 1, "t": time.time(), "kind": "finished", "state": "failed", "exit_code": 2, "result": {}}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    return folder


def test_resume_goes_on_from_the_newest_state_however_often_it_failed_to_begin(four_steps, tmp_path):
    output, workspace = tmp_path / "out", load_workspace(tmp_path)
    shutil.copytree(four_steps.output, output)
    begun_and_ended(tmp_path / "runs", "20260101-000001-train-aaa", "--resume", str(output))
    begun_and_ended(tmp_path / "runs", "20260101-000002-train-bbb", "--resume=20260101-000001-train-aaa")
    for name in ("20260101-000001-train-aaa", "20260101-000002-train-bbb", "last"):
        assert results.find(name, workspace).folder == output
    begun_and_ended(tmp_path / "runs", "20260101-000003-train-ccc", "--resume", str(output), "--learning_rate", "1e-5")
    with pytest.raises(UsageError, match=r"had the options --learning_rate 1e-5; give them again"):
        results.find("last", workspace)
    assert results.find("last", workspace, {"learning_rate"}).folder == output
    begun_and_ended(tmp_path / "runs", "20260101-000004-train-ddd", "--frames_dir", "nowhere")
    with pytest.raises(UsageError, match="nothing to resume; start it again"):
        results.find("last", workspace)


def test_a_resumed_run_that_saved_nothing_stands_for_the_state_that_it_was_to_go_on_from(four_steps, world, tmp_path):
    output, other = tmp_path / "out", tmp_path / "other"
    shutil.copytree(four_steps.output, output)
    options = {name: {"value": value} for name, value in vars(world.train_options(**four_steps.options)).items()}
    options |= {"resume": {"value": str(output)}, "output_dir": {"value": str(other)}}
    with Run.create(tmp_path / "runs", "train", options=options):
        other.mkdir()
    found = results.find("last", load_workspace(tmp_path))
    assert found.folder == output and found.options["output_dir"] == str(other)


def test_last_means_a_run_before_the_one_that_resumes(four_steps, tmp_path):
    """A launched job finds its own folder among the runs, and one that failed to begin was to resume an earlier one."""
    output, workspace, runs = tmp_path / "out", load_workspace(tmp_path), tmp_path / "runs"
    shutil.copytree(four_steps.output, output)
    begun_and_ended(runs, "20260101-000001-train-aaa", "--resume", str(output))
    begun_and_ended(runs, "20260101-000002-train-bbb", "--resume", "last")
    begun_and_ended(runs, "20260101-000003-train-ccc", "--resume=last")
    given = {"resume": "last"}
    results.inherit("train", given, workspace, own="20260101-000003-train-ccc")
    assert Path(given["resume"]) == output
    assert results.find("last", workspace).folder == output
    begun_and_ended(runs, "20260101-000004-train-ddd", "--frames_dir", "nowhere")  # newer, and of no concern to ccc
    assert results.find("20260101-000003-train-ccc", workspace).folder == output


@pytest.mark.parametrize("argv", [("--resume", "last"), ("--resume", "20260101-000002-train-bbb")])
def test_runs_that_were_to_resume_each_other_end_in_one_line(tmp_path, argv):
    begun_and_ended(tmp_path / "runs", "20260101-000001-train-aaa", *argv)
    begun_and_ended(tmp_path / "runs", "20260101-000002-train-bbb", "--resume", "20260101-000001-train-aaa")
    with pytest.raises(UsageError, match=r"no such run|was to resume from itself"):
        results.find("20260101-000001-train-aaa", load_workspace(tmp_path))


def test_a_launched_evaluation_does_not_resume_from_itself(tmp_path):
    runs, workspace = tmp_path / "runs", load_workspace(tmp_path)
    earlier = begun_and_ended(runs, "20260101-000001-evaluate-aaa")
    info = {"v": 1, "id": earlier.name, "command": "evaluate", "started": 1.0, "options": {"batch_size": {"value": 3}}}
    (earlier / "run.json").write_text(json.dumps(info))
    own = begun_and_ended(runs, "20260101-000002-evaluate-bbb", "--resume", "last")
    (own / "run.json").write_text(json.dumps({**info, "id": own.name, "options": None, "started": 2.0}))
    given = {"resume": "last"}
    inherited = evaluation_resume.inherit(given, workspace, own.name)
    assert given["resume"] == str(earlier) and inherited.values["batch_size"] == 3
