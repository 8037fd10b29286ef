"""`surgvqa train`: checks everything possible before the model is loaded, then trains.

The training itself is in recipe.py and trainer.py, which are heavy to import.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal as human_bytes

from surgvqa.checkpoint.folder import Checkpoint, open_checkpoint
from surgvqa.config.options import TrainOptions
from surgvqa.config.settings import require_bounds, settings_of
from surgvqa.data.lookup import check_samples
from surgvqa.errors import UsageError
from surgvqa.model.sizes import checkpoint_sizes, require_layers
from surgvqa.outcome import Outcome
from surgvqa.runs.folder import Run
from surgvqa.runs.ranks import rank_and_count
from surgvqa.training import checkpoints, results
from surgvqa.training.schedule import evaluates

if TYPE_CHECKING:
    from surgvqa.training.answers import Scorer

LOSSES = ("eval_loss", "loss")
OF_ANSWERS = ("label_accuracy", "keyword_accuracy")


LEFT_TO_THE_JOB = ("optim", "report_to", "device", "bf16")
"""Options that only torch and transformers can check."""


def check(options: TrainOptions) -> None:
    """Raises UsageError for what would stop the run later: options, checkpoint, samples, files, output folder, disk."""
    _check_lightly(options)
    if rank_and_count()[1] > 1:  # TrainingArguments would wait for the other ranks, which wait for this one
        return
    from surgvqa.training.arguments import training_arguments  # imported here, because it takes seconds

    training_arguments(options, Path(options.output_dir or "."))


def check_before_launch(options: TrainOptions) -> None:
    """Like `check`, but imports torch and transformers only for options that differ from their defaults.

    These imports take seconds. The job itself runs the full check when it starts.
    """
    defaults = settings_of(TrainOptions)
    asked = options.extra or any(getattr(options, name) != defaults[name].default for name in LEFT_TO_THE_JOB)
    (check if asked else _check_lightly)(options)


def _check_lightly(options: TrainOptions) -> None:
    _check_values(options)
    checkpoint = open_checkpoint(options.model_name_or_path).require_sound()
    require_layers(options.checkpointed_layers, checkpoint_sizes(options.model_name_or_path)[0].num_hidden_layers)
    spoken = options.input_mode != "text_only"
    check_samples(options.train_data_path, options.frames_dir, options.audio_dir if spoken else None)
    if options.eval_data_path and evaluates(options):
        eval_audio_dir = (options.eval_audio_dir or options.audio_dir) if spoken else None
        check_samples(options.eval_data_path, options.frames_dir, eval_audio_dir)
    _check_resumed(options)
    _check_output(options, checkpoint)


def run(options: TrainOptions, run: Run, scorer: Scorer | None = None) -> Outcome:
    """Trains. The result is in the output folder (results.py). A requested stop that was saved is not a failure.

    `scorer` scores the answers to `eval_generate` samples (answers.py); without one, no samples are answered.
    """
    from surgvqa.training.recipe import train

    result = train(options, run, scorer)

    def show(console: Any) -> None:
        loss = "".join(
            f", {name} {result[key]:.4f}"
            for name, key in (("train loss", "train_loss"), ("eval loss", "eval_loss"))
            if result.get(key) is not None
        )
        peak = f", peak {result['peak_allocated_gb']:.2f} GB" if result.get("peak_allocated_gb") else ""
        console.print(f"{result['state']} at step {result['steps']} of {result['total_steps']}{loss}{peak}")
        console.print(
            f"adapter: {result['adapter']}" if result["state"] == "finished" else f"resume: {result['resume']}"
        )

    return Outcome({"run": run.id, **result}, show=show)


def adapter_size(checkpoint: Checkpoint, options: TrainOptions) -> int:
    """Number of trained parameters: r·(in+out) of each module that the pattern matches, and the audio projector's."""
    pattern = re.compile(options.lora_target_modules)
    total = 0
    for name, tensor in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        if name.startswith("audio_projector."):
            total += tensor.numel
        elif len(tensor.shape) == 2 and module != name and pattern.fullmatch(module):
            total += options.lora_r * sum(tensor.shape)
    return total


