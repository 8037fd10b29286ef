"""transformers' Trainer with its private methods under names of ours: everything private of it that we rely on is named
here and nowhere else. tests/surgvqa/training/test_trainer_hooks.py asserts that each exists with the signature used
here and is called where we need it, so that a new transformers fails there and not silently in training.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import rotate_checkpoints

from surgvqa.data.numbered import Batch, Numbered
from surgvqa.errors import SurgvqaError

__all__ = ["HookedTrainer", "rotate_checkpoints"]


class HookedTrainer(Trainer):
    """The loop, evaluation and saved states are Trainer's; what it does at each point is left to the methods below."""

    # Trainer types these loosely; here they are always there, and of these kinds.
    model: PeftModel
    optimizer: torch.optim.Optimizer
    train_dataset: Numbered
    eval_dataset: Numbered

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        self.remove_callback(PrinterCallback)  # our own events say it
        # "The model has a device map": else Accelerate fetches back to the GPU what has left it
        self.accelerator.verify_device_map = lambda model: True
        if not self.model_accepts_loss_kwargs:
            raise SurgvqaError("the model does not take num_items_in_batch: gradients would be scaled wrongly")
        self.model.train = MethodType(_train, self.model)  # type: ignore[method-assign]  # on purpose
        self.writes_to: Path | None = None
        """The folder below which a saved state is being written, in place of the output folder."""

    @property
    def folder(self) -> Path:
        """The output folder, which holds the saved states."""
        return Path(str(self.args.output_dir))

    # --- for subclasses ----------------------------------------------------------------------------------------------

    def model_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What the model is called with, of a batch on the training device."""
        raise NotImplementedError

    def before_optimizer_step(self, model: Any, grad_norm: float, learning_rate: float) -> None:
        """After the last backward pass of an optimiser step, whose gradients have the norm `grad_norm`."""
        raise NotImplementedError

    def on_best(self) -> None:
        """After an evaluation that is the best so far."""
        raise NotImplementedError

    def write_adapter(self, folder: Path) -> None:
        """Writes the weights that are trained into `folder`."""
        raise NotImplementedError

    def save_whole(self) -> None:
        """Saves the training's state as it is now."""
        raise NotImplementedError

    def load_state(self, folder: Path) -> None:
        """Puts the weights of a saved state into the model, before training goes on from it."""
        raise NotImplementedError

    def load_optimizer(self, load: Callable[[], None], folder: str | None) -> None:
        """`load` reads optimiser and schedule of the saved state `folder`; without one it reads nothing."""
        raise NotImplementedError

    def load_best(self) -> None:
        """Puts the best weights back, once training has ended."""
        raise NotImplementedError

    def on_random_state(self) -> None:
        """After the random state of a saved state has been set."""
        raise NotImplementedError

    # --- for callers -------------------------------------------------------------------------------------------------

    def on_device(self, batch: Batch) -> Batch:
        """A batch of the data loader, on the training device."""
        return super()._prepare_inputs(batch)

    def write_state(self) -> None:
        """Trainer's own saving, below `writes_to`: optimiser, schedule, random state, and `write_adapter`."""
        super()._save_checkpoint(self.model, None)

    # --- Trainer's own names -----------------------------------------------------------------------------------------

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: Trainer would go through all modules for it at every micro step."""
        return 0

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        """The model stays where it is: load_model put it there, and what no step needs has left the GPU. (On a GPU
        tests/surgvqa/training/test_train_gpu.py looks; on a CPU nothing can be in the wrong place.)"""

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return self.model_inputs(self.on_device(inputs))

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

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.writes_to or self.folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.save_whole()

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
    """As nn.Module.train, unless the model trains already: Trainer asks for it at every micro step, and going through
    3,000 modules takes 10 ms and more, in which the GPU runs out of work."""
    if mode and model.training and model.get_base_model().training:
        return model
    return type(model).train(model, mode)
