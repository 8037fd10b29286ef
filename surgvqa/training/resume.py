"""Going on from a checkpoint: what it holds goes on, what the options say holds from now on, and an evaluation that was
cut short is made up for.

Trainer takes the options of the optimiser and when to evaluate, save and log from the checkpoint, without a word.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer_callback import ExportableState

from surgvqa.config.options import TrainOptions
from surgvqa.errors import UsageError
from surgvqa.runs.folder import Run
from surgvqa.training import checkpoints, results
from surgvqa.training.trainer import EventTrainer


def find_checkpoint(options: TrainOptions, output_dir: Path, run: Run) -> Path | None:
    """The checkpoint to resume from: the one named, or the newest whole one of the run named.

    Newer ones in `output_dir` are damaged (train.check sees to that). They are renamed: the highest step counts as the
    newest, and they would be kept in place of those to come.
    """
    if not options.resume:
        return None
    folder = Path(options.resume).absolute()
    checkpoint: Path | None
    if folder.name.startswith("checkpoint-") and not checkpoints.checkpoints(folder):
        damage = checkpoints.damage_of(folder)
        if damage:
            raise UsageError(f"{folder}: cannot be resumed from: {damage}")
        checkpoint, newer = folder, checkpoints.newer_than(folder)
    else:
        checkpoint, _ = checkpoints.newest_whole_checkpoint(folder)
        newer = checkpoints.newer_than(checkpoint) if checkpoint else checkpoints.checkpoints(folder)
    for damaged in newer:
        damage = checkpoints.damage_of(damaged)
        now = f"; it is now {checkpoints.put_aside(damaged).name}" if damaged.parent == output_dir else ""
        run.warning(f"skipped {damaged.name}: {damage}{now}")
    if checkpoint is None:  # gone since train.check saw it
        raise UsageError(f"{folder}: no checkpoint to resume from")
    run.phase("resume", str(checkpoint))
    written = results.read(checkpoint)
    before, after = written and samples_a_step(written.options), samples_a_step(vars(options))
    if before and before != after:
        run.warning(
            f"a step has {after} samples and had {before}: {checkpoint.name} stands for as many steps as before, but "
            "for another place in the data, so that samples of this epoch come twice or not at all"
        )
    return checkpoint


def samples_a_step(options: dict[str, Any]) -> int:
    """Samples of one optimiser step."""
    return int(options["per_device_train_batch_size"]) * int(options["gradient_accumulation_steps"])


def begin(trainer: EventTrainer) -> None:
    """Once the checkpoint is loaded, before the first step."""
    state = trainer.state
    state.compute_steps(trainer.args, state.max_steps)
    stateful: Any = state.stateful_callbacks
    for callback in trainer.callback_handler.callbacks:  # the counter of early stopping, but not its patience
        if isinstance(callback, ExportableState):
            saved = stateful.setdefault(type(callback).__name__, callback.state())
            for name, value in saved["attributes"].items():
                setattr(callback, name, value)
    find_best(trainer)
    if evaluation_is_due(trainer) and trainer._determine_best_metric(trainer._evaluate(None, None), None):
        state.best_model_checkpoint = str(trainer.resumed)


def end_with(trainer: EventTrainer, checkpoint: Path) -> None:
    """The result of a run whose last checkpoint is of its last step: the best state of it, or that one."""
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    trainer._load_from_checkpoint(str(checkpoint))
    begin(trainer)
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
        trainer._load_best_model()


def find_best(trainer: EventTrainer) -> None:
    """The best checkpoint so far, also where the folder has moved. When it is gone, the search begins anew."""
    assert trainer.resumed
    state, folder = trainer.state, trainer.resumed.parent
    if not trainer.args.load_best_model_at_end or state.best_global_step is None:
        return
    places = [Path(state.best_model_checkpoint or folder), folder / f"checkpoint-{state.best_global_step}"]
    best = next((place for place in places if (place / checkpoints.ADAPTER).is_file() and place != folder), None)
    if best is None:
        trainer.events.warning(f"{places[1]}, the best so far, is gone: the best from now on counts")
        state.best_metric = state.best_global_step = None
    state.best_model_checkpoint = str(best) if best else None


def evaluation_is_due(trainer: EventTrainer) -> bool:
    """Whether the step at hand is one to evaluate and was not: a stop, or an error, came before the end of it."""
    state, args = trainer.state, trainer.args
    if any(row.get("step") == state.global_step and "eval_loss" in row for row in state.log_history):
        return False
    last = state.global_step >= state.max_steps
    if args.eval_strategy == "steps":
        return (last or state.global_step % state.eval_steps == 0) and args.eval_delay <= state.global_step
    return args.eval_strategy == "epoch" and (last or state.epoch % 1 == 0) and args.eval_delay <= state.epoch
