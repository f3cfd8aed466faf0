"""How many requests a key may make: a window of ten seconds and a number at once, for each operation, in memory.

Each gateway counts for itself; behind a load balancer the sum over the replicas is what a caller gets.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from services.domain.errors import RateLimited
from services.gateway.auth import Caller

WINDOW_S = 10.0


@dataclass(frozen=True, slots=True)
class Limit:
    """What one key may do of one operation: requests in ten seconds, requests at once."""

    requests: int
    at_once: int


RUNPOD_LIMITS: Mapping[str, Limit] = {
    "run": Limit(1000, 200),
    "runsync": Limit(2000, 400),
    "status": Limit(2000, 400),
    "cancel": Limit(100, 20),
    "purge-queue": Limit(2, 2),
    "health": Limit(2000, 400),
}
"""`status` is shared by status, status-sync and stream; `cancel` by cancel and retry."""


SDAPI_LIMITS: Mapping[str, Limit] = {
    "start": Limit(1000, 200),
    "read": Limit(2000, 400),
    "steer": Limit(100, 20),
}
"""`start` trains or draws, `steer` cancels and deletes, `read` is everything else."""


@dataclass(frozen=True, slots=True)
class QueueLimit:
    """When a queue is full: longer than `floor` and longer than `per_worker` times the workers."""

    floor: int = 50
    per_worker: int = 500

    def is_full(self, waiting: int, workers: int) -> bool:
        """One more job is one too many."""
        return waiting > self.floor and waiting > self.per_worker * max(1, workers)


@dataclass(slots=True)
class _Use:
    """What one key has done of one operation: when, within the window, and how many requests are under way."""

    moments: deque[float] = field(default_factory=deque)
    at_once: int = 0


class RateLimiter:
    """Counts requests by key, endpoint and operation."""

    def __init__(
        self,
        limits: Mapping[str, Limit] = RUNPOD_LIMITS,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Takes the limits by operation."""
        self._limits = limits
        self._monotonic = monotonic
        self._uses: dict[tuple[str, str, str], _Use] = {}
        self._swept_at = monotonic()

    @contextmanager
    def admitted(self, caller: Caller, endpoint: str, operation: str) -> Iterator[None]:
        """Counts one request, for as long as it lasts.

        Raises:
            RateLimited: the key has used up its requests, or has too many under way.
        """
        self._sweep()
        use = self._uses.setdefault((caller.key_id, endpoint, operation), _Use())
        self._forget_old(use)
        if (
            len(use.moments) >= self._requests(caller, operation)
            or use.at_once >= self._limits[operation].at_once
        ):
            raise RateLimited("too many requests")
        use.moments.append(self._monotonic())
        use.at_once += 1
        try:
            yield
        finally:
            use.at_once -= 1

    def _requests(self, caller: Caller, operation: str) -> int:
        own = (caller.operation_limits or {}).get(operation, 0) or caller.requests_per_ten_seconds
        return own or self._limits[operation].requests

    def _forget_old(self, use: _Use) -> None:
        oldest = self._monotonic() - WINDOW_S
        while use.moments and use.moments[0] <= oldest:
            use.moments.popleft()

    def _sweep(self) -> None:
        """Drops the counts of callers who have gone quiet, once a window."""
        now = self._monotonic()
        if now < self._swept_at + WINDOW_S:
            return
        self._swept_at = now
        for key, use in list(self._uses.items()):
            self._forget_old(use)
            if not use.moments and not use.at_once:
                del self._uses[key]
