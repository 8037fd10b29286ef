"""Fitting a training to the budget, and what it does when the GPU's memory runs out: injected on the CPU."""

import functools
import json
import os
import shutil
import signal
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import small

from presets import step_down_presets
from surgvqa.config.options import TrainOptions
from surgvqa.config.workspace import load_workspace
from surgvqa.errors import SurgvqaError
from surgvqa.memory import fit, reductions
from surgvqa.model.sizes import Sizes
from surgvqa.runs.folder import Run
from surgvqa.training import checkpoints, command, results

ERROR = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …"
ON_A_GPU = (
    "CUDA out of memory. Tried to allocate 588.00 MiB. GPU 0 has a total capacity of 79.18 GiB of which 68.51 GiB is "
    "free. Including non-PyTorch memory, this process has 10.62 GiB memory in use. 9.52 GiB allowed; Of the allocated "
    "memory 9.00 GiB is allocated by PyTorch, and 192.00 MiB is reserved by PyTorch but unallocated. If reserved but "
    "unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
FEWER = 'reason = "r"\ngives_up = "g"\nrung = 0\n[settings]\nnum_frames = 1\nimage_size = 84\n'
NEEDED = ("model_name_or_path", "train_data_path", "frames_dir", "audio_dir")
SMALLER = 'reason = "r"\ngives_up = "g"\nrung = 1\n[settings]\nimage_size = 28\n'


# --- what is decided, without a model ---------------------------------------------------------------------------------


def options_for(**changes) -> TrainOptions:
    return TrainOptions(**{**dict.fromkeys(NEEDED, "x"), **changes})


@pytest.fixture
def forecast(monkeypatch):
    """Of the real model on REAL-Colon-VQA frames, as training/recipe.py runs it on a GPU."""
    monkeypatch.setattr(reductions, "checkpoint_sizes", lambda folder: (Sizes(), None))
    return reductions.Forecast(options_for(), (1240, 1080))


def test_fit_takes_the_fewest_recomputing_layers_within_the_budget(forecast):
    found = reductions.fit(options_for(), 28, forecast, 28.5)
    assert found.prediction.predicted_peak_gb <= 28.5 * (1 - fit.MARGIN) and found.warning is None
    assert found.prediction.configuration.checkpointed_layers == found.recomputing
    if found.recomputing:
        fewer = forecast.of(options_for(checkpointed_layers=found.recomputing - 1))
        assert fewer.predicted_peak_gb > 28.5 * (1 - fit.MARGIN)
    tight = reductions.fit(options_for(), 28, forecast, found.prediction.predicted_peak_gb - 2)
    assert found.recomputing < tight.recomputing < 28
    assert f"{tight.recomputing} of 28 layers" in tight.text and "the fewest that fit" in tight.text


def test_fit_says_what_compiled_layers_keep(forecast):
    plan = reductions.fit(options_for(), 28, forecast, 28.5)
    assert plan.keep == "products" and plan.recomputing <= 3 and plan.text.endswith("keep only matrix products")
    more = reductions.fit(options_for(), 28, forecast, 35)
    assert (more.keep, more.recomputing) == ("products", 0) and more.text.endswith("keep only matrix products")
    roomy = reductions.fit(options_for(), 28, forecast, 60)
    assert (roomy.keep, roomy.recomputing) == ("all", 0) and roomy.text.endswith("keep all activations")
    few = reductions.fit(options_for(checkpointed_layers=20), 28, forecast, 28.5)  # 20 of 28 leave room for the rest
    assert few.keep == "all" and few.prediction.configuration.keep == "all"
    assert reductions.fit(options_for(checkpointed_layers=4), 28, forecast, 28.5).keep == "products"
    assert reductions.fit(options_for(keep_activations="all"), 28, forecast, 28.5).keep == "all"
    assert reductions.fit(options_for(), 28, None, 28.5).keep == "products"  # a CPU


def test_fit_does_what_was_asked_for(forecast):
    assert reductions.fit(options_for(checkpointed_layers=7), 28, forecast, 28.5).recomputing == 7
    off = reductions.fit(options_for(gradient_checkpointing=False), 28, forecast, 28.5)
    assert off.recomputing == 0 and off.prediction.configuration.checkpointed_layers == 0
    assert reductions.fit(options_for(), 28, None, 28.5).recomputing == 28  # a CPU


def test_fit_warns_of_what_does_not_and_names_what_does(forecast):
    need = {
        p.name: forecast.of(reductions.changed(options_for(), **p.settings)).predicted_peak_gb
        for p in step_down_presets()
    }
    assert need["baseline-8f-512px"] > need["oom-6f-512px"] > need["oom-8f-384px"] > need["oom-6f-384px"]
    between = (need["oom-6f-512px"] + need["oom-8f-384px"]) / 2
    found = reductions.fit(options_for(), 28, forecast, between, step_down_presets())
    assert found.recomputing == 28 and "--preset oom-8f-384px would take" in found.warning
    assert "no preset fits either" in reductions.fit(options_for(), 28, forecast, 5, step_down_presets()).warning
    asked = reductions.fit(
        options_for(checkpointed_layers=0), 28, forecast, need["baseline-8f-512px"] + 1, step_down_presets()
    )
    assert asked.recomputing == 0 and "--checkpointed_layers" in asked.warning


def descent(options, recomputing, forecast, limit_gb) -> list:
    """The names of all reductions, one after the other; None for recomputing."""
    path = []
    while found := reductions.next_reduction(options, recomputing, 28, step_down_presets(), forecast, limit_gb):
        path.append(found.preset)
        options = reductions.changed(options, **found.settings)
        recomputing = options.checkpointed_layers
    return path


def test_recomputing_comes_first_and_presets_that_cannot_fit_are_skipped(forecast):
    everything = [None, "oom-6f-512px", "oom-8f-384px", "oom-6f-384px"]
    assert descent(options_for(), 12, forecast, 28.5) == everything
    assert descent(options_for(), 12, None, 28.5) == everything
    assert descent(options_for(), 28, None, 28.5) == everything[1:]
    assert descent(options_for(num_frames=6, image_size=448), 28, None, 28.5) == everything[2:]
    six = forecast.of(options_for(num_frames=6)).predicted_peak_gb
    assert descent(options_for(), 28, forecast, six - 0.01) == everything[2:]
    assert descent(options_for(), 28, forecast, 5) == []
    assert descent(options_for(), 12, forecast, six + 0.01) == everything[1:]  # recomputing would not suffice


def test_under_a_cap_what_is_reserved_must_fit(forecast):
    six = forecast.of(options_for(num_frames=6))
    between = (six.predicted_peak_gb + six.predicted_reserved_gb) / 2
    assert descent(options_for(), 28, forecast, between)[0] == "oom-6f-512px"
    assert descent(options_for(enforce_budget=True), 28, forecast, between)[0] == "oom-8f-384px"
    plans = [reductions.fit(options_for(enforce_budget=capped), 28, forecast, 28.5) for capped in (False, True)]
    assert plans[0].prediction.predicted_reserved_gb > plans[1].prediction.predicted_reserved_gb
    assert plans[1].prediction.predicted_reserved_gb <= 28.5 * (1 - fit.MARGIN) and plans[1].warning is None


def test_in_an_evaluation_recomputing_reduces_nothing():
    found = reductions.next_reduction(options_for(), 0, 28, step_down_presets(), None, 28.5, evaluating=True)
    assert found.preset == "oom-6f-512px" and found.settings == {"num_frames": 6, "image_size": 512}


# --- with a model -----------------------------------------------------------------------------------------------------

model = pytest.mark.model


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
    )
    failure = step_down.let_go(torch.OutOfMemoryError(ON_A_GPU.replace("192.00 MiB", free)), trainer)
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
def world(tmp_path_factory):
    """With noisy frames of 168×112, so that a smaller size shows other pixels."""
    import numpy as np
    from PIL import Image

    built = small.build(tmp_path_factory.mktemp("small"))
    noise = np.random.default_rng(0)
    for file in sorted((built.root / "frames").rglob("*.jpg")):
        Image.fromarray(noise.integers(0, 255, (112, 168, 3), dtype=np.uint8)).save(file)
    return built


