"""Training, stopping, resuming and evaluating the very small model on a CUDA GPU."""

import importlib.util
import os
import signal

import pytest
import small

from surgvqa.evaluation import command as evaluate
from surgvqa.runs.folder import Run
from surgvqa.training import command as train

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
    from surgvqa.training.trainer import EventTrainer

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

    original, count, devices = EventTrainer.training_step, 0, set()

    def stops_at_the_seventh(self, *arguments, **keywords):
        nonlocal count
        count += 1
        model = self.model.get_base_model()
        parts = (model.model.visual, model.audio_encoder, model.model.language_model.layers, model.lm_head)
        devices.add(tuple(next(part.parameters()).device.type for part in parts))
        if count == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments, **keywords)

    with monkeypatch.context() as patched:
        patched.setattr(EventTrainer, "training_step", stops_at_the_seventh)
        stopped, _, first = _train(world.train_options(**shared), tmp_path / "stopped")
    assert stopped["state"] == "stopped" and stopped["steps"] == 3
    assert devices == {("cpu", "cpu", "cuda", "cuda")}  # features are cached: the encoders have left
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


def test_token_embeddings_on_the_host_give_the_same(tmp_path):
    import tiny_model

    from surgvqa.model.loading import load_model

    world = small.build(tmp_path / "small", samples=1)
    model = load_model(world.checkpoint, dtype=torch.bfloat16, device="cuda", attn_implementation="sdpa")
    table = model.get_input_embeddings()
    assert table.weight.device.type == "cpu" and model.device.type == "cuda"
    ids = torch.randint(0, 40, (2, 70), device="cuda")  # words, no pads
    found, mask = model.embed(ids), torch.ones_like(ids)
    said = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    table.to("cuda")
    assert torch.equal(found, model.embed(ids)) and found.device.type == "cuda"
    assert torch.equal(said, model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False))

    tied = tiny_model.built(tie_word_embeddings=True).to("cuda")
    tied.embeddings_to_host()
    assert tied.get_input_embeddings().weight.device.type == "cuda"


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed")
@pytest.mark.parametrize("several", [False, True])
def test_flash_attention_equals_sdpa(several):
    """Language model (heads of 128, grouped) and vision tower (heads of 80), as in the real model, in bf16: both are as
    far from float32."""
    import tiny_model

    sizes = {
        "hidden_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {"model_type": "qwen2_vl", "depth": 2, "embed_dim": 160, "hidden_size": 512, "num_heads": 2},
    }
    samples = [tiny_model.sample(1, frames=4), tiny_model.sample(2, frames=7, answer=5)]
    batch = tiny_model.packed(samples, 64) if several else samples[1]
    batch.pop("attention_mask", None)
    batch = {name: value.to("cuda") if torch.is_tensor(value) else value for name, value in batch.items()}

    def run(attention, dtype):
        model = tiny_model.built(**sizes).to("cuda", dtype)
        for parameter in model.parameters():  # large enough that attention matters
            if parameter.dim() > 1:
                parameter.mul_(3)
        for part in (model.model.language_model, model.model.visual):
            part.config._attn_implementation = attention
        model.model.language_model.layers.requires_grad_(True)
        features = model.encode_images(batch["pixel_values"].to(dtype), batch["image_grid_thw"])
        model(**batch).loss.backward()
        gradient = [p.grad.flatten() for p in model.model.language_model.layers.parameters() if p.grad is not None]
        return features.float().flatten(), torch.cat(gradient).float()

    exact = run("sdpa", torch.float32)
    errors = {}
    for attention in ("sdpa", "flash_attention_2"):
        found = run(attention, torch.bfloat16)
        errors[attention] = [float((a - b).norm() / b.norm()) for a, b in zip(found, exact)]
    print("relative errors against float32, (vision features, gradients):", errors)
    for sdpa, flash in zip(*errors.values()):
        assert flash < max(1.5 * sdpa, 0.02)
