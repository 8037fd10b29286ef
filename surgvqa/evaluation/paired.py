"""Statistics of two models on the same samples: whether a difference is chance, and how many samples would show it."""

from __future__ import annotations

import math
from fractions import Fraction

from surgvqa.evaluation.interval import Z

Z_POWER = 0.8416
"""The 0.8 quantile of the normal distribution, for a power of 80 %."""


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided p-value of McNemar's test; 1 without a flip.

    If both models are equally good, each flip goes either way with probability ½. The p-value is the sum of both tails
    of the binomial distribution, at most 1. The test assumes independent flips, which flips of one cluster are not.
    (McNemar 1947; exact: Edwards 1948.)
    """
    flips, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(flips, k) for k in range(fewer + 1))
    return float(min(Fraction(1), Fraction(2 * tail, 2**flips)))


def clusters_needed(error: float, clusters: int, difference: float) -> int:
    """Number of such clusters with which four of five experiments detect a true `difference` (a share).

    `error` is the standard error with C `clusters`. The variance of a mean is proportional to 1 / C, so
    C · (error · (1.96 + 0.84) / difference)² are needed.
    """
    return max(2, math.ceil(clusters * (error * (Z + Z_POWER) / difference) ** 2))


def detectable(error: float) -> float:
    """The smallest true difference (a share) that four of five experiments of this size detect."""
    return (Z + Z_POWER) * error
