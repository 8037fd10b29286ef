"""Two ways to one result: each pair is trained through the real command and must end with the same losses and weights.

Where the order of additions differs, figures agree to rounding only. Rounding has no direction, so the mean of the
signed differences has to be smaller than any one of them may be. A small fault of one sign (a token too many in a mean,
a gradient scaled by a little) would stay within the tolerance of single figures and show there.
"""

import json
import signal
import wave
from statistics import fmean
from types import SimpleNamespace

import pytest
from watched import STEPS, Watched, assert_same, assert_same_adapter, constant_rate, places, preset, stop_in

from surgvqa.config.options import TrainOptions
from surgvqa.config.workspace import load_workspace
from surgvqa.runs.state import state_of
from surgvqa.training import results

pytestmark = pytest.mark.model

SINGLE, MEAN = 1e-5, 1e-6
"""The largest relative difference of one figure, and of the signed mean of them all; float32."""


@pytest.fixture(scope="session")
def uneven_world(noisy_world, tmp_path_factory):
    """Clips of one and of two frames, questions of 0.2 to 0.55 s; 3 samples a micro step of 8 training and 4 evaluation
    samples leave a rest."""
    folder = tmp_path_factory.mktemp("uneven")
    (folder / "audio/v1").mkdir(parents=True)
    for number, file in enumerate(sorted((noisy_world.root / "audio/v1").glob("*.wav"))):
        with wave.open(str(file)) as sound, wave.open(str(folder / "audio/v1" / file.name), "wb") as shorter:
            shorter.setparams(sound.getparams())
            shorter.writeframes(sound.readframes(3200 + 800 * number))
    for name in ("train", "eval"):
        rows = [json.loads(line) for line in (noisy_world.root / f"{name}.jsonl").read_text().splitlines()]
        for row in rows[::3]:
            row["frames"] = row["frames"][:1]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train_data_path": str(folder / "train.jsonl"), "eval_data_path": str(folder / "eval.jsonl")}
    data["audio_dir"] = str(folder / "audio")
    return SimpleNamespace(train_options=lambda **changes: noisy_world.train_options(**data | changes))


BATCHES = {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 3}
UNCACHED = {**BATCHES, "feature_cache": "off"}
SPOKEN = {"audio_span": "spoken", "audio_margin_s": 0.1}
PAIRS: dict[str, tuple[dict, dict]] = {
    "cached = uncached": (BATCHES, UNCACHED),
    "packed = separate": (BATCHES | {"packing": "off"}, BATCHES | {"packing": "on"}),
    "packed = separate, uncached": (UNCACHED | {"packing": "off"}, UNCACHED | {"packing": "on"}),
    "what is spoken: cached = uncached": (BATCHES | SPOKEN, UNCACHED | SPOKEN),
    "what is spoken: packed = separate": (BATCHES | SPOKEN | {"packing": "off"}, BATCHES | SPOKEN | {"packing": "on"}),
    "1x4 = 4x1": (
        SPOKEN | {"gradient_accumulation_steps": 4},
        SPOKEN | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
    ),
    "all layers recompute = none does": ({"checkpointed_layers": 2}, {"checkpointed_layers": 0}),
}
ROWS = {name: ["padded", "packed"] for name in PAIRS if "packed" in name}


def relative(one: list[float], other: list[float]) -> list[float]:
    return [(a - b) / b for a, b in zip(one, other, strict=True)]


