"""A training run from its options to the adapter on disk: model, data, Trainer, result."""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed
from transformers.training_args import OptimizerNames

from presets import step_down_presets
from surgvqa.config.options import TrainOptions
from surgvqa.data.collate import Collator
from surgvqa.data.dataset import ClipDataset, make_room_for_sockets
from surgvqa.data.frames import largest_frame
from surgvqa.data.numbered import Numbered, NumberedCollator
from surgvqa.data.processors import Processors, load_processors
from surgvqa.data.samples import read_samples
from surgvqa.errors import SurgvqaError, first_line, of_worker
from surgvqa.files import write_json_atomic
from surgvqa.machine.ranks import part
from surgvqa.machine.sampling import MemorySampler
from surgvqa.memory import allocator, reductions
from surgvqa.memory.fit import choices, memory_limit_gb
from surgvqa.model import layers
from surgvqa.model.adapter import adapter_parameters, add_lora
from surgvqa.model.attention import AttentionShape, attention_kernel, choose_attention
from surgvqa.model.compile_ahead import CompileAhead
from surgvqa.model.device import choose_dtype
from surgvqa.model.divide import DividedLayers
from surgvqa.model.encode import use_cache
from surgvqa.model.loading import load_model
from surgvqa.model.sizes import checkpoint_sizes
from surgvqa.model.torch_internals import start_compiler
from surgvqa.runs.folder import Run
from surgvqa.training import answers, checkpoints, results, resume
from surgvqa.training.arguments import choose_optimiser, training_arguments
from surgvqa.training.callbacks import EventCallback
from surgvqa.training.carry import CARRIED, carry
from surgvqa.training.layer_job import begin_compiling
from surgvqa.training.schedule import evaluates, schedule
from surgvqa.training.sharding import optimiser_steps, require_same_samples
from surgvqa.training.step_down import StepDown, release_memory
from surgvqa.training.stopping import StopRequested, stop_on_signals
from surgvqa.training.tracking import wandb_environment
from surgvqa.training.trainer import EventTrainer

MOMENTS_32_BIT, MOMENTS_8_BIT = 8, 2
"""Bytes of AdamW's two moments per trained parameter."""
LENGTH_BUCKET, ALIGNED = 64, 8
"""Compiled layers are compiled again for each new length, so rows are padded to the longest length (rounded up to a
multiple of 8 for tensor cores) minus a multiple of 64."""


def train(options: TrainOptions, run: Run, scorer: answers.Scorer | None = None) -> dict[str, Any]:
    """Trains, writes the adapter to the output folder, and returns the command's JSON keys.

    A requested stop ends with a checkpoint and the state "stopped".
    """
    output_dir = Path(options.output_dir or run.folder / "checkpoints").absolute()
    output_dir.mkdir(parents=True, exist_ok=True)
    with results.output_lock(output_dir) if run.ranks.rank == 0 else contextlib.nullcontext():
        return _train(options, output_dir, run, scorer)


