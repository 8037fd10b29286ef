"""Runs of a very small model on the CPU."""

import functools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from waiting import until
from watched import Watched, adapter_of, assert_same_adapter

from surgvqa.cli import main
from surgvqa.errors import UsageError
from surgvqa.runs.events import finished_event, parse_event
from surgvqa.runs.history import last_step
from surgvqa.runs.launch import launch, stop
from surgvqa.runs.state import state_of
from surgvqa.training import checkpoints

model = pytest.mark.model


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory) -> Watched:
    """Six steps in one go, with evaluation, dropout on; four steps are an epoch."""
    options = world.train_options(
        max_steps=6,
        eval_data_path=str(world.eval),
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        learning_rate=0.01,
    )
    return Watched(options, tmp_path_factory.mktemp("straight"))


@model
def test_a_run_says_what_it_does(straight):
    assert straight.result["state"] == "finished" and straight.result["steps"] == 6
    assert [wrong for event in straight.events for wrong in parse_event(json.dumps(event).encode())[1]] == []
    assert list(straight.losses()) == [1, 2, 3, 4, 5, 6]
    for event in straight.of("metric"):
        assert event["total_steps"] == 6 and event["samples_per_s"] > 0 and event["tokens_per_s"] > 0
        assert 0 <= event["data_wait"] <= 1 and event["grad_norm"] > 0 and event["learning_rate"] > 0
    assert [event["step"] for event in straight.of("eval")] == [2, 4, 6]
    assert straight.losses()[6] < straight.losses()[1]
    (plan,) = [event for event in straight.of("phase") if event["name"] == "plan"]
    assert plan["trained_parameters"] == 11520 and "sdpa" in plan["text"] and "adamw_torch" in plan["text"]
    assert plan["sequence_tokens"] > 50 and plan["dtype"] == "float32"
    gpu = straight.of("gpu")
    assert gpu and gpu[-1]["backend"] == "host" and gpu[-1]["process_bytes"] > 1e8
    assert straight.result["peak_allocated_gb"] == pytest.approx(max(e["process_bytes"] for e in gpu) / 1e9)
    assert "CPU" in straight.result["peak_kind"]
    assert straight.result["train_loss"] == pytest.approx(sum(straight.losses().values()) / 6)


@model
def test_the_result_is_the_best_state_in_old_names(straight):
    evaluations = {event["step"]: event["eval_loss"] for event in straight.of("eval")}
    best = min(evaluations, key=evaluations.get)
    assert straight.result["eval_loss"] == evaluations[best]
    assert straight.result["best_checkpoint"] == str(straight.output / f"checkpoint-{best}")
    assert_same_adapter(straight.output, straight.output / f"checkpoint-{best}")
    names = set(adapter_of(straight.output))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert "base_model.model.audio_projector.weight" in names
    record = json.loads((straight.output / "surgvqa.json").read_text())
    assert record["step"] == best and record["run"] == straight.run.id and record["options"]["num_frames"] == 2
    assert len(checkpoints.checkpoints(straight.output)) == 2  # save_total_limit
    assert not list(straight.output.glob(".*"))


@model
def test_worker_processes_decode_the_same_and_tell_a_broken_file_in_one_line(world, tmp_path, monkeypatch):
    from surgvqa.model import encode

    def entries(folder: Path) -> dict[str, list]:
        from safetensors.torch import load_file

        return {path.name: load_file(path)["features"].tolist() for path in folder.glob("??/*.safetensors")}

    def run(name: str, **changes) -> Watched:
        cache = {"feature_cache_dir": str(tmp_path / name), "max_steps": 1}
        return Watched(world.train_options(**cache, **changes), tmp_path / f"{name} runs")

    alone = run("alone")
    monkeypatch.setattr(encode, "ITEMS_PER_WORKER", 1)
    monkeypatch.setattr(encode, "usable_cores", lambda: 3)
    workers = run("workers")
    assert workers.losses() == alone.losses()
    assert entries(tmp_path / "workers") == entries(tmp_path / "alone")

    for folder, suffix, said in (("frames", "jpg", "cannot be decoded"), ("audio", "wav", "cannot be decoded")):
        shutil.copytree(world.root / folder, tmp_path / folder)
        victim = sorted((tmp_path / folder).rglob(f"*.{suffix}"))[0]
        victim.write_bytes(b"no such format")
        failed = run(f"broken {folder}", **{f"{folder}_dir": str(tmp_path / folder)})
        text = str(failed.error)
        assert isinstance(failed.error, UsageError) and "\n" not in text and str(victim) in text and said in text