@pytest.mark.parametrize("pair", PAIRS)
def test_both_ways_train_and_evaluate_alike(uneven_world, tmp_path, pair):
    shared = {"max_steps": 4, "lora_dropout": 0.0, "learning_rate": 0.01}
    one, other = (
        Watched(uneven_world.train_options(**shared | changes), tmp_path / str(number) / "runs")
        for number, changes in enumerate(PAIRS[pair])
    )
    assert one.error is None and other.error is None
    figures = {
        "loss": [list(run.losses().values()) for run in (one, other)],
        "grad_norm": [[event["grad_norm"] for event in run.of("metric")] for run in (one, other)],
        "eval_loss": [[event["eval_loss"] for event in run.of("eval")] for run in (one, other)],
        "tokens of a sample": [
            [event["tokens_per_s"] / event["samples_per_s"] for event in run.of("metric")] for run in (one, other)
        ],
    }
    assert len(figures["loss"][0]) == 4 and figures["eval_loss"][0]
    for name, (left, right) in figures.items():
        differences = relative(left, right)
        assert max(map(abs, differences)) < SINGLE * (10 if name == "grad_norm" else 1), name
        assert abs(fmean(differences)) < MEAN * (10 if name == "grad_norm" else 1), f"{name} differs to one side"
    # Of the 0.04 that Adam may move a weight: it makes whole steps of gradients that are rounding only.
    assert_same_adapter(one.output, other.output, rtol=1e-3, atol=1e-3)
    rows = [event["rows"] for run in (one, other) for event in run.of("phase") if event["name"] == "plan"]
    assert rows == ROWS.get(pair, rows[:1] * 2)


FEWER = preset(1, 84)

# --- stepped down = started so: bit by bit ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(noisy_world, tmp_path_factory):
    """Three steps of two micro steps; no layer recomputes, dropout is on."""
    return Watched(noisy_world.train_options(checkpointed_layers=0, **STEPS), tmp_path_factory.mktemp("straight"))


@pytest.mark.parametrize(("place", "call"), [("forward", 1), ("forward", 4), ("backward", 2), ("backward", 3)])
def test_recomputing_from_any_micro_step_on_changes_no_bit(noisy_world, straight, tmp_path, out_of_memory, place, call):
    out_of_memory(*places()[place], lambda count, _: count == call)
    run = Watched(noisy_world.train_options(checkpointed_layers=0, **STEPS), tmp_path / "runs")
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


@pytest.mark.parametrize(("cache", "workers"), [("auto", 0), ("off", 0), ("auto", 1)])
def test_a_run_that_steps_down_at_once_is_one_that_began_so(noisy_world, tmp_path, out_of_memory, cache, workers):
    """Also with a worker process, whose batches of the whole epoch are still encoded in the old way."""
    options = {"feature_cache": cache, **STEPS}
    reference = Watched(noisy_world.train_options(num_frames=1, image_size=84, **options), tmp_path / "reference/runs")
    out_of_memory(*places()["forward"], lambda count, _: count <= 2)
    began = noisy_world.train_options(image_size=168, **options)
    began.extra = {"dataloader_num_workers": str(workers)}
    presets = preset(1, 168), preset(1, 84, rung=1)
    run = Watched(began, tmp_path / "run/runs", presets)
    assert_same(run, reference)
    assert [event["name"] for event in run.of("preset")] == ["own-0", "own-1"]
    assert run.seen == reference.seen and set(run.rows[2:]) == set(reference.rows)
    assert run.rows[0] > run.rows[1] > run.rows[2]


def test_a_run_that_gives_up_the_silence_is_one_that_began_without(noisy_world, tmp_path, out_of_memory, monkeypatch):
    """And its encoders need not come back: the cache has all that may go on."""
    from surgvqa.training import step_down

    monkeypatch.setattr(step_down, "encode_again", lambda *_: pytest.fail("encodes again"))
    reference = Watched(noisy_world.train_options(**SPOKEN, **STEPS), tmp_path / "reference/runs")
    out_of_memory(*places()["forward"], lambda count, _: count == 1)
    began = noisy_world.train_options(audio_margin_s=SPOKEN["audio_margin_s"], **STEPS)
    run = Watched(began, tmp_path / "run/runs", (preset(2, 84) + 'audio_span = "spoken"\n',))
    assert_same(run, reference)
    assert [shown for _, shown in run.seen] == [(2, 84, "spoken")] * len(run.seen)
    assert results.read(run.output).options["audio_span"] == "spoken"


