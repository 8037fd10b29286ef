"""Converts our options to transformers' TrainingArguments."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from surgvqa.config.options import TrainOptions
from surgvqa.config.settings import nearest, settings_of
from surgvqa.errors import UsageError, first_line
from surgvqa.machine.process import usable_cores
from surgvqa.model.device import choose_device, choose_dtype
from surgvqa.training.schedule import evaluates, schedule
from surgvqa.training.trainer_hooks import use_one_gpu

NOT_OURS = {
    "resume_from_checkpoint": "use --resume RUN",
    "output_dir": "it is a separate option",
    "deepspeed": "several GPUs train with --gpus, and --shard divides the model among them",
    "fsdp": "use --gpus and --shard, which divides the model among the GPUs",
    "average_tokens_across_devices": "the loss is always the mean over the tokens of all GPUs",
    "remove_unused_columns": "the model needs every column of a batch",
}


def training_arguments(options: TrainOptions, output_dir: Path, run_name: str = "") -> TrainingArguments:
    """Our options as transformers' TrainingArguments. Raises UsageError for values that it rejects."""
    device = choose_device(options.device)
    planned, _ = schedule(options)
    values = {
        "output_dir": str(output_dir),
        "run_name": options.run_name or run_name,
        **planned,
        "do_eval": evaluates(options),
        "bf16": choose_dtype(device, options.bf16) == torch.bfloat16,
        "use_cpu": device.type == "cpu",
        "optim": choose_optimiser(options.optim, device)[0],
        "warmup_steps": options.warmup_ratio,  # below 1, it is a share of the steps
        "report_to": options.report_to.split(","),
        "prediction_loss_only": True,
        "remove_unused_columns": False,
        "max_steps": options.max_steps if options.max_steps > 0 else -1,  # 0 would mean one step
        "label_names": ["labels"],
        "logging_nan_inf_filter": False,  # it waits for the GPU at each micro step; EventTrainer checks once per step
        "disable_tqdm": True,
        "average_tokens_across_devices": False,  # our trainer counts the tokens of all ranks and sums gradients
        "dataloader_num_workers": min(4, usable_cores() // 2) if device.type == "cuda" else 0,
    }
    same_name = {f.name for f in fields(TrainingArguments)} & set(settings_of(TrainOptions))
    for name in same_name - set(values) - {"gradient_checkpointing"}:  # enabled in the model instead
        values[name] = getattr(options, name)
    values |= parse_extra(options.extra)
    try:
        arguments = TrainingArguments(**values)
    except (ValueError, TypeError) as error:
        raise UsageError(" ".join(str(error).split())) from None
    if arguments.label_smoothing_factor:  # Trainer's implementation assumes shifted labels, which this model's are not
        raise UsageError("--label_smoothing_factor: not with this model, whose loss has no smoothing")
    missing = set(arguments.report_to or ()) - set(get_available_reporting_integrations())
    if missing:
        known = ", ".join(["none", *get_available_reporting_integrations()])
        raise UsageError(f"report_to is {options.report_to}; installed and enabled here are: {known}")
    use_one_gpu(arguments)
    return arguments


def parse_extra(extra: dict[str, str]) -> dict[str, Any]:
    """Further TrainingArguments fields, converted from text. Raises UsageError for an unknown name or a bad value."""
    known = {f.name for f in fields(TrainingArguments) if f.init}
    for name in extra:
        if name in NOT_OURS:
            raise UsageError(f"--{name}: {NOT_OURS[name]}")
        if name not in known:
            raise UsageError(f"unknown option --{name}{nearest(name, known | set(settings_of(TrainOptions)))}")
    parser = HfArgumentParser(TrainingArguments, allow_abbrev=False)  # type: ignore[arg-type]  # a class is correct here

    def fail(message: str) -> NoReturn:
        raise UsageError(message)

    parser.error = fail  # type: ignore[method-assign]  # raises our error instead of exiting
    namespace, _ = parser.parse_known_args([f"--{name}={value}" for name, value in extra.items()])
    return {name: getattr(namespace, name) for name in extra}


def choose_optimiser(requested: str, device: torch.device) -> tuple[str, str | None]:
    """(transformers' name of the optimiser, why `auto` on a GPU does not give the 8-bit one).

    Raises UsageError when one of bitsandbytes' was requested and cannot be imported.
    """
    if requested != "auto":
        if re.search("8bit|bnb|paged", requested) and (problem := bitsandbytes_problem()):
            raise UsageError(f"--optim {requested}: {problem}; pip install -U bitsandbytes, or use --optim adamw_torch")
        return requested, None
    problem = bitsandbytes_problem() if device.type == "cuda" else None
    return ("adamw_bnb_8bit" if device.type == "cuda" and not problem else "adamw_torch"), problem


def bitsandbytes_problem() -> str | None:
    """Why bitsandbytes cannot be imported, as a one-line message; None if it can.

    A build for another CUDA can fail in many ways.
    """
    try:
        import bitsandbytes  # noqa: F401
    except (Exception, SystemExit) as error:
        kind = type(error).__name__
        return f"bitsandbytes cannot be imported ({kind}: {first_line(error)})".replace(": )", ")")
    return None