@model
def test_waiting_for_data_is_measured(world, tmp_path, monkeypatch):
    from surgvqa.data.dataset import ClipDataset
    from surgvqa.training.trainer import EventTrainer

    load, train_on = ClipDataset.__getitem__, EventTrainer.training_step
    monkeypatch.setattr(ClipDataset, "__getitem__", lambda *a: time.sleep(0.1) or load(*a))
    monkeypatch.setattr(EventTrainer, "training_step", lambda *a, **k: time.sleep(0.2) or train_on(*a, **k))
    run = Watched(world.train_options(max_steps=3, gradient_accumulation_steps=2), tmp_path)
    waited, passed = 0.0, 0.0
    for event in run.of("metric"):
        seconds = 2 / event["samples_per_s"]
        assert event["data_wait"] * seconds <= seconds - 2 * 0.2
        waited, passed = waited + event["data_wait"] * seconds, passed + seconds
    assert waited >= 6 * 0.1
    assert run.result["data_wait"] == pytest.approx(waited / passed)


@model
@pytest.mark.parametrize("backend", ["eager", "broken"])
def test_compiled_layers_are_counted_and_a_failure_is_told_once(world, tmp_path, monkeypatch, backend):
    import torch._dynamo

    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    torch._dynamo.reset()
    torch._dynamo.utils.clear_compilation_metrics()
    torch._dynamo.utils.counters.clear()
    chosen = broken if backend == "broken" else backend
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=chosen))
    shared = {"max_steps": 3, "lora_dropout": 0.0, "learning_rate": 0.01}
    plain = Watched(world.train_options(**shared), tmp_path / "plain")
    compiled = Watched(world.train_options(compile="on", **shared), tmp_path / "compiled")
    assert list(compiled.losses().values()) == pytest.approx(list(plain.losses().values()), rel=1e-4)
    last = compiled.of("metric")[-1]
    counted = ("graphs", "recompiles", "graph_breaks", "compile_failures")
    assert {name: last[name] for name in counted} == {name: compiled.result[name] for name in counted}
    told = [event for event in compiled.of("warning") if "torch.compile" in event["text"]]
    if backend == "broken":
        assert last["graphs"] == 0 and last["compile_failures"] > 0 and len(told) == 1
    else:
        assert last["graphs"] > 0 and last["compile_failures"] == 0 and not told
        # rows are padded to multiples of one length: the first step has compiled all that is needed
        assert compiled.of("metric")[0]["graphs"] == last["graphs"]
    assert "graphs" not in plain.of("metric")[-1]


@model
def test_resume_skips_a_damaged_checkpoint_and_ends_a_finished_run(world, straight, tmp_path):
    shutil.copytree(straight.output, tmp_path / "out")
    whole = checkpoints.checkpoints(tmp_path / "out")[0]
    options = world.train_options(output_dir=str(tmp_path / "out"), resume=str(tmp_path / "out"), max_steps=6)
    done = Watched(options, tmp_path / "runs")
    assert done.result["steps"] == 6 and not done.losses()
    assert_same_adapter(tmp_path / "out", whole)
    optimiser = whole / "optimizer.pt"
    optimiser.write_bytes(optimiser.read_bytes()[:-100])
    again = Watched(options, tmp_path / "runs")
    assert any("checkpoint-6: optimizer.pt is truncated" in event["text"] for event in again.of("warning"))
    assert min(again.losses()) == int(Path(again.result["resumed_from"]).name.split("-")[1]) + 1
    with pytest.raises(UsageError, match="lora"):
        _raise(Watched(world.train_options(**{**options.__dict__, "lora_r": 8}), tmp_path / "runs"))