class Watched:
    """A run that is over, with its events; `seen` holds (sample, how it is shown) of each finished micro step, and
    `rows` the image rows (pixels or features) that the model got."""

    def __init__(self, options, folder: Path, presets: str | tuple[str, ...] = ()):
        from surgvqa.training.trainer import EventTrainer

        (folder / "presets").mkdir(parents=True, exist_ok=True)
        for number, text in enumerate([presets] if isinstance(presets, str) else presets):
            (folder / f"presets/own-{number}.toml").write_text(text)
        self.events, self.seen, self.rows, self.result, self.error = [], [], [], None, None
        original, forward = EventTrainer.training_step, EventTrainer.compute_loss

        def training_step(trainer, wrapped, inputs, *arguments, **keywords):
            found = original(trainer, wrapped, inputs, *arguments, **keywords)
            self.seen += [(index, inputs["shown"]) for index in inputs["sample_indices"]]
            return found

        def compute_loss(trainer, wrapped, inputs, *arguments, **keywords):
            images = inputs.get("image_features", inputs.get("pixel_values"))
            self.rows.append(len(images))
            return forward(trainer, wrapped, inputs, *arguments, **keywords)

        with (
            pytest.MonkeyPatch.context() as patched,
            Run.create(folder / "runs", "train", observer=self.observe) as run,
        ):
            patched.setattr(EventTrainer, "training_step", training_step)
            patched.setattr(EventTrainer, "compute_loss", compute_loss)
            self.run = run
            try:
                self.result = command.run(options, run).data
            except SurgvqaError as error:
                self.error = str(error)
        self.output = Path(options.output_dir or run.folder / "checkpoints")

    def observe(self, event):
        self.events.append(event)

    def of(self, kind: str) -> list[dict]:
        return [event for event in self.events if event["kind"] == kind]

    def losses(self) -> dict[int, float]:
        return {event["step"]: event["loss"] for event in self.of("metric")}

    def logged(self) -> list[float]:
        """Trainer's own losses, which go to W&B."""
        state = json.loads((checkpoints.checkpoints(self.output)[0] / "trainer_state.json").read_text())
        return [row["loss"] for row in state["log_history"] if "loss" in row]

    def actions(self) -> list[str]:
        return [event["action"] for event in self.of("oom")]


