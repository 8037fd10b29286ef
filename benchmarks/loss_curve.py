"""Compares our training with plain training: the loss curves, and the gradients at the same weights.

    python benchmarks/loss_curve.py --checkpoint demo/merged --data demo            # on a CPU in a minute
    python benchmarks/loss_curve.py --checkpoint BIG --data demo --plain_attention sdpa --bf16 -- --compile on …

Ours is `surgvqa train` with its defaults (feature cache, answer-only logits, and on a GPU compiled layers and LoRA
without casts) and the options after `--`. Plain is benchmarks/old_way.py: encoders in every step, logits at all
positions, eager attention, unchanged PEFT with float32 adapters, nothing compiled. Both use the same samples in the
same order, the same initial adapter, the same 32-bit AdamW, and no dropout (its masks would differ). Weights are
bfloat16 under autocast on a GPU; on a CPU float32, or as on a GPU with --bf16.

bfloat16 is noisy: two plain bf16 trainings differ by up to 1.2 % in a step. So `--plain_dtype float32` adds a plain
training in float32 and checks ours within two standard errors: the root mean square of its differences from float32
must not be larger than plain bf16's, and it must not lie on one side of plain bf16 unless it is closer to float32
there. Exit code 1 if a check fails or, without a float32 training, if the cosine of our gradient and the plain one is
below LOWEST_COSINE.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
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
"""Length in steps of the running mean that is compared, besides single steps."""

LOWEST_COSINE = 0.999
"""Lowest allowed cosine of our gradient and the plain one at the same weights."""

Tensors = dict[str, torch.Tensor]


class Watched(EventTrainer):
    """Our trainer, which also records the samples of each step, and weights and gradients at some steps."""

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
    """Trains. Returns (what was recorded, the loss of each step, the result)."""
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
    """Copies these weights into the adapter."""
    with torch.no_grad():
        for name, slot in adapter_parameters(model).items():
            slot.copy_(weights[name])


def plain_training(
    options: TrainOptions, watched: type[Watched], dtype: torch.dtype | None = None
) -> tuple[list[float], Any, Any]:
    """A plain training from the same adapter on the same samples: (the loss of each step, its model, its data)."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    base, data = old_way.load(options, options.model_name_or_path, options.train_data_path, dtype)
    model = add_lora(base, options).train()
    layers.checkpoint_layers(base, None if options.gradient_checkpointing else 0)
    put(model, watched.weights[1])
    optimiser, scheduler = old_way.optimiser_of(options, model, len(watched.windows))
    losses = []
    for indices in watched.windows:
        batches, tokens = old_way.window(data, indices, base.device)
        losses.append(old_way.step(model, optimiser, scheduler, batches, tokens))
    return losses, model, data


def compare(
    options: TrainOptions, plain: TrainOptions, at: set[int], folder: Path, in_float32: bool = False
) -> dict[str, Any]:
    """The trainings; the losses of each and the differences."""
    watched, our_losses, result = ours(options, at, folder)
    reference = plain_training(plain, watched, torch.float32)[0] if in_float32 else None
    losses, model, data = plain_training(plain, watched)
    cosines = {}
    for number, weights in sorted(watched.weights.items()):
        put(model, weights)
        model.zero_grad()
        old_way.backward(model, *old_way.window(data, watched.windows[number - 1], model.device))
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
        **({"float32": reference, **against_float32(our_losses, losses, reference)} if reference else {}),
    }


def against_float32(ours: list[float], plain: list[float], reference: list[float]) -> dict[str, Any]:
    """The signed differences of both from the float32 losses, as shares of these; and whether ours may be so."""
    of_ours, of_plain = (
        [(loss - exact) / exact for loss, exact in zip(curve, reference, strict=True)] for curve in (ours, plain)
    )
    ours_from_it, plain_from_it = residual(of_ours), residual(of_plain)
    beside = residual([one - other for one, other in zip(of_ours, of_plain)])
    lies_on_one_side = abs(beside["mean"]) > 2 * beside["standard_error"]
    nearer = abs(ours_from_it["mean"]) < abs(plain_from_it["mean"])
    ok = (nearer or not lies_on_one_side) and ours_from_it["rms"] <= plain_from_it["rms"] + 2 * beside["standard_error"]
    return {"ours_from_float32": ours_from_it, "plain_from_float32": plain_from_it, "ours_from_plain": beside, "ok": ok}


