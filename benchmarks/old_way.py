"""The old way of training and answering, for comparison: each sample is decoded in the training process and goes
through the encoders in every step, all positions have logits, PEFT and the layers are unchanged, answers come one at a
time.

    python benchmarks/old_way.py train '{"model_name_or_path": "…", "train_data_path": "…", …}'
    python benchmarks/old_way.py answer '{"checkpoint": "…", "eval_data_path": "…", …}'

The JSON has options of `surgvqa train` or `surgvqa evaluate`. Prints one JSON line. Loading the model is not timed.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, get_scheduler

from surgvqa.config.options import EvaluateOptions, TrainOptions
from surgvqa.data.collate import Collator
from surgvqa.data.dataset import ClipDataset
from surgvqa.data.processors import load_processors
from surgvqa.data.prompt import IGNORED
from surgvqa.data.samples import read_samples
from surgvqa.model import layers
from surgvqa.model.adapter import add_lora
from surgvqa.model.attention import choose_attention
from surgvqa.model.device import choose_device, choose_dtype
from surgvqa.model.loading import load_model
from surgvqa.training.arguments import choose_optimiser

Batch = dict[str, torch.Tensor]
OURS = ("audio_tokens", "position_ids", "host_ids", "supervised", "tokens")
"""Keys that our collator adds for our model."""


def load(
    options: TrainOptions | EvaluateOptions, checkpoint: str, samples: str, dtype: torch.dtype | None = None
) -> tuple[Any, ClipDataset]:
    """The frozen model on its device, in `dtype` (None: bfloat16 on a GPU), and the samples, each of which is decoded
    when it is taken."""
    device = choose_device(options.device)
    attention, _ = choose_attention(options.attn_implementation, device)
    data = ClipDataset(
        read_samples(samples),
        options.frames_dir,
        options.audio_dir,
        load_processors(checkpoint),
        options,
        with_answer=isinstance(options, TrainOptions),
    )
    model = load_model(checkpoint, dtype=dtype or choose_dtype(device), device=device, attn_implementation=attention)
    model.get_input_embeddings().to(device)
    return model, data


def window(data: ClipDataset, indices: list[list[int]], device: torch.device) -> tuple[list[Batch], int]:
    """The micro batches of an optimiser step on the device, and their supervised tokens."""
    collate = Collator(data.processors)
    batches = [collate([data[int(index)] for index in micro]) for micro in indices]
    tokens = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
    return [{name: batch[name].to(device) for name in batch if name not in OURS} for batch in batches], tokens


def backward(model: Any, batches: list[Batch], tokens: int) -> float:
    """Computes gradients of the mean loss over the window's supervised tokens. Returns the loss."""
    total = 0.0
    for batch in batches:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
            logits = model(**inputs, use_cache=False).logits
        targets = batch["labels"][:, 1:].flatten()
        loss = F.cross_entropy(logits.float()[:, :-1].flatten(0, 1), targets, reduction="sum") / tokens
        loss.backward()
        total += float(loss.detach())
    return total


def optimiser_of(options: TrainOptions, model: Any, steps: int) -> tuple[Any, Any]:
    """(optimiser, scheduler) with Trainer's defaults: AdamW without weight decay, and a rate that falls to 0."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if choose_optimiser(options.optim, model.device) == "adamw_bnb_8bit":
        import bitsandbytes

        optimiser = bitsandbytes.optim.AdamW8bit(trained, lr=options.learning_rate, weight_decay=0.0)
    else:
        optimiser = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0)
    return optimiser, get_scheduler("linear", optimiser, num_warmup_steps=0, num_training_steps=steps)


def step(model: Any, optimiser: Any, scheduler: Any, batches: list[Batch], tokens: int) -> float:
    """Runs one optimiser step and returns its loss."""
    loss = backward(model, batches, tokens)
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimiser.step()
    scheduler.step()
    optimiser.zero_grad()
    return loss


def train(options: TrainOptions) -> dict[str, Any]:
    """Trains for `num_train_epochs`."""
    base, data = load(options, options.model_name_or_path, options.train_data_path)
    model = add_lora(base, options).train()
    layers.checkpoint_layers(base, None if options.gradient_checkpointing else 0)
    micro, many = options.per_device_train_batch_size, options.gradient_accumulation_steps
    steps = math.ceil(len(data) / (micro * many)) * int(options.num_train_epochs)
    optimiser, scheduler = optimiser_of(options, model, steps)
    generator = torch.Generator().manual_seed(options.seed)
    losses, times, decoding = [], [time.perf_counter()], 0.0
    for _ in range(int(options.num_train_epochs)):
        order = torch.randperm(len(data), generator=generator).tolist()
        parts = [order[start : start + micro] for start in range(0, len(order), micro)]
        for first in range(0, len(parts), many):
            asked = time.perf_counter()
            batches, tokens = window(data, parts[first : first + many], base.device)
            decoding += time.perf_counter() - asked
            losses.append(step(model, optimiser, scheduler, batches, tokens))
            times.append(time.perf_counter())
    shown = len(data) * int(options.num_train_epochs)
    return {
        **seconds_of(times, micro * many, shown),
        "decoding_s": round(decoding, 2),
        "samples": shown,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        **peak(base.device),
    }


@torch.inference_mode()
def answer(options: EvaluateOptions) -> dict[str, Any]:
    """Greedy answers, one sample at a time."""
    base, data = load(options, options.checkpoint, options.eval_data_path)
    processors, answers, times = data.processors, [], [time.perf_counter()]
    collate = Collator(processors, padding_side="left")
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=options.max_new_tokens,
        eos_token_id=processors.im_end_token_id,
        pad_token_id=processors.pad_token_id,
    )
    for index in range(len(data)):
        row = collate([data[index]])
        batch = {name: row[name].to(base.device) for name in row if name not in ("labels", *OURS)}
        ids = base.generate(**batch, generation_config=greedy)[0, batch["input_ids"].shape[1] :]
        answers.append(processors.tokenizer.decode(ids, skip_special_tokens=True).strip())
        times.append(time.perf_counter())
    return {**seconds_of(times, 1, len(data)), "answers": answers, **peak(base.device)}


def seconds_of(times: list[float], first: int, samples: int) -> dict[str, float]:
    """Seconds of the first step (`first` samples), which loads the GPU's libraries, and of each later sample."""
    rest = (times[-1] - times[1]) / (samples - first) if samples > first else math.nan
    return {"seconds": round(times[-1] - times[0], 2), "first_s": round(times[1] - times[0], 2), "first": first,
            "s_per_sample": round(rest, 4)}  # fmt: skip


def peak(device: torch.device) -> dict[str, float]:
    """The peak of torch's allocated memory on the GPU in GB."""
    return {"peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)} if device.type == "cuda" else {}


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    print(json.dumps(train(TrainOptions(**given)) if sys.argv[1] == "train" else answer(EvaluateOptions(**given))))
