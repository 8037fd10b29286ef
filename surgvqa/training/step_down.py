"""When the GPU's memory runs out in training: say what happened, need less, go on at the same step; or save and stop.

What is given up is decided in retreat.py. Who ran out of memory (trainer.py) does its work again afterwards.
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
from surgvqa.memory.out_of_memory import read
from surgvqa.memory.retreat import SHOWN, Forecast, Retreat, changed, next_retreat
from surgvqa.model import layers
from surgvqa.model.encode import encode_again
from surgvqa.runs.folder import Run
from surgvqa.training import results
from surgvqa.training.rollback import Aside

OWNERS_SHOWN = 6
"""Rows of the predicted table in an `oom` event, the largest ones."""


@dataclass(frozen=True)
class Lack:
    """An out-of-memory error: what was asked for, and who held what when it came."""

    step: int
    activity: str
    text: str
    """In one line."""
    requested_bytes: int | None
    allocated_bytes: int
    reserved_bytes: int
    memory: dict[str, int]
    """Bytes by owner, as measured."""

    @property
    def is_fragmentation(self) -> bool:
        """The allocator held enough free memory, but in no piece that was large enough."""
        free = self.reserved_bytes - self.allocated_bytes
        return self.requested_bytes is not None and free >= self.requested_bytes


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
    aside: Aside

    def save_last_step(self) -> None:
        """Saves a checkpoint of the last whole optimiser step."""
        ...


class StepDown:
    """The way down from a configuration that needs too much memory. `options` are what holds now."""

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
        every retreat is taken for one that helps."""
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

    def meet(self, lack: Lack, trainer: Trains, evaluating: bool = False) -> None:
        """Makes room for another try. Raises SurgvqaError, the last step saved, when there is no way left.

        Fragmentation is met with an emptied cache at first, everything else with the next retreat; and so is a retreat
        that runs out of memory itself, when the encoders come back for its frames.
        """
        if self.allowed and lack.is_fragmentation and not self.defragmented:
            self.defragmented = True
            self.say(lack, "free memory lies in pieces: trying again with an emptied cache")
            return
        retreat = self._next(evaluating) if self.allowed else None
        if retreat is None:
            raise self.stop(lack, trainer)
        self.say(lack, f"going on with {retreat.text}", settings=retreat.settings)
        try:
            self._apply(retreat, lack)
        except torch.OutOfMemoryError as error:
            lack = take(error, trainer)
        else:
            return
        self.meet(lack, trainer, evaluating)

    def stop(self, lack: Lack, trainer: Trains, intact: bool = True) -> SurgvqaError:
        """Saves the last whole step and returns the error that names the way on.

        Not `intact`: an optimiser step or a save was cut short, and the weights may be half updated; nothing is saved.
        """
        retreat = self._next(lack.activity == "evaluate") if lack.activity != "optimizer" else None
        self.say(
            lack,
            "stopping",
            next_preset=retreat.preset if retreat else None,
            next_settings=retreat.settings if retreat else None,
        )
        if intact:
            trainer.save_last_step()
        if retreat:
            settings = " ".join(f"--{name} {value}" for name, value in retreat.settings.items())
            way_on = f"go on with {retreat.text}: surgvqa train --resume {self.run.id} {settings}"
        elif lack.activity == "optimizer":
            way_on = "fewer frames would not help: take a smaller --lora_r, --optim adamw_bnb_8bit or a larger GPU"
        elif self.forecast:
            way_on = (
                f"this is the end of the ladder: nothing smaller is predicted to fit into {self.limit_gb:.1f} GB; "
                "take a smaller --image_size or a larger GPU"
            )
        else:
            way_on = "this is already the smallest preset; take a smaller --image_size or a larger GPU"
        return SurgvqaError(f"out of GPU memory at step {lack.step} ({lack.activity}): {lack.text}; {way_on}")

    def say(self, lack: Lack, action: str, **fields: Any) -> None:
        """The `oom` event."""
        now = self.forecast.of(changed(self.options, checkpointed_layers=self.recomputing)) if self.forecast else None
        predicted = sorted(now.components, key=lambda c: c.bytes, reverse=True)[:OWNERS_SHOWN] if now else []
        self.run.emit(
            "oom",
            step=lack.step,
            phase=lack.activity,
            text=f"{lack.text}: {action}",
            requested_bytes=lack.requested_bytes,
            allocated_bytes=lack.allocated_bytes,
            reserved_bytes=lack.reserved_bytes,
            memory=lack.memory,
            predicted={c.name: round(c.bytes) for c in predicted},
            predicted_peak_gb=now.predicted_peak_gb if now else None,
            action=action,
            **fields,
        )

    def _next(self, evaluating: bool) -> Retreat | None:
        return next_retreat(
            self.options,
            self.recomputing,
            len(layers.decoder_layers(self.model)),
            self.presets,
            self.forecast,
            self.limit_gb,
            evaluating,
        )

    def _apply(self, retreat: Retreat, lack: Lack) -> None:
        """Changes layers and datasets, and writes down what holds from now on: for checkpoints, for --resume, and for
        whoever evaluates the result."""
        self.options = changed(self.options, **retreat.settings)
        self.record.options |= retreat.settings
        self.record.preset = retreat.preset or self.record.preset
        write_json_atomic(self.record.folder / results.RECORD, self.record.document())
        recomputing = retreat.settings.get("checkpointed_layers", self.recomputing)
        now = changed(self.options, checkpointed_layers=recomputing)
        predicted = self.forecast.of(now).peak_table if self.forecast else None
        if retreat.preset:
            self.run.emit("preset", name=retreat.preset, settings=retreat.settings, step=lack.step, predicted=predicted)
        else:
            self.run.emit("retreat", settings=retreat.settings, step=lack.step, predicted=predicted)
        if "checkpointed_layers" in retreat.settings:
            self.recomputing = layers.checkpoint_layers(self.model, retreat.settings["checkpointed_layers"])
        if retreat.settings.keys() & set(SHOWN):
            for dataset in self.datasets:
                dataset.show(self.options.num_frames, self.options.image_size)
            encode_again(self.model, self.datasets, self.options, self.run)
            if self.forecast and self.datasets[0].store is None:
                self.forecast.overrides |= {"cached_features": False, "encoders_resident": True}
            evaluating = lack.activity == "evaluate"
            self.run.phase("evaluate" if evaluating else "train", f"again at step {lack.step}, {retreat.text}")


def take(error: torch.OutOfMemoryError, trainer: Trains, drop_gradients: bool = False) -> Lack:
    """Reads what the error says and who holds the memory, then lets go of what the cut-off work held and puts the rest
    aside."""
    said = read(error)
    lack = Lack(
        trainer.state.global_step,
        trainer.activity,
        **vars(said),
        memory=owners(trainer, said.allocated_bytes),
    )
    traceback.clear_frames(error.__traceback__)  # they hold the activations
    if drop_gradients:
        trainer.model.zero_grad(set_to_none=True)
    states = trainer.optimizer.state.values() if trainer.optimizer is not None else ()
    trainer.aside.put((*states, *trainer.window.inputs), trainer.args.device)
    return lack


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
