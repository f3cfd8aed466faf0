"""Which workers live, what they hold, and which jobs have not been named for a lease.

All of it lies in memory and comes from beats, whichever replica they were sent to. Time is this replica's own
monotonic clock. Nothing is called lost before this replica has been connected without a break for a whole lease: it
publishes a sign of life of its own and counts as connected while it hears itself. So neither an outage of the log nor
a paused or restarted api ends a lease. A wrong guess costs time, never correctness: the epoch decides.
"""

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from services.domain.job import JobKind, JobRef
from services.domain.matching import LIVE_S, Asking
from services.domain.ports import Beat, Clock, Revision

ECHO_PREFIX: Final = "api-"
"""Workers' names never begin like this."""


@dataclass(slots=True)
class Worker:
    """What is known of a worker.

    Attributes:
        heard_at: when it was last heard of, by the monotonic clock.
        jobs: the (project, id, epoch) it named.
    """

    heard_at: float
    warm_models: frozenset[str] = frozenset()
    jobs: tuple[tuple[str, str, int], ...] = ()
    free_slots: int = 0
    leaving: bool = False


@dataclass(slots=True)
class WorkerBook:
    """The workers of one kind, as far as this replica has heard."""

    clock: Clock
    workers: dict[str, Worker] = field(default_factory=dict)

    def hear(self, beat: Beat) -> None:
        """Takes over a beat."""
        self.workers[beat.worker] = Worker(
            heard_at=self.clock.monotonic(),
            warm_models=frozenset(beat.warm_models),
            jobs=beat.jobs,
            free_slots=beat.free_slots,
            leaving=beat.leaving,
        )

    def ask(self, worker: str, warm_models: Iterable[str], free_slots: int) -> None:
        """Notes that a worker asks for work."""
        known = self.workers.setdefault(worker, Worker(self.clock.monotonic()))
        known.heard_at = self.clock.monotonic()
        known.warm_models = frozenset(warm_models)
        known.free_slots = free_slots
        known.leaving = False

    def live(self) -> Mapping[str, Worker]:
        """The workers heard of lately that are not leaving; forgets the others."""
        since = self.clock.monotonic() - LIVE_S
        self.workers = {name: worker for name, worker in self.workers.items() if worker.heard_at >= since}
        return {name: worker for name, worker in self.workers.items() if not worker.leaving}

    def asking(self, worker: str, warm_models: Iterable[str], free_slots: int) -> Asking:
        """A worker's request as the matching sees it."""
        elsewhere = [other.warm_models for name, other in self.live().items() if name != worker]
        return Asking(frozenset(warm_models), frozenset().union(*elsewhere), free_slots)


class Leases:
    """When each job that a worker has was last named, and whether this replica may judge by that."""

    def __init__(self, kind: JobKind, clock: Clock, lease_s: float) -> None:
        """Starts with every job as fresh as the moment it is first seen.

        Args:
            kind: whose workers.
            clock: this replica's time.
            lease_s: seconds that a job may go unnamed.
        """
        self._clock = clock
        self._lease_s = lease_s
        self._break_s = lease_s / 3
        self._named_at: dict[tuple[str, str, int], float] = {}
        self._echoed_at = clock.monotonic()
        self._connected_since = self._echoed_at
        self.echo = Beat(kind=kind, worker=ECHO_PREFIX + secrets.token_hex(8), leaving=True)

    def hear(self, beat: Beat) -> bool:
        """Takes over a beat; returns whether it is a worker's and not a replica's sign of life."""
        if beat.worker == self.echo.worker:
            self._hear_echo()
        now = self._clock.monotonic()
        for job in beat.jobs:
            self._named_at[job] = now
        return not beat.worker.startswith(ECHO_PREFIX)

    def name(self, ref: JobRef, epoch: int) -> None:
        """Notes that a job's worker was heard of by other means than a beat."""
        self._named_at[ref.project, ref.id, epoch] = self._clock.monotonic()

    def _hear_echo(self) -> None:
        now = self._clock.monotonic()
        if now - self._echoed_at > self._break_s:
            self._connected_since = now
        self._echoed_at = now

    @property
    def is_connected(self) -> bool:
        """This replica has heard itself lately."""
        return self._clock.monotonic() - self._echoed_at <= self._break_s

    @property
    def may_judge(self) -> bool:
        """This replica has been connected without a break for a whole lease."""
        return self.is_connected and self._clock.monotonic() - self._connected_since >= self._lease_s

    def lost(self, owned: Iterable[Revision]) -> list[tuple[JobRef, int]]:
        """The (job, epoch) whose lease is over.

        Args:
            owned: the jobs that workers have now; what is remembered of others is forgotten.
        """
        now = self._clock.monotonic()
        jobs = {(r.record.project, r.record.id, r.record.epoch): r.record.ref for r in owned}
        self._named_at = {job: self._named_at.get(job, now) for job in jobs}
        if not self.may_judge:
            return []
        over = now - self._lease_s
        return [(jobs[job], job[2]) for job, named_at in self._named_at.items() if named_at < over]
