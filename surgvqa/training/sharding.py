"""How the samples of an epoch are dealt to the ranks: micro batch by micro batch in turn, as Accelerate deals them.

One process with twice the accumulation takes the same samples in the same step as two ranks do. At the end of an epoch
Accelerate fills up with samples from its beginning; those are surplus, and are left out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from surgvqa.data.samples import Sample
from surgvqa.errors import SurgvqaError
from surgvqa.runs.ranks import Ranks


def micro_steps(samples: int, batch: int, ranks: int, drop_last: bool = False) -> int:
    """Micro batches that each rank gets in an epoch of `samples`."""
    if drop_last:
        return samples // batch // ranks
    return math.ceil(math.ceil(samples / batch) / ranks)


def optimiser_steps(samples: int, batch: int, accumulation: int, ranks: int, drop_last: bool = False) -> int:
    """Optimiser steps of an epoch, as Trainer counts them."""
    return max(1, math.ceil(micro_steps(samples, batch, ranks, drop_last) / accumulation))


def remaining(samples: int, batch: int, number: int, rank: int, ranks: int) -> int:
    """How many samples are left for the `number`th micro batch of a rank: below `batch`, the rest of it is surplus."""
    return max(0, samples - (number * ranks + rank) * batch)


def require_same_samples(ranks: Ranks, sets: Sequence[Sequence[Sample]]) -> None:
    """SurgvqaError on all ranks when one of them has read other samples than rank 0: each knows its own by number."""
    mine = []
    for samples in sets:
        text = "\0".join(f"{s.id}\0{s.clip}\0{s.question}\0{s.answer}" for s in samples)
        mine.append([len(samples), hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()])
    found = ranks.share(mine, "samples")
    for rank, (here, first) in ((rank, pair) for rank, of in enumerate(found) for pair in zip(of, found[0])):
        if here != first:
            counts = f"{here[0]} and {first[0]}" if here[0] != first[0] else f"{here[0]}, with another content"
            raise SurgvqaError(f"{ranks.name(rank)}has other samples than rank 0 ({counts}); give all the same files")
