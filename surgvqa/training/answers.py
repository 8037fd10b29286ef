"""Answers some samples at each evaluation during training, and scores the answers.

The loss measures the probability of the reference answers, not which answer is given. It can be at its best while all
answers to a question type are the same. Answers are greedy, as in `evaluate`, and use the feature cache.
"""

from __future__ import annotations

import copy
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from surgvqa.config.options import EvaluateOptions
from surgvqa.config.settings import settings_of
from surgvqa.data.collate import Collator
from surgvqa.data.dataset import ClipDataset
from surgvqa.data.draw import draw_evenly
from surgvqa.memory.activations import Configuration
from surgvqa.memory.out_of_memory import empty_cache
from surgvqa.memory.predict import GB, adapter_tensors, optimiser_bytes, predict_generation
from surgvqa.memory.reductions import Fit, Forecast
from surgvqa.model import layers
from surgvqa.model.generation import LENGTHS, Generator
from surgvqa.runs.folder import Run
from surgvqa.runs.ranks import Ranks

AT_ONCE = 8
MAX_NEW_TOKENS: int = settings_of(EvaluateOptions)["max_new_tokens"].default
FEWEST = 4
"""Minimum number of samples of a question type for warnings about its labels."""
SHOWN = ("n", "label_accuracy", "keyword_accuracy", "majority_accuracy", "labels", "predicted", "collapsed")
"""Figures of each question type in an `answers` event."""

Scorer = Callable[[list[dict[str, Any]]], Mapping[str, Any]]
"""The signature of `score` in evaluation/score.py, which this room cannot import."""


class HeldOut:
    """Answers the same `count` evaluation samples at each call."""

    def __init__(self, dataset: ClipDataset, count: int, scorer: Scorer, run: Run, at_once: int = AT_ONCE):
        self.dataset, self.scorer, self.run, self.at_once = dataset, scorer, run, at_once
        self.indices = draw_evenly(dataset.samples, count, seed=0)
        self._collapsed: set[str] = set()
        self._began = 0.0

    def answers(self, model: Any, device: torch.device, bf16: bool, look: Callable[[], None]) -> list[str]:
        """The answers of `model` (without PEFT's wrapper, in eval mode). Each of several ranks answers a part.

        `look` is called between batches. Raises torch.OutOfMemoryError when a single sample does not fit.
        """
        self._began = time.monotonic()
        self.run.phase("answer", f"{len(self.indices)} held-out samples")
        prompts = copy.copy(self.dataset)  # with the current settings
        prompts.with_answer = False
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)
        with layers.uncompiled(model), autocast:
            texts = self._answers(model, prompts, device, look)
        empty_cache()
        return texts

    def report(self, answers: Sequence[Sequence[str]], step: int) -> Mapping[str, Any]:
        """The scorer's report on the `answers` of all ranks. Also emits it as an `answers` event."""
        texts = [""] * len(self.indices)
        for rank, part in enumerate(answers):
            texts[rank :: len(answers)] = part
        report = self.scorer(
            [
                {
                    "question_type": sample.question_type,
                    "short_answer": sample.short_answer,
                    "ground_truth": sample.answer,
                    "predicted_answer": text,
                }
                for sample, text in zip((self.dataset.samples[i] for i in self.indices), texts)
            ]
        )
        self.run.emit(
            "answers",
            step=step,
            samples=len(texts),
            label_accuracy=report["label_accuracy"],
            keyword_accuracy=report["keyword_accuracy"],
            majority_accuracy=report["majority_accuracy"],
            collapsed_types=report["collapsed_types"],
            by_type={kind: {name: row[name] for name in SHOWN} for kind, row in report["by_type"].items()},
            seconds=time.monotonic() - self._began,
        )
        self._warn_collapsed(report["by_type"], step)
        return report

    def _warn_collapsed(self, by_type: Mapping[str, Any], step: int) -> None:
        """Warns when further question types have lost most of their labels."""
        collapsed = {
            kind: " and ".join(few) for kind, row in by_type.items() if (few := collapsed_labels(row)) is not None
        }
        if new := collapsed.keys() - self._collapsed:
            listed = "; ".join(f"{kind}: only {collapsed[kind] or 'none of its labels'}" for kind in sorted(new))
            self.run.warning(f"step {step}: answers have collapsed, whatever the loss says: {listed}")
        self._collapsed = set(collapsed)

    def _answers(self, model: Any, prompts: ClipDataset, device: torch.device, look: Callable[[], None]) -> list[str]:
        processors = prompts.processors
        own_indices = self.indices[self.run.ranks.rank :: self.run.ranks.count]
        collate = Collator(processors, multiple_of=LENGTHS)
        generator = Generator(model)  # not kept, because training needs its memory
        texts: list[str] = []
        while len(texts) < len(own_indices):
            look()
            items = [prompts[index] for index in own_indices[len(texts) : len(texts) + self.at_once]]
            try:
                whole = collate(items)
                batch = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in whole.items()}
                end = processors.im_end_token_id
                ids = generator.answer(batch, max_new_tokens=MAX_NEW_TOKENS, end_token_id=end)
            except torch.OutOfMemoryError as error:
                if len(items) == 1:
                    raise
                self.at_once = len(items) // 2
                self.run.warning(f"out of memory with {len(items)} samples: answering {self.at_once} at once")
                traceback.clear_frames(error.__traceback__)  # frees the activations that the frames refer to
                generator = Generator(model)
                empty_cache()
                continue
            texts += [text.strip() for text in processors.tokenizer.batch_decode(ids, skip_special_tokens=True)]
            self.run.progress("answer", len(texts), len(own_indices), "samples")
        return texts


