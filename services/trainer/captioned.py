"""The plan of captioned training: which pictures each update of each epoch uses, in batches of one size.

Pictures and captions are those of `captions`, lists and batches are cut by `epoch_lists`, sizes and crops are those of
`buckets`. Everything is a pure function of seed, purpose, epoch, picture and occurrence, so a position in the data
needs no state.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from services.domain.errors import BadInput
from services.trainer.buckets import Size, choose_bucket
from services.trainer.captions import CaptionedPicture, UseRules, drawn_caption
from services.trainer.data import Use
from services.trainer.epoch_lists import Multipliers, cut_into_batches, kept_places, kept_share
from services.trainer.randomness import Purpose, permutation, uniform

MAX_ENTRIES = 1_000_000
"""Longest epoch: a folder of a thousand pictures may ask for each of them a thousand times."""


@dataclass(frozen=True, slots=True)
class CaptionedUse(Use):
    """One picture at one place of one epoch, with all that is drawn for it except its crop.

    Attributes:
        bucket: size that it is trained at.
        flip: whether it is mirrored.
        caption: what it is said to show.
        weight: of its loss.
    """

    picture: CaptionedPicture
    bucket: Size
    flip: bool
    caption: str
    weight: float

    @property
    def size(self) -> Size:
        """Of the stored picture."""
        return self.picture.size


@dataclass(frozen=True, slots=True)
class _Entry:
    """A place of an epoch's list: a picture, by its index, for the n-th time."""

    index: int
    occurrence: int


