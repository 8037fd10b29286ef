"""Keeps the optimiser's hyperparameters as the options request them, also after a resume."""

from __future__ import annotations

from typing import Any

import torch

from surgvqa.errors import UsageError
from surgvqa.training.trainer_hooks import set_last_learning_rates

OF_THE_STATES = ("params", "lr", "fused", "foreach", "capturable", "differentiable")
"""Keys of a parameter group that belong to the optimiser's states, not to the options."""


def hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The requested hyperparameters of each parameter group, without the current learning rate."""
    return [{k: v for k, v in group.items() if k not in OF_THE_STATES} for group in optimizer.param_groups]


def keep_requested(optimizer: Any, scheduler: Any, requested: list[dict[str, Any]], checkpoint: str) -> None:
    """Restores the `requested` hyperparameters after a checkpoint's have been loaded with its states.

    The learning rate follows the schedule at this step. Raises UsageError for states of another optimiser.
    """
    for group, now in zip(optimizer.param_groups, requested):
        loaded = group.keys() - set(OF_THE_STATES)
        if loaded - now.keys() and now.keys() - loaded:
            raise UsageError(
                f"{checkpoint}: its optimizer.pt is from another optimiser than this run's; use the one that the run "
                "started with (--optim; see its plan)"
            )
        group.update(now)
    if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas):
            group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)
        set_last_learning_rates(scheduler, [group["lr"] for group in optimizer.param_groups])
