"""What the text of samples tells without a frame or a recording: leaks, wordings, clusters, odd answers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from surgvqa.data.clusters import clusters_of
from surgvqa.data.samples import Sample

EXAMPLES = 5
"""Named of each kind of finding."""


def id_collisions(samples: Iterable[Sample]) -> list[str]:
    """The ids that stand for more than one question, whatever the video."""
    questions: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        questions[sample.id].add(sample.wording)
    return sorted(name for name, asked in questions.items() if len(asked) > 1)


def in_several(groups: Sequence[set[Any]]) -> set[Any]:
    """What is in more than one of the sets."""
    counts = Counter(item for group in groups for item in group)
    return {item for item, count in counts.items() if count > 1}


def wordings(samples: Iterable[Sample]) -> dict[str, set[str]]:
    """{question type: its different wordings}, without case and extra spaces."""
    found: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        found[sample.question_type].add(sample.wording)
    return dict(sorted(found.items()))


def unseen_wordings(training: Iterable[Sample], evaluation: Iterable[Sample]) -> dict[str, int]:
    """{question type: wordings of the evaluation that the training never has}."""
    known = wordings(training)
    return {kind: len(asked - known.get(kind, set())) for kind, asked in wordings(evaluation).items()}


def duplicates(samples: Iterable[Sample]) -> list[str]:
    """Places of samples that ask what an earlier one asks, of the same frames."""
    seen, found = set(), []
    for sample in samples:
        key = sample.clip, sample.wording
        if key in seen:
            found.append(sample.place)
        seen.add(key)
    return found


def frames_out_of_order(samples: Iterable[Sample]) -> list[str]:
    """Places of samples whose frame numbers do not rise."""
    return [s.place for s in samples if any(a >= b for a, b in pairwise(s.frame_numbers or ()))]


def answers_without_label(samples: Iterable[Sample]) -> list[str]:
    """Places of samples whose reference answer lacks their label: even that answer would fail the keyword metric."""
    return [s.place for s in samples if s.label not in s.answer.lower()]


def cluster_count(samples: Sequence[Sample]) -> int:
    """Clusters of samples that show nearly the same seconds: what a score has as independent trials."""
    return len(set(clusters_of(samples)))
