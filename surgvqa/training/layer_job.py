"""What a training lets a child process compile ahead (model/compile_ahead.py)."""

from __future__ import annotations

from dataclasses import fields

import torch
from transformers import TrainingArguments

from surgvqa.config.options import LoraOptions, TrainOptions
from surgvqa.memory.reductions import Fit
from surgvqa.model.compile_ahead import CompileAhead, LayerJob
from surgvqa.model.device import choose_dtype
from surgvqa.model.sizes import checkpoint_sizes
from surgvqa.model.torch_internals import compiler_cache_dir

DEVICES = ("cuda",)
"""Kinds of devices for which a layer is compiled ahead."""
BESIDE_WEIGHTS_GB = 9.0
"""Room that must be left beside the weights: for the child (a layer's weights and activations, a CUDA context) and for
encoding in this process."""


def begin_compiling(
    ahead: CompileAhead,
    options: TrainOptions,
    arguments: TrainingArguments,
    attention: str,
    fit: Fit,
    tokens: int,
    limit_gb: float,
) -> None:
    """Starts to compile the layer of this training, where that is worth it and memory allows it.

    `fit` is what the training will probably choose after loading, and `tokens` the length of its longest rows.
    """
    device = arguments.device
    parameters = sum(sum(part) for part in checkpoint_sizes(options.model_name_or_path)[1].values())
    if device.type not in DEVICES:
        return
    dtype = choose_dtype(device, options.bf16)
    if device.type == "cuda" and parameters * dtype.itemsize / 1e9 + BESIDE_WEIGHTS_GB > limit_gb:
        return
    job = LayerJob(
        checkpoint=str(options.model_name_or_path),
        lora={field.name: getattr(options, field.name) for field in fields(LoraOptions)},
        attention=attention,
        keep=fit.keep,
        recomputing={0: (False,), fit.layers: (True,)}.get(fit.recomputing, (False, True)),
        input_needs_grad=(False, True) if options.input_mode == "text_only" else (True,),
        rows=arguments.train_batch_size,
        tokens=tokens,
        dtype=str(dtype).removeprefix("torch."),
        autocast=arguments.bf16,
        device=str(device),
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    ahead.begin(job, job.mark(compiler_cache_dir(), name))
