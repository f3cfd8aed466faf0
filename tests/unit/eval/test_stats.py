"""Intervals of shares and means."""

import random
import statistics

import pytest

from tests.eval.stats import bootstrap, wilson


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_the_score_interval_is_that_of_the_literature(right: int, n: int, low: float, high: float) -> None:
    # The last line is the example of Newcombe (1998), table I; the others are the closed form by hand.
    share = wilson(right, n)
    assert [share.low, share.high] == pytest.approx([low, high], abs=5e-5)
    assert share.value == right / n


def test_the_mean_is_that_of_the_groups_and_lies_within_its_interval() -> None:
    mean = bootstrap([[0.1, 0.2, 0.3], [0.5, 0.6, 0.7]], n=72)
    assert mean.value == pytest.approx(0.4)
    assert mean.low < 0.4 < mean.high
    assert mean.n == 72
    assert mean == bootstrap([[0.1, 0.2, 0.3], [0.5, 0.6, 0.7]], n=72)


def test_equal_values_leave_no_interval() -> None:
    mean = bootstrap([[0.5, 0.5], [0.5, 0.5]], n=4)
    assert (mean.low, mean.high) == (0.5, 0.5)


def test_values_of_one_subject_do_not_count_as_independent() -> None:
    rng = random.Random(4)
    levels = [rng.random() for _ in range(6)]
    alike = bootstrap([[level] * 10 for level in levels], n=60)
    apart = bootstrap([[level] for level in levels for _ in range(10)], n=60)
    assert alike.high - alike.low > 2 * (apart.high - apart.low)


def test_the_interval_of_many_normal_groups_is_that_of_theory() -> None:
    rng = random.Random(7)
    groups = [[rng.gauss(0, 1)] for _ in range(200)]
    mean = bootstrap(groups, n=200)
    half = 1.96 * statistics.stdev(group[0] for group in groups) / 200**0.5
    assert mean.high - mean.value == pytest.approx(half, rel=0.12)