def constant_rate(options):
    """The learning rate does not depend on max_steps."""
    options.extra = {"lr_scheduler_type": "constant"}
    return options


def assert_same(one: Watched, other: Watched):
    """Losses and weights, bit by bit."""
    assert one.error is None and other.error is None
    assert one.losses() == other.losses()
    assert_same_adapter(one, other)


def assert_same_adapter(one: Watched, other: Watched):
    import torch
    from safetensors.torch import load_file

    left, right = (load_file(run.output / checkpoints.ADAPTER) for run in (one, other))
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.fixture
def out_of_memory(monkeypatch):
    """out_of_memory(owner, name, when): the method raises torch's error after it has done its work (so that the work
    has to be taken back), whenever `when` says so of the call's number (from 1 on) and the object.
    """

    import torch

    def inject(owner, name, when):
        original, count = getattr(owner, name), 0

        @functools.wraps(original)
        def raises(self, *arguments, **keywords):
            nonlocal count
            count += 1
            fails = when(count, self)
            found = original(self, *arguments, **keywords)
            if fails:
                raise torch.OutOfMemoryError(ERROR)
            return found

        monkeypatch.setattr(owner, name, raises)

    return inject


def places():
    from accelerate import Accelerator

    from surgvqa.training.trainer import EventTrainer

    return {"forward": (EventTrainer, "compute_loss"), "backward": (Accelerator, "backward")}


SHARED = {"learning_rate": 0.01, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 9}


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    """Three steps of two micro steps; no layer recomputes, dropout is on."""
    folder = tmp_path_factory.mktemp("straight")
    return Watched(world.train_options(checkpointed_layers=0, **SHARED), folder)


@model
@pytest.mark.parametrize(("place", "call"), [("forward", 1), ("forward", 4), ("backward", 2), ("backward", 3)])
def test_recomputing_from_any_micro_step_on_changes_no_bit(world, straight, tmp_path, out_of_memory, place, call):
    out_of_memory(*places()[place], lambda count, _: count == call)
    run = Watched(world.train_options(checkpointed_layers=0, **SHARED), tmp_path)
    assert_same(run, straight)
    assert run.seen == straight.seen and run.logged() == straight.logged()
    (event,) = run.of("oom")
    assert event["step"] == (call - 1) // 2 and event["phase"] == "forward and backward"
    assert event["requested_bytes"] == 2 * 2**30 and "all layers recompute" in event["action"]
    assert event["memory"]["frozen weights"] > event["memory"]["adapters"] == 11520 * 4
    (change,) = run.of("retreat")
    assert change["settings"] == {"gradient_checkpointing": True, "checkpointed_layers": 2}
    record = results.read(run.output)
    assert record.options["checkpointed_layers"] == 2 and record.options["num_frames"] == 2


