"""Assigns each group of samples to a side, so that every side gets its share of every question type and label.

A group (a video or a cluster) is never divided. All groups start on the first side and go, one by one, where they bring
the counts closest to the target. Then single groups are moved and pairs are swapped until nothing improves.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence

from surgvqa.data.clusters import clusters_of
from surgvqa.data.samples import Sample

Stratum = tuple[str, ...]
"""(), (question type,) or (question type, label): sets of samples to spread evenly."""
PAIRS = 3000
"""Maximum number of pairs to try to swap in a round: enough for all pairs of few groups. For many small groups, moves
are enough."""
ROUNDS = 20
ENOUGH = 1e-9
"""Smallest improvement that counts, so that rounding errors cannot cause an endless loop."""


def groups_of(samples: Sequence[Sample], by: str) -> list[list[int]]:
    """Indices of the samples that must stay together, by "video" or by "cluster" of clips within a video.

    Two clips with a common frame are always in one group. The groups' order does not depend on that of the samples.
    """
    keys: Sequence[str | int] = [s.video_id for s in samples] if by == "video" else _cluster_keys(samples)
    members: dict[str | int, list[int]] = {}
    for index, key in enumerate(keys):
        members.setdefault(key, []).append(index)
    return sorted(members.values(), key=lambda group: min(samples[index].clip for index in group))


def _cluster_keys(samples: Sequence[Sample]) -> list[int]:
    """The cluster of each sample.

    Clusters that share a frame, which is possible if a clip has frames without a number, are joined.
    """
    clusters = clusters_of(samples)
    joined = list(range(max(clusters, default=-1) + 1))

    def root(cluster: int) -> int:
        while joined[cluster] != cluster:
            joined[cluster] = cluster = joined[joined[cluster]]
        return cluster

    first: dict[str, int] = {}
    for sample, cluster in zip(samples, clusters):
        for frame in sample.frames:
            joined[root(cluster)] = root(first.setdefault(frame, cluster))
    return [root(cluster) for cluster in clusters]


def divide(samples: Sequence[Sample], groups: Sequence[Sequence[int]], shares: Sequence[float], seed: int) -> list[int]:
    """The side (an index of `shares`) of each group. `shares` are above 0 and add up to 1; no side remains empty.

    Minimises the sum over sides and strata of (samples there - samples wanted)² / samples of the stratum. There must be
    at least as many groups as sides. The same groups and seed give the same sides.
    """
    source = random.Random(seed)
    counts = [_counts(samples[index] for index in group) for group in groups]
    totals: Counter[Stratum] = Counter()
    for count in counts:
        totals.update(count)
    # Samples of each stratum that a side has too many.
    excess = [{stratum: -share * n for stratum, n in sorted(totals.items())} for share in shares]
    for stratum, n in totals.items():
        excess[0][stratum] += n
    sides = [0] * len(groups)
    group_counts = [len(groups), *[0] * (len(shares) - 1)]

    def cost(group: int, to: int) -> float:
        """The change of the sum if a group moves."""
        here, there = excess[sides[group]], excess[to]
        return sum(2 * n * (n - here[s] + there[s]) / totals[s] for s, n in counts[group].items())

    def move(group: int, to: int) -> None:
        here, there = excess[sides[group]], excess[to]
        for stratum, n in counts[group].items():
            here[stratum] -= n
            there[stratum] += n
        group_counts[sides[group]] -= 1
        group_counts[to] += 1
        sides[group] = to

    def move_where_it_helps(group: int) -> bool:
        if group_counts[sides[group]] == 1:
            return False
        best, to = min((cost(group, side), side) for side in range(len(shares)) if side != sides[group])
        if best >= -ENOUGH:
            return False
        move(group, to)
        return True

    def swap_where_it_helps(group: int) -> bool:
        for other in source.sample(order, partners):
            here, there = sides[group], sides[other]
            if here == there:
                continue
            gain = cost(group, there)
            move(group, there)
            gain += cost(other, here)
            if gain < -ENOUGH:
                move(other, here)
                return True
            move(group, here)
        return False

    partners = min(len(groups), PAIRS // len(groups))
    order = list(range(len(groups)))
    source.shuffle(order)
    order.sort(
        key=lambda group: -counts[group][()]
    )  # large groups first, because small ones can then even out the rest
    for group in order:
        move_where_it_helps(group)
    for side in range(1, len(shares)):
        if not group_counts[side]:
            free = [group for group in order if group_counts[sides[group]] > 1]
            move(min(free, key=lambda group: cost(group, side)), side)
    for _ in range(ROUNDS):
        moved = [move_where_it_helps(group) for group in order]
        swapped = [swap_where_it_helps(group) for group in order]
        if not any(moved + swapped):
            break
    return sides


def _counts(samples: Iterable[Sample]) -> Counter[Stratum]:
    """{stratum: number of samples}, in an order that does not depend on that of the samples."""
    found: Counter[Stratum] = Counter()
    for sample in samples:
        found.update(((), (sample.question_type,), (sample.question_type, sample.label)))
    return Counter(dict(sorted(found.items())))
