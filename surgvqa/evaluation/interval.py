"""The 95 % interval of an accuracy whose samples come in clusters, and which sample a prediction belongs to."""

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
    """[low, high] of the share of correct answers, within 0..1.

    With clusters c and residuals y - ȳ summed to s_c in each of the C clusters, the half width is
    1.96 · √(Σ s_c² · C/(C-1)) / n: the cluster-robust (sandwich) variance of a mean. Without `clusters` each sample is
    one of its own, and this is the usual interval. A single cluster says nothing: [0, 1].
    """
    n = len(correct)
    mean = sum(correct) / n
    sums: dict[int, float] = defaultdict(float)
    for index, right in enumerate(correct):
        sums[clusters[index] if clusters is not None else index] += right - mean
    count = len(sums)
    if count < 2:
        return [0.0, 1.0]
    half = Z * math.sqrt(sum(s * s for s in sums.values()) * count / (count - 1)) / n
    return [max(0.0, mean - half), min(1.0, mean + half)]


def samples_of(predictions: Sequence[dict[str, Any]], samples: Sequence[Sample], path: str) -> list[Sample]:
    """The sample that each prediction answers: by video, id and question, or what the prediction has of them.

    Where several samples fit they are taken in order. UsageError when one has none: another file's predictions.
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
            raise UsageError(f"prediction {number} ({named}) answers no sample of {path}; is it that file's?")
        found.append(fitting.pop() if len(fitting) > 1 else fitting[0])
    return found


def _key(has: tuple[str, ...], video_id: str, name: str, wording: str) -> tuple[str, ...]:
    values = {"video_id": video_id, "question_id": name, "question": wording}
    return tuple(values[key] for key in has)
