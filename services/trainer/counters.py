"""What a training counts and measures from update to update: progress, what went wrong, time and its use."""

import math
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from services.trainer.guards import SPIKE_WINDOW, is_spike

CONSECUTIVE_LIMIT = 3
WINDOW = 200
WINDOW_LIMIT = 2
LOSSES_AVERAGED = 50
CHECKPOINT_TIME_SHARE = 0.02


@dataclass(slots=True)
class Counters:
    """What moves from update to update besides the weights; all of it is in every checkpoint.

    Attributes:
        planned: updates of the whole training as first asked for; the learning-rate curves keep that length.
        elapsed_s: seconds that all updates took, those of earlier attempts too.
        version_s: what `elapsed_s` was when the last version of the model was begun; 0: none was.
    """

    planned: int
    update: int = 0
    samples: int = 0
    skipped: int = 0
    consecutive_skipped: int = 0
    elapsed_s: float = 0.0
    version_s: float = 0.0
    spikes: int = 0
    largest_change: float = 0.0
    recent_losses: tuple[float, ...] = ()
    recent_skips: tuple[bool, ...] = ()

    def note(self, loss: float, *, finite: bool, samples: int) -> None:
        """Counts one update that was applied, or left out because it was not finite."""
        self.update += 1
        self.samples += samples
        self.skipped += not finite
        self.consecutive_skipped = 0 if finite else self.consecutive_skipped + 1
        self.recent_skips = (*self.recent_skips, not finite)[-WINDOW:]
        if finite:
            self.spikes += is_spike(loss, self.recent_losses)
            self.recent_losses = (*self.recent_losses, loss)[-SPIKE_WINDOW:]

    def pass_over(self) -> None:
        """Counts one update that had no picture left to learn from."""
        self.update += 1
        self.skipped += 1

    def version_is_due(self, every_minutes: float) -> bool:
        """Whether so much training has passed since the last version was begun, or since the start; 0: never."""
        return every_minutes > 0 and self.elapsed_s - self.version_s >= 60 * every_minutes

    def note_version(self) -> None:
        """Counts the time to the next version from here."""
        self.version_s = self.elapsed_s

    @property
    def diverged(self) -> bool:
        """Whether too many updates were not finite: three in a row, or 1 % of the last 200."""
        crowded = len(self.recent_skips) == WINDOW and sum(self.recent_skips) >= WINDOW_LIMIT
        return self.consecutive_skipped >= CONSECUTIVE_LIMIT or crowded

    @property
    def final_loss(self) -> float:
        """Mean loss of the last updates that were applied."""
        last = self.recent_losses[-LOSSES_AVERAGED:]
        return statistics.fmean(last) if last else math.nan

    def as_json(self) -> dict[str, Any]:
        """Returns the counters as JSON values that make the same counters again."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


class Pace:
    """Measures updates and checkpoints; decides when a recovery checkpoint is due.

    Checkpoints never take more than 2 % of the time: after a slow one the next is due later.
    """

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._checkpointed_at = time.monotonic()
        self._checkpoint_cost_s = 0.0
        self._recent_s: deque[float] = deque(maxlen=20)

    @property
    def checkpoint_is_due(self) -> bool:
        """Whether enough time has passed since the last one."""
        wait = max(self._interval_s, self._checkpoint_cost_s / CHECKPOINT_TIME_SHARE)
        return time.monotonic() - self._checkpointed_at >= wait

    @contextmanager
    def checkpoint(self) -> Iterator[None]:
        """Times how long a checkpoint holds training up."""
        began = time.monotonic()
        yield
        self._checkpointed_at = time.monotonic()
        self._checkpoint_cost_s = self._checkpointed_at - began

    @property
    def last_update_s(self) -> float:
        """Seconds of the update that ended last."""
        return self._recent_s[-1]

    @property
    def seconds_per_update(self) -> float:
        """Mean over the last 20 updates: the first ones are slow, because latents are computed then."""
        return statistics.fmean(self._recent_s)

    @contextmanager
    def update(self) -> Iterator[None]:
        """Times one update."""
        began = time.monotonic()
        yield
        self._recent_s.append(time.monotonic() - began)
