"""Intervals for shares and for means over subjects and seeds."""

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_Z = 1.959964
"""Two-sided 95 %."""
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Share:
    """How many of n were right, with a 95 % interval of the share."""

    right: int
    n: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share itself."""
        return self.right / self.n


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean of n pictures or runs, with a 95 % interval."""

    value: float
    low: float
    high: float
    n: int


def wilson(right: int, n: int) -> Share:
    """A share with its score interval (Wilson 1927, equation 7). `n`: at least 1."""
    share, z2 = right / n, _Z**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return Share(right, n, max(0.0, middle - half), min(1.0, middle + half))


def bootstrap(groups: Sequence[Sequence[float]], n: int, seed: int = 0) -> Mean:
    """The mean of all values, with a percentile interval (Efron and Tibshirani 1993, chapter 13).

    Groups (subjects) are drawn with replacement, and within each its values (seeds): values of one subject are alike,
    and an interval that took them for independent would be too narrow.

    Args:
        groups: values by subject; every group has at least one.
        n: what the values are means of, for the record.
        seed: of the resampling.
    """
    rng = random.Random(seed)
    means = sorted(_resampled(groups, rng) for _ in range(_RESAMPLES))
    cut = round(0.025 * _RESAMPLES)
    value = statistics.fmean(statistics.fmean(group) for group in groups)
    return Mean(value, means[cut], means[-1 - cut], n)


def _resampled(groups: Sequence[Sequence[float]], rng: random.Random) -> float:
    chosen = rng.choices(groups, k=len(groups))
    return statistics.fmean(statistics.fmean(rng.choices(group, k=len(group))) for group in chosen)
