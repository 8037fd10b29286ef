"""Saved states of a training: written whole or not at all, found again, put back.

A run can be stopped and resumed as if it had not been: a saved state holds adapter, optimiser, scheduler, position in
the data and random state as they were after the last optimiser step.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from surgvqa.data.numbered import Batch
from surgvqa.errors import SurgvqaError, UsageError, first_line
from surgvqa.memory.reductions import SHOWN
from surgvqa.model.adapter import adapter_parameters, save_adapter
from surgvqa.runs.folder import Run
from surgvqa.training import checkpoints, optimiser, results
from surgvqa.training.random_state import random_state, set_random_state
from surgvqa.training.rollback import OffloadedTensors
from surgvqa.training.step_down import StepDown, let_go
from surgvqa.training.trainer_hooks import HookedTrainer, rotate_checkpoints


@dataclass
class Window:
    """One optimiser step in the making."""

    began: float
    waited_s: float = 0.0
    inputs: list[Batch] = field(default_factory=list)
    """Of all its micro steps, on the training device."""
    batches: list[Batch] = field(default_factory=list)
    """Of the micro steps so far."""
    losses: list[torch.Tensor] = field(default_factory=list)
    """The micro steps' losses, each already divided by the window's supervised tokens."""
    random_state: dict[str, Any] | None = None
    """Before the first micro step."""
    loss: float = math.nan
    grad_norm: float | None = None
    learning_rate: float | None = None


class SavingTrainer(HookedTrainer):
    """Trainer with saved states of ours."""

    def __init__(self, *, run: Run, record: results.Trained, step_down: StepDown, **arguments: Any):
        super().__init__(**arguments)
        self.events = run
        self.record = record
        self.step_down = step_down
        self.activity = "start"
        """For an out-of-memory report: load batch, forward and backward, optimizer, report, evaluate or save."""
        self.window = Window(time.monotonic())
        self.offloaded = OffloadedTensors()
        self.resumed: Path | None = None
        """The saved state that this training goes on from."""
        self._rng: dict[str, Any] | None = None
        self._last_eval_loss: float | None = None
        self._is_best_of: tuple[int, float] | None = None
        """(step, evaluation loss) of the weights, once the best ones are back in the model."""

    def on_best(self) -> None:
        """Saved at once: with save_steps above eval_steps Trainer would keep an older state as best."""
        if self.args.load_best_model_at_end:
            self.control.should_save = True

    def reported_eval_loss(self) -> float | None:
        """The evaluation loss of the state that is the result."""
        return self._is_best_of[1] if self._is_best_of else self._last_eval_loss

    def write_adapter(self, folder: Path) -> None:
        """The adapter with the record of how it was trained."""
        step, loss = self._is_best_of or (self.state.global_step, self._last_eval_loss)
        document = self.record.document() | {"step": step, "eval_loss": loss}
        save_adapter(self.model, folder, document)

    def save_whole(self) -> None:
        """As a whole checkpoint-<step>, tried twice when memory runs out."""
        self.activity = "save"
        try:
            return self._write_whole()
        except torch.OutOfMemoryError as error:
            self.step_down.say(let_go(error, self), "trying again with an emptied cache")
        try:
            return self._write_whole()
        except torch.OutOfMemoryError as error:
            failure = let_go(error, self)
        raise self.step_down.stop(failure, self, weights_whole=False)

    def _write_whole(self) -> None:
        """Written to a folder of its own and renamed when it is whole."""
        final = self.folder / f"checkpoint-{self.state.global_step}"
        staging = self.folder / ".saving"
        shutil.rmtree(staging, ignore_errors=True)
        self.writes_to = staging
        try:
            self.write_state()
            best = final.with_name(f"checkpoint-{self.state.best_global_step}")
            if best.is_dir() or best == final:
                self.state.best_model_checkpoint = str(best)
            self.state.save_to_json(str(staging / final.name / "trainer_state.json"))  # not with the staging path
            checkpoints.publish(staging / final.name, final)
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors on a full disk
            raise SurgvqaError(
                f"{final}: the checkpoint cannot be saved ({first_line(error)}); free some disk space and go "
                f"on with --resume {self.events.id}"
            ) from error
        finally:
            self.writes_to = None
            shutil.rmtree(staging, ignore_errors=True)
        rotate_checkpoints(
            output_dir=str(self.folder),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
        )
        self.events.emit("checkpoint", step=self.state.global_step, path=str(final))

    def save_last_step(self) -> None:
        """A checkpoint of the last whole optimiser step, with the random state of then; none before the first step."""
        final = self.folder / f"checkpoint-{self.state.global_step}"
        if self.state.global_step == 0 or (final.is_dir() and not checkpoints.damage_of(final)):
            return
        if self._rng:
            set_random_state(self._rng)
        self.save_whole()

    def restore(self, folder: str | Path) -> None:
        """Puts the adapter of a checkpoint into the model; every tensor must have its place."""
        path = Path(folder) / checkpoints.ADAPTER
        tensors, slots = load_file(path), adapter_parameters(self.model)
        for name in sorted(tensors.keys() | slots.keys()):
            found = tuple(tensors[name].shape) if name in tensors else "missing"
            expected = tuple(slots[name].shape) if name in slots else "none"
            if found != expected:
                raise UsageError(
                    f"{path}: {name} is {found}, expected {expected}; a resumed run keeps its base model and its LoRA "
                    "options"
                )
        with torch.no_grad():
            for name, slot in slots.items():
                slot.copy_(tensors[name])

    def load_state(self, folder: Path) -> None:
        self.restore(folder)
        self.resumed = folder

    def load_optimizer(self, load: Callable[[], None], folder: str | None) -> None:
        """Learning rate and the like stay as they were asked for, not as they were saved."""
        asked = optimiser.hyperparameters(self.optimizer)
        load()
        if folder:
            optimiser.keep_asked(self.optimizer, self.lr_scheduler, asked, folder)

    def load_best(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        self.restore(best)
        written = results.read(Path(best))
        if written:  # it may be from before the run stepped down, and is evaluated as it was trained
            self.record.options |= {name: written.options[name] for name in SHOWN if name in written.options}
            self.record.preset = written.preset
        step, metric = self.state.best_global_step, self.state.best_metric
        self._is_best_of = None if step is None or metric is None else (step, metric)

    def on_random_state(self) -> None:
        self._rng = random_state()