def _raise(watched: Watched):
    if watched.result is None:
        raise watched.error


@model
def test_without_evaluation_the_last_state_is_the_result(world, tmp_path):
    run = Watched(world.train_options(max_steps=2, save_strategy="no"), tmp_path)
    assert run.result["state"] == "finished" and run.result["eval_loss"] is None
    assert (run.output / checkpoints.ADAPTER).is_file()
    assert any("no evaluation, so" in event["text"] for event in run.of("warning"))


@model
def test_early_stopping(world, tmp_path):
    options = world.train_options(
        max_steps=8,
        eval_data_path=str(world.eval),
        eval_strategy="steps",
        eval_steps=1,
        early_stopping_patience=1,
        learning_rate=1e-12,
    )
    run = Watched(options, tmp_path)
    assert run.result["state"] == "finished" and run.result["steps"] < 8


@model
def test_the_model_is_told_to_train_once_and_again_whenever_a_part_of_it_is_not(world):
    """Trainer asks for it at each micro step; an evaluation and new frames put the model, or its base, in eval mode."""
    from types import MethodType

    import torch

    from surgvqa.model import adapter, loading
    from surgvqa.training import trainer_hooks

    base = loading.load_model(world.checkpoint, dtype=torch.float32, device="cpu", attn_implementation="sdpa")
    tuned = adapter.add_lora(base, world.train_options())
    tuned.train = MethodType(trainer_hooks._train, tuned)
    dropout = next(m for m in tuned.modules() if isinstance(m, torch.nn.Dropout))
    visits = []
    dropout.train = lambda mode=True: visits.append(mode) or torch.nn.Module.train(dropout, mode)
    for _ in range(3):
        tuned.train()
    assert visits == [True] and dropout.training and not base.audio_encoder.training
    for eval_mode in (tuned.eval, base.eval):
        eval_mode()
        assert not dropout.training
        tuned.train()
        assert dropout.training
    assert visits == [True, False, True, False, True]


def test_released_encoders_point_into_the_checkpoint_and_are_the_same(world):
    import torch
    from safetensors import safe_open

    from surgvqa.model import encode, loading

    with safe_open(next(world.checkpoint.glob("*.safetensors")), "pt") as file:
        dtype = file.get_tensor(next(iter(file.keys()))).dtype
    loaded = loading.load_model(world.checkpoint, dtype=dtype, device="cpu", attn_implementation="sdpa")
    encoders = (loaded.model.visual, loaded.audio_encoder)
    before = [(p, p.data_ptr(), p.clone()) for encoder in encoders for p in encoder.parameters()]
    others = {name: p.data_ptr() for name, p in loaded.model.language_model.named_parameters()}
    buffers = [(b, b.clone()) for encoder in encoders for b in encoder.buffers()]
    encode.release_encoders(loaded)
    assert all(p.data_ptr() != place and torch.equal(p, was) for p, place, was in before) and len(before) > 20
    assert all(torch.equal(b, was) for b, was in buffers)
    assert others == {name: p.data_ptr() for name, p in loaded.model.language_model.named_parameters()}


def test_encoders_that_compute_otherwise_with_the_same_weights_have_other_features(world, tmp_path):
    import torch

    from surgvqa.data.processors import load_processors
    from surgvqa.model import encode, loading

    frame = str(next((world.root / "frames").rglob("*.jpg")))
    loaded = loading.load_model(world.checkpoint, dtype=torch.float32, device="cpu", attn_implementation="sdpa")

    def key(checkpoint: Path) -> str:
        return encode.open_store(loaded, str(checkpoint), load_processors(checkpoint), tmp_path).frame_key(frame, 84)

    shutil.copytree(world.checkpoint, tmp_path / "other")
    assert key(tmp_path / "other") == key(world.checkpoint)
    config = json.loads((tmp_path / "other/config.json").read_text())
    config["vision_config"]["num_heads"] = 1
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    assert key(tmp_path / "other") != key(world.checkpoint)