class CaptionedPlan:
    """Which pictures are used in which update, and how: the multiplied, perhaps thinned list of each epoch in batches.

    An epoch's list is shuffled, grouped by bucket and cut into batches, and the batches are shuffled. The last batch of
    a bucket may be short, and so may the last update of an epoch.

    Args:
        pictures: all of them, in the order of their names.
        seed: the job's.
        buckets: sizes to train at.
        train_batch_size: samples of a batch.
        gradient_accumulation_steps: batches of an update.
        epochs: of the training.
        rules: what is drawn at each use.
        rated_final_percent: share of the list that the last epoch of a rated dataset keeps, in percent; None: it is
            not rated.

    Raises:
        BadInput: no picture is left to train on, or an epoch would be too long.
    """

    def __init__(
        self,
        pictures: Sequence[CaptionedPicture],
        *,
        seed: int,
        buckets: tuple[Size, ...],
        train_batch_size: int,
        gradient_accumulation_steps: int,
        epochs: int,
        rules: UseRules,
        rated_final_percent: float | None = None,
    ) -> None:
        self._pictures = tuple(pictures)
        self._seed = seed
        self._batch = train_batch_size
        self._accumulation = gradient_accumulation_steps
        self._epochs = epochs
        self._rules = rules
        self._final_percent = rated_final_percent
        self._buckets = [choose_bucket(picture.size, buckets) for picture in self._pictures]
        self._multipliers = Multipliers(
            [picture.folder for picture in pictures], [picture.multiplier for picture in pictures], seed=seed
        )
        if not self._multipliers.total:
            raise BadInput(
                "no picture is left to train on: the multipliers of all of them are 0, or add up to nothing"
            )
        if self._multipliers.total > MAX_ENTRIES:
            raise BadInput(f"the multipliers make an epoch of more than {MAX_ENTRIES} pictures")
        self._ends: list[int] = []
        self._cached_epoch: tuple[int, list[list[_Entry]]] | None = None

    @property
    def never_used(self) -> list[CaptionedPicture]:
        """Pictures that no epoch has because the fractions of their folder's multipliers add up to next to nothing."""
        return [self._pictures[index] for index in self._multipliers.silent]

    @property
    def total_updates(self) -> int:
        """Updates of all epochs."""
        return self._end_of(self._epochs - 1)

    @property
    def assignments(self) -> list[tuple[CaptionedPicture, Size]]:
        """Each picture with the size that it is trained at."""
        return list(zip(self._pictures, self._buckets, strict=True))

    def updates_in(self, epoch: int) -> int:
        """Returns the updates of one epoch, counted from 0; epochs beyond the last one are like it."""
        return self._end_of(epoch) - (self._end_of(epoch - 1) if epoch else 0)

    def epoch_of(self, update: int) -> int:
        """Returns the epoch an update belongs to; both count from 0."""
        while not self._ends or self._ends[-1] <= update:
            self._end_of(len(self._ends))
        return bisect_right(self._ends, update)

    def micro_steps(self, update: int) -> list[list[CaptionedUse]]:
        """Returns the batches that are accumulated in one update, counted from 0 over the whole run."""
        epoch = self.epoch_of(update)
        first = (update - (self._ends[epoch - 1] if epoch else 0)) * self._accumulation
        chosen = self._batches(epoch)[first : first + self._accumulation]
        return [[self._use(entry, epoch) for entry in batch] for batch in chosen]

    def epoch(self, epoch: int) -> list[list[CaptionedUse]]:
        """Returns all batches of one epoch in order."""
        return [[self._use(entry, epoch) for entry in batch] for batch in self._batches(epoch)]

    def _use(self, entry: _Entry, epoch: int) -> CaptionedUse:
        picture = self._pictures[entry.index]
        coordinates = (epoch, picture.sample_id, entry.occurrence)
        own = picture.flip_probability
        probability = self._rules.flip_probability if own is None else own
        return CaptionedUse(
            picture,
            epoch,
            entry.occurrence,
            bucket=self._buckets[entry.index],
            flip=bool(probability) and uniform(self._seed, Purpose.FLIP, *coordinates) < probability,
            caption=drawn_caption(picture, self._rules, self._seed, coordinates),
            weight=picture.loss_scale,
        )

    def _entries(self, epoch: int) -> list[_Entry]:
        """The multiplied list of one epoch, thinned by rating, in the order of pictures."""
        counts = self._multipliers.occurrences(epoch)
        entries = [_Entry(index, number) for index, count in enumerate(counts) for number in range(count)]
        if self._final_percent is None:
            return entries
        share = kept_share(epoch, self._epochs, self._final_percent)
        draws = [
            uniform(self._seed, Purpose.RATED, epoch, self._pictures[entry.index].sample_id, entry.occurrence)
            for entry in entries
        ]
        ratings = [self._pictures[entry.index].rating for entry in entries]
        return [entries[place] for place in kept_places(ratings, draws, share)]

    def _cut(self, entries: Sequence[_Entry]) -> list[list[_Entry]]:
        return cut_into_batches(
            entries,
            self._batch,
            bucket=lambda entry: self._buckets[entry.index],
            batch_id=lambda entry: self._pictures[entry.index].batch_id,
        )

    def _batches(self, epoch: int) -> list[list[_Entry]]:
        if self._cached_epoch is None or self._cached_epoch[0] != epoch:
            entries = self._entries(epoch)
            order = permutation(len(entries), self._seed, Purpose.ORDER, epoch, "pictures")
            batches = self._cut([entries[place] for place in order])
            order = permutation(len(batches), self._seed, Purpose.ORDER, epoch, "batches")
            self._cached_epoch = (epoch, [batches[place] for place in order])
        return self._cached_epoch[1]

    def _end_of(self, epoch: int) -> int:
        """Updates of an epoch and of all before it; their number hangs on what the lists hold, not on their order."""
        varies = self._final_percent is not None or self._multipliers.vary
        while len(self._ends) <= epoch:
            if self._ends and not varies:
                count = self._ends[0]
            else:
                count = math.ceil(len(self._cut(self._entries(len(self._ends)))) / self._accumulation)
            self._ends.append((self._ends[-1] if self._ends else 0) + count)
        return self._ends[epoch]
