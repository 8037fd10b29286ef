"""The optimiser's hyperparameters: what the options ask, kept over a resume."""

from __future__ import annotations

from typing import Any

import torch

from surgvqa.errors import UsageError

OF_THE_STATES = ("params", "lr", "fused", "foreach", "capturable", "differentiable")
"""Of a group of parameters: what goes with the states of the optimiser, not with the options."""


def hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What the options ask of each group of parameters, without the rate of the moment."""
    return [{k: v for k, v in group.items() if k not in OF_THE_STATES} for group in optimizer.param_groups]


def keep_asked(optimizer: Any, scheduler: Any, asked: list[dict[str, Any]], checkpoint: str) -> None:
    """Back to the `asked` hyperparameters after the checkpoint's have been loaded with its states; the learning rate is
    what the schedule makes of it at this step. UsageError when the states are of another optimiser."""
    for group, now in zip(optimizer.param_groups, asked):
        loaded = group.keys() - set(OF_THE_STATES)
        if loaded - now.keys() and now.keys() - loaded:
            raise UsageError(
                f"{checkpoint}: its optimizer.pt is of another optimiser than this run's; name the one that the run "
                "began with (--optim; its plan says which)"
            )
        group.update(now)
    if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas):
            group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
