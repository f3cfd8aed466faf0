"""Multipliers, rated thinning and batches, against their definitions and an independent reference."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from services.trainer.epoch_lists import (
    Multipliers,
    cut_into_batches,
    inclusion_shares,
    kept_places,
    kept_share,
    systematic_sample,
)
from services.trainer.randomness import Purpose, uniform


def within_three_sigma(counted: float, share: float, trials: int) -> bool:
    return abs(counted - share) <= 3 * math.sqrt(share * (1 - share) / trials) + 1e-12


def occurrences(multipliers: list[float], folders: list[str] | None = None, epochs: int = 1) -> np.ndarray:
    """How often each picture occurs, [epoch, picture]."""
    plan = Multipliers(folders or ["a"] * len(multipliers), multipliers, seed=3)
    return np.array([plan.occurrences(epoch) for epoch in range(epochs)])


def test_whole_multipliers_are_exact_in_every_epoch() -> None:
    multipliers = [0.0, 1.0, 2.0, 5.0]
    assert (occurrences(multipliers, epochs=20) == multipliers).all()
    plan = Multipliers(["a"] * 4, multipliers, seed=3)
    assert (plan.total, plan.vary, plan.silent) == (8, False, [])


def test_a_fraction_is_a_share_of_the_epochs() -> None:
    multipliers = [0.25, 0.5, 1.5, 0.75, 2.0]
    found = occurrences(multipliers, epochs=2000)
    assert (found.sum(axis=1) == 5).all()
    for column, multiplier in enumerate(multipliers):
        assert set(found[:, column]) <= {math.floor(multiplier), math.ceil(multiplier)}
        share = multiplier - math.floor(multiplier)
        assert within_three_sigma(found[:, column].mean() - math.floor(multiplier), share, 2000)


def test_no_place_in_the_list_is_favoured() -> None:
    found = occurrences([0.5] * 20, epochs=2000).mean(axis=0)
    assert all(within_three_sigma(share, 0.5, 2000) for share in found)


def test_equal_fractions_do_not_always_come_in_the_same_company() -> None:
    found = occurrences([0.5] * 6, epochs=400)
    assert len({tuple(row) for row in found}) == math.comb(6, 3)


@pytest.mark.parametrize(
    ("multipliers", "total"),
    [
        ([0.5, 0.5, 0.5], 2),
        ([0.3] * 4, 1),
        ([0.9, 0.9, 0.9], 3),
        ([1.1, 1.1], 2),
        ([0.1] * 15, 2),
        ([2.5], 3),
    ],
)
def test_each_folder_s_total_is_its_rounded_sum(multipliers: list[float], total: int) -> None:
    folders = ["a"] * len(multipliers) + ["b"] * 2
    found = occurrences([*multipliers, 1.0, 3.0], folders, epochs=200)
    assert (found[:, : len(multipliers)].sum(axis=1) == total).all()
    assert (found[:, len(multipliers) :] == [1, 3]).all()


def test_where_the_sum_is_not_whole_shares_stay_in_proportion() -> None:
    found = occurrences([0.2, 0.4, 0.6], epochs=2000).mean(axis=0)
    assert [
        within_three_sigma(share, want / 1.2, 2000)
        for share, want in zip(found, (0.2, 0.4, 0.6), strict=True)
    ] == [True] * 3


def test_pictures_that_no_epoch_has_are_known() -> None:
    plan = Multipliers(["a", "a", "b", "b", "c"], [0.2, 0.2, 1.0, 0.3, 0.0], seed=1)
    assert plan.silent == [0, 1, 3]
    assert plan.total == 1


def test_rounding_is_exact_where_binary_fractions_are_not() -> None:
    plan = Multipliers(["a"] * 15, [0.1] * 15, seed=1)
    assert plan.total == 2, "the sum is 1.5 and not a little less"


def test_epochs_and_seeds_differ_and_repeat() -> None:
    first, second = (Multipliers(["a"] * 8, [0.5] * 8, seed=seed) for seed in (1, 2))
    rows = [tuple(first.occurrences(epoch)) for epoch in range(10)]
    assert rows == [tuple(first.occurrences(epoch)) for epoch in range(10)]
    assert len(set(rows)) > 5
    assert rows != [tuple(second.occurrences(epoch)) for epoch in range(10)]


def test_scaled_shares_have_their_sum_and_none_exceeds_one() -> None:
    assert inclusion_shares([0.9, 0.9], 2) == [1.0, 1.0]
    assert inclusion_shares([0.95, 0.35, 0.3], 2) == pytest.approx([1.0, 0.35 / 0.65, 0.3 / 0.65])
    assert inclusion_shares([0.2, 0.4], 1) == pytest.approx([1 / 3, 2 / 3])
    for count in range(1, 6):
        shares = inclusion_shares([0.05, 0.5, 0.7, 0.9, 0.99], count)
        assert sum(shares) == pytest.approx(count)
        assert max(shares) <= 1


def test_a_systematic_sample_has_exactly_its_size_whatever_rounding_does() -> None:
    for parts in (3, 7, 10, 49):
        for start in (0.0, 0.1, 1 - 2**-53):
            shares = [1 / parts] * (parts * 4)
            taken = systematic_sample(shares, 4, start)
            assert len(taken) == len(set(taken)) == 4
    assert systematic_sample([0.5, 0.5, 0.5, 0.5], 2, 0.4) == [0, 2]
    assert systematic_sample([0.5, 0.5, 0.5, 0.5], 2, 0.5) == [1, 3]


@pytest.mark.parametrize(
    ("epochs", "percent", "shares"),
    [
        (5, 50.0, ["1", "7/8", "3/4", "5/8", "1/2"]),
        (3, 30.0, ["1", "13/20", "3/10"]),
        (2, 0.0, ["1", "0"]),
        (4, 100.0, ["1", "1", "1", "1"]),
        (1, 50.0, ["1"]),
    ],
)
def test_the_share_falls_from_everything_to_the_wanted_percentage(
    epochs: int, percent: float, shares: list[str]
) -> None:
    assert [kept_share(epoch, epochs, percent) for epoch in range(epochs)] == list(map(Fraction, shares))
    assert kept_share(epochs + 3, epochs, percent) == Fraction(shares[-1])


def kept(ratings: list[float], share: Fraction, epoch: int) -> list[int]:
    draws = [uniform(5, Purpose.RATED, epoch, str(place), 0) for place in range(len(ratings))]
    return kept_places(ratings, draws, share)


def test_sizes_are_rounded_up_without_rounding_errors_and_never_zero() -> None:
    assert len(kept([1.0] * 10, kept_share(2, 3, 30.0), 0)) == 3, "in floating point it would be 4"
    assert [len(kept([1.0] * 7, Fraction(part, 10), 0)) for part in range(11)] == [
        1,
        1,
        2,
        3,
        3,
        4,
        5,
        5,
        6,
        7,
        7,
    ]


def reference_shares(ratings: list[float], count: int) -> list[float]:
    """Inclusion probabilities of drawing one after another in proportion to rating, by going through all orders."""
    shares = [0.0] * len(ratings)

    def draw(left: frozenset[int], taken: frozenset[int], probability: float) -> None:
        if len(taken) == count:
            for place in taken:
                shares[place] += probability
            return
        total = sum(ratings[place] for place in left)
        for place in left:
            draw(left - {place}, taken | {place}, probability * ratings[place] / total)

    draw(frozenset(range(len(ratings))), frozenset(), 1.0)
    return shares


def test_inclusion_follows_ratings_as_drawing_without_replacement_does() -> None:
    ratings = [1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    expected = reference_shares(ratings, 3)
    counts = Counter(place for epoch in range(2000) for place in kept(ratings, Fraction(1, 2), epoch))
    for place, share in enumerate(expected):
        assert within_three_sigma(counts[place] / 2000, share, 2000)
    assert expected[0] < expected[2] < expected[4]


def test_pictures_of_one_rating_are_equally_likely_wherever_they_stand() -> None:
    ratings = [1.0, 2.0, 4.0] * 10
    counts = Counter(place for epoch in range(2000) for place in kept(ratings, Fraction(1, 2), epoch))
    for rating in range(3):
        group = [counts[place] / 2000 for place in range(rating, 30, 3)]
        mean = sum(group) / len(group)
        assert all(within_three_sigma(share, mean, 2000) for share in group)


def test_the_reference_gives_the_published_shares_for_three_equal_groups() -> None:
    """Ratings 1, 2 and 4, a half kept: 0.28, 0.48 and 0.74."""
    ratings = [1.0, 2.0, 4.0] * 10
    counts = Counter(place % 3 for epoch in range(2000) for place in kept(ratings, Fraction(1, 2), epoch))
    assert [round(counts[group] / 20_000, 2) for group in range(3)] == [0.28, 0.48, 0.74]


Entry = tuple[str, str]  # bucket, batch id


def cut(entries: list[Entry], size: int) -> list[list[Entry]]:
    return cut_into_batches(entries, size, bucket=lambda entry: entry[0], batch_id=lambda entry: entry[1])


def test_each_batch_has_one_bucket_and_what_is_left_is_short() -> None:
    entries = [("wide" if number % 3 else "tall", "") for number in range(17)]
    batches = cut(entries, 4)
    assert all(len({bucket for bucket, _ in batch}) == 1 for batch in batches)
    assert sorted(len(batch) for batch in batches) == [2, 3, 4, 4, 4]
    assert Counter(entry for batch in batches for entry in batch) == Counter(entries)


def test_batches_keep_the_order_of_the_epoch() -> None:
    batches = cut_into_batches(
        [0, 2, 1, 4, 3, 6], 2, bucket=lambda entry: entry % 2, batch_id=lambda entry: ""
    )
    assert batches == [[0, 2], [4, 6], [1, 3]]


def test_pictures_of_one_batch_id_share_batches_and_their_rest_joins_the_others() -> None:
    entries = [("wide", "night" if number % 2 else "") for number in range(14)]
    batches = cut(entries, 4)
    names = [Counter(name for _, name in batch) for batch in batches]
    assert {"night": 4} in names
    mixed = [count for count in names if count["night"] and count[""]]
    assert sum(count["night"] for count in mixed) == 3
    assert sorted(len(batch) for batch in batches) == [2, 4, 4, 4]


def test_a_batch_id_never_mixes_buckets() -> None:
    entries = [("wide", "night"), ("tall", "night"), ("wide", "night"), ("tall", "night")]
    assert sorted(cut(entries, 2)) == [[("tall", "night")] * 2, [("wide", "night")] * 2]
