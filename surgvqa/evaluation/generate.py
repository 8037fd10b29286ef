"""Greedy answers of a model to the samples of a file."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from surgvqa.config.options import AnswerOptions, EvaluateOptions, LoraOptions
from surgvqa.data.dataset import ClipDataset, EncodedSample, loaded, make_room_for_sockets
from surgvqa.data.frames import largest_frame
from surgvqa.data.samples import Sample
from surgvqa.errors import SurgvqaError
from surgvqa.evaluation.answerer import Answerer, load_answerer
from surgvqa.evaluation.model_folders import required
from surgvqa.machine.process import usable_cores
from surgvqa.machine.sampling import MemorySampler
from surgvqa.memory.activations import FP32
from surgvqa.memory.clip import clip_of
from surgvqa.memory.fit import MARGIN, memory_limit_gb
from surgvqa.memory.out_of_memory import empty_cache, read
from surgvqa.memory.predict import MemoryPrediction, predict_generation
from surgvqa.memory.predict import configuration as memory_configuration
from surgvqa.model.encode import use_cache
from surgvqa.model.peft_internals import ADAPTER
from surgvqa.model.sizes import checkpoint_sizes
from surgvqa.runs.folder import Run

CPU_BATCH, MAX_BATCH = 8, 32
"""Default batch sizes: CPU_BATCH on a CPU; on a GPU as many samples as are predicted to fit, up to MAX_BATCH (a GPU
takes little longer for a step with more samples)."""


def answer_some(
    options: EvaluateOptions,
    samples: Sequence[Sample],
    chosen: Sequence[int],
    keep: Callable[[str, float], None],
    run: Run,
) -> dict[str, Any]:
    """Loads the model, answers the `chosen` samples and passes each answer to `keep`, in order.

    Returns facts for the result. Raises UsageError for a sample that cannot be read.
    """
    run.phase("load model", str(options.checkpoint))
    make_room_for_sockets()
    answerer = load_answerer(options)
    audio_dir = str(options.eval_audio_dir or options.audio_dir)
    # looked up among all samples and then reduced to the chosen, because an id's recording depends on the others
    dataset = ClipDataset(
        samples, required(options, "frames_dir"), audio_dir, answerer.processors, options, with_answer=False
    )
    for text in dataset.warnings:
        run.warning(text)
    dataset.samples = [dataset.samples[index] for index in chosen]
    dataset.frame_paths = [dataset.frame_paths[index] for index in chosen]
    dataset.audio_paths = [dataset.audio_paths[index] for index in chosen]
    return answer_all(answerer, dataset, options, run, keep)


def answer_all(
    answerer: Answerer, dataset: ClipDataset, options: AnswerOptions, run: Run, keep: Callable[[str, float], None]
) -> dict[str, Any]:
    """Passes each sample's answer and its share of the batch's milliseconds to `keep`, in order.

    The encoders' outputs come from the feature cache, if that is on. The batch size is the one in the options, else one
    that is predicted to fit the budget. When the GPU runs out of memory it is halved, down to one sample. Returns facts
    for the result.
    """
    cached = use_cache(answerer.base_model, answerer.base, [dataset], options, run)
    prediction = _predict(answerer, dataset, options, cached)
    largest, how_many = _batch_size(
        options, len(dataset), prediction, memory_limit_gb(options.budget_gb, answerer.device)
    )
    run.phase("generate", f"{len(dataset)} samples, {how_many}; {answerer.description}")
    workers = min(4, usable_cores() // 2) if answerer.device.type == "cuda" else 0
    ahead = math.ceil(largest / workers) if workers else None
    # samples one by one, because a batch may have to be split, and several workers can share the first one
    indexed: Any = dataset  # a Dataset by its methods; data.dataset imports no torch
    loader: DataLoader[EncodedSample] = DataLoader(
        indexed, batch_size=None, collate_fn=_identity, num_workers=workers, prefetch_factor=ahead
    )
    encoded = loaded(
        iter(loader)
    )  # starts the workers here, because workers forked in the thread below would fail at their end
    began, done = time.monotonic(), 0
    with MemorySampler(run, answerer.device, budget_gb=options.budget_gb) as sampler:
        run.progress("generate", 0, len(dataset), "samples")

        def prepare() -> tuple[list[EncodedSample], dict[str, Any] | None]:
            items = list(islice(encoded, largest))
            try:
                return items, answerer.batch(items) if items else None
            except torch.OutOfMemoryError:  # memory will be free when this batch is answered
                return items, None

        # while one batch is answered, the next one is read and copied to the GPU
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
                        for text in texts:
                            keep(text, milliseconds)
                        done, items = done + len(texts), items[len(texts) :]
                    except torch.OutOfMemoryError as error:
                        largest = _smaller_batch(min(largest, len(items)), error, options, run)
                    batch = None
                    run.progress("generate", done, len(dataset), "samples")
    return {"samples_per_s": done / (time.monotonic() - began), "batch_size": largest, **sampler.peaks()}


def _identity(item: Any) -> Any:
    return item


def _predict(
    answerer: Answerer, dataset: ClipDataset, options: AnswerOptions, cached: bool
) -> Callable[[int], MemoryPrediction] | None:
    """A function that predicts the memory for a batch size; None on a CPU."""
    if answerer.device.type != "cuda":
        return None
    sizes, weights = checkpoint_sizes(answerer.base)
    adapters = getattr(answerer.model, "peft_config", {})
    configuration = memory_configuration(
        sizes,
        options,
        clip=clip_of(sizes, options, largest_frame(dataset.frame_paths), dataset.longest_question_s),
        lora=LoraOptions(lora_r=adapters[ADAPTER].r) if adapters else LoraOptions(),
        adapter_bytes=FP32 if adapters else 0,
        casts_lora_inputs=True,
        cached_features=cached,
        encoders_resident=not cached,
        compiled=False,
    )
    return lambda batch: predict_generation(sizes, replace(configuration, batch=batch), weights)


def _batch_size(
    options: AnswerOptions, samples: int, predict: Callable[[int], MemoryPrediction] | None, limit_gb: float
) -> tuple[int, str]:
    """(batch size, its description)."""
    if predict is None:
        count = options.batch_size or CPU_BATCH
        return count, f"{count} at once"
    room = limit_gb * (1 - MARGIN)
    count = options.batch_size or min(MAX_BATCH, samples)
    while options.batch_size is None and count > 1 and not predict(count).fits(room):
        count -= 1
    if options.batch_size is None:
        count = math.ceil(samples / math.ceil(samples / count))  # batches of nearly equal size
    found = predict(count)
    text = f"{count} at once ({found.predicted_peak_gb:.1f} of {limit_gb:.1f} GB predicted)"
    if not found.fits(limit_gb):
        text += ", which may not fit: the batch is halved if memory runs out"
    return count, text


def _smaller_batch(size: int, error: torch.OutOfMemoryError, options: AnswerOptions, run: Run) -> int:
    """Halves the batch size and reports it in an `oom` event. Raises SurgvqaError for a batch of one sample."""
    failure, action = read(error), "stopping" if size == 1 else f"answering {size // 2} at once"
    figures = vars(failure) | {"text": f"batch of {size}: {failure.text}: {action}"}
    run.emit("oom", step=None, phase="generate", action=action, **figures)
    if size == 1:
        raise SurgvqaError(
            f"out of GPU memory with a single sample of {options.num_frames} frames at {options.image_size} px: "
            f"{failure.text}; evaluate with fewer or smaller frames (--num_frames, --image_size)"
        ) from None
    traceback.clear_frames(error.__traceback__)  # frees the activations that the frames refer to
    empty_cache()
    return size // 2
