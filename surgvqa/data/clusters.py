"""Clusters: groups of samples that show nearly the same seconds of a video, and so are not independent trials."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from surgvqa.data.samples import Sample

NEARBY = 25
"""Largest gap between two clips of one cluster, in frame numbers: one second of video."""


def clusters_of(samples: Sequence[Sample]) -> list[int]:
    """A cluster number for each sample.

    Samples of one video are in one cluster if their frame ranges overlap or are at most NEARBY frame numbers apart
    (single linkage). A clip whose frames have no numbers shares a cluster only with the same clip.
    """
    found = [0] * len(samples)
    ranges: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    unnumbered: dict[tuple[str, tuple[str, ...]], list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        numbers = sample.frame_numbers
        if numbers is None:
            unnumbered[sample.clip].append(index)
        else:
            ranges[sample.video_id].append((min(numbers), max(numbers), index))
    cluster = -1
    for clips in ranges.values():
        end: int | None = None
        for first, last, index in sorted(clips):
            if end is None or first > end + NEARBY:
                cluster, end = cluster + 1, last
            end = max(end, last)
            found[index] = cluster
    for indices in unnumbered.values():
        cluster += 1
        for index in indices:
            found[index] = cluster
    return found
