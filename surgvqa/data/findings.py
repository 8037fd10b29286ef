"""Findings from the text of samples, without frames and recordings: leaks, wordings, clusters, odd answers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from surgvqa.data.clusters import clusters_of
from surgvqa.data.samples import Sample

EXAMPLES = 5
"""Number of examples for each kind of finding."""


def id_collisions(samples: Iterable[Sample]) -> list[str]:
    """The ids with more than one question, in any video."""
    questions: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        questions[sample.id].add(sample.wording)
    return sorted(name for name, asked in questions.items() if len(asked) > 1)


def in_several(groups: Sequence[set[Any]]) -> set[Any]:
    """The elements that are in more than one of the sets."""
    counts = Counter(item for group in groups for item in group)
    return {item for item, count in counts.items() if count > 1}


def wordings(samples: Iterable[Sample]) -> dict[str, set[str]]:
    """{question type: its different wordings}, ignoring case and extra spaces."""
    found: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        found[sample.question_type].add(sample.wording)
    return dict(sorted(found.items()))


def unseen_wordings(training: Iterable[Sample], evaluation: Iterable[Sample]) -> dict[str, int]:
    """{question type: number of wordings in the evaluation that are not in the training}."""
    known = wordings(training)
    return {kind: len(asked - known.get(kind, set())) for kind, asked in wordings(evaluation).items()}


def duplicates(samples: Iterable[Sample]) -> list[str]:
    """Places of samples that repeat an earlier sample's question about the same frames."""
    seen, found = set(), []
    for sample in samples:
        key = sample.clip, sample.wording
        if key in seen:
            found.append(sample.place)
        seen.add(key)
    return found


def contradictions(samples: Iterable[Sample]) -> list[str]:
    """Places of samples that repeat an earlier sample's question about the same frames with another label."""
    first: dict[Any, str] = {}
    return [s.place for s in samples if first.setdefault((s.clip, s.wording), s.label) != s.label]


def frames_out_of_order(samples: Iterable[Sample]) -> list[str]:
    """Places of samples whose frame numbers are not in rising order."""
    return [s.place for s in samples if any(a >= b for a, b in pairwise(s.frame_numbers or ()))]


def answers_without_label(samples: Iterable[Sample]) -> list[str]:
    """Places of samples whose reference answer lacks their label, so that it would fail the keyword metric."""
    return [s.place for s in samples if s.label not in s.answer.lower()]


def cluster_count(samples: Sequence[Sample]) -> int:
    """Number of clusters (samples that show nearly the same seconds): a score's number of independent trials."""
    return len(set(clusters_of(samples)))
