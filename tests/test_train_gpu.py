"""Training, stopping, resuming and evaluating the very small model on a CUDA GPU."""

import os
import signal

import pytest
import small

from surgvqa import evaluate, train
from surgvqa.runs import Run

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.model,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]


def _train(options, folder):
    events = []
    with Run.create(folder, "train", observer=events.append) as run:
        train.check(options)
        result = train.run(options, run).data
    print({key: result[key] for key in ("state", "steps", "peak_allocated_gb", "samples_per_s")})
    print([event["text"] for event in events if event["kind"] in ("warning", "oom") or event.get("name") == "plan"])
    return result, events, {event["step"]: event["loss"] for event in events if event["kind"] == "metric"}


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_stopped_and_resumed_on_the_gpu(tmp_path, monkeypatch, compiled):
    from surgvqa.trainer import EventTrainer

    world = small.build(tmp_path / "small", samples=16)
    shared = {
        "device": "cuda",
        "compile": compiled,
        "max_steps": 6,
        "eval_data_path": str(world.eval),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "learning_rate": 0.01,
    }
    _, events, straight = _train(world.train_options(**shared), tmp_path / "straight")
    (plan,) = [event for event in events if event.get("name") == "plan"]
    assert plan["dtype"] == "bfloat16" and plan["device"].startswith("cuda")
    gpu = [event for event in events if event["kind"] == "gpu"]
    assert gpu[-1]["backend"] == "cuda" and gpu[-1]["peak_allocated_bytes"] > 1e6

    original, count = EventTrainer.training_step, 0

    def stops_at_the_seventh(self, *arguments, **keywords):
        nonlocal count
        count += 1
        if count == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments, **keywords)

    with monkeypatch.context() as patched:
        patched.setattr(EventTrainer, "training_step", stops_at_the_seventh)
        stopped, _, first = _train(world.train_options(**shared), tmp_path / "stopped")
    assert stopped["state"] == "stopped" and stopped["steps"] == 3
    folder = stopped["output_dir"]
    resumed, _, second = _train(world.train_options(**shared, resume=folder, output_dir=folder), tmp_path / "resumed")
    both = first | second
    print("straight", straight, "resumed", both)
    assert both == pytest.approx(straight, rel=2e-2)  # GPU kernels add up in no fixed order

    options = world.evaluate_options(device="cuda", checkpoint=resumed["adapter"])
    with Run.create(tmp_path / "evaluate", "evaluate") as run:
        evaluate.check(options)
        report = evaluate.run(options, run).data
    print({key: report[key] for key in ("samples", "label_accuracy", "samples_per_s", "peak_allocated_gb")})
    assert report["samples"] == 8 and report["peak_kind"] == "cuda allocator"
