"""Every sample once, on whatever number of ranks, and the same samples in the same step."""

from itertools import chain

import pytest

from surgvqa.data.samples import Sample
from surgvqa.errors import SurgvqaError
from surgvqa.runs.ranks import Ranks
from surgvqa.training.sharding import micro_steps, optimiser_steps, remaining, require_same_samples


def dealt(samples: int, batch: int, accumulation: int, ranks: int) -> list[list[int]]:
    """The samples of each optimiser step of an epoch."""
    steps = [[] for _ in range(optimiser_steps(samples, batch, accumulation, ranks))]
    for number in range(micro_steps(samples, batch, ranks)):
        for rank in range(ranks):
            first = (number * ranks + rank) * batch
            steps[number // accumulation] += range(
                first, first + min(batch, remaining(samples, batch, number, rank, ranks))
            )
    return steps


@pytest.mark.parametrize("samples", [1, 6, 7, 8, 9, 23])
@pytest.mark.parametrize("batch", [1, 3])
def test_two_ranks_take_what_one_takes_with_twice_the_accumulation(samples, batch):
    alone = dealt(samples, batch, 4, 1)
    assert sorted(chain(*alone)) == list(range(samples))
    assert dealt(samples, batch, 2, 2) == alone == dealt(samples, batch, 1, 4)


def test_what_is_dropped_is_dropped_for_all():
    assert micro_steps(9, 2, 2, drop_last=True) == 2 and optimiser_steps(1, 2, 4, 2, drop_last=True) == 1


def test_ranks_with_other_samples_are_refused():
    def samples(*answers):
        return [[Sample(str(n), "v", ("f",), "q", "t", answer, answer) for n, answer in enumerate(answers)]]

    class Two(Ranks):
        """Rank 0, and what rank 1 says."""

        count = 2

        def share(self, value, what):
            return [value, self.other]

    two, other = Two(), Two()
    other.share = lambda value, what: setattr(two, "other", value) or [value]
    for theirs, said in ((("a", "b", "c"), "3 and 2"), (("a", "x"), "2, with another content")):
        require_same_samples(other, samples(*theirs))
        with pytest.raises(SurgvqaError, match=f"rank 1: has other samples than rank 0 .{said}"):
            require_same_samples(two, samples("a", "b"))
    require_same_samples(other, samples("a", "b"))
    require_same_samples(two, samples("a", "b"))
