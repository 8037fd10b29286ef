"""Configures Weights & Biases: its files stay in the run folder, and without a key it logs offline."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from surgvqa.machine.wandb_key import wandb_key_source
from surgvqa.runs.folder import Run


@contextmanager
def wandb_environment(report_to: str, run: Run) -> Iterator[None]:
    """Sets wandb's environment variables while a run trains, if `report_to` names it, and ends wandb's run afterwards.

    Variables that the user has set (WANDB_PROJECT, WANDB_MODE, …) stay. No key is printed or logged.
    """
    if run.ranks.rank or not {"wandb", "all"} & set(report_to.split(",")):  # Trainer logs only on rank 0
        yield
        return
    wanted = {"WANDB_DIR": str(run.folder), "WANDB_PROJECT": "surgvqa", "WANDB_SILENT": "true"}
    if wandb_key_source() is None and "WANDB_MODE" not in os.environ:
        wanted["WANDB_MODE"] = "offline"
        run.warning(
            f"W&B: no API key here, so it logs offline; later: wandb sync {run.folder / 'wandb' / 'offline-run-*'}"
        )
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        import wandb

        if wandb.run is not None:
            wandb.finish()
        wandb.teardown()  # otherwise it would reuse the environment in the process's next run
        for name in added:
            os.environ.pop(name, None)
