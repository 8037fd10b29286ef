"""Gives the private methods of transformers' Trainer public names.

All private names of Trainer and of torch's schedules that training relies on are here.
tests/surgvqa/training/test_trainer_hooks.py asserts that each exists with the signature used here and is called where
we need it, so that a new version fails there and not silently in training.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback
from transformers.trainer_utils import rotate_checkpoints

from surgvqa.data.numbered import Batch, Numbered
from surgvqa.errors import SurgvqaError
from surgvqa.training.random_state import random_state

__all__ = ["HookedTrainer", "rotate_checkpoints", "set_last_learning_rates", "use_one_gpu"]


def use_one_gpu(arguments: TrainingArguments) -> None:
    """Prevents torch's DataParallel, which Trainer would use if it finds several GPUs."""
    arguments._n_gpu = min(arguments.n_gpu, 1)


def set_last_learning_rates(scheduler: torch.optim.lr_scheduler.LRScheduler, rates: list[float]) -> None:
    """Sets the last learning rate of each parameter group that the schedule reports."""
    scheduler._last_lr = list(rates)


class HookedTrainer(Trainer):
    """Trainer's loop, evaluation and saved states, with the methods below as hooks."""

    # Trainer's types are looser; here they are always set and have these types.
    model: PeftModel
    optimizer: torch.optim.Optimizer
    train_dataset: Numbered
    eval_dataset: Numbered

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        self.remove_callback(PrinterCallback)  # our events replace it
        prepare = self.accelerator.prepare_model
        # Accelerate must not move the model to the GPU, because it would move back what we moved to the host. And no
        # DistributedDataParallel, which sums gradients in the last backward pass, where a rank that runs out of memory
        # would leave the others waiting forever. We sum gradients when all ranks have finished the backward pass.
        self.accelerator.prepare_model = lambda model, **_: prepare(model, device_placement=False, evaluation_mode=True)
        if not self.model_accepts_loss_kwargs:
            raise SurgvqaError("the model does not accept num_items_in_batch: gradients would be scaled wrongly")
        self.model.train = MethodType(_train, self.model)  # type: ignore[method-assign]  # on purpose
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.model.zero_grad = self._zero_grad  # type: ignore[method-assign]  # on purpose

    def _zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients, without visiting all 3,000 modules (10 ms, in which the GPU is idle)."""
        for parameter in self.trained:
            parameter.grad = None

    @property
    def folder(self) -> Path:
        """The output folder, which has the saved states."""
        return Path(str(self.args.output_dir))

    # --- for subclasses ----------------------------------------------------------------------------------------------

    def model_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The model's arguments for a batch on the training device."""
        raise NotImplementedError

    def tokens_of_all(self, batches: list[Batch], count: Any) -> Any:
        """The supervised tokens of an optimiser step over all ranks; `count` are those of `batches` on this rank."""
        raise NotImplementedError

    def before_optimizer_step(self, model: Any, grad_norm: float, learning_rate: float) -> None:
        """Called after the last backward pass of an optimiser step; `grad_norm` is the gradients' norm."""
        raise NotImplementedError

    def on_best(self) -> None:
        """Called after the best evaluation so far."""
        raise NotImplementedError

    def write_adapter(self, folder: Path) -> None:
        """Writes the trained weights into `folder`."""
        raise NotImplementedError

    def save_checkpoint(self) -> None:
        """Saves the current state of the training."""
        raise NotImplementedError

    def load_state(self, folder: Path) -> None:
        """Loads the weights of a saved state into the model before training resumes."""
        raise NotImplementedError

    def load_optimizer(self, load: Callable[[], None], folder: str | None) -> None:
        """Calls `load`, which loads optimiser and schedule of the saved state `folder`, or nothing if that is None."""
        raise NotImplementedError

    def load_best(self) -> None:
        """Loads the best weights after training."""
        raise NotImplementedError

    def on_random_state(self) -> None:
        """Called after the random state of a saved state has been restored."""
        raise NotImplementedError

    # --- for callers -------------------------------------------------------------------------------------------------

    def on_device(self, batch: Batch) -> Batch:
        """A batch of the data loader, moved to the training device."""
        return super()._prepare_inputs(batch)

    def write_state(self, folder: Path) -> None:
        """Writes what Trainer saves of a training with AdamW, in its format.

        That is weights, optimiser, schedule, random state and Trainer's own state. Trainer's own method would wait for
        all ranks in the middle.
        """
        folder.mkdir(parents=True)
        self.write_adapter(folder)
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
        assert self.lr_scheduler is not None
        torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")
        torch.save(random_state(), folder / "rng_state.pth")
        states: Any = self.state.stateful_callbacks
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                states[type(callback).__name__] = callback.state()
        self.state.save_to_json(str(folder / "trainer_state.json"))

    def is_best_now(self) -> bool:
        """Evaluates as after a step. Returns whether this is the best evaluation so far."""
        return self._determine_best_metric(self._evaluate(None, None), None)

    # --- Trainer's own names -----------------------------------------------------------------------------------------

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Does not count them, because Trainer would visit all modules at every micro step."""
        return 0

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        """Does not move the model, because load_model has placed it and unneeded parts were moved to the host.

        tests/surgvqa/training/test_train_gpu.py checks this on a GPU; on a CPU there is nothing to move.
        """

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return self.model_inputs(self.on_device(inputs))

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: Any) -> Any:
        return self.tokens_of_all(batch_samples, super()._get_num_items_in_batch(batch_samples, device))

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clips the gradients of the trained parameters. Trainer would visit all modules for them."""
        return self.accelerator.clip_grad_norm_(self.trained, self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.before_optimizer_step(model, float(norm), self._get_learning_rate())
        return norm

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics=metrics, trial=trial)
        if is_best:
            self.on_best()
        return is_best

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self.write_adapter(Path(output_dir) if output_dir else self.folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.save_checkpoint()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_state(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        load = super()._load_optimizer_and_scheduler
        self.load_optimizer(lambda: load(checkpoint), checkpoint)

    def _load_best_model(self) -> None:
        self.load_best()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self.on_random_state()


def _train(model: Any, mode: bool = True) -> Any:
    """Like nn.Module.train, but does nothing if the mode is already set.

    Trainer calls it at every micro step, and visiting 3,000 modules takes 10 ms or more, in which the GPU is idle.
    """
    if mode and model.training and model.get_base_model().training:
        return model
    return type(model).train(model, mode)
