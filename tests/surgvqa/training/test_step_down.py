"""What a training does when the GPU's memory runs out: injected on the CPU. That stepping down gives what a run that
began so gives is in test_equivalences.py."""

import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
from watched import ERROR, STEPS, Watched, assert_same, assert_same_adapter, places, preset

from surgvqa.config.options import TrainOptions
from surgvqa.config.workspace import load_workspace
from surgvqa.memory import fit, reductions
from surgvqa.runs.ranks import Ranks
from surgvqa.training import checkpoints, results

ON_A_GPU = (
    "CUDA out of memory. Tried to allocate 588.00 MiB. GPU 0 has a total capacity of 79.18 GiB of which 68.51 GiB is "
    "free. Including non-PyTorch memory, this process has 10.62 GiB memory in use. 9.52 GiB allowed; Of the allocated "
    "memory 9.00 GiB is allocated by PyTorch, and 192.00 MiB is reserved by PyTorch but unallocated. If reserved but "
    "unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
FEWER = preset(1, 84)
NEEDED = ("model_name_or_path", "train_data_path", "frames_dir", "audio_dir")
SMALLER = preset(1, 28, rung=1)


model = pytest.mark.model


@pytest.fixture(scope="session")
def world(noisy_world):
    return noisy_world


@model
@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        (ERROR, (2 * 2**30, None, None)),
        ("Tried to allocate 512 bytes", (512, None, None)),
        ("Tried to allocate 20.50 MiB.", (21495808, None, None)),
        (ON_A_GPU, (588 * 2**20, 9 * 2**30, 192 * 2**20)),
        ("no", (None, None, None)),
    ],
)
def test_the_sizes_are_read_from_the_message(text, sizes):
    from surgvqa.memory.out_of_memory import ALLOCATED, REQUESTED, UNALLOCATED, size_in

    assert tuple(size_in(text, where) for where in (REQUESTED, ALLOCATED, UNALLOCATED)) == sizes


@model
@pytest.mark.parametrize(("free", "in_pieces"), [("192.00 MiB", False), ("600.00 MiB", True)])
def test_fragmentation_is_told_by_what_the_message_says(monkeypatch, free, in_pieces):
    """By the time that the error is met, temporaries are gone: the allocator's own figures would say 'in pieces'."""
    import torch

    from surgvqa.memory import out_of_memory as out_of_memory_module
    from surgvqa.training import rollback, step_down

    monkeypatch.setattr(out_of_memory_module, "allocator_bytes", lambda: (2**30, 9 * 2**30))
    monkeypatch.setattr(step_down, "owners", lambda trainer, allocated: {})
    trainer = SimpleNamespace(
        state=SimpleNamespace(global_step=3),
        activity="forward and backward",
        args=SimpleNamespace(device=torch.device("cpu")),
        optimizer=None,
        window=SimpleNamespace(inputs=[]),
        offloaded=rollback.OffloadedTensors(),
        ranks=Ranks(),
    )
    failure = step_down.release_memory(torch.OutOfMemoryError(ON_A_GPU.replace("192.00 MiB", free)), trainer)
    assert failure.is_fragmentation is in_pieces and failure.allocated_bytes == 9 * 2**30
    assert failure.text.startswith("tried to allocate 0.62 GB; 9.7 GB allocated, 0.") and len(failure.text) < 80


@model
def test_offloaded_tensors_come_back_as_it_was_if_at_the_second_try(monkeypatch):
    import torch

    from surgvqa.training import rollback

    device, emptied = torch.device("cpu"), []
    table, moments = torch.arange(4.0), [torch.randn(3), torch.randn(3)]
    states = {n: {"step": n, "moment": moments[n], "table": table} for n in range(2)}
    batch = {"labels": torch.tensor([1, -100]), "shown": (8, 512), "gone": torch.ones(1)}
    before = [moments[0].clone(), moments[1].clone(), batch["labels"].clone()]
    on_device = [weakref.ref(value) for value in (batch["labels"], batch["gone"])]
    monkeypatch.setattr(rollback, "empty_cache", lambda: emptied.append([ref() is None for ref in on_device]))

    offloaded = rollback.OffloadedTensors()
    offloaded.put((*states.values(), batch), device)
    on_host = [states[0]["moment"], states[1]["moment"], batch["labels"]]
    assert emptied == [[True, True]] and all(one is not other for one, other in zip(on_host, moments))
    assert states[0]["table"] is states[1]["table"] is not table
    del batch["gone"]  # encoded again meanwhile

    to, room = torch.Tensor.to, iter([True, False, *[True] * 9])

    def tight(tensor, *arguments, **keywords):
        if not next(room):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return to(tensor, *arguments, **keywords).clone()

    monkeypatch.setattr(torch.Tensor, "to", tight)
    with pytest.raises(torch.OutOfMemoryError):
        offloaded.bring_back(device)
    offloaded.bring_back(device)
    after = [states[0]["moment"], states[1]["moment"], batch["labels"]]
    assert all(torch.equal(one, other) and one is not host for one, other, host in zip(after, before, on_host))
    assert states[0]["table"] is states[1]["table"] and "gone" not in batch
    assert (states[1]["step"], batch["shown"]) == (1, (8, 512))
    offloaded.bring_back(device)
    assert states[0]["moment"] is after[0]  # nothing is left to bring


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    """Three steps of two micro steps; no layer recomputes, dropout is on."""
    folder = tmp_path_factory.mktemp("straight")
    return Watched(world.train_options(checkpointed_layers=0, **STEPS), folder)


