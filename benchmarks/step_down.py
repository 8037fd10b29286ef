"""Tests every step down after a real out-of-memory error, forced by a memory cap on the process, on one GPU.

    python benchmarks/step_down.py          # under four minutes on an H100; exit code 1 when a run did not continue
    python benchmarks/step_down.py --dry    # a tiny model on the CPU, whose "memory" is counted in tokens

A model of 3.3 B random parameters (the real one with 4 of its layers) trains on synthetic clips of 8 frames of
1240×1080. The first run takes all steps down in turn: at each optimiser step the cap is lowered so far that nothing
fits until the run has taken one more. This measures the memory after each of them. Then there is one run for each step
down, with a cap that fits its settings but not those before it. Then come the optimiser's first step, an evaluation,
and a save. Prints a row for each. Writes step_down.json to --out (default: $OUT).
"""

# ruff: noqa: E402  (torch reads its allocator's setting when it is imported)
from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/kits"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from surgvqa.memory import allocator

allocator.grow_segments()  # before torch is imported

import numpy as np
import small
import torch
from PIL import Image

from presets import step_down_presets
from surgvqa.errors import SurgvqaError
from surgvqa.memory.reductions import SHOWN
from surgvqa.model.layers import forwards
from surgvqa.runs.folder import Run
from surgvqa.training import checkpoints, command
from surgvqa.training.trainer import EventTrainer

LAYERS, BATCH, ACCUMULATION = 4, 4, 2
CAP_MARGIN = 200e6
"""Bytes that a tightened cap leaves above the allocated ones: less than a layer's temporary tensors."""


class Card:
    """The GPU's memory: the peak of a step, and a cap."""

    def __init__(self) -> None:
        self.total = torch.cuda.get_device_properties(0).total_memory
        held = torch.empty(1, device="cuda")
        if not all(segment["is_expandable"] for segment in torch.cuda.memory_snapshot()):
            raise SystemExit(
                "the allocator's segments cannot grow; unset PYTORCH_ALLOC_CONF and PYTORCH_CUDA_ALLOC_CONF"
            )
        del held
        self.ballast: list[torch.Tensor] = []

    def tighten(self, leave: float = CAP_MARGIN) -> None:
        """Lowers the cap. Fills the holes in reserved segments first, because the cap counts reserved bytes."""
        torch.cuda.empty_cache()
        self.cap(torch.cuda.memory_reserved())
        for size in (2**k for k in range(32, 20, -1)):
            with contextlib.suppress(torch.OutOfMemoryError):
                while True:
                    self.ballast.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        self.cap(torch.cuda.memory_allocated() + leave)

    def cap(self, nbytes: float | None) -> None:
        if nbytes is None:
            self.ballast.clear()
        torch.cuda.set_per_process_memory_fraction(1.0 if nbytes is None else min(1.0, nbytes / self.total))

    def peak(self) -> float:
        """The peak since the last call."""
        torch.cuda.synchronize()
        found = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return found

    def touch(self, trainer: EventTrainer, inputs: dict[str, Any]) -> None:
        """Does nothing, because the work itself takes the memory."""

    def run_out(self) -> None:
        """Causes a real out-of-memory error."""
        torch.empty(2**50, dtype=torch.uint8, device="cuda")


