"""Greedy answers from a model: for a file of samples (evaluate) or for one question (ask)."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from surgvqa.config.options import EvaluateOptions, LoraOptions
from surgvqa.data.dataset import ClipDataset, Item, loaded, make_room_for_sockets
from surgvqa.data.frames import largest_frame
from surgvqa.data.samples import Sample, read_samples
from surgvqa.errors import SurgvqaError
from surgvqa.evaluation.answerer import Answerer, load_answerer
from surgvqa.evaluation.model_folders import required
from surgvqa.machine.process import usable_cores
from surgvqa.machine.sampling import MemorySampler
from surgvqa.memory.activations import FP32
from surgvqa.memory.clip import clip_of
from surgvqa.memory.fit import MARGIN, memory_limit_gb
from surgvqa.memory.out_of_memory import empty_cache, read
from surgvqa.memory.predict import Prediction as MemoryPrediction
from surgvqa.memory.predict import configuration as memory_configuration
from surgvqa.memory.predict import predict_generation
from surgvqa.model.encode import use_cache
from surgvqa.model.peft_internals import ADAPTER
from surgvqa.model.sizes import checkpoint_sizes
from surgvqa.runs.folder import Run

AT_ONCE, AT_MOST = 8, 32
"""Samples generated together by default: AT_ONCE on a CPU; on a GPU as many as are predicted to fit, up to AT_MOST (a
step of generation takes a GPU little longer for more of them)."""


def generate_answers(
    options: EvaluateOptions, run: Run
) -> tuple[list[Sample], list[tuple[str, float]], dict[str, Any]]:
    """(samples, an answer to each and its share of the batch's milliseconds, facts for the result).

    A sample that cannot be read ends the run with its error.

    How many are answered at once is what the options ask for, else what is predicted to fit the budget; when the GPU's
    memory runs out it is halved, down to one sample.
    """
    run.phase("load model", str(options.checkpoint))
    make_room_for_sockets()
    answerer = load_answerer(options)
    audio_dir = options.eval_audio_dir or required(options, "audio_dir")
    dataset = ClipDataset(
        read_samples(required(options, "eval_data_path")),
        required(options, "frames_dir"),
        audio_dir,
        answerer.processors,
        options,
        with_answer=False,
    )
    for text in dataset.warnings:
        run.warning(text)
    cached = use_cache(answerer.base_model, answerer.base, [dataset], options, run)
    prediction = _predict(answerer, dataset, options, cached)
    largest, how_many = _at_once(options, len(dataset), prediction, memory_limit_gb(options.budget_gb, answerer.device))
    run.phase("generate", f"{len(dataset)} samples, {how_many}; {answerer.description}")
    workers = min(4, usable_cores() // 2) if answerer.device.type == "cuda" else 0
    ahead = math.ceil(largest / workers) if workers else None
    # one by one: a batch may have to be split, and the first one need not wait for one worker to make it all
    indexed: Any = dataset  # a Dataset by its methods; data.dataset imports no torch
    loader: DataLoader[Item] = DataLoader(
        indexed, batch_size=None, collate_fn=_as_it_is, num_workers=workers, prefetch_factor=ahead
    )
    encoded = loaded(iter(loader))  # starts the workers here: forked in the thread below, they would fail as they end
    answers: list[tuple[str, float]] = []
    began = time.monotonic()
    with MemorySampler(run, answerer.device, budget_gb=options.budget_gb) as sampler:
        run.progress("generate", 0, len(dataset), "samples")

        def prepare() -> tuple[list[Item], dict[str, Any] | None]:
            items = list(islice(encoded, largest))
            try:
                return items, answerer.batch(items) if items else None
            except torch.OutOfMemoryError:  # there will be room once this batch's own turn has come
                return items, None

        # while some are answered, the next ones are read and sent to the GPU
        with ThreadPoolExecutor(1, thread_name_prefix="next batch") as beside:
            coming = beside.submit(prepare)
            while (prepared := coming.result())[0]:
                items, batch = prepared
                coming = beside.submit(prepare)
                while items:
                    try:
                        asked = time.monotonic()
                        texts = answerer.answer(batch or answerer.batch(items[:largest]))
                        milliseconds = 1000 * (time.monotonic() - asked) / len(texts)
                        answers += [(text, milliseconds) for text in texts]
                        items = items[len(texts) :]
                    except torch.OutOfMemoryError as error:
                        largest = _smaller_batch(min(largest, len(items)), error, options, run)
                    batch = None
                    run.progress("generate", len(answers), len(dataset), "samples")
    facts = {
        "checkpoint": str(Path(required(options, "checkpoint")).absolute()),
        "samples_per_s": len(answers) / (time.monotonic() - began),
        "batch_size": largest,
        **sampler.peaks(),
    }
    return dataset.samples, answers, facts


def _as_it_is(item: Any) -> Any:
    return item


def _predict(
    answerer: Answerer, dataset: ClipDataset, options: EvaluateOptions, cached: bool
) -> Callable[[int], MemoryPrediction] | None:
    """The memory of answering so many at once; None where it is not known, on a CPU."""
    if answerer.device.type != "cuda":
        return None
    sizes, weights = checkpoint_sizes(answerer.base)
    adapters = getattr(answerer.model, "peft_config", {})
    configuration = memory_configuration(
        sizes,
        options,
        clip=clip_of(sizes, options, largest_frame(dataset.frame_paths)),
        lora=LoraOptions(lora_r=adapters[ADAPTER].r) if adapters else LoraOptions(),
        adapter_bytes=FP32 if adapters else 0,
        casts_lora_inputs=True,
        cached_features=cached,
        encoders_resident=not cached,
        compiled=False,
    )
    return lambda batch: predict_generation(sizes, replace(configuration, batch=batch), weights)


def _at_once(
    options: EvaluateOptions, samples: int, predict: Callable[[int], MemoryPrediction] | None, limit_gb: float
) -> tuple[int, str]:
    """(how many of the samples are answered at once, that in words)."""
    if predict is None:
        count = options.batch_size or AT_ONCE
        return count, f"{count} at once"
    room = limit_gb * (1 - MARGIN)
    count = options.batch_size or min(AT_MOST, samples)
    while options.batch_size is None and count > 1 and not predict(count).fits(room):
        count -= 1
    if options.batch_size is None:
        count = math.ceil(samples / math.ceil(samples / count))  # no batch much smaller than the others
    found = predict(count)
    text = f"{count} at once ({found.predicted_peak_gb:.1f} of {limit_gb:.1f} GB predicted)"
    if not found.fits(limit_gb):
        text += ", which may not fit: the batch is halved when memory runs out"
    return count, text


def _smaller_batch(size: int, error: torch.OutOfMemoryError, options: EvaluateOptions, run: Run) -> int:
    """Half the batch, reported in an `oom` event; SurgvqaError when it is already a single sample."""
    said, action = read(error), "stopping" if size == 1 else f"answering {size // 2} at once"
    figures = vars(said) | {"text": f"batch of {size}: {said.text}: {action}"}
    run.emit("oom", step=None, phase="generate", action=action, **figures)
    if size == 1:
        raise SurgvqaError(
            f"out of GPU memory with a single sample of {options.num_frames} frames at {options.image_size} px: "
            f"{said.text}; evaluate with fewer or smaller frames (--num_frames, --image_size)"
        ) from None
    traceback.clear_frames(error.__traceback__)  # they hold the activations
    empty_cache()
    return size // 2
