"""Clusters against a slow computation of their definition."""

import itertools
import random

import pytest
from places import REAL_DATA

from surgvqa.data.clusters import clusters_of
from surgvqa.data.samples import Sample, read_samples


def sample(first, last, video="v") -> Sample:
    return Sample("q", video, tuple(f"{video}_{n}" for n in range(first, last + 1)), "?", "t", "a", "a")


def by_definition(samples) -> set[frozenset[int]]:
    """Connected components of "same video, and ranges that overlap or are at most 25 apart"."""
    groups = [{i} for i in range(len(samples))]
    for i, j in itertools.combinations(range(len(samples)), 2):
        a, b = samples[i].frame_numbers, samples[j].frame_numbers
        gap = max(min(a), min(b)) - min(max(a), max(b))
        if samples[i].video_id == samples[j].video_id and gap <= 25:
            one, other = (next(g for g in groups if n in g) for n in (i, j))
            if one is not other:
                groups.remove(other)
                one |= other
    return {frozenset(g) for g in groups}


def grouped(samples) -> set[frozenset[int]]:
    numbers = clusters_of(samples)
    return {frozenset(i for i, n in enumerate(numbers) if n == number) for number in numbers}


def test_a_gap_of_25_joins_and_of_26_does_not():
    assert len(grouped([sample(0, 10), sample(35, 40)])) == 1
    assert len(grouped([sample(0, 10), sample(36, 40)])) == 2
    assert len(grouped([sample(0, 10), sample(5, 40, video="w")])) == 2
    assert len(grouped([sample(0, 100), sample(5, 10), sample(110, 120)])) == 1, "the longest so far counts"


def test_random_clips_as_by_definition():
    source = random.Random(0)
    for _ in range(20):
        starts = [(source.randrange(2000), source.choice("vw")) for _ in range(40)]
        samples = [sample(start, start + source.randrange(60), video) for start, video in starts]
        source.shuffle(samples)
        assert grouped(samples) == by_definition(samples)


def test_frames_without_numbers_join_the_same_clip_alone():
    one, other = (Sample("q", "v", frames, "?", "t", "a", "a") for frames in (("v_a", "v_b"), ("v_a",)))
    assert clusters_of([one, one, other]) == [0, 0, 1]


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no shared/data")
def test_the_real_clips_as_by_definition():
    samples = read_samples(REAL_DATA / "in_002-001.jsonl") + read_samples(REAL_DATA / "out_002-001.jsonl")
    assert grouped(samples) == by_definition(samples) and 1 < len(grouped(samples)) < 50