class DryRunCard(Card):
    """The dry run's memory: a batch takes a byte per token and layer that keeps its activations, and one more."""

    def __init__(self) -> None:
        self.limit, self.most = math.inf, 0.0

    def tighten(self, leave: float = CAP_MARGIN) -> None:
        self.limit = 0.0

    def cap(self, nbytes: float | None) -> None:
        self.limit = math.inf if nbytes is None else nbytes

    def peak(self) -> float:
        found, self.most = self.most, 0.0
        return found

    def touch(self, trainer: EventTrainer, inputs: dict[str, Any]) -> None:
        kept = sum(not forward.recomputes for forward in forwards(trainer.model))
        needed = inputs["input_ids"].numel() * (1 + kept * trainer.model.training)
        if needed > self.limit:
            self.run_out()
        self.most = max(self.most, needed)

    def run_out(self) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Trial:
    """One observed training. The functions are called before a step, before an evaluation, and with each event."""

    def __init__(
        self,
        card: Card,
        options: Any,
        folder: Path,
        before_step: Callable[[int], None] = lambda step: None,
        before_evaluation: Callable[[], None] = lambda: None,
        on_event: Callable[[dict[str, Any]], None] = lambda event: None,
    ):
        self.events: list[dict[str, Any]] = []
        self.peaks: dict[int, float] = {}
        self.error, self.result = "", {}
        card.cap(None)
        gc.collect()  # the previous trial's model is part of a reference cycle

        def observe(event: dict[str, Any]) -> None:
            self.events.append(event)
            if event["kind"] == "metric":
                self.peaks[event["step"]] = card.peak()
            on_event(event)

        def training_step(original: Any, trainer: EventTrainer, *arguments: Any, **keywords: Any) -> Any:
            if not trainer.window.batches:
                before_step(trainer.state.global_step + 1)
            return original(trainer, *arguments, **keywords)

        def evaluate(original: Any, trainer: EventTrainer, *arguments: Any, **keywords: Any) -> Any:
            before_evaluation()
            return original(trainer, *arguments, **keywords)

        def compute_loss(
            original: Any, trainer: EventTrainer, model: Any, inputs: Any, *arguments: Any, **keywords: Any
        ) -> Any:
            card.touch(trainer, inputs)
            return original(trainer, model, inputs, *arguments, **keywords)

        began = time.perf_counter()
        with (
            hooked(EventTrainer, "training_step", training_step),
            hooked(EventTrainer, "evaluate", evaluate),
            hooked(EventTrainer, "compute_loss", compute_loss),
            Run.create(folder / "runs", "train", observer=observe) as run,
        ):
            try:
                self.result = command.run(options, run).data
            except SurgvqaError as error:
                self.error = str(error)
            except Exception as error:  # the other trials still run
                self.error = f"{type(error).__name__}: {error}"
                traceback.print_exc()
                traceback.clear_frames(error.__traceback__)
        card.cap(None)
        self.seconds = time.perf_counter() - began
        self.output = Path(options.output_dir or run.folder / "checkpoints")

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]

    def reductions(self) -> list[str]:
        """The steps down, in order: "recompute" or a preset."""
        return [e.get("name", "recompute") for e in self.events if e["kind"] in ("retreat", "preset")]

    def faults(self, steps: int) -> list[str]:
        """What is wrong with the run; [] if it did all its steps once, with finite losses."""
        losses = {event["step"]: event["loss"] for event in self.of("metric")}
        wrong = [self.error] if self.error else []
        if sorted(losses) != list(range(1, steps + 1)) or len(self.of("metric")) != steps:
            wrong.append(f"steps {sorted(losses)}, expected 1 to {steps}")
        if not all(math.isfinite(loss) for loss in losses.values()):
            wrong.append(f"losses {losses}")
        if not self.error and not (self.output / checkpoints.ADAPTER).is_file():
            wrong.append("no adapter")
        return wrong


@contextmanager
def hooked(owner: Any, name: str, hook: Callable[..., Any]):
    """Replaces a method by `hook(original, self, …)`."""
    original = getattr(owner, name)

    @wraps(original)
    def method(self: Any, *arguments: Any, **keywords: Any) -> Any:
        return hook(original, self, *arguments, **keywords)

    with patch.object(owner, name, method):
        yield


def build(folder: Path, dry: bool) -> Callable[..., Any]:
    """Writes a checkpoint, clips of 8 frames, and questions. Returns a function that makes a training's options."""
    world = small.build(folder / "small", samples=2 * BATCH)
    noise = np.random.default_rng(0)
    width, height = (560, 420) if dry else (1240, 1080)
    names = [f"v1_{number}" for number in range(9)]
    for name in names:
        pixels = noise.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(world.root / f"frames/v1/{name}.jpg")
    for file in (world.train, world.eval):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row | {"frames": names[i % 2 :][:8]}) + "\n" for i, row in enumerate(rows)))
    checkpoint = world.checkpoint
    if not dry:
        import real_size

        checkpoint = folder / "checkpoint"
        real_size.write_checkpoint(checkpoint, world.checkpoint, LAYERS)
        gc.collect()
        torch.cuda.empty_cache()
    shared = {
        "model_name_or_path": str(checkpoint),
        "num_frames": 8,
        "image_size": 512,
        "lora_r": 4 if dry else 64,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "checkpointed_layers": 0,
        "compile": "off",
        "device": "cpu" if dry else "cuda",
        "save_strategy": "no",
        "feature_cache_dir": str(folder / "cache"),
    }
    return lambda **changes: world.train_options(**shared | changes)