def _train(options: TrainOptions, output_dir: Path, run: Run, scorer: answers.Scorer | None) -> dict[str, Any]:
    ranks = run.ranks
    found = str(resume.find_checkpoint(options, output_dir, run) or "") if ranks.rank == 0 else ""
    resumed = Path(found) if (found := ranks.share(found, "resume")[0]) else None
    if resumed and ranks.rank == 0:
        resume.keep_samples_a_step(options, resumed, run)
    options.gradient_accumulation_steps = ranks.share(options.gradient_accumulation_steps, "samples a step")[0]
    record = results.record_of(options, output_dir, run)
    for note in schedule(options)[1]:
        run.warning(note)
    arguments = training_arguments(options, output_dir, run.id)
    device = arguments.device
    if ranks.rank == 0:
        write_json_atomic(output_dir / results.RECORD, record.document())

    run.phase("read data", f"{options.train_data_path}")
    make_room_for_sockets()
    processors = load_processors(options.model_name_or_path)
    train_set, eval_set = _datasets(options, processors, run)
    require_same_samples(ranks, [data.samples for data in (train_set, eval_set) if data])
    with MemorySampler(run, device, budget_gb=options.budget_gb) as sampler:
        with CompileAhead() as ahead:
            trainer, total_steps = _prepare(
                options, run, record, arguments, processors, train_set, eval_set, sampler, scorer, ahead
            )
            if found := ahead.finish():
                run.phase("compile", found)
        began = time.monotonic()
        with wandb_environment(options.report_to, run):
            if resumed:
                resumed = carry(resumed, ranks, device, run.folder / CARRIED)
            stopped = _run_trainer(trainer, resumed, total_steps)
            if stopped is None:
                run.phase("save", str(output_dir))
                if ranks.rank == 0:
                    trainer.save_model(str(output_dir))
                run.emit("checkpoint", step=trainer.state.global_step, path=str(output_dir), final=True)
        sampler.measure("save")
    peaks = ranks.last(sampler.peaks())
    if ranks.count > 1:
        part()
    result = {
        "state": "finished" if stopped is None else "stopped",
        "steps": trainer.state.global_step,
        "total_steps": total_steps,
        "train_loss": trainer.mean_loss(),
        "eval_loss": trainer.reported_eval_loss(),
        "label_accuracy": trainer.reported("eval_label_accuracy"),
        "best_checkpoint": trainer.state.best_model_checkpoint,
        "output_dir": str(output_dir),
        "adapter": str(output_dir) if stopped is None else None,
        "resume": None if stopped is None else f"surgvqa train --resume {run.id}",
        "resumed_from": str(resumed) if resumed else None,
        "trained_parameters": sum(p.numel() for p in adapter_parameters(trainer.model).values()),
        "seconds": time.monotonic() - began,
        "samples_per_s": trainer.samples_per_s(),
        "data_wait": trainer.data_wait(),
        **trainer.compilations,
        **{name: max(of_rank[name] for of_rank in peaks) for name in peaks[0]},
    }
    run.result.update(result)
    return result