def test_steps_that_are_not_finite_change_nothing_and_three_end_the_run(world, tmp_path, monkeypatch):
    from surgvqa.training.trainer import EventTrainer

    original = EventTrainer.compute_loss
    bad: set[int] = set()

    def compute_loss(self, *arguments, **keywords):
        loss = original(self, *arguments, **keywords)
        return loss * math.nan if self.state.global_step in bad else loss

    monkeypatch.setattr(EventTrainer, "compute_loss", compute_loss)
    options = world.train_options(max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=9)
    bad = {1}
    once = Watched(options, tmp_path)
    assert once.result["state"] == "finished" and once.losses()[2] is None and math.isfinite(once.losses()[3])
    assert any("step 2 is not finite" in event["text"] for event in once.of("warning"))
    assert_same_adapter(once.output / "checkpoint-1", once.output / "checkpoint-2")
    bad = {1, 2, 3}
    thrice = Watched(options, tmp_path)
    assert thrice.result is None and "steps 2 to 4 are not finite" in str(thrice.error)
    assert "checkpoint-3" in str(thrice.error)


@model
@pytest.mark.parametrize("place", ["forward", "evaluation"])
def test_out_of_memory_is_saved_and_says_how_to_go_on(world, tmp_path, monkeypatch, place):
    import torch

    from surgvqa.training.trainer import EventTrainer

    name = {"forward": "training_step", "evaluation": "prediction_step"}[place]
    original = getattr(EventTrainer, name)

    def fails_at_two(self, *arguments, **keywords):
        if self.state.global_step == 2:
            self.activity = "forward and backward" if place == "forward" else "evaluate"
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(EventTrainer, name, fails_at_two)
    options = world.train_options(eval_data_path=str(world.eval), eval_strategy="steps", eval_steps=2, num_frames=8)
    run = Watched(options, tmp_path)
    assert "out of GPU memory at step 2" in str(run.error)
    (event,) = run.of("oom")
    assert event["step"] == 2 and event["requested_bytes"] == 2 * 2**30
    assert event["next_preset"] is None and "smallest preset" in str(run.error)  # 84 px are fewer than any preset's
    assert checkpoints.newest_complete_checkpoint(run.output)[0].name == "checkpoint-2"


@model
def test_a_full_disk_ends_the_run_with_one_line_and_nothing_half_written(world, tmp_path, monkeypatch):
    import torch

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    run = Watched(world.train_options(save_strategy="steps", save_steps=1), tmp_path)
    assert "No space left on device" in str(run.error) and "\n" not in str(run.error)
    assert [path.name for path in run.output.iterdir()] == ["surgvqa.json"]


def document(out: str) -> dict:
    """The JSON of --json; pytest's stdout is no file descriptor, so that what goes to log.txt stands before it."""
    return json.loads(out[out.index("{\n") :])