@model
@pytest.mark.parametrize(("cache", "workers"), [("auto", 0), ("off", 0), ("auto", 1)])
def test_a_run_that_retreats_at_once_is_one_that_began_so(world, tmp_path, out_of_memory, cache, workers):
    """Also with a worker process, whose batches of the whole epoch are still encoded in the old way."""
    (tmp_path / "reference").mkdir()
    options = {"feature_cache": cache, **SHARED}
    reference = Watched(world.train_options(num_frames=1, image_size=84, **options), tmp_path / "reference")
    out_of_memory(*places()["forward"], lambda count, _: count <= 2)
    began = world.train_options(image_size=168, **options)
    began.extra = {"dataloader_num_workers": str(workers)}
    presets = FEWER.replace("84", "168"), SMALLER.replace("28", "84")
    run = Watched(began, tmp_path / "run", presets)
    assert_same(run, reference)
    assert [event["name"] for event in run.of("preset")] == ["own-0", "own-1"]
    assert run.seen == reference.seen and set(run.rows[2:]) == set(reference.rows)
    assert run.rows[0] > run.rows[1] > run.rows[2]


@model
def test_a_retreat_whose_frames_replace_the_old_ones_in_a_full_cache_goes_on(world, tmp_path, out_of_memory):
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
    options = {**SHARED, "gradient_accumulation_steps": 1, "max_steps": 8, "image_size": 168}
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
        runs.append(Watched(began, tmp_path / f"{workers}", FEWER.replace("num_frames = 1", "num_frames = 2")))
        sizes.append(sum(file.stat().st_size for file in cache.rglob("*.safetensors")))
    assert sizes[1] <= 190e3 < sizes[0], "some of the old frames had to go"
    assert_same(*runs)
    assert not any("encoding in every step" in event["text"] for event in runs[1].of("warning"))


@model
def test_a_retreat_that_runs_out_of_memory_while_it_encodes_is_met_by_the_next(world, tmp_path, out_of_memory):
    from surgvqa.model.audio_qwen2vl import AudioQwen2VLForConditionalGeneration

    straight = Watched(world.train_options(num_frames=1, image_size=28, **SHARED), tmp_path / "straight")
    encoded: list[int] = []
    out_of_memory(*places()["forward"], lambda count, _: count == 1)
    out_of_memory(
        AudioQwen2VLForConditionalGeneration, "encode_images", lambda count, _: encoded.append(1) or count == 2
    )
    run = Watched(world.train_options(**SHARED), tmp_path / "run", (FEWER.replace("84", "56"), SMALLER))
    assert len(encoded) == 3  # at the start, in vain, and for the second preset
    assert [event["name"] for event in run.of("preset")] == ["own-0", "own-1"] and len(run.of("oom")) == 2
    assert_same(run, straight)


@model
def test_a_retreat_in_the_middle_goes_on_with_the_same_samples_and_can_be_resumed(world, tmp_path, out_of_memory):
    """As if the run had been stopped at step 1 and resumed with fewer frames."""
    first = Watched(constant_rate(world.train_options(**SHARED | {"max_steps": 1})), tmp_path / "first")
    folder = {"output_dir": str(first.output), "resume": str(first.output / "checkpoint-1")}
    shared = SHARED | {"max_steps": 6}
    reference = Watched(constant_rate(world.train_options(**shared, num_frames=1, **folder)), tmp_path / "reference")
    out_of_memory(*places()["backward"], lambda count, _: count == 4)  # the second micro step of step 2
    run = Watched(constant_rate(world.train_options(**shared)), tmp_path / "run", FEWER)
    assert run.losses() == first.losses() | reference.losses()
    assert_same_adapter(run, reference)
    assert run.logged() == pytest.approx(list(run.losses().values()), rel=1e-5)  # W&B's curve is the same
    order = [index for index, _ in run.seen]
    assert order == [i for i, _ in first.seen] + [i for i, _ in reference.seen]
    assert sorted(order[:8]) == list(range(8))  # an epoch: none left out, none twice
    assert [frames for _, (frames, _) in run.seen] == [2, 2, 2] + [1] * 9