def collapsed_labels(row: Mapping[str, Any]) -> list[str] | None:
    """The labels that answers to a question type state, if they are at most half of its labels.

    None if they are more, or if there are too few samples.
    """
    labels = row["labels"]
    given = [label for label in labels if label in row["predicted"]]
    enough = len(labels) > 1 and row["n"] >= max(FEWEST, len(labels))
    return given if enough and len(given) <= len(labels) // 2 else None


def largest_batch(fit: Fit, forecast: Forecast | None) -> tuple[int, str]:
    """(batch size, its description): as large as fits into the memory of training, at most AT_ONCE and at least one."""
    if fit.prediction is None or forecast is None:
        return AT_ONCE, f"{AT_ONCE} at once"
    most, c = fit.prediction.peak_bytes, fit.prediction.configuration
    beside = optimiser_bytes(adapter_tensors(forecast.sizes, c.lora), c)

    def needed(batch: int) -> float:
        return beside + predict_generation(forecast.sizes, _generation_case(c, batch), forecast.weights).peak_bytes

    count = next((n for n in range(AT_ONCE, 1, -1) if needed(n) <= most), 1)
    return count, f"{count} at once, {needed(count) / GB:.1f} GB predicted"


def _generation_case(c: Configuration, batch: int) -> Configuration:
    return replace(c, batch=batch, accumulation=1)


class LossByType:
    """The evaluation's loss by question type: the mean over all supervised tokens of a type."""

    def __init__(self, dataset: ClipDataset, ranks: Ranks):
        self.dataset, self.ranks = dataset, ranks
        self._parts: list[tuple[list[int], torch.Tensor, torch.Tensor]] = []

    def begin(self) -> None:
        """Resets the sums before an evaluation."""
        self._parts.clear()

    def add(self, indices: list[int], inputs: Mapping[str, torch.Tensor], logits: torch.Tensor) -> None:
        """Adds a batch: the samples' indices, the model's inputs and its logits [supervised tokens, vocabulary]."""
        labels, supervised = inputs["labels"], inputs["supervised"]
        losses = F.cross_entropy(logits.float(), labels.flatten()[supervised + 1], reduction="none")
        if "cu_seq_lens" in inputs:
            rows = torch.searchsorted(inputs["cu_seq_lens"], supervised, right=True) - 1
        else:
            rows = supervised // labels.shape[1]
        sums = torch.zeros(len(indices), device=losses.device).index_add(0, rows, losses)
        self._parts.append((indices, sums, rows.bincount(minlength=len(indices))))

    def result(self) -> dict[str, float]:
        """{question type: loss} over all ranks."""
        own_sums = [
            (self.dataset.samples[index].question_type, loss, count)
            for indices, losses, counts in self._parts
            for index, loss, count in zip(indices, losses.tolist(), counts.tolist())
        ]
        sums: dict[str, float] = defaultdict(float)
        tokens: dict[str, int] = defaultdict(int)
        for of_rank in self.ranks.share(own_sums, "loss by type"):
            for kind, loss, count in of_rank:
                sums[kind] += loss
                tokens[kind] += count
        return {kind: sums[kind] / tokens[kind] for kind in sorted(sums) if tokens[kind]}