def residual(differences: list[float]) -> dict[str, float]:
    """Of signed differences: mean, its standard error, root mean square, the share that is above 0.

    Neighbouring steps share weights, so the standard error is that of the means of SMOOTHED_OVER steps each.
    """
    blocks = [
        statistics.fmean(differences[i : i + SMOOTHED_OVER])
        for i in range(0, len(differences) - SMOOTHED_OVER + 1, SMOOTHED_OVER)
    ]
    return {
        "mean": statistics.fmean(differences),
        "standard_error": statistics.stdev(blocks) / math.sqrt(len(blocks)) if len(blocks) > 1 else math.inf,
        "rms": math.sqrt(statistics.fmean([d * d for d in differences])),
        "share_above": statistics.fmean([float(d > 0) for d in differences]),
    }


def agreement(one: Tensors, other: Tensors) -> dict[str, float]:
    """Of two gradients: the overall cosine, the lowest cosine of a matrix, and the ratio of their norms."""
    pairs = [(one[name].double().flatten(), other[name].double().flatten()) for name in one]
    dots = sum(float(a @ b) for a, b in pairs)
    lengths = [sum(float(g @ g) for g in side) ** 0.5 for side in zip(*pairs)]
    each = [float(a @ b / (a.norm() * b.norm())) for a, b in pairs if a.any() and b.any()]
    return {"cosine": dots / (lengths[0] * lengths[1]), "lowest": min(each), "ratio": lengths[0] / lengths[1]}


def relative(ours: float, plain: float) -> float:
    """The difference relative to the plain value."""
    return abs(ours - plain) / abs(plain)


def smoothed(curve: list[float]) -> list[float]:
    """Running means."""
    width = min(SMOOTHED_OVER, len(curve))
    return [sum(curve[i : i + width]) / width for i in range(len(curve) - width + 1)]


def main() -> None:
    """Trains both ways and prints the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", type=Path, required=True, help="a folder made by `surgvqa demo`")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--plain_attention", default="eager", choices=("eager", "sdpa"))
    parser.add_argument("--plain_dtype", choices=("float32",), help="a plain training in this dtype too")
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
        found = compare(options, plain, {1, 2, 5, 10, 25, 50}, Path(folder), given.plain_dtype == "float32")
    print(f"{'step':>5} {'ours':>10} {'plain':>10} {'difference':>11}   gradient cosine, lowest of a matrix, ratio")
    for number, (one, other) in enumerate(zip(found["ours"], found["plain"]), start=1):
        if number in found["gradients"] or number == found["steps"]:
            said = found["gradients"].get(number)
            more = f"   {said['cosine']:.7f} {said['lowest']:.7f} {said['ratio']:.6f}" if said else ""
            print(f"{number:5d} {one:10.5f} {other:10.5f} {relative(one, other):11.2e}{more}")
    single, smooth = found["largest_difference"], found["largest_difference_smoothed"]
    print(f"largest difference of a step {single:.2e}, of the mean over {SMOOTHED_OVER} steps {smooth:.2e}; "
          f"{found['trained_parameters']:,} trained parameters")  # fmt: skip
    lowest = min(said["cosine"] for said in found["gradients"].values())
    ok = lowest >= LOWEST_COSINE
    if "ok" in found:
        ok = found["ok"]
        for name in ("ours_from_float32", "plain_from_float32", "ours_from_plain"):
            of = found[name]
            print(f"{name}: mean {of['mean']:+.3%} ± {of['standard_error']:.3%} (standard error), root mean square "
                  f"{of['rms']:.3%}, above 0 in {of['share_above']:.0%} of the steps")  # fmt: skip
    if given.out:
        given.out.write_text(json.dumps(found, indent=1))
    print(
        "good" if ok else f"NOT good: {'no nearer to float32 than plain' if 'ok' in found else f'cosine {lowest:.5f}'}"
    )
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