@model
def test_the_old_command_line_works_as_it_is(world, tmp_path, monkeypatch, capfd):
    """The command of the instructions (shared/mission), with the program's name changed; W&B offline without a key."""
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    command = f"""train --model_name_or_path {world.checkpoint} --output_dir ./checkpoints/surgical_vqa_bf16
        --run_name surgical-vqa-bf16-001 --train_data_path {world.train} --eval_data_path {world.eval}
        --frames_dir {world.root}/frames --audio_dir {world.root}/audio --eval_audio_dir {world.root}/audio
        --per_device_train_batch_size 1 --gradient_accumulation_steps 4 --learning_rate 2e-4 --num_train_epochs 1
        --warmup_ratio 0.0 --do_eval --eval_strategy steps --eval_steps 10 --save_strategy steps --save_steps 50
        --save_total_limit 1 --load_best_model_at_end True --metric_for_best_model eval_loss --bf16 True
        --report_to wandb --image-size 84 --json"""
    assert main.main(command.split()) == 0
    result = document(capfd.readouterr().out)
    assert result["steps"] == 2 and result["eval_loss"] > 0
    output = tmp_path / "checkpoints/surgical_vqa_bf16"
    assert (output / "adapter_model.safetensors").is_file() and (output / "adapter_config.json").is_file()
    run = tmp_path / "runs" / result["run"]
    assert list((run / "wandb").glob("offline-run-*")) and "WANDB_MODE" not in os.environ
    recorded = json.loads((run / "run.json").read_text())["options"]["num_train_epochs"]
    assert recorded == {"value": 1.0, "from": "command line"}

    assert main.main([*command.split()]) == 2  # the same again would overwrite it
    assert f"--resume {result['run']}" in capfd.readouterr().err
    # Resuming takes everything over from the run; what is named wins.
    assert (
        main.main(
            ["train", "--resume", "surgical-vqa-bf16-001", "--num_train_epochs", "2", "--report_to", "none", "--json"]
        )
        == 0
    )
    resumed = document(capfd.readouterr().out)
    assert resumed["steps"] == 4 and resumed["output_dir"] == str(output)
    assert resumed["resumed_from"] == str(output / "checkpoint-2")


@model
def test_a_detached_run_stops_cleanly(world, tmp_path):
    """`surgvqa stop`: SIGTERM to a real process; it saves, says stopped and ends with exit code 0."""
    (tmp_path / "surgvqa.toml").write_text(
        f"model_name_or_path = '{world.checkpoint}'\ntrain_data_path = '{world.train}'\nimage_size = 84\n"
        f"frames_dir = '{world.root}/frames'\naudio_dir = '{world.root}/audio'\n"
    )
    folder = launch("train", ["--max_steps", "10000", "--device", "cpu"], tmp_path)
    assert '"name": "start"' in (folder / "events.jsonl").read_text(), "what it does is said before Python has started"
    until(lambda: last_step(folder) >= 2 or state_of(folder) not in ("starting", "running"), 120)
    assert last_step(folder) >= 2, (folder / "log.txt").read_text()
    assert stop(folder) == "stopped"
    finished = finished_event(folder)
    assert finished["exit_code"] == 0 and finished["result"]["steps"] >= 2
    assert "'loss'" not in (folder / "log.txt").read_text(), "our own lines say it, Trainer's are not printed too"
    checkpoint, skipped = checkpoints.newest_complete_checkpoint(folder / "checkpoints")
    assert checkpoint.name == f"checkpoint-{finished['result']['steps']}" and not skipped


def test_the_rooms_import_light():
    rooms = "surgvqa.training.command, surgvqa.evaluation.command, surgvqa.evaluation.ask"
    code = f"import sys, {rooms}; assert not {{'torch', 'numpy'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_workers_hand_over_in_a_temporary_folder_with_a_long_path(world, tmp_path):
    """Their sockets' paths may have 107 bytes; before, the run waited forever."""
    deep = tmp_path / "so deep a folder" / ("d" * 100)
    deep.mkdir(parents=True)
    options = {
        "model_name_or_path": world.checkpoint, "train_data_path": world.train, "frames_dir": world.root / "frames",
        "audio_dir": world.root / "audio", "num_frames": 2, "image_size": 84, "lora_r": 4, "max_steps": 1,
        "gradient_accumulation_steps": 2, "device": "cpu", "dataloader_num_workers": 1,
    }  # fmt: skip
    words = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    program = [sys.executable, "-m", "surgvqa", "train", *words, "--json"]
    environment = os.environ | {"TMPDIR": str(deep)}
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and json.loads(done.stdout)["steps"] == 1, done.stderr
