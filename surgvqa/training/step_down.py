"""When the GPU's memory runs out in training: say what happened, need less, go on at the same step; or save and stop.

What is given up is decided in memory/reductions.py. The trainer does the work again that was cut off.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from presets import Preset
from surgvqa.config.options import TrainOptions
from surgvqa.data.dataset import ClipDataset
from surgvqa.errors import SurgvqaError
from surgvqa.files import write_json_atomic
from surgvqa.memory.out_of_memory import OutOfMemory, read
from surgvqa.memory.reductions import SHOWN, Forecast, Reduction, changed, next_reduction
from surgvqa.model import layers
from surgvqa.model.encode import encode_again
from surgvqa.runs.folder import Run
from surgvqa.training import results
from surgvqa.training.rollback import OffloadedTensors

OWNERS_SHOWN = 6
"""Rows of the predicted table in an `oom` event, the largest ones."""


@dataclass(frozen=True, kw_only=True)
class TrainingOutOfMemory(OutOfMemory):
    """An out-of-memory error of a training: where it came, and what held the memory."""

    step: int
    activity: str
    memory: dict[str, int]
    """Bytes by owner, as measured."""


class Trains(Protocol):
    """What stepping down needs of the trainer."""

    model: Any
    optimizer: Any
    args: Any
    """Of which `device` is read."""
    state: Any
    """Of which `global_step` is read."""
    activity: str
    window: Any
    """Of which `inputs` are read: the batches of the optimiser step in the making."""
    offloaded: OffloadedTensors

    def save_last_step(self) -> None:
        """Saves a checkpoint of the last whole optimiser step."""
        ...


class StepDown:
    """Steps down from a configuration that needs too much memory. `options` are those in force now."""

    def __init__(
        self,
        options: TrainOptions,
        *,
        run: Run,
        record: results.Trained,
        model: Any,
        datasets: Sequence[ClipDataset],
        presets: Sequence[Preset],
        recomputing: int,
        forecast: Forecast | None = None,
        limit_gb: float = float("inf"),
    ):
        """`model`: below PEFT's wrapper. `recomputing`: how many of its layers recompute now. Without a `forecast`
        every reduction counts as one that helps."""
        self.options = changed(options)
        self.run = run
        self.record = record
        self.model = model
        self.datasets = datasets
        self.presets = presets
        self.recomputing = recomputing
        self.forecast = forecast
        self.limit_gb = limit_gb
        self.defragmented = False
        """Whether this step was already tried again with nothing given up."""

    @property
    def allowed(self) -> bool:
        """--on_oom step_down."""
        return self.options.on_oom == "step_down"

    def make_room(self, failure: TrainingOutOfMemory, trainer: Trains, evaluating: bool = False) -> None:
        """Makes room for another try. Raises SurgvqaError, the last step saved, when there is no way left.

        For fragmentation the emptied cache is tried first; for everything else the next reduction is applied, also when
        a reduction itself runs out of memory because the encoders come back for its frames.
        """
        if self.allowed and failure.is_fragmentation and not self.defragmented:
            self.defragmented = True
            self.say(failure, "free memory lies in pieces: trying again with an emptied cache")
            return
        reduction = self._next(evaluating) if self.allowed else None
        if reduction is None:
            raise self.stop(failure, trainer)
        self.say(failure, f"going on with {reduction.text}", settings=reduction.settings)
        try:
            self._apply(reduction, failure)
        except torch.OutOfMemoryError as error:
            failure = let_go(error, trainer)
        else:
            return
        self.make_room(failure, trainer, evaluating)

    def stop(self, failure: TrainingOutOfMemory, trainer: Trains, weights_whole: bool = True) -> SurgvqaError:
        """Saves the last whole step and returns the error that names the way on.

        Not `weights_whole`: an optimiser step or a save was cut short, and the weights may be half updated; nothing is
        saved.
        """
        reduction = self._next(failure.activity == "evaluate") if failure.activity != "optimizer" else None
        self.say(
            failure,
            "stopping",
            next_preset=reduction.preset if reduction else None,
            next_settings=reduction.settings if reduction else None,
        )
        if weights_whole:
            trainer.save_last_step()
        if reduction:
            settings = " ".join(f"--{name} {value}" for name, value in reduction.settings.items())
            way_on = f"go on with {reduction.text}: surgvqa train --resume {self.run.id} {settings}"
        elif failure.activity == "optimizer":
            way_on = "fewer frames would not help: take a smaller --lora_r, --optim adamw_bnb_8bit or a larger GPU"
        elif self.forecast:
            way_on = (
                f"no smaller setting is predicted to fit into {self.limit_gb:.1f} GB; "
                "take a smaller --image_size or a larger GPU"
            )
        else:
            way_on = "this is already the smallest preset; take a smaller --image_size or a larger GPU"
        return SurgvqaError(f"out of GPU memory at step {failure.step} ({failure.activity}): {failure.text}; {way_on}")

    def say(self, failure: TrainingOutOfMemory, action: str, **fields: Any) -> None:
        """The `oom` event."""
        now = self.forecast.of(changed(self.options, checkpointed_layers=self.recomputing)) if self.forecast else None
        predicted = sorted(now.components, key=lambda c: c.bytes, reverse=True)[:OWNERS_SHOWN] if now else []
        self.run.emit(
            "oom",
            step=failure.step,
            phase=failure.activity,
            text=f"{failure.text}: {action}",
            requested_bytes=failure.requested_bytes,
            allocated_bytes=failure.allocated_bytes,
            reserved_bytes=failure.reserved_bytes,
            memory=failure.memory,
            predicted={c.name: round(c.bytes) for c in predicted},
            predicted_peak_gb=now.predicted_peak_gb if now else None,
            action=action,
            **fields,
        )

    def _next(self, evaluating: bool) -> Reduction | None:
        return next_reduction(
            self.options,
            self.recomputing,
            len(layers.decoder_layers(self.model)),
            self.presets,
            self.forecast,
            self.limit_gb,
            evaluating,
        )

    def _apply(self, reduction: Reduction, failure: TrainingOutOfMemory) -> None:
        """Changes layers and datasets, and writes down what holds from now on: for checkpoints, for --resume, and for
        whoever evaluates the result."""
        self.options = changed(self.options, **reduction.settings)
        self.record.options |= reduction.settings
        self.record.preset = reduction.preset or self.record.preset
        write_json_atomic(self.record.folder / results.RECORD, self.record.document())
        recomputing = reduction.settings.get("checkpointed_layers", self.recomputing)
        now = changed(self.options, checkpointed_layers=recomputing)
        predicted = self.forecast.of(now).peak_table if self.forecast else None
        if reduction.preset:
            self.run.emit(
                "preset", name=reduction.preset, settings=reduction.settings, step=failure.step, predicted=predicted
            )
        else:
            self.run.emit("retreat", settings=reduction.settings, step=failure.step, predicted=predicted)
        if "checkpointed_layers" in reduction.settings:
            self.recomputing = layers.checkpoint_layers(self.model, reduction.settings["checkpointed_layers"])
        if reduction.settings.keys() & set(SHOWN):
            for dataset in self.datasets:
                dataset.show(self.options.num_frames, self.options.image_size)
            encode_again(self.model, self.datasets, self.options, self.run)
            if self.forecast and self.datasets[0].store is None:
                self.forecast.overrides |= {"cached_features": False, "encoders_resident": True}
            evaluating = failure.activity == "evaluate"
            self.run.phase("evaluate" if evaluating else "train", f"again at step {failure.step}, {reduction.text}")


def let_go(error: torch.OutOfMemoryError, trainer: Trains, drop_gradients: bool = False) -> TrainingOutOfMemory:
    """Reads what the error says and what holds the memory; then frees what the work held that was cut off, and moves
    what the next try needs to the host."""
    figures = read(error)
    failure = TrainingOutOfMemory(
        **vars(figures),
        step=trainer.state.global_step,
        activity=trainer.activity,
        memory=owners(trainer, figures.allocated_bytes),
    )
    traceback.clear_frames(error.__traceback__)  # they hold the activations
    if drop_gradients:
        trainer.model.zero_grad(set_to_none=True)
    states = trainer.optimizer.state.values() if trainer.optimizer is not None else ()
    trainer.offloaded.put((*states, *trainer.window.inputs), trainer.args.device)
    return failure


def owners(trainer: Trains, allocated: int) -> dict[str, int]:
    """Bytes by owner: what the model and the optimiser hold on the training device, and the rest of the allocated."""
    device = trainer.args.device.type

    def size(tensors: Any) -> int:
        return sum(t.nbytes for t in tensors if torch.is_tensor(t) and t.device.type == device)

    parameters = list(trainer.model.parameters())
    states = trainer.optimizer.state.values() if trainer.optimizer is not None else ()
    held = {
        "frozen weights": size(p for p in parameters if not p.requires_grad),
        "adapters": size(p for p in parameters if p.requires_grad),
        "gradients": size(p.grad for p in parameters),
        "optimiser states": size(value for state in states for value in state.values()),
    }
    return held | {"activations and temporaries": max(0, allocated - sum(held.values()))}
