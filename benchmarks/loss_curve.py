"""Is our training the same as plain training? The loss curve of both, and the gradients at the same weights.

    python benchmarks/loss_curve.py --checkpoint demo/merged --data demo            # on a CPU in a minute
    python benchmarks/loss_curve.py --checkpoint BIG --data demo --plain_attention sdpa --bf16 -- --compile on …

Ours is `surgvqa train` with its defaults (feature cache, answer-only logits, and on a GPU compiled layers and LoRA
without casts) and the further options after `--`. Plain is benchmarks/old_way.py: encoders in every step, logits at all
positions, eager attention, PEFT with float32 adapters as it is, nothing compiled. Both see the same samples in the same
order from the same initial adapter, with the same AdamW in 32 bit and no dropout (its draws would differ). Weights are
bfloat16 under autocast on a GPU; on a CPU float32, or with --bf16 as on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import old_way
import torch

from surgvqa.config.options import TrainOptions
from surgvqa.config.settings import convert, settings_of
from surgvqa.memory import reductions
from surgvqa.model import layers
from surgvqa.model.adapter import adapter_parameters, add_lora
from surgvqa.runs.folder import Run
from surgvqa.training import command, recipe
from surgvqa.training.trainer import EventTrainer

SMOOTHED_OVER = 5
"""Steps of the running mean that is compared beside the single steps."""

Tensors = dict[str, torch.Tensor]


class Watched(EventTrainer):
    """Our trainer, which also remembers the samples of each step, and weights and gradients at some of them."""

    at: frozenset[int]
    weights: dict[int, Tensors]
    gradients: dict[int, Tensors]
    windows: list[list[list[int]]]

    def _clip_grad_norm(self, model: Any) -> Any:
        number = len(self.windows) + 1
        self.windows.append([[int(i) for i in batch["sample_indices"]] for batch in self.window.batches])
        if number in self.at:
            slots = adapter_parameters(self.model)
            self.weights[number] = {name: p.detach().cpu().clone() for name, p in slots.items()}
            self.gradients[number] = {name: p.grad.detach().cpu().float().clone() for name, p in slots.items()}
        return super()._clip_grad_norm(model)


def ours(options: TrainOptions, at: set[int], folder: Path) -> tuple[type[Watched], list[float], dict[str, Any]]:
    """Trains; (what was remembered, the loss of each step, the result)."""
    Watched.at, Watched.weights, Watched.gradients, Watched.windows = frozenset(at | {1}), {}, {}, []
    recipe.EventTrainer = Watched
    losses = []

    def observe(event: dict[str, Any]) -> None:
        if event["kind"] == "metric":
            losses.append(event["loss"])

    with Run.create(folder / "runs", "train", observer=observe) as run:
        command.check(options)
        return Watched, losses, command.run(options, run).data


def put(model: Any, weights: Tensors) -> None:
    """These weights into the adapter."""
    with torch.no_grad():
        for name, slot in adapter_parameters(model).items():
            slot.copy_(weights[name])


def compare(options: TrainOptions, plain: TrainOptions, at: set[int], folder: Path) -> dict[str, Any]:
    """Both trainings; the losses of both and the differences."""
    watched, our_losses, result = ours(options, at, folder)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    base, data = old_way.load(plain, plain.model_name_or_path, plain.train_data_path)
    model = add_lora(base, plain).train()
    layers.checkpoint_layers(base, None if plain.gradient_checkpointing else 0)

    put(model, watched.weights[1])
    optimiser, scheduler = old_way.optimiser_of(plain, model, len(watched.windows))
    losses = []
    for indices in watched.windows:
        batches, tokens = old_way.window(data, indices, base.device)
        losses.append(old_way.step(model, optimiser, scheduler, batches, tokens))

    cosines = {}
    for number, weights in sorted(watched.weights.items()):
        put(model, weights)
        model.zero_grad()
        old_way.backward(model, *old_way.window(data, watched.windows[number - 1], base.device))
        plain_gradients = {name: p.grad.detach().cpu().float() for name, p in adapter_parameters(model).items()}
        cosines[number] = agreement(watched.gradients[number], plain_gradients)
    smooth = [smoothed(curve) for curve in (our_losses, losses)]
    return {
        "steps": len(losses),
        "ours": our_losses,
        "plain": losses,
        "largest_difference": max(map(relative, our_losses, losses)),
        "largest_difference_smoothed": max(map(relative, *smooth)),
        "gradients": cosines,
        "trained_parameters": result["trained_parameters"],
    }


def agreement(one: Tensors, other: Tensors) -> dict[str, float]:
    """Of two gradients: the cosine of all of it, the lowest cosine of one matrix, the ratio of the lengths."""
    pairs = [(one[name].double().flatten(), other[name].double().flatten()) for name in one]
    dots = sum(float(a @ b) for a, b in pairs)
    lengths = [sum(float(g @ g) for g in side) ** 0.5 for side in zip(*pairs)]
    each = [float(a @ b / (a.norm() * b.norm())) for a, b in pairs if a.any() and b.any()]
    return {"cosine": dots / (lengths[0] * lengths[1]), "lowest": min(each), "ratio": lengths[0] / lengths[1]}


def relative(ours: float, plain: float) -> float:
    """Difference as a share of the plain one."""
    return abs(ours - plain) / abs(plain)


def smoothed(curve: list[float]) -> list[float]:
    """Running means."""
    width = min(SMOOTHED_OVER, len(curve))
    return [sum(curve[i : i + width]) / width for i in range(len(curve) - width + 1)]


def main() -> None:
    """Trains both ways and prints the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", type=Path, required=True, help="a folder as `surgvqa demo` makes it")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--plain_attention", default="eager", choices=("eager", "sdpa"))
    parser.add_argument("--bf16", action="store_true", help="bfloat16 on a CPU too")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    parser.add_argument("options", nargs="*", help="--name value … of surgvqa train, after --")
    given = parser.parse_args()
    values: dict[str, Any] = {
        "model_name_or_path": given.checkpoint,
        "train_data_path": str(given.data / "train.jsonl"),
        "frames_dir": str(given.data / "frames"),
        "audio_dir": str(given.data / "audio"),
        "max_steps": given.steps,
        "save_strategy": "no",
        "lora_dropout": 0.0,
        "optim": "adamw_torch",
    }
    if given.bf16:
        for module in (recipe, old_way):
            module.choose_dtype = lambda *_: torch.bfloat16
    known = settings_of(TrainOptions)
    names, texts = [n.removeprefix("--") for n in given.options[::2]], given.options[1::2]
    values |= {name: convert(known[name], text, "command line") for name, text in zip(names, texts, strict=True)}
    with tempfile.TemporaryDirectory() as folder:
        options = TrainOptions(**values, feature_cache_dir=f"{folder}/cache", output_dir=f"{folder}/adapter")
        plain = reductions.changed(options, attn_implementation=given.plain_attention)
        found = compare(options, plain, {1, 2, 5, 10, 25, 50}, Path(folder))
    print(f"{'step':>5} {'ours':>10} {'plain':>10} {'difference':>11}   gradient cosine, lowest of a matrix, ratio")
    for number, (one, other) in enumerate(zip(found["ours"], found["plain"]), start=1):
        if number in found["gradients"] or number == found["steps"]:
            said = found["gradients"].get(number)
            more = f"   {said['cosine']:.7f} {said['lowest']:.7f} {said['ratio']:.6f}" if said else ""
            print(f"{number:5d} {one:10.5f} {other:10.5f} {relative(one, other):11.2e}{more}")
    single, smooth = found["largest_difference"], found["largest_difference_smoothed"]
    print(f"largest difference of a step {single:.2e}, of the mean over {SMOOTHED_OVER} steps {smooth:.2e}; "
          f"{found['trained_parameters']:,} trained parameters")  # fmt: skip
    if given.out:
        given.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