def _prepare(
    options: TrainOptions,
    run: Run,
    record: results.Trained,
    arguments: TrainingArguments,
    processors: Processors,
    train_set: ClipDataset,
    eval_set: ClipDataset | None,
    sampler: MemorySampler,
    scorer: answers.Scorer | None,
    ahead: CompileAhead,
) -> tuple[EventTrainer, int]:
    """(the trainer, with the model loaded, features cached and layers configured; number of optimiser steps)."""
    device = arguments.device
    run.phase("load model", f"{options.model_name_or_path}")
    compiled = options.compile == "on" or (options.compile == "auto" and device.type == "cuda")
    if compiled:
        start_compiler()
    longest = train_set.longest() if compiled or device.type == "cuda" else 0
    chosen = choose_attention(options.attn_implementation, device, _attention_shape(options, device, longest))
    attention, why_attention = run.ranks.share(chosen, "choice of attention")[0]  # one kernel for all ranks
    packed = options.packing == "on" or (options.packing == "auto" and attention == "flash_attention_2")
    limits_gb = run.ranks.share(memory_limit_gb(options.budget_gb, device, run.ranks.count), "available memory")
    limit_gb = min(limits_gb)  # every rank has to fit into the smallest card
    presets = step_down_presets(run.workspace)
    sizes, _ = checkpoint_sizes(options.model_name_or_path)

    def planned(cached: bool) -> tuple[reductions.Forecast | None, reductions.Fit]:
        kernel = attention_kernel(sizes, attention, device)
        forecast = _forecast(options, arguments, train_set, cached=cached, compiled=compiled, attention=kernel)
        return forecast, reductions.fit(options, sizes.num_hidden_layers, forecast, limit_gb, presets)

    divided = options.shard and run.ranks.count > 1
    if compiled and not packed and not divided:
        expected = planned(options.feature_cache != "off")[1]
        begin_compiling(ahead, options, arguments, attention, expected, -(-longest // ALIGNED) * ALIGNED, limit_gb)
    if options.enforce_budget and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.budget_gb * 1e9 / total), device)
    set_seed(options.seed)
    if options.shard and not divided:
        run.warning("shard: there is one GPU only, so the whole model is on it")
    base = load_model(
        options.model_name_or_path,
        dtype=choose_dtype(device, options.bf16),
        device="cpu" if divided else device,
        attn_implementation=attention,
    )
    model = add_lora(base, options)
    if divided:
        DividedLayers(model, run.ranks, device)
    sampler.measure("load model")
    shown = [train_set, *([eval_set] if eval_set else [])]
    cached = use_cache(base, options.model_name_or_path, shown, options, run)
    sampler.measure("encode")

    forecast, fit = planned(cached)
    if fit.warning:
        run.warning(fit.warning)
    keep = fit.keep if compiled else None
    layers.configure(model, recomputing=fit.recomputing, autocast=arguments.bf16, keep=keep)
    bucket, offset = 1, 0
    if compiled:
        bucket, offset = LENGTH_BUCKET, -(-longest // ALIGNED) * ALIGNED % LENGTH_BUCKET
    held_out = None
    if eval_set and scorer and options.eval_generate:
        at_once, how_many = answers.largest_batch(fit, forecast)
        held_out = answers.HeldOut(eval_set, options.eval_generate, scorer, run, at_once)
        run.phase("plan", f"{len(held_out.indices)} of {len(eval_set)} evaluation samples are answered, {how_many}")
    trainer = EventTrainer(
        run=run,
        record=record,
        step_down=StepDown(
            reductions.changed(options, keep_activations=fit.keep),
            run=run,
            record=record,
            model=base,
            datasets=shown,
            presets=presets,
            recomputing=fit.recomputing,
            forecast=forecast,
            limit_gb=limit_gb,
        ),
        sampler=sampler,
        compiled=compiled,
        held_out=held_out,
        model=model,
        args=arguments,
        train_dataset=Numbered(train_set),
        eval_dataset=Numbered(eval_set) if eval_set else None,
        data_collator=NumberedCollator(Collator(processors, multiple_of=bucket, offset=offset, packed=packed)),
    )
    trainer.add_callback(EventCallback(trainer))
    if options.early_stopping_patience and eval_set:
        trainer.add_callback(EarlyStoppingCallback(options.early_stopping_patience))
    total_steps = _total_steps(arguments, len(train_set), run.ranks.count)
    rows = "packed" if packed and arguments.train_batch_size > 1 else "padded"
    memory_choices = (
        choices(forecast.sizes, fit.prediction.configuration, forecast.weights) if forecast and fit.prediction else []
    )
    _announce_plan(run, options, arguments, model, train_set, total_steps, why_attention, fit, rows, memory_choices)
    return trainer, total_steps


def _attention_shape(options: TrainOptions, device: torch.device, longest: int) -> AttentionShape | None:
    """The size of attention for a row of the batch of `longest` tokens.

    None on a CPU, and if a row has several samples, because only flash-attn needs no mask for those.
    """
    if device.type != "cuda" or (options.per_device_train_batch_size > 1 and options.packing != "off"):
        return None
    sizes, _ = checkpoint_sizes(options.model_name_or_path)
    return AttentionShape(sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim, longest)


def _forecast(
    options: TrainOptions,
    arguments: TrainingArguments,
    train_set: ClipDataset,
    *,
    cached: bool,
    compiled: bool,
    attention: str,
) -> reductions.Forecast | None:
    """Memory predictions for this run; None on a CPU and with float32 weights, for which there are none."""
    if arguments.device.type != "cuda" or not arguments.bf16:
        return None
    return reductions.Forecast(
        options,
        largest_frame(train_set.frame_paths),
        train_set.longest_question_s,
        batch=arguments.train_batch_size,
        eight_bit="8bit" in OptimizerNames(arguments.optim).value,
        cached_features=cached,
        encoders_resident=not cached,
        compiled=compiled,
        attention=attention,
        expandable_segments=allocator.segments_grow(),
    )


def _datasets(options: TrainOptions, processors: Processors, run: Run) -> tuple[ClipDataset, ClipDataset | None]:
    wanted = [(options.train_data_path, options.audio_dir)]
    if options.eval_data_path and evaluates(options):
        wanted.append((options.eval_data_path, options.eval_audio_dir or options.audio_dir))
    found = []
    for path, audio_dir in wanted:
        found.append(ClipDataset(read_samples(path), options.frames_dir, audio_dir, processors, options))
        for text in found[-1].warnings:
            run.warning(text)
    return found[0], found[1] if len(found) > 1 else None


def _total_steps(arguments: TrainingArguments, samples: int, ranks: int) -> int:
    """Number of optimiser steps of the whole run, as Trainer counts them."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    steps = optimiser_steps(
        samples,
        arguments.train_batch_size,
        arguments.gradient_accumulation_steps,
        ranks,
        arguments.dataloader_drop_last,
    )
    return math.ceil(arguments.num_train_epochs * steps)


def _announce_plan(
    run: Run,
    options: TrainOptions,
    arguments: TrainingArguments,
    model: PeftModel,
    train_set: ClipDataset,
    total_steps: int,
    attention: str,
    fit: reductions.Fit,
    rows: str,
    memory_choices: list[tuple[str, float]],
) -> None:
    """Emits a phase event with the plan: what will run, why, and its figures."""
    trained_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if problem := choose_optimiser(options.optim, arguments.device)[1]:
        more = trained_parameters * (MOMENTS_32_BIT - MOMENTS_8_BIT) / 1e9
        run.warning(f"{problem}: using 32-bit AdamW instead of 8-bit, which takes {more:.2f} GB more")
    all_parameters = sum(p.numel() for p in model.parameters())
    tokens = len(train_set[0]["input_ids"])
    dtype = str(next(p for p in model.parameters() if not p.requires_grad).dtype).removeprefix("torch.")
    ranks = run.ranks.count
    window = arguments.train_batch_size * arguments.gradient_accumulation_steps * ranks
    together = f", on {ranks} ranks" if ranks > 1 else ""
    peak = fit.prediction.predicted_peak_gb if fit.prediction else None
    run.emit(
        "phase",
        name="plan",
        text=f"{total_steps} steps of {window} samples{together}, {tokens} tokens per sample, rows {rows}; "
        f"{trained_parameters:,} of {all_parameters:,} parameters trained; {dtype} on {arguments.device}; {fit.text}; "
        f"optimiser {OptimizerNames(arguments.optim).value}; attention {attention}",
        attention=attention,
        optimiser=OptimizerNames(arguments.optim).value,
        dtype=dtype,
        device=str(arguments.device),
        trained_parameters=trained_parameters,
        parameters=all_parameters,
        sequence_tokens=tokens,
        rows=rows,
        ranks=ranks,
        total_steps=total_steps,
        samples=len(train_set),
        fit=fit.text,
        checkpointed_layers=fit.recomputing,
        layers=fit.layers,
        predicted_peak_gb=peak,
        predicted=fit.prediction.peak_table if fit.prediction else None,
        choices=[{"text": text, "saves_gb": gb} for text, gb in memory_choices],
        budget_gb=options.budget_gb,
    )


def _run_trainer(trainer: EventTrainer, checkpoint: Path | None, total_steps: int) -> StopRequested | None:
    """Trains to the end and returns the stop that interrupted it, if any.

    Raises SurgvqaError, which says how to continue, when the GPU runs out of memory.
    """
    if checkpoint and int(checkpoint.name.rpartition("-")[2]) >= total_steps:
        trainer.events.warning(f"{checkpoint.name} is already at the last of {total_steps} steps: nothing to train")
        resume.end_with(trainer, checkpoint)
        return None
    trainer.events.phase("train", f"{total_steps} steps")
    # The first signal does not interrupt saving after an error either; torchrun sends one when a rank is lost.
    with stop_on_signals(trainer.request_stop):
        return _train_or_save(trainer, checkpoint)


def _train_or_save(trainer: EventTrainer, checkpoint: Path | None) -> StopRequested | None:
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.sampler.measure("train")
        return None
    except StopRequested as stop:
        trainer.events.phase("stop", f"stop requested at step {trainer.state.global_step}: saving")
        trainer.save_last_step()
        return stop
    except torch.OutOfMemoryError as error:
        trainer.ranks.leave(first_line(error))
        failure = release_memory(error, trainer, drop_gradients=True)  # at a place where nothing can be retried
        raise trainer.step_down.stop(failure, trainer, trainer.weights_are_intact) from None
    except Exception as error:  # an unreadable frame, a killed worker, a failed service of W&B
        error = trainer.ranks.cause_of(error)
        trainer.ranks.leave(first_line(error))
        if trainer.weights_are_intact:
            _save_after(error, trainer)
        if isinstance(error, SurgvqaError):
            raise of_worker(error) from error
        raise error


def _save_after(error: Exception, trainer: EventTrainer) -> None:
    """Saves the last complete step after `error`, with which the run ends. Warns if the step cannot be saved."""
    try:
        trainer.save_last_step()
    except Exception as second:  # the user has to see the first error
        newest, _ = checkpoints.newest_complete_checkpoint(trainer.folder)
        trainer.events.warning(
            f"step {trainer.state.global_step} could not be saved after {type(error).__name__} "
            f"({first_line(second)}); the newest saved state is {newest.name if newest else 'none'}"
        )
