"""Defines the alterations and chooses the sample that provides recording, wording or frames. No numpy, no torch.

Every condition changes one thing in a sample and nothing else, so that a changed answer has one cause.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from surgvqa.config.options import PROBE_CONDITIONS
from surgvqa.data.samples import Sample

AS_IT_IS = "as it is"
"""The condition that changes nothing, with which the others are compared."""


@dataclass(frozen=True)
class Condition:
    """One way to alter a sample."""

    modality: str
    """sound, writing or frames."""
    text: str
    """What the model gets instead, as text."""
    needs: tuple[str, ...] = ("audio_only", "audio_text", "text_only")
    """The input modes in which the model gets the altered input."""


SPOKEN, WRITTEN = ("audio_only", "audio_text"), ("audio_text", "text_only")
CONDITIONS: dict[str, Condition] = {
    "other_question": Condition("sound", "a question of another type is spoken", SPOKEN),
    "other_text": Condition("writing", "a question of another type is written", WRITTEN),
    "same_question": Condition("sound", "another recording of the same question", SPOKEN),
    "silence": Condition("sound", "silence", SPOKEN),
    "noise": Condition("sound", "noise as loud as the speech", SPOKEN),
    "speed": Condition("sound", "spoken a fifth faster and higher", SPOKEN),
    "other_wording": Condition("sound", "the same question in other words"),
    "shuffled": Condition("frames", "the frames in another order"),
    "first_frame": Condition("frames", "the first frame repeated"),
    "black": Condition("frames", "black frames"),
    "other_clip": Condition("frames", "the frames of another clip"),
}
assert tuple(CONDITIONS) == PROBE_CONDITIONS


@dataclass(frozen=True)
class Case:
    """One sample under one condition."""

    condition: str
    index: int
    """Index of the sample among the evaluation's samples."""
    partner: int | None = None
    """Index in the pool of the sample whose recording, wording or frames are used instead."""


@dataclass(frozen=True)
class Pool:
    """The samples whose parts can be used: first those of the evaluation file, then those of the training."""

    samples: Sequence[Sample]
    clusters: Sequence[int]
    """Clusters of the evaluation's samples (data.clusters)."""

    @property
    def evaluation(self) -> range:
        """Indices of the evaluation's samples."""
        return range(len(self.clusters))

    def labels(self) -> Mapping[str, set[str]]:
        """{question type: its labels in the evaluation}."""
        found: dict[str, set[str]] = defaultdict(set)
        for index in self.evaluation:
            found[self.samples[index].question_type].add(self.samples[index].label)
        return found


def cases_of(condition: str, probed: Sequence[int], pool: Pool, seed: int) -> list[Case]:
    """The cases of one condition. A sample without a suitable partner has none."""
    chooser = {
        "other_question": _other_question,
        "other_text": _other_question,
        "same_question": _same_question,
        "other_wording": _other_wording,
        "other_clip": _other_clip,
    }.get(condition)
    if chooser is None:
        return [Case(condition, index) for index in probed]
    found = []
    for index in probed:
        rng = random.Random(f"{seed} {index}")  # the partner does not depend on which other samples are probed
        tiers = chooser(index, pool)
        if candidates := next(filter(None, tiers), None):
            found.append(Case(condition, index, rng.choice(candidates)))
    return found


def _other_question(index: int, pool: Pool) -> tuple[list[int], ...]:
    """Preferably a question about the same clip, whose correct answer is known; else one with entirely other labels."""
    own, labels = pool.samples[index], pool.labels()
    others = [i for i in pool.evaluation if pool.samples[i].question_type != own.question_type]
    same_clip = [i for i in others if pool.samples[i].clip == own.clip]
    other_labels = [i for i in others if labels[pool.samples[i].question_type].isdisjoint(labels[own.question_type])]
    return same_clip, other_labels, others


def _same_question(index: int, pool: Pool) -> tuple[list[int], ...]:
    own = pool.samples[index]
    return ([i for i in pool.evaluation if i != index and _question(pool.samples[i]) == _question(own)],)


def _other_wording(index: int, pool: Pool) -> tuple[list[int], ...]:
    own = pool.samples[index]
    asked = [i for i, s in enumerate(pool.samples) if s.question_type == own.question_type and s.wording != own.wording]
    return ([i for i in asked if i in pool.evaluation], asked)


def _other_clip(index: int, pool: Pool) -> tuple[list[int], ...]:
    """Preferably a clip with another answer to the same question, so that the correct answer is known."""
    own = pool.samples[index]
    others = [i for i in pool.evaluation if pool.clusters[i] != pool.clusters[index]]
    same_type = [i for i in others if pool.samples[i].question_type == own.question_type]
    return [i for i in same_type if pool.samples[i].label != own.label], same_type, others


def _question(sample: Sample) -> tuple[str, str]:
    return sample.question_type, sample.wording