@model
def test_frames_that_replace_the_old_ones_in_a_full_cache(world, tmp_path, out_of_memory):
    """While a worker process, which has inherited the lock of the cache, works ahead with the old frames."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0)
    for file in (world.root / "frames").rglob("*.jpg"):
        square = tmp_path / "frames" / file.relative_to(world.root / "frames")
        square.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 255, (168, 168, 3), dtype=np.uint8)).save(square)
    step_1 = lambda _, trainer: (trainer.state.global_step, trainer.train_dataset.dataset.image_size) == (1, 168)  # noqa: E731
    out_of_memory(*places()["forward"], step_1)
    options = {**STEPS, "gradient_accumulation_steps": 1, "max_steps": 8, "image_size": 168}
    runs, sizes = [], []
    for workers, capacity in ((0, 1e9), (1, 190e3)):
        cache = tmp_path / f"cache of {capacity}"
        began = world.train_options(
            **options,
            frames_dir=str(tmp_path / "frames"),
            feature_cache_dir=str(cache),
            feature_cache_gb=capacity / 1e9,
        )
        began.extra = {"dataloader_num_workers": str(workers)}
        runs.append(Watched(began, tmp_path / f"{workers}/runs", (preset(2, 84),)))
        sizes.append(sum(file.stat().st_size for file in cache.rglob("*.safetensors")))
    assert sizes[1] <= 190e3 < sizes[0], "some of the old frames had to go"
    assert_same(*runs)
    assert not any("encoding in every step" in event["text"] for event in runs[1].of("warning"))


@model
def test_running_out_of_memory_again_while_encoding_takes_the_next_preset(world, tmp_path, out_of_memory):
    from surgvqa.model.audio_qwen2vl import AudioQwen2VLForConditionalGeneration

    straight = Watched(world.train_options(num_frames=1, image_size=28, **STEPS), tmp_path / "straight/runs")
    encoded: list[int] = []
    out_of_memory(*places()["forward"], lambda count, _: count == 1)
    out_of_memory(
        AudioQwen2VLForConditionalGeneration, "encode_images", lambda count, _: encoded.append(1) or count == 2
    )
    run = Watched(world.train_options(**STEPS), tmp_path / "run/runs", (preset(1, 56), SMALLER))
    assert len(encoded) == 3  # at the start, in vain, and for the second preset
    assert [event["name"] for event in run.of("preset")] == ["own-0", "own-1"] and len(run.of("oom")) == 2
    assert_same(run, straight)


@model
@pytest.mark.parametrize("resumed", [False, True])
def test_the_optimisers_first_step_is_taken_back_and_tried_again(
    world, straight, tmp_path, out_of_memory, monkeypatch, resumed
):
    import torch

    options = world.train_options(checkpointed_layers=0, **STEPS)
    if resumed:
        options.output_dir = str(tmp_path / "out")
        shutil.copytree(straight.output / "checkpoint-1", tmp_path / "out/checkpoint-1")
        options.resume = str(tmp_path / "out")
    out_of_memory(torch.optim.AdamW, "step", lambda count, _: count == 1)
    run = Watched(options, tmp_path / "runs")
    assert run.error is None and run.actions() == ["trying again with an emptied cache"]
    expected = {step: loss for step, loss in straight.losses().items() if step > resumed}
    assert run.losses() == expected
    assert_same_adapter(run.output, straight.output)
    assert run.of("oom")[0]["phase"] == "optimizer" and not run.of("preset")
    monkeypatch.undo()
    out_of_memory(torch.optim.AdamW, "step", lambda count, _: count <= 2)
    twice = Watched(world.train_options(checkpointed_layers=0, **STEPS), tmp_path / "runs")
    assert "out of GPU memory at step 0 (optimizer)" in str(twice.error) and "--lora_r" in str(twice.error)
    assert len(twice.of("oom")) == 2


@model
def test_a_later_optimiser_step_that_is_cut_short_is_never_saved(world, straight, tmp_path, out_of_memory):
    """The weights may be half updated: the checkpoint before it is the last one."""
    import torch

    out_of_memory(torch.optim.AdamW, "step", lambda count, _: count == 3)
    run = Watched(world.train_options(checkpointed_layers=0, **STEPS), tmp_path / "runs")
    assert "out of GPU memory at step 2 (optimizer)" in str(run.error) and run.actions() == ["stopping"]
    assert [c.name for c in checkpoints.checkpoints(run.output)] == ["checkpoint-2", "checkpoint-1"]
    assert run.losses() == {step: loss for step, loss in straight.losses().items() if step <= 2}


@model
def test_stepping_down_stays_in_one_wandb_run(world, tmp_path, out_of_memory, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    out_of_memory(*places()["backward"], lambda count, _: count == 3)
    run = Watched(world.train_options(**STEPS, report_to="wandb", logging_steps=1), tmp_path / "runs", (FEWER,))
    assert run.error is None and len(run.of("preset")) == 1 and sorted(run.losses()) == [1, 2, 3]
    assert len(list((run.run.folder / "wandb").glob("offline-run-*"))) == 1


@model
def test_an_evaluation_halves_its_batch_and_its_loss_stays(world, tmp_path, out_of_memory, monkeypatch):
    evaluated = {"eval_data_path": str(world.eval), "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    options = {**STEPS, **evaluated, "save_steps": 2, "per_device_eval_batch_size": 4}
    whole = Watched(world.train_options(**options), tmp_path / "whole/runs")
    import torch

    from surgvqa.training.trainer import EventTrainer

    original = EventTrainer.compute_loss

    def output_lock(self, wrapped, inputs, *arguments, **keywords):
        if not wrapped.training and len(inputs["input_ids"]) > 1:
            raise torch.OutOfMemoryError(ERROR)
        return original(self, wrapped, inputs, *arguments, **keywords)

    monkeypatch.setattr(EventTrainer, "compute_loss", output_lock)
    run = Watched(world.train_options(**options), tmp_path / "run/runs")
    assert run.actions() == ["evaluating 2 at once", "evaluating 1 at once"]
    assert [e["step"] for e in run.of("eval")] == [2, 4]
    assert_same(run, whole)
    for one, other in zip(run.of("eval"), whole.of("eval")):
        assert one["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-5)
    done = [e["done"] for e in run.of("progress") if e["phase"] == "evaluate"]
    assert max(done) == 4


@model
def test_an_evaluation_that_fits_no_sample_begins_again_with_the_next_preset(world, tmp_path, out_of_memory):
    from surgvqa.training.trainer import EventTrainer

    evaluated = {"eval_data_path": str(world.eval), "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    out_of_memory(EventTrainer, "prediction_step", lambda count, _: count == 3)
    run = Watched(world.train_options(**STEPS | {"save_steps": 2}, **evaluated), tmp_path / "runs", (FEWER,))
    (event,) = run.of("oom")
    assert run.error is None and (event["phase"], event["step"]) == ("evaluate", 2)
    assert [e["name"] for e in run.of("preset")] == ["own-0"] and [e["step"] for e in run.of("eval")] == [2, 4]
    assert [frames for _, (frames, *_) in run.seen] == [2] * 4 + [1] * 4
    evaluations = [rows for rows in run.rows[4:] if rows]
    assert len(evaluations) == 3 + 4 + 4 + 4 and set(evaluations[3:]) == {min(evaluations)}


@model
def test_the_best_state_keeps_the_settings_that_it_was_trained_with(world, tmp_path, out_of_memory):
    """The first evaluation is made the best one, by taking a high loss for good."""
    evaluated = {"eval_data_path": str(world.eval), "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    out_of_memory(*places()["backward"], lambda count, _: count == 3)
    run = Watched(world.train_options(**STEPS, **evaluated, greater_is_better=True), tmp_path / "runs", (FEWER,))
    assert run.error is None and run.result["best_checkpoint"].endswith("checkpoint-1")
    assert results.read(run.output / "checkpoint-2").options["num_frames"] == 1
    assert results.read(run.output).options["num_frames"] == 2 and results.read(run.output).preset is None


@model
def test_a_save_is_tried_again(world, straight, tmp_path, out_of_memory, monkeypatch):
    from surgvqa.training.trainer import EventTrainer

    out_of_memory(EventTrainer, "write_state", lambda count, _: count == 2)
    run = Watched(world.train_options(checkpointed_layers=0, **STEPS), tmp_path / "runs")
    assert_same(run, straight)
    assert run.actions() == ["trying again with an emptied cache"] and run.of("oom")[0]["phase"] == "save"
    assert [c.name for c in checkpoints.checkpoints(run.output)] == ["checkpoint-3", "checkpoint-2", "checkpoint-1"]
    monkeypatch.undo()
    out_of_memory(EventTrainer, "write_state", lambda count, _: count >= 2)
    twice = Watched(world.train_options(**STEPS), tmp_path / "runs")
    assert "out of GPU memory at step 2 (save)" in str(twice.error)
    assert [c.name for c in checkpoints.checkpoints(twice.output)] == ["checkpoint-1"]
    assert not list(twice.output.glob(".*"))


@model
def test_fragmentation_is_met_without_giving_anything_up_once_a_step(
    world, straight, tmp_path, out_of_memory, monkeypatch
):
    from surgvqa.memory import out_of_memory as out_of_memory_module

    monkeypatch.setattr(out_of_memory_module, "allocator_bytes", lambda: (20 * 2**30, 22 * 2**30))
    out_of_memory(*places()["forward"], lambda count, _: count in (2, 6, 8))
    run = Watched(world.train_options(checkpointed_layers=0, **STEPS), tmp_path / "runs")
    assert_same(run, straight)
    pieces = "free memory is fragmented: trying again with an emptied cache"
    assert run.actions() == [pieces, pieces, "continuing with all layers recompute"]
    assert run.of("oom")[0]["reserved_bytes"] == 22 * 2**30


@model
def test_the_last_step_down_ends_with_a_saved_state_and_a_message(world, tmp_path, out_of_memory):
    out_of_memory(*places()["forward"], lambda count, trainer: trainer.state.global_step == 2)
    options = world.train_options(checkpointed_layers=1, **STEPS | {"save_steps": 50})
    run = Watched(options, tmp_path / "runs", (FEWER, SMALLER))
    text = str(run.error)
    assert "out of GPU memory at step 2" in text and "smallest preset" in text and "\n" not in text
    assert [event["step"] for event in run.of("oom")] == [2, 2, 2, 2] and run.actions()[-1] == "stopping"
    assert len(run.of("retreat")) == 1 and [e["name"] for e in run.of("preset")] == ["own-0", "own-1"]
    checkpoint, skipped = checkpoints.newest_complete_checkpoint(run.output)
    assert checkpoint.name == "checkpoint-2" and not skipped
    assert results.read(checkpoint).options["image_size"] == 28


@model
def test_on_oom_fail_stops_with_a_checkpoint_and_the_advice(world, straight, tmp_path, out_of_memory):
    out_of_memory(*places()["backward"], lambda count, _: count == 4)
    run = Watched(world.train_options(on_oom="fail", **STEPS | {"save_steps": 50}), tmp_path / "runs", (FEWER,))
    (event,) = run.of("oom")
    assert event["action"] == "stopping" and event["next_preset"] == "own-0"
    assert f"surgvqa train --resume {run.run.id} --num_frames 1 --image_size 84" in str(run.error)
    assert checkpoints.newest_complete_checkpoint(run.output)[0].name == "checkpoint-1"
    assert results.read(run.output).options["num_frames"] == 2  # nothing was given up


@model
def test_a_run_on_a_gpu_is_fitted_and_its_phases_are_measured(world, tmp_path, monkeypatch):
    """The forecast of a GPU on a CPU: the plan is made of it, and every reduction has to be predicted to fit."""
    from surgvqa.training import recipe

    monkeypatch.setattr(recipe, "_forecast", lambda options, *_, **__: reductions.Forecast(options, (84, 56)))
    options = world.train_options(eval_data_path=str(world.eval), max_steps=2, keep_activations="all")
    predicted = [
        reductions.Forecast(options, (84, 56)).of(reductions.changed(options, checkpointed_layers=n)).predicted_peak_gb
        for n in range(3)
    ]
    assert predicted[0] > predicted[1]
    options.budget_gb = (predicted[0] + predicted[1]) / 2 / (1 - fit.MARGIN)
    run = Watched(options, tmp_path / "runs")
    (plan,) = [event for event in run.of("phase") if event["name"] == "plan"]
    assert plan["checkpointed_layers"] == 1 and plan["predicted_peak_gb"] == predicted[1]
    assert "1 of 2 layers recomputed" in plan["fit"] and plan["fit"] in plan["text"]
    measured = {event["phase"]: event["peak_process_bytes"] for event in run.of("memory")}
    assert list(measured) == ["load model", "encode", "train", "evaluate", "save"] and min(measured.values()) > 1e8
    options.budget_gb = min(predicted) / 2
    run = Watched(options, tmp_path / "runs")
    assert run.result and any("GB available" in event["text"] for event in run.of("warning"))


@model
def test_an_oom_event_names_the_largest_owners_by_prediction(world, tmp_path, out_of_memory, monkeypatch):
    from surgvqa.training import recipe

    monkeypatch.setattr(recipe, "_forecast", lambda options, *_, **__: reductions.Forecast(options, (84, 56)))
    options = world.train_options(max_steps=1, checkpointed_layers=0, keep_activations="all")
    out_of_memory(*places()["forward"], lambda count, _: count == 1)
    run = Watched(options, tmp_path / "runs")
    (event,), (change,) = run.of("oom"), run.of("retreat")
    forecast = reductions.Forecast(options, (84, 56))
    now, then = (forecast.of(reductions.changed(options, checkpointed_layers=n)) for n in (0, 2))
    assert event["predicted_peak_gb"] == now.predicted_peak_gb > then.predicted_peak_gb
    largest = [c.name for c in sorted(now.components, key=lambda c: -c.bytes)][: len(event["predicted"])]
    assert list(event["predicted"]) == largest and len(largest) == 6
    assert change["predicted"] == then.peak_table and f"{then.predicted_peak_gb:.1f} GB predicted" in event["action"]


@model
async def test_one_key_in_the_monitor_goes_on_from_the_last_step(world, tmp_path, out_of_memory, monkeypatch):
    """End to end: a run that failed for failure of memory, the panel, its key `o`, the job that it starts."""
    from panels import settle
    from textual.widgets import Static

    from surgvqa.cli import main
    from surgvqa.runs.events import finished_event
    from surgvqa.runs.history import list_runs
    from tui.app import Panel
    from tui.targets.local import LocalTarget

    (tmp_path / "presets").mkdir()
    (tmp_path / "presets/own.toml").write_text(FEWER)
    monkeypatch.chdir(tmp_path)
    asked = vars(world.train_options(on_oom="fail", **STEPS))
    known = TrainOptions(**{name: asked[name] for name in NEEDED})
    named = [f"--{name}={value}" for name, value in asked.items() if value != getattr(known, name, None)]
    needed = [f"--{name}={asked[name]}" for name in NEEDED]
    out_of_memory(*places()["backward"], lambda count, _: count == 4)
    assert main.main(["train", *needed, *named]) == 1
    (failed,) = list_runs(tmp_path / "runs")
    panel = Panel(LocalTarget(load_workspace(tmp_path)))

    def said() -> str:
        return str(panel.screen.query_one("#facts", Static).content)

    async with panel.run_test(size=(120, 36)) as pilot:
        await pilot.press("4")
        await settle(pilot, lambda: panel.screen.query("#facts") and "out of GPU memory at step 1" in said())
        assert "o goes on from the last checkpoint as in preset own" in said()
        await pilot.press("o")
        await settle(pilot, lambda: len(list_runs(tmp_path / "runs")) == 2, 60)  # the check imports torch
        (job,) = {run.id for run in list_runs(tmp_path / "runs")} - {failed.id}
        file = tmp_path / "runs" / job / "events.jsonl"
        await settle(pilot, lambda: finished_event(file.parent), 150)
    events = [json.loads(line) for line in file.read_text().splitlines()]
    assert events[-1]["state"] == "finished"
    assert [event["step"] for event in events if event["kind"] == "metric"] == [2, 3]
    result = events[-1]["result"]
    assert result["resumed_from"].endswith("checkpoint-1")
    record = results.read(Path(result["output_dir"]))
    assert (record.options["num_frames"], record.options["image_size"]) == (1, 84)
    log = file.with_name("log.txt").read_text()
    assert "Warning" not in log and "kernels" not in log, "of libraries, about what nobody can change here"