def run(arguments: argparse.Namespace) -> int:
    """Runs all trials, prints the table, and returns the exit code."""
    if arguments.work:
        arguments.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.work) as temporary:
        folder = Path(temporary)
        options = build(folder, arguments.dry)
        card = DryRunCard() if arguments.dry else Card()
        rows: list[dict[str, Any]] = []

        def record(name: str, trial: Trial, steps: int, **expected: Any) -> None:
            wrong = trial.faults(steps)
            done = {"reductions": trial.reductions(), "actions": [event["action"] for event in trial.of("oom")]}
            wrong += [f"{key} {done[key]}, expected {value}" for key, value in expected.items() if done[key] != value]
            first = next((e for e in trial.of("oom")), {})
            rows.append({"name": name, "wrong": wrong, **done, "seconds": round(trial.seconds, 1),
                         "peaks_gb": {step: peak / 1e9 for step, peak in trial.peaks.items()},
                         "losses": {e["step"]: e["loss"] for e in trial.of("metric")}, "first_oom": first})  # fmt: skip
            lost = [f"{e['step']}:{e['phase']}" for e in trial.of("oom")]
            print(f"{'FAILED' if wrong else 'ok':6} {name:34} {trial.seconds:5.1f} s  out of memory at {lost}, gave up "
                  f"{done['reductions']} {'; '.join(wrong)}", flush=True)  # fmt: skip
            if arguments.out:
                arguments.out.mkdir(parents=True, exist_ok=True)
                machine = {
                    "torch": torch.__version__,
                    "card": "none" if arguments.dry else torch.cuda.get_device_name(),
                }
                found = {"machine": machine, "rows": rows}
                (arguments.out / "step_down.json").write_text(json.dumps(found, indent=1))

        presets, shown = {}, {}
        for preset in step_down_presets()[1:]:  # each keeps what the earlier ones have given up
            shown = shown | {name: preset.settings[name] for name in SHOWN if name in preset.settings}
            presets[preset.name] = shown
        rungs = ["recompute", *presets]
        steps = 2 + len(rungs) + 1  # from the second one on, a step uses all its memory
        tour = Trial(
            card,
            options(max_steps=steps),
            folder,
            before_step=lambda step: card.tighten() if 2 < step < steps else None,
            on_event=lambda event: lift_cap(card) if event["kind"] in ("retreat", "preset") else None,
        )
        record("all rungs, one a step", tour, steps, reductions=rungs)
        takes = {name: tour.peaks.get(step, math.nan) for step, name in enumerate(["nothing", *rungs], start=2)}
        print("  takes: " + ", ".join(f"{name} {peak / 1e9:.2f} GB" for name, peak in takes.items()))

        settings: dict[str, Any] = {}
        for above, rung in zip(takes, rungs):
            room = takes[rung] + 0.7 * (takes[above] - takes[rung])
            trial = Trial(
                card,
                options(**settings, max_steps=3),
                folder,
                before_step=lambda step, room=room: card.cap(room) if step == 2 else None,
            )
            record(f"capped at {room / 1e9:.2f} GB: {rung}", trial, 3, reductions=[rung])
            settings = {"checkpointed_layers": 2 if arguments.dry else LAYERS, **presets.get(rung, {})}

        for name, trial, actions in other_errors(card, options, folder):
            record(name, trial, 2, actions=actions, reductions=[])
    failed = [row["name"] for row in rows if row["wrong"]]
    print(f"{len(rows) - len(failed)} of {len(rows)} continued" + (f"; not: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def lift_cap(card: Card) -> None:
    """Removes the cap and restarts the measurement of the peak."""
    card.cap(None)
    card.peak()


def other_errors(card: Card, options: Callable[..., Any], folder: Path):
    """Yields (name, trial, expected actions) of errors for which stepping down is not the solution."""
    again = "trying again with an emptied cache"

    def first_step(original: Any, trainer: EventTrainer, optimizer: Any, step: Any) -> Any:
        def tight() -> Any:
            if not tried:
                tried.append(True)
                card.tighten(leave=1e6)
                step()  # if it fits nevertheless, it must be undone
                card.run_out()
            return step()

        tried: list[bool] = []
        return original(trainer, optimizer, tight)

    def lift(event: dict[str, Any]) -> None:
        if event["kind"] == "oom" and event["action"] in (again, "evaluating 1 at once"):
            card.cap(None)

    with hooked(EventTrainer, "_first_optimizer_step", first_step):
        yield "the optimiser's first step", Trial(card, options(max_steps=2), folder, on_event=lift), [again]

    evaluated = {"eval_data_path": options().train_data_path, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    halves = ["evaluating 2 at once", "evaluating 1 at once"]
    trial = Trial(card, options(**evaluated), folder, before_evaluation=card.tighten, on_event=lift)
    if not all(math.isfinite(event["eval_loss"]) for event in trial.of("eval")) or len(trial.of("eval")) != 1:
        trial.error = trial.error or f"evaluations {trial.of('eval')}"
    yield "an evaluation", trial, halves

    failed: list[bool] = []

    def save(original: Any, trainer: EventTrainer, *arguments: Any) -> Any:
        if not failed:
            failed.append(True)
            card.run_out()
        return original(trainer, *arguments)

    with hooked(EventTrainer, "_save_optimizer_and_scheduler", save):
        trial = Trial(card, options(max_steps=2, save_strategy="steps", save_steps=1), folder)
    yield "a save", trial, [again]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--work", type=Path, help="folder for 7 GB of checkpoint (default: the temporary one)")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), help="folder for step_down.json")
    arguments = parser.parse_args()
    arguments.out = Path(arguments.out) if arguments.out else None
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