def _check_values(options: TrainOptions) -> None:
    require_bounds(options)
    if options.num_train_epochs <= 0 and options.max_steps <= 0:
        raise UsageError(f"num_train_epochs is {options.num_train_epochs} and max_steps is not given: nothing to train")
    metric = options.metric_for_best_model
    if evaluates(options) and metric not in LOSSES:
        if metric.removeprefix("eval_") not in OF_ANSWERS:
            raise UsageError(f"metric_for_best_model is {metric}; expected eval_loss or {' or '.join(OF_ANSWERS)}")
        if not options.eval_generate:
            raise UsageError(f"metric_for_best_model is {metric}, which needs answers: --eval_generate 128, say")
    if options.eval_data_path and not Path(options.eval_data_path).is_file():
        raise UsageError(f"{options.eval_data_path}: no such file (eval_data_path)")
    try:
        re.compile(options.lora_target_modules)
    except re.error as error:
        raise UsageError(f"lora_target_modules {options.lora_target_modules!r}: {error}") from None
    if "wandb" in options.report_to.split(",") and importlib.util.find_spec("wandb") is None:
        raise UsageError("report_to is wandb, but wandb is not installed: pip install wandb, or --report_to none")


def _check_resumed(options: TrainOptions) -> None:
    """Raises UsageError when --resume finds no complete saved state; it never starts from the beginning."""
    folder = Path(options.resume or ".")
    if not options.resume or folder.name.startswith("checkpoint-"):
        return
    checkpoint, damaged = checkpoints.newest_complete_checkpoint(folder)
    if checkpoint is None:
        raise UsageError(
            f"{folder}: no checkpoint to resume from ({damaged[0] if damaged else 'none was kept'}); copy a "
            "complete one here, or train again without --resume into another output_dir"
        )


def _check_output(options: TrainOptions, checkpoint: Checkpoint) -> None:
    """Raises UsageError if results would be overwritten, the folder is not writable, or an adapter does not fit."""
    if options.output_dir:
        folder = Path(options.output_dir)
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder}: a file; expected a folder for the checkpoints (output_dir)")
        if folder.resolve() == checkpoint.folder.resolve():
            raise UsageError(f"{folder}: output_dir is the checkpoint itself; choose another folder")
        resumed = Path(options.resume).resolve() if options.resume else None
        if folder.is_dir():
            with results.output_lock(folder):
                pass
        if resumed in [checkpoint.resolve() for checkpoint in checkpoints.checkpoints(folder)]:
            newer = next((c for c in checkpoints.newer_than(resumed) if not checkpoints.damage_of(c)), None)
            if newer:
                raise UsageError(
                    f"{newer}: is from a later step than {resumed.name}, and would count as the newest of the "
                    "resumed run; choose another output_dir, or delete it"
                )
        if resumed not in (folder.resolve(), *(c.resolve() for c in checkpoints.checkpoints(folder))):
            earlier = results.read(folder)
            if earlier or checkpoints.checkpoints(folder) or (folder / checkpoints.ADAPTER).exists():
                whose = f"run {earlier.run}" if earlier and earlier.run else "another training"
                raise UsageError(
                    f"{folder}: has the results of {whose}; choose another output_dir, or continue with "
                    f"--resume {(earlier and earlier.run) or folder}"
                )
    existing = Path(options.output_dir or ".").absolute()
    while not existing.is_dir():
        existing = existing.parent
    if not os.access(existing, os.W_OK):
        raise UsageError(f"{existing}: not writable; choose another output_dir")
    # A float32 adapter in a checkpoint and as the result, and at least 8-bit moments of the optimiser.
    needed = adapter_size(checkpoint, options) * (4 + 4 + 2)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UsageError(
            f"{existing}: {human_bytes(free)} free, but one checkpoint and the result take {human_bytes(needed)}; "
            "choose another output_dir"
        )
