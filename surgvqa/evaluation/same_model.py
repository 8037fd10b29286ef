"""Checks that an adapter on its base and a checkpoint are the same model, by logits and answers on the same samples."""

from __future__ import annotations

import gc
import math
from contextlib import nullcontext
from typing import Any

import torch

from surgvqa.config.options import EvaluateOptions
from surgvqa.data.dataset import ClipDataset, EncodedSample
from surgvqa.data.samples import read_samples
from surgvqa.evaluation.answerer import Answerer, load_answerer
from surgvqa.evaluation.merge import Verification
from surgvqa.evaluation.model_folders import required
from surgvqa.memory.out_of_memory import empty_cache
from surgvqa.runs.folder import Run


def compare(adapter: EvaluateOptions, merged: EvaluateOptions, samples: int, run: Run) -> Verification:
    """Answers the first `samples` of the file with the adapter on its base, then with the merged checkpoint.

    Compares the logits at the true answer's tokens, so that both models have the same input. Also computes those of
    PEFT's own merge, rounded to bfloat16, which a correct checkpoint equals. Only one model is in memory at a time; two
    sets of logits of each sample, float32 [answer tokens, vocabulary], are kept on the host.
    """
    run.phase("verify", f"{samples} samples with base + adapter")
    answerer = load_answerer(adapter)
    asked, learned = (_dataset(answerer, adapter, samples, with_answer) for with_answer in (False, True))
    answers, logits, changes2 = [], [], 0.0
    for index in range(len(asked)):
        answers += answerer.answer(answerer.batch([asked[index]]))
        item = learned[index]
        logits.append(_logits(answerer, item))
        changes2 += _square(logits[-1] - _logits(answerer, item, plain=True))
        run.progress("verify", index + 1, 2 * len(asked), "samples")
    dtype = str(answerer.base_model.dtype).removeprefix("torch.")
    _merge_and_round(answerer)
    rounded = [_logits(answerer, learned[index]) for index in range(len(asked))]
    del answerer
    gc.collect()
    empty_cache()

    run.phase("verify", f"{samples} samples with {merged.checkpoint}")
    answerer = load_answerer(merged)
    differ, largest, gaps2, unexplained2 = [], 0.0, 0.0, 0.0
    for index in range(len(asked)):
        (answer,) = answerer.answer(answerer.batch([asked[index]]))
        if answer != answers[index]:
            differ.append({"id": asked.samples[index].id, "adapter": answers[index], "merged": answer})
        found = _logits(answerer, learned[index])
        gaps2 += _square(found - logits[index])
        unexplained2 += _square(found - rounded[index])
        largest = max(largest, float((found - logits[index]).abs().max()))
        run.progress("verify", len(asked) + index + 1, 2 * len(asked), "samples")
    gap, unexplained = _share(gaps2, changes2), _share(unexplained2, changes2)
    return Verification(len(asked), largest, gap, unexplained, dtype, differ)


def _share(part2: float, whole2: float) -> float:
    if part2 == 0:
        return 0.0
    return math.sqrt(part2 / whole2) if whole2 else math.inf


def _square(values: torch.Tensor) -> float:
    return float(values.double().square().sum())


@torch.no_grad()
def _merge_and_round(answerer: Answerer) -> None:
    answerer.model = answerer.model.merge_and_unload()
    for parameter in answerer.model.parameters():
        parameter.copy_(parameter.to(torch.bfloat16))


def _dataset(answerer: Answerer, options: EvaluateOptions, samples: int, with_answer: bool) -> ClipDataset:
    return ClipDataset(
        read_samples(required(options, "eval_data_path"))[:samples],
        required(options, "frames_dir"),
        required(options, "audio_dir"),
        answerer.processors,
        options,
        with_answer=with_answer,
    )


@torch.inference_mode()
def _logits(answerer: Answerer, item: EncodedSample, plain: bool = False) -> torch.Tensor:
    """Logits float32 [answer tokens, vocabulary] on the host; with `plain`, those of the base without its adapter."""
    inputs = answerer.batch([item])
    inputs.pop("tokens")  # only used in training
    model: Any = answerer.model
    with model.disable_adapter() if plain else nullcontext():
        found: torch.Tensor = answerer.base_model(**inputs).logits
    return found.float().cpu()
