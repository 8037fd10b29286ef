"""Resumes from a checkpoint, applies the current options, and repeats an interrupted evaluation.

Trainer alone would silently use the checkpoint's options for the optimiser and for evaluating, saving and logging.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer_callback import ExportableState

from surgvqa.config.options import TrainOptions
from surgvqa.errors import UsageError
from surgvqa.runs.folder import Run
from surgvqa.training import checkpoints, results
from surgvqa.training.trainer import EventTrainer

A_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps")
"""Options that, with the number of GPUs, determine the samples per step."""


def find_checkpoint(options: TrainOptions, output_dir: Path, run: Run) -> Path | None:
    """The checkpoint to resume from: the named one, or the newest complete one of the named run.

    Newer ones in `output_dir` are damaged (train.check ensures this). They are renamed, because the highest step counts
    as the newest, and they would be kept instead of new ones.
    """
    if not options.resume:
        return None
    folder = Path(options.resume).absolute()
    checkpoint: Path | None
    if folder.name.startswith("checkpoint-") and not checkpoints.checkpoints(folder):
        damage = checkpoints.damage_of(folder)
        if damage:
            raise UsageError(f"{folder}: cannot be resumed: {damage}")
        checkpoint, newer = folder, checkpoints.newer_than(folder)
    else:
        checkpoint, _ = checkpoints.newest_complete_checkpoint(folder)
        newer = checkpoints.newer_than(checkpoint) if checkpoint else checkpoints.checkpoints(folder)
    for damaged in newer:
        damage = checkpoints.damage_of(damaged)
        now = f"; it is now {checkpoints.rename_damaged(damaged).name}" if damaged.parent == output_dir else ""
        run.warning(f"skipped {damaged.name}: {damage}{now}")
    if checkpoint is None:  # deleted since train.check
        raise UsageError(f"{folder}: no checkpoint to resume from")
    run.phase("resume", str(checkpoint))
    return checkpoint


def keep_samples_a_step(options: TrainOptions, checkpoint: Path, run: Run) -> None:
    """Keeps the number of samples per step, which determines a step's position in the data.

    On another number of GPUs it changes the accumulation accordingly. Warns if the options change the number.
    """
    written = results.read(checkpoint)
    if not written:
        return
    before, after = samples_a_step(written.options), samples_a_step(vars(options))
    same = all(written.options.get(name) == getattr(options, name) for name in A_STEP)
    each = options.per_device_train_batch_size * int(options.gpus)
    if before != after and same and written.options.get("gpus", "1") != options.gpus and before % each == 0:
        options.gradient_accumulation_steps = before // each
        run.warning(
            f"gpus is {options.gpus}, but was {written.options.get('gpus', '1')}: gradient_accumulation_steps is now "
            f"{before // each}, so that a step has {before} samples as before"
        )
    elif before != after:
        run.warning(
            f"a step has {after} samples, but had {before}: {checkpoint.name} counts as many steps as before, but "
            "is at another position in the data, so samples of this epoch are used twice or not at all"
        )


def samples_a_step(options: dict[str, Any]) -> int:
    """Number of samples per optimiser step, on all GPUs."""
    return math.prod(int(options[name]) for name in A_STEP) * int(options.get("gpus", "1"))


def begin(trainer: EventTrainer) -> None:
    """Applies the current options, after the checkpoint is loaded and before the first step."""
    state = trainer.state
    state.compute_steps(trainer.args, state.max_steps)
    stateful: Any = state.stateful_callbacks
    for callback in trainer.callback_handler.callbacks:  # keeps the counter of early stopping, but not its patience
        if isinstance(callback, ExportableState):
            saved = stateful.setdefault(type(callback).__name__, callback.state())
            for name, value in saved["attributes"].items():
                setattr(callback, name, value)
    find_best(trainer)
    if evaluation_is_due(trainer) and trainer.is_best_now():
        state.best_model_checkpoint = str(trainer.resumed)


def end_with(trainer: EventTrainer, checkpoint: Path) -> None:
    """Sets the result of a run whose last checkpoint is already at its last step: the best state, or this one."""
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    trainer.load_state(checkpoint)
    begin(trainer)
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
        trainer.load_best()


def find_best(trainer: EventTrainer) -> None:
    """Finds the best checkpoint so far, even if the folder has moved. If it is missing, starts the search again."""
    assert trainer.resumed
    state, folder = trainer.state, trainer.resumed.parent
    if not trainer.args.load_best_model_at_end or state.best_global_step is None:
        return
    places = [Path(state.best_model_checkpoint or folder), folder / f"checkpoint-{state.best_global_step}"]
    found = next((place for place in places if (place / checkpoints.ADAPTER).is_file() and place != folder), None)
    best = trainer.ranks.share(str(found) if found else None, "best so far")[0]  # rank 0's disk counts
    if best is None:
        trainer.events.warning(f"{places[1]}, the best so far, is missing: only later ones count now")
        state.best_metric = state.best_global_step = None
    state.best_model_checkpoint = best


def evaluation_is_due(trainer: EventTrainer) -> bool:
    """Whether the evaluation of the current step is missing because of a stop or an error."""
    state, args = trainer.state, trainer.args
    if any(row.get("step") == state.global_step and "eval_loss" in row for row in state.log_history):
        return False
    last = state.global_step >= state.max_steps
    if args.eval_strategy == "steps":
        return (last or state.global_step % state.eval_steps == 0) and args.eval_delay <= state.global_step
    return args.eval_strategy == "epoch" and (last or state.epoch % 1 == 0) and args.eval_delay <= state.epoch
