"""95 % intervals of accuracies and of paired differences on clustered samples, and the sample of each prediction."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from surgvqa.data.samples import Sample, wording_of
from surgvqa.errors import UsageError
from surgvqa.untrusted import one_line

Z = 1.96


def interval(correct: Sequence[bool], clusters: Sequence[int] | None = None) -> list[float]:
    """[low, high] of the share of correct answers, within 0..1; [0, 1] for a single cluster."""
    return _around_mean(correct, clusters, 0.0)


def paired_interval(differences: Sequence[float], clusters: Sequence[int] | None = None) -> list[float]:
    """[low, high] of the mean of paired differences, within -1..1; [-1, 1] for a single cluster."""
    return _around_mean(differences, clusters, -1.0)


def standard_error(values: Sequence[float], clusters: Sequence[int] | None = None) -> float | None:
    """The standard error of the mean of `values`; None if there is only one cluster.

    With the residuals y - ȳ summed to s_c in each of the C clusters c it is √(Σ s_c² · C/(C-1)) / n, the cluster-robust
    (sandwich) estimate. Without `clusters` each sample is its own cluster, which gives the usual estimate.
    """
    n = len(values)
    mean = sum(values) / n
    sums: dict[int, float] = defaultdict(float)
    for index, value in enumerate(values):
        sums[clusters[index] if clusters is not None else index] += value - mean
    count = len(sums)
    return math.sqrt(sum(s * s for s in sums.values()) * count / (count - 1)) / n if count > 1 else None


def _around_mean(values: Sequence[float], clusters: Sequence[int] | None, least: float) -> list[float]:
    """[low, high]: the mean ± 1.96 standard errors, within `least`..1."""
    error = standard_error(values, clusters)
    if error is None:
        return [least, 1.0]
    mean = sum(values) / len(values)
    return [max(least, mean - Z * error), min(1.0, mean + Z * error)]


def samples_of(predictions: Sequence[dict[str, Any]], samples: Sequence[Sample], path: str) -> list[Sample]:
    """The sample that each prediction answers, matched by those of video, id and question that the prediction has.

    If several samples match, they are used in order. Raises UsageError when a prediction has no sample in this file.
    """
    tables: dict[tuple[str, ...], dict[tuple[str, ...], list[Sample]]] = {}
    found = []
    for number, prediction in enumerate(predictions, 1):
        has = tuple(key for key in ("video_id", "question_id", "question") if prediction.get(key))
        if "question_id" not in has and "question" not in has:
            raise UsageError(f"prediction {number} has no question_id and no question, so its sample cannot be found")
        if has not in tables:
            tables[has] = defaultdict(list)
            for sample in reversed(samples):
                tables[has][_key(has, sample.video_id, sample.id, sample.wording)].append(sample)
        video, name, question = (str(prediction.get(key) or "") for key in ("video_id", "question_id", "question"))
        fitting = tables[has].get(_key(has, video, name, wording_of(question)))
        if not fitting:
            named = one_line(name or question)[:60]
            raise UsageError(
                f"prediction {number} ({named}) answers no sample of {path}; are the predictions for another file?"
            )
        found.append(fitting.pop() if len(fitting) > 1 else fitting[0])
    return found


def _key(has: tuple[str, ...], video_id: str, name: str, wording: str) -> tuple[str, ...]:
    values = {"video_id": video_id, "question_id": name, "question": wording}
    return tuple(values[key] for key in has)