def test_stepping_down_in_the_middle_is_a_resume_with_fewer_frames(noisy_world, tmp_path, out_of_memory):
    """As if the run had been stopped at step 1 and resumed with fewer frames."""
    first = Watched(constant_rate(noisy_world.train_options(**STEPS | {"max_steps": 1})), tmp_path / "first/runs")
    folder = {"output_dir": str(first.output), "resume": str(first.output / "checkpoint-1")}
    shared = STEPS | {"max_steps": 6}
    fewer = constant_rate(noisy_world.train_options(**shared, num_frames=1, **folder))
    reference = Watched(fewer, tmp_path / "reference/runs")
    out_of_memory(*places()["backward"], lambda count, _: count == 4)  # the second micro step of step 2
    run = Watched(constant_rate(noisy_world.train_options(**shared)), tmp_path / "run/runs", (FEWER,))
    assert run.losses() == first.losses() | reference.losses()
    assert_same_adapter(run.output, reference.output)
    assert run.logged() == pytest.approx(list(run.losses().values()), rel=1e-5)  # W&B's curve is the same
    order = [index for index, _ in run.seen]
    assert order == [i for i, _ in first.seen] + [i for i, _ in reference.seen]
    assert sorted(order[:8]) == list(range(8))  # an epoch: none left out, none twice
    assert [frames for _, (frames, *_) in run.seen] == [2, 2, 2] + [1] * 9


def test_a_stopped_run_goes_on_with_what_it_stepped_down_to(noisy_world, tmp_path, out_of_memory, monkeypatch):
    out_of_memory(*places()["forward"], lambda count, _: count == 3)
    whole = Watched(noisy_world.train_options(**STEPS), tmp_path / "whole/runs", (FEWER,))
    monkeypatch.undo()
    out_of_memory(*places()["forward"], lambda count, _: count == 3)
    stop_in(monkeypatch, "end_of_step", 2)
    stopped = Watched(noisy_world.train_options(**STEPS), tmp_path / "stopped/runs", (FEWER,))
    monkeypatch.undo()
    assert stopped.result["state"] == "stopped" and stopped.result["steps"] == 2
    for name in (stopped.run.id, str(stopped.output), str(stopped.output / "checkpoint-2")):
        found = results.find(name, load_workspace(tmp_path / "stopped"))
        assert (found.options["num_frames"], found.preset) == (1, "own-0")
    again = found.options | {"resume": str(stopped.output), "output_dir": str(stopped.output)}
    resumed = Watched(TrainOptions(**again), tmp_path / "stopped/runs")
    assert stopped.losses() | resumed.losses() == whole.losses() and not resumed.of("oom")


# --- resumed = uninterrupted: bit by bit ------------------------------------------------------------------------------

EVALUATED = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    """Six steps with evaluation and dropout; four steps are an epoch."""
    options = world.train_options(eval_data_path=str(world.eval), **EVALUATED)
    return Watched(options, tmp_path_factory.mktemp("uninterrupted"))


@pytest.mark.parametrize(("micro_step", "saved"), [(6, 3), (7, 3), (9, 4)])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(world, uninterrupted, tmp_path, monkeypatch, micro_step, saved):
    options = world.train_options(eval_data_path=str(world.eval), **EVALUATED)
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        stop_in(patched, "training_step", micro_step)
        first = Watched(options, tmp_path)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert first.result["state"] == "stopped" and first.result["steps"] == saved
    assert state_of(first.run.folder) == "stopped" and first.run.exit_code == 0
    workspace = load_workspace(tmp_path)
    (tmp_path / "runs").symlink_to(tmp_path)
    given = {"resume": first.run.id}
    results.inherit("train", given, workspace)  # an id becomes its output folder
    second = Watched(
        world.train_options(**{**options.__dict__, "resume": given["resume"], "output_dir": str(first.output)}),
        tmp_path,
    )
    assert second.result["resumed_from"].endswith(f"checkpoint-{saved}")
    assert first.losses() | second.losses() == uninterrupted.losses()
    assert min(second.losses()) == saved + 1
    assert_same_adapter(second.output, uninterrupted.output)
    assert_same_adapter(second.output / "checkpoint-6", uninterrupted.output / "checkpoint-6")
