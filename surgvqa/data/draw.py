"""Draws some of the samples, reproducibly."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain, zip_longest

from surgvqa.data.samples import Sample


def draw_evenly(samples: Sequence[Sample], count: int | None, seed: int) -> list[int]:
    """The indices of `count` samples, in order; all of them if `count` is None or larger.

    They are drawn from the question types in turn, and within each from its labels in turn, so that rare labels are
    included.
    """
    if count is None or count >= len(samples):
        return list(range(len(samples)))
    by_label: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index in random.Random(seed).sample(range(len(samples)), len(samples)):
        by_label[samples[index].question_type][samples[index].label].append(index)
    by_type = [_round_robin(labels.values()) for _, labels in sorted(by_label.items())]
    return sorted(_round_robin(by_type)[:count])


def _round_robin(groups: Iterable[list[int]]) -> list[int]:
    """The first element of each group, then the second of each, and so on."""
    return [index for index in chain.from_iterable(zip_longest(*groups)) if index is not None]
