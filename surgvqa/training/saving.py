"""Writes the saved states of a training atomically, and loads them.

A stopped run resumes as if it had never stopped, because a saved state has adapter, optimiser, scheduler, position in
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
from surgvqa.training.carry import CARRIED, carry
from surgvqa.training.random_state import random_state, set_random_state
from surgvqa.training.rollback import OffloadedTensors
from surgvqa.training.step_down import StepDown, TrainingOutOfMemory, release_memory
from surgvqa.training.trainer_hooks import HookedTrainer, rotate_checkpoints


@dataclass
class Window:
    """The current optimiser step."""

    began: float
    waited_s: float = 0.0
    inputs: list[Batch] = field(default_factory=list)
    """Batches of all its micro steps, on the training device."""
    batches: list[Batch] = field(default_factory=list)
    """Batches of the micro steps so far."""
    losses: list[torch.Tensor] = field(default_factory=list)
    """Losses of the micro steps, each already divided by the window's supervised tokens."""
    random_state: dict[str, Any] | None = None
    """The state before the first micro step."""
    failure: TrainingOutOfMemory | None = None
    """This rank's error, until it is shared with the others."""
    samples: int = 0
    tokens: int = 0
    """Sum over all ranks."""
    rank_wait_s: list[float] = field(default_factory=list)
    """How long each rank waited for the slowest one."""
    loss: float = math.nan
    grad_norm: float | None = None
    learning_rate: float | None = None


class SavingTrainer(HookedTrainer):
    """Trainer with our own saved states."""

    def __init__(self, *, run: Run, record: results.Trained, step_down: StepDown, **arguments: Any):
        super().__init__(**arguments)
        self.events = run
        self.ranks = run.ranks
        self.record = record
        self.step_down = step_down
        self.activity = "start"
        """For an out-of-memory report: load batch, forward and backward, optimizer, report, evaluate, or save (only on
        the rank that writes)."""
        self.window = Window(time.monotonic())
        self.offloaded = OffloadedTensors()
        self.resumed: Path | None = None
        """The saved state that this training resumes from."""
        self._rng: dict[str, Any] | None = None
        self._is_best_of: int | None = None
        """The step of the best weights, after they have been loaded."""

    def on_best(self) -> None:
        """Saves at once, because with save_steps above eval_steps Trainer would keep an older state as the best."""
        if self.args.load_best_model_at_end:
            self.control.should_save = True

    def reported_eval_loss(self) -> float | None:
        """The evaluation loss of the resulting state."""
        return self.reported("eval_loss")

    def reported(self, metric: str) -> float | None:
        """A figure from the evaluation of the resulting state; None if it has none."""
        rows = [row for row in self.state.log_history if metric in row]
        if self._is_best_of is not None:
            rows = [row for row in rows if row.get("step") == self._is_best_of]
        return rows[-1][metric] if rows else None

    def write_adapter(self, folder: Path) -> None:
        """Writes the adapter with the record of its training."""
        step = self._is_best_of or self.state.global_step
        document = self.record.document() | {"step": step, "eval_loss": self.reported_eval_loss()}
        save_adapter(self.model, folder, document)

    def save_checkpoint(self) -> None:
        """Writes checkpoint-<step> atomically on the first rank; the others wait for it."""
        if self.ranks.disconnected:  # the ranks no longer wait for each other
            if self.ranks.first:
                self._save_with_retry()
            return
        problem: SurgvqaError | None = None
        if self.ranks.first:
            try:
                self._save_with_retry()
            except SurgvqaError as error:
                problem = error
        text = None if problem is None else str(problem)
        text, best = self.ranks.share([text, self.state.best_model_checkpoint], "save")[0]
        if text is not None:
            raise problem or SurgvqaError(text)
        self.state.best_model_checkpoint = best

    def _save_with_retry(self) -> None:
        """Saves, and tries once more when memory runs out."""
        self.activity = "save"
        try:
            return self._write_checkpoint()
        except torch.OutOfMemoryError as error:
            self.step_down.report(release_memory(error, self), "trying again with an emptied cache")
        try:
            return self._write_checkpoint()
        except torch.OutOfMemoryError as error:
            failure = release_memory(error, self)
        raise self.step_down.stop(failure, self, weights_intact=False)

    def _write_checkpoint(self) -> None:
        """Writes a temporary folder and renames it when it is complete."""
        final = self.folder / f"checkpoint-{self.state.global_step}"
        staging = self.folder / (
            f".saving-{self.ranks.rank}" if self.ranks.rank else ".saving"
        )  # of one that took over
        shutil.rmtree(staging, ignore_errors=True)
        best = final.with_name(f"checkpoint-{self.state.best_global_step}")
        if best.is_dir() or best == final:
            self.state.best_model_checkpoint = str(best)
        try:
            self.write_state(staging)
            checkpoints.publish(staging, final)
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError, SafetensorError) as error:  # errors of torch and safetensors on a full disk
            raise SurgvqaError(
                f"{final}: the checkpoint cannot be saved ({first_line(error)}); free some disk space and "
                f"continue with --resume {self.events.id}"
            ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        rotate_checkpoints(
            output_dir=str(self.folder),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
        )
        self.events.emit("checkpoint", step=self.state.global_step, path=str(final))

    def save_last_step(self) -> None:
        """Saves the last complete optimiser step with its random state; nothing before the first step."""
        final = self.folder / f"checkpoint-{self.state.global_step}"
        if self.state.global_step == 0 or (final.is_dir() and not checkpoints.damage_of(final)):
            return
        if self._rng:
            set_random_state(self._rng)
        self.save_checkpoint()

    def restore(self, folder: str | Path) -> None:
        """Loads a checkpoint's adapter into the model. Raises UsageError when a tensor does not match."""
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
        """Keeps the requested learning rate and other hyperparameters instead of the saved ones."""
        asked = optimiser.hyperparameters(self.optimizer)
        load()
        if folder:
            optimiser.keep_requested(self.optimizer, self.lr_scheduler, asked, folder)

    def load_best(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        folder = carry(Path(best), self.ranks, self.args.device, self.events.folder / CARRIED)
        self.restore(folder)
        written = results.read(folder)
        if written:  # it may be from before a step down, and has to be evaluated as it was trained
            self.record.options |= {name: written.options[name] for name in SHOWN if name in written.options}
            self.record.preset = written.preset
        self._is_best_of = self.state.best_global_step

    def on_random_state(self) -> None:
        self._rng = random_state()
