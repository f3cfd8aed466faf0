"""Which pictures an epoch of captioned training holds, and in which batches: pure functions of seed, purpose and epoch.

Owns multipliers, the thinning of rated datasets and the cutting into batches of one size. What a picture looks like and
says at each use belongs to `captioned`.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

from services.trainer.randomness import Purpose, permutation, uniform

T = TypeVar("T")

SMALLEST = 2.0**-54
"""Half the smallest step of a draw: what stands for a draw of exactly 0 in a logarithm."""


class Multipliers:
    """How often each picture occurs in an epoch.

    A picture with multiplier m occurs floor(m) times, and once more in a share of the epochs. How many of a folder's
    pictures do so is the same in each epoch: as many as round the sum of its multipliers (half up). Which ones is found
    by systematic sampling (Madow 1949) of the folder in a new order, with the fractions m - floor(m) as probabilities;
    where their sum is not whole they are scaled, though none beyond 1.

    Args:
        folders: the folder of each picture.
        multipliers: of each picture, >= 0.
        seed: the job's.

    Attributes:
        total: entries of every epoch.
        silent: indices of the pictures that no epoch has although their multiplier is not 0: the fractions of their
            folder add up to less than a half.
    """

    def __init__(self, folders: Sequence[str], multipliers: Sequence[float], *, seed: int) -> None:
        self._seed = seed
        self._whole = [math.floor(multiplier) for multiplier in multipliers]
        exact = [Fraction(str(multiplier)) for multiplier in multipliers]
        members: dict[str, list[int]] = defaultdict(list)
        for index, folder in enumerate(folders):
            members[folder].append(index)
        self._partial: list[_Partial] = []
        self.total = 0
        self.silent: list[int] = []
        for folder, indices in members.items():
            count = math.floor(sum((exact[index] for index in indices), Fraction(0)) + Fraction(1, 2))
            self.total += count
            extra = count - sum(self._whole[index] for index in indices)
            open_ones = [index for index in indices if exact[index] != self._whole[index]]
            if not extra:
                self.silent += [index for index in open_ones if not self._whole[index]]
            else:
                shares = [float(exact[index] - self._whole[index]) for index in open_ones]
                self._partial.append(_Partial(folder, open_ones, inclusion_shares(shares, extra), extra))

    @property
    def vary(self) -> bool:
        """Whether the epochs differ in what they hold."""
        return any(len(partial.members) > partial.extra for partial in self._partial)

    def occurrences(self, epoch: int) -> list[int]:
        """Returns how often each picture occurs in one epoch."""
        counts = list(self._whole)
        for partial in self._partial:
            order = permutation(len(partial.members), self._seed, Purpose.MULTIPLY, epoch, partial.folder)
            start = uniform(self._seed, Purpose.MULTIPLY, epoch, partial.folder, "start")
            taken = systematic_sample([partial.shares[place] for place in order], partial.extra, start)
            for place in taken:
                counts[partial.members[order[place]]] += 1
        return counts


@dataclass(frozen=True, slots=True)
class _Partial:
    """A folder's pictures with fractions: `extra` of `members` occur once more, each with its share."""

    folder: str
    members: list[int]
    shares: list[float]
    extra: int


def inclusion_shares(shares: Sequence[float], count: int) -> list[float]:
    """Scales shares to a given sum; those that would exceed 1 become 1, and the others take the rest.

    Args:
        shares: each above 0 and below 1.
        count: the sum, at most as many as there are shares.
    """
    scaled = list(shares)
    certain: set[int] = set()
    while len(certain) < len(shares):
        rest = sum(share for index, share in enumerate(shares) if index not in certain)
        scale = (count - len(certain)) / rest
        beyond = {index for index, share in enumerate(shares) if share * scale >= 1} - certain
        scaled = [1.0 if index in certain else share * scale for index, share in enumerate(shares)]
        if not beyond:
            break
        certain |= beyond
        scaled = [1.0] * len(shares)
    return scaled


def systematic_sample(shares: Sequence[float], count: int, start: float) -> list[int]:
    """Returns the places, in order, at which the points start, start + 1, ... fall when shares lie end to end.

    Args:
        shares: probability of each place, 0..1; their sum is `count`.
        count: points in all.
        start: 0..1 without 1.
    """
    taken: list[int] = []
    reached = 0.0
    for place, share in enumerate(shares):
        reached += share
        # Rounding must not lose the last point: there are exactly `count`.
        if len(taken) < count and (start + len(taken) < reached or place - len(shares) == len(taken) - count):
            taken.append(place)
    return taken


def kept_share(epoch: int, epochs: int, final_percent: float) -> Fraction:
    """Returns the share of a rated dataset that one epoch keeps: everything in the first, `final_percent` in the last.

    Args:
        epoch: from 0; beyond the last one the share stays.
        epochs: of the whole training.
        final_percent: 0..100.
    """
    lost = 1 - Fraction(str(final_percent)) / 100
    return 1 - lost * Fraction(min(epoch, epochs - 1), max(1, epochs - 1))


def kept_places(ratings: Sequence[float], draws: Sequence[float], share: Fraction) -> list[int]:
    """Chooses places without replacement, with probability proportional to rating at each draw; at least one.

    The largest log(u) / rating are the same choice (Efraimidis and Spirakis 2006, algorithm A).

    Args:
        ratings: above 0.
        draws: u of each place, independent and uniform in 0..1.
        share: of the places to keep, rounded up.

    Returns:
        The places, in order.
    """
    count = max(1, math.ceil(share * len(ratings)))
    keys = [math.log(max(draw, SMALLEST)) / rating for draw, rating in zip(draws, ratings, strict=True)]
    best = sorted(range(len(keys)), key=lambda place: keys[place], reverse=True)[:count]
    return sorted(best)


def cut_into_batches(
    entries: Sequence[T], size: int, *, bucket: Callable[[T], Hashable], batch_id: Callable[[T], str]
) -> list[list[T]]:
    """Cuts a list into batches of one bucket each, in the order of their first entries' buckets.

    Entries of one batch id share batches as far as they fill whole ones; what is left of them joins those without. What
    is left of a bucket is one short batch.

    Args:
        entries: in the order of the epoch.
        size: entries of a batch.
        bucket: of an entry.
        batch_id: of an entry; empty: none.
    """
    named = _grouped(
        (place for place, entry in enumerate(entries) if batch_id(entry)),
        lambda place: (bucket(entries[place]), batch_id(entries[place])),
    )
    whole = [chunk for places in named.values() for chunk in _chunks(places, size) if len(chunk) == size]
    taken = {place for chunk in whole for place in chunk}
    others = _grouped(
        (place for place in range(len(entries)) if place not in taken), lambda place: bucket(entries[place])
    )
    chunks = whole + [chunk for places in others.values() for chunk in _chunks(places, size)]
    return [[entries[place] for place in chunk] for chunk in chunks]


def _grouped(places: Iterable[int], key: Callable[[int], Hashable]) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for place in places:
        groups[key(place)].append(place)
    return groups


def _chunks(places: Sequence[int], size: int) -> list[Sequence[int]]:
    return [places[first : first + size] for first in range(0, len(places), size)]
