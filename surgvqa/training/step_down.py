"""Handles out-of-memory errors in training: reports them, steps down and retries the step, or saves and stops.

memory/reductions.py decides what to give up. The trainer repeats the interrupted work.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
from surgvqa.model.divide import local
from surgvqa.model.encode import encode_again
from surgvqa.runs.folder import Run
from surgvqa.runs.ranks import Ranks
from surgvqa.training import results
from surgvqa.training.rollback import OffloadedTensors

OWNERS_SHOWN = 6
"""Number of rows, the largest ones, of the predicted table in an `oom` event."""


@dataclass(frozen=True, kw_only=True)
class TrainingOutOfMemory(OutOfMemory):
    """An out-of-memory error in training: where it occurred, and what used the memory."""

    step: int
    activity: str
    memory: dict[str, int]
    """{owner: measured bytes}."""
    rank: int = 0
    """The rank that ran out of memory."""


class AnyRankOutOfMemory(Exception):
    """Raised on all ranks at the same place when one of them has run out of memory there."""

    def __init__(self, failure: TrainingOutOfMemory):
        super().__init__(failure.text)
        self.failure = failure


class OomTrainer(Protocol):
    """The parts of the trainer that stepping down needs."""

    model: Any
    optimizer: Any
    args: Any
    """Only `device` is used."""
    state: Any
    """Only `global_step` is used."""
    ranks: Ranks
    activity: str
    window: Any
    """Only `inputs` are used: the batches of the current optimiser step."""
    offloaded: OffloadedTensors

    def save_last_step(self) -> None:
        """Saves a checkpoint of the last complete optimiser step."""
        ...


class StepDown:
    """Steps down from a configuration that needs too much memory. `options` are the current ones."""

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
        """`model` has no PEFT wrapper. `recomputing` is the current number of recomputing layers. Without a `forecast`,
        every reduction counts as sufficient."""
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
        """Whether this step was already retried without giving anything up."""

    @property
    def allowed(self) -> bool:
        """Whether --on_oom is step_down."""
        return self.options.on_oom == "step_down"

    def make_room(self, failure: TrainingOutOfMemory, trainer: OomTrainer, evaluating: bool = False) -> None:
        """Frees memory for a retry, on all ranks at once, which all decide from the same `failure`.

        For fragmentation, first tries an emptied cache. Otherwise applies the next reduction, also when a reduction
        itself runs out of memory because the encoders return for its frames. Saves the last step and raises
        SurgvqaError when there is nothing left to try.
        """
        if self.allowed and failure.is_fragmentation and not self.defragmented:
            self.defragmented = True
            self.report(failure, "free memory is fragmented: trying again with an emptied cache")
            return
        reduction = self._next(evaluating) if self.allowed else None
        if reduction is None:
            raise self.stop(failure, trainer)
        self.report(failure, f"continuing with {reduction.text}", settings=reduction.settings)
        own_failure = None
        try:
            self._apply(reduction, failure)
        except torch.OutOfMemoryError as error:
            own_failure = release_memory(error, trainer)
        again = failure_of_any_rank(self.run.ranks, own_failure)
        if again:
            self.make_room(again, trainer, evaluating)

    def stop(self, failure: TrainingOutOfMemory, trainer: OomTrainer, weights_intact: bool = True) -> SurgvqaError:
        """Saves the last complete step and returns the error, which says how to continue.

        If an optimiser step or a save was interrupted (not `weights_intact`), the weights may be partly updated, and
        nothing is saved.
        """
        reduction = self._next(failure.activity == "evaluate") if failure.activity != "optimizer" else None
        self.report(
            failure,
            "stopping",
            next_preset=reduction.preset if reduction else None,
            next_settings=reduction.settings if reduction else None,
        )
        if weights_intact:
            trainer.save_last_step()
        if reduction:
            settings = " ".join(f"--{name} {value}" for name, value in reduction.settings.items())
            advice = f"go on with {reduction.text}: surgvqa train --resume {self.run.id} {settings}"
        elif failure.activity == "optimizer":
            advice = "fewer frames would not help: use a smaller --lora_r, --optim adamw_bnb_8bit or a larger GPU"
        elif self.forecast:
            advice = (
                f"no smaller setting is predicted to fit into {self.limit_gb:.1f} GB; "
                "use a smaller --image_size or a larger GPU"
            )
        else:
            advice = "this is already the smallest preset; use a smaller --image_size or a larger GPU"
        where = f"{self.run.ranks.name(failure.rank)}out of GPU memory at step {failure.step} ({failure.activity})"
        return SurgvqaError(f"{where}: {failure.text}; {advice}")

    def report(self, failure: TrainingOutOfMemory, action: str, **fields: Any) -> None:
        """Emits the `oom` event, on the rank that ran out of memory."""
        if failure.rank != self.run.ranks.rank:
            return
        now = self.forecast.of(changed(self.options, checkpointed_layers=self.recomputing)) if self.forecast else None
        predicted = sorted(now.components, key=lambda c: c.bytes, reverse=True)[:OWNERS_SHOWN] if now else []
        self.run.emit(
            "oom",
            step=failure.step,
            phase=failure.activity,
            text=f"{self.run.ranks.name(failure.rank)}{failure.text}: {action}",
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
        """Changes layers and datasets, and records the new settings for checkpoints, --resume and evaluations."""
        self.options = changed(self.options, **reduction.settings)
        self.record.options |= reduction.settings
        self.record.preset = reduction.preset or self.record.preset
        if self.run.ranks.first:
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
            frames = self.datasets[0].shown[:2]
            for dataset in self.datasets:
                dataset.show(*(getattr(self.options, name) for name in SHOWN))
            if self.datasets[0].shown[:2] != frames:  # the cache has all features of a question anyway
                encode_again(self.model, self.datasets, self.options, self.run)
            if self.forecast and self.datasets[0].store is None:
                self.forecast.overrides |= {"cached_features": False, "encoders_resident": True}
            evaluating = failure.activity == "evaluate"
            self.run.phase("evaluate" if evaluating else "train", f"again at step {failure.step}, {reduction.text}")


def release_memory(
    error: torch.OutOfMemoryError, trainer: OomTrainer, drop_gradients: bool = False
) -> TrainingOutOfMemory:
    """Returns the failure's figures, frees the interrupted work's memory, and moves what a retry needs to the host."""
    figures = read(error)
    failure = TrainingOutOfMemory(
        **vars(figures),
        step=trainer.state.global_step,
        activity=trainer.activity,
        memory=owners(trainer, figures.allocated_bytes),
        rank=trainer.ranks.rank,
    )
    traceback.clear_frames(error.__traceback__)  # frees the activations that the frames refer to
    if drop_gradients:
        trainer.model.zero_grad(set_to_none=True)
    states = trainer.optimizer.state.values() if trainer.optimizer is not None else ()
    trainer.offloaded.put((*states, *trainer.window.inputs), trainer.args.device)
    return failure


def failure_of_any_rank(ranks: Ranks, own_failure: TrainingOutOfMemory | None) -> TrainingOutOfMemory | None:
    """The failure that all ranks act on: that of the first rank that failed; None if none did.

    `own_failure` is this rank's.
    """
    failures = ranks.share(asdict(own_failure) if own_failure else None, "memory")
    return next((TrainingOutOfMemory(**found) for found in failures if found), None)


def owners(trainer: OomTrainer, allocated: int) -> dict[str, int]:
    """{owner: bytes} of the model and the optimiser on the training device, and of the rest of `allocated`."""
    device = trainer.args.device.type

    def size(tensors: Any) -> int:
        return sum(local(t).nbytes for t in tensors if torch.is_tensor(t) and t.device.type == device)

    parameters = list(trainer.model.parameters())
    states = trainer.optimizer.state.values() if trainer.optimizer is not None else ()
    owned = {
        "frozen weights": size(p for p in parameters if not p.requires_grad),
        "adapters": size(p for p in parameters if p.requires_grad),
        "gradients": size(p.grad for p in parameters),
        "optimiser states": size(value for state in states for value in state.values()),
    }
    return owned | {"activations and temporaries": max(0, allocated - sum(owned.values()))}