@model
def test_a_stopped_run_goes_on_with_what_it_retreated_to(world, tmp_path, out_of_memory, monkeypatch):
    from surgvqa.training.trainer import EventTrainer

    out_of_memory(*places()["forward"], lambda count, _: count == 3)
    whole = Watched(world.train_options(**SHARED), tmp_path / "whole", FEWER)
    monkeypatch.undo()
    out_of_memory(*places()["forward"], lambda count, _: count == 3)
    original = EventTrainer.end_of_step

    def stops_after_two(self):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self)

    monkeypatch.setattr(EventTrainer, "end_of_step", stops_after_two)
    stopped = Watched(world.train_options(**SHARED), tmp_path / "stopped", FEWER)
    monkeypatch.undo()
    assert stopped.result["state"] == "stopped" and stopped.result["steps"] == 2
    for name in (stopped.run.id, str(stopped.output), str(stopped.output / "checkpoint-2")):
        found = results.find(name, load_workspace(tmp_path / "stopped"))
        assert (found.options["num_frames"], found.preset) == (1, "own-0")
    again = found.options | {"resume": str(stopped.output), "output_dir": str(stopped.output)}
    resumed = Watched(TrainOptions(**again), tmp_path / "stopped")
    assert stopped.losses() | resumed.losses() == whole.losses() and not resumed.of("oom")


@model
@pytest.mark.parametrize("resumed", [False, True])
def test_the_optimisers_first_step_is_taken_back_and_tried_again(
    world, straight, tmp_path, out_of_memory, monkeypatch, resumed
):
    import torch

    options = world.train_options(checkpointed_layers=0, **SHARED)
    if resumed:
        options.output_dir = str(tmp_path / "out")
        shutil.copytree(straight.output / "checkpoint-1", tmp_path / "out/checkpoint-1")
        options.resume = str(tmp_path / "out")
    out_of_memory(torch.optim.AdamW, "step", lambda count, _: count == 1)
    run = Watched(options, tmp_path)
    assert run.error is None and run.actions() == ["trying again with an emptied cache"]
    expected = {step: loss for step, loss in straight.losses().items() if step > resumed}
    assert run.losses() == expected
    assert_same_adapter(run, straight)
    assert run.of("oom")[0]["phase"] == "optimizer" and not run.of("preset")
    monkeypatch.undo()
    out_of_memory(torch.optim.AdamW, "step", lambda count, _: count <= 2)
    twice = Watched(world.train_options(checkpointed_layers=0, **SHARED), tmp_path)
    assert "out of GPU memory at step 0 (optimizer)" in twice.error and "--lora_r" in twice.error
    assert len(twice.of("oom")) == 2


@model
def test_a_later_optimiser_step_that_is_cut_short_is_never_saved(world, straight, tmp_path, out_of_memory):
    """The weights may be half updated: the checkpoint before it is the last one."""
    import torch

    out_of_memory(torch.optim.AdamW, "step", lambda count, _: count == 3)
    run = Watched(world.train_options(checkpointed_layers=0, **SHARED), tmp_path)
    assert "out of GPU memory at step 2 (optimizer)" in run.error and run.actions() == ["stopping"]
    assert [c.name for c in checkpoints.checkpoints(run.output)] == ["checkpoint-2", "checkpoint-1"]
    assert run.losses() == {step: loss for step, loss in straight.losses().items() if step <= 2}


@model
def test_a_retreat_stays_in_one_wandb_run(world, tmp_path, out_of_memory, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    out_of_memory(*places()["backward"], lambda count, _: count == 3)
    run = Watched(world.train_options(**SHARED, report_to="wandb", logging_steps=1), tmp_path, FEWER)
    assert run.error is None and len(run.of("preset")) == 1 and sorted(run.losses()) == [1, 2, 3]
    assert len(list((run.run.folder / "wandb").glob("offline-run-*"))) == 1


@model
def test_an_evaluation_halves_its_batch_and_its_loss_stays(world, tmp_path, out_of_memory, monkeypatch):
    evaluated = {"eval_data_path": str(world.eval), "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    options = {**SHARED, **evaluated, "save_steps": 2, "per_device_eval_batch_size": 4}
    whole = Watched(world.train_options(**options), tmp_path / "whole")
    import torch

    from surgvqa.training.trainer import EventTrainer

    original = EventTrainer.compute_loss

    def only_one(self, wrapped, inputs, *arguments, **keywords):
        if not wrapped.training and len(inputs["input_ids"]) > 1:
            raise torch.OutOfMemoryError(ERROR)
        return original(self, wrapped, inputs, *arguments, **keywords)

    monkeypatch.setattr(EventTrainer, "compute_loss", only_one)
    run = Watched(world.train_options(**options), tmp_path / "run")
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
    run = Watched(world.train_options(**SHARED | {"save_steps": 2}, **evaluated), tmp_path, FEWER)
    (event,) = run.of("oom")
    assert run.error is None and (event["phase"], event["step"]) == ("evaluate", 2)
    assert [e["name"] for e in run.of("preset")] == ["own-0"] and [e["step"] for e in run.of("eval")] == [2, 4]
    assert [frames for _, (frames, _) in run.seen] == [2] * 4 + [1] * 4
    evaluations = [rows for rows in run.rows[4:] if rows]
    assert len(evaluations) == 3 + 4 + 4 + 4 and set(evaluations[3:]) == {min(evaluations)}


@model
def test_the_best_state_keeps_the_settings_that_it_was_trained_with(world, tmp_path, out_of_memory):
    """The first evaluation is made the best one, by taking a high loss for good."""
    evaluated = {"eval_data_path": str(world.eval), "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    out_of_memory(*places()["backward"], lambda count, _: count == 3)
    run = Watched(world.train_options(**SHARED, **evaluated, greater_is_better=True), tmp_path, FEWER)
    assert run.error is None and run.result["best_checkpoint"].endswith("checkpoint-1")
    assert results.read(run.output / "checkpoint-2").options["num_frames"] == 1
    assert results.read(run.output).options["num_frames"] == 2 and results.read(run.output).preset is None


@model
def test_a_save_is_tried_again(world, straight, tmp_path, out_of_memory, monkeypatch):
    from surgvqa.training.trainer import EventTrainer

    out_of_memory(EventTrainer, "_save_optimizer_and_scheduler", lambda count, _: count == 2)
    run = Watched(world.train_options(checkpointed_layers=0, **SHARED), tmp_path)
    assert_same(run, straight)
    assert run.actions() == ["trying again with an emptied cache"] and run.of("oom")[0]["phase"] == "save"
    assert [c.name for c in checkpoints.checkpoints(run.output)] == ["checkpoint-3", "checkpoint-2", "checkpoint-1"]
    monkeypatch.undo()
    out_of_memory(EventTrainer, "_save_optimizer_and_scheduler", lambda count, _: count >= 2)
    twice = Watched(world.train_options(**SHARED), tmp_path)
    assert "out of GPU memory at step 2 (save)" in twice.error
    assert [c.name for c in checkpoints.checkpoints(twice.output)] == ["checkpoint-1"]
    assert not list(twice.output.glob(".*"))


@model
def test_fragmentation_is_met_without_giving_anything_up_once_a_step(
    world, straight, tmp_path, out_of_memory, monkeypatch
):
    from surgvqa.memory import out_of_memory as out_of_memory_module

    monkeypatch.setattr(out_of_memory_module, "allocator_bytes", lambda: (20 * 2**30, 22 * 2**30))
    out_of_memory(*places()["forward"], lambda count, _: count in (2, 6, 8))
    run = Watched(world.train_options(checkpointed_layers=0, **SHARED), tmp_path)
    assert_same(run, straight)
    pieces = "free memory lies in pieces: trying again with an emptied cache"
    assert run.actions() == [pieces, pieces, "going on with all layers recompute"]
    assert run.of("oom")[0]["reserved_bytes"] == 22 * 2**30


@model
def test_the_last_step_down_ends_with_a_saved_state_and_a_message(world, tmp_path, out_of_memory):
    out_of_memory(*places()["forward"], lambda count, trainer: trainer.state.global_step == 2)
    options = world.train_options(checkpointed_layers=1, **SHARED | {"save_steps": 50})
    run = Watched(options, tmp_path, (FEWER, SMALLER))
    assert "out of GPU memory at step 2" in run.error and "smallest preset" in run.error and "\n" not in run.error
    assert [event["step"] for event in run.of("oom")] == [2, 2, 2, 2] and run.actions()[-1] == "stopping"
    assert len(run.of("retreat")) == 1 and [e["name"] for e in run.of("preset")] == ["own-0", "own-1"]
    checkpoint, skipped = checkpoints.newest_whole_checkpoint(run.output)
    assert checkpoint.name == "checkpoint-2" and not skipped
    assert results.read(checkpoint).options["image_size"] == 28


@model
def test_on_oom_fail_stops_with_a_checkpoint_and_the_advice(world, straight, tmp_path, out_of_memory):
    out_of_memory(*places()["backward"], lambda count, _: count == 4)
    run = Watched(world.train_options(on_oom="fail", **SHARED | {"save_steps": 50}), tmp_path, FEWER)
    (event,) = run.of("oom")
    assert event["action"] == "stopping" and event["next_preset"] == "own-0"
    assert f"surgvqa train --resume {run.run.id} --num_frames 1 --image_size 84" in run.error
    assert checkpoints.newest_whole_checkpoint(run.output)[0].name == "checkpoint-1"
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
    run = Watched(options, tmp_path)
    (plan,) = [event for event in run.of("phase") if event["name"] == "plan"]
    assert plan["checkpointed_layers"] == 1 and plan["predicted_peak_gb"] == predicted[1]
    assert "1 of 2 layers recomputed" in plan["fit"] and plan["fit"] in plan["text"]
    measured = {event["phase"]: event["peak_process_bytes"] for event in run.of("memory")}
    assert list(measured) == ["load model", "encode", "train", "evaluate", "save"] and min(measured.values()) > 1e8
    options.budget_gb = min(predicted) / 2
    run = Watched(options, tmp_path)
    assert run.result and any("to be had" in event["text"] for event in run.of("warning"))


@model
def test_an_oom_event_names_the_largest_owners_by_prediction(world, tmp_path, out_of_memory, monkeypatch):
    from surgvqa.training import recipe

    monkeypatch.setattr(recipe, "_forecast", lambda options, *_, **__: reductions.Forecast(options, (84, 56)))
    options = world.train_options(max_steps=1, checkpointed_layers=0, keep_activations="all")
    out_of_memory(*places()["forward"], lambda count, _: count == 1)
    run = Watched(options, tmp_path)
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
    import asyncio
    import time

    from textual.widgets import Static

    from surgvqa.cli import main
    from surgvqa.runs.history import list_runs
    from tui.app import Panel
    from tui.targets.local import LocalTarget

    (tmp_path / "presets").mkdir()
    (tmp_path / "presets/own.toml").write_text(FEWER)
    monkeypatch.chdir(tmp_path)
    asked = vars(world.train_options(on_oom="fail", **SHARED))
    known = TrainOptions(**{name: asked[name] for name in NEEDED})
    named = [f"--{name}={value}" for name, value in asked.items() if value != getattr(known, name, None)]
    needed = [f"--{name}={asked[name]}" for name in NEEDED]
    out_of_memory(*places()["backward"], lambda count, _: count == 4)
    assert main.main(["train", *needed, *named]) == 1
    (failed,) = list_runs(tmp_path / "runs")
    panel = Panel(LocalTarget(load_workspace(tmp_path)))

    async def until(condition):
        deadline = time.monotonic() + 150
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            await asyncio.sleep(0.1)

    def said() -> str:
        return str(panel.screen.query_one("#facts", Static).content)

    async with panel.run_test(size=(120, 36)) as pilot:
        await pilot.press("4")
        await until(lambda: panel.screen.query("#facts") and "out of GPU memory at step 1" in said())
        assert "o goes on from the last checkpoint as in preset own" in said()
        await pilot.press("o")
        await until(lambda: len(list_runs(tmp_path / "runs")) == 2)
        (job,) = {run.id for run in list_runs(tmp_path / "runs")} - {failed.id}
        file = tmp_path / "runs" / job / "events.jsonl"
        await until(lambda: file.is_file() and '"kind":"finished"' in file.read_text().replace(" ", ""))
    events = [json.loads(line) for line in file.read_text().splitlines()]
    assert events[-1]["state"] == "finished"
    assert [event["step"] for event in events if event["kind"] == "metric"] == [2, 3]
    result = events[-1]["result"]
    assert result["resumed_from"].endswith("checkpoint-1")
    record = results.read(Path(result["output_dir"]))
    assert (record.options["num_frames"], record.options["image_size"]) == (1, 84)
    log = file.with_name("log.txt").read_text()
    assert "Warning" not in log and "kernels" not in log, "of libraries, about what nobody can change here"
