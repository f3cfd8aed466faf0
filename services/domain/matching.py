"""Which waiting job goes to which worker: warm models first, priorities, and turns between projects.

Pure functions over light entries; the index of :mod:`services.jobs` holds the entries, its dispatcher asks.

    eligible(job, worker) = job.model in worker.warm  or  no other live worker holds job.model  or  age(job) >= T
    order                 = (priority, running jobs of the project, not warm, queued time)

The project with the fewest running jobs comes first, which is max-min fairness without any state of its own.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NamedTuple

from services.domain.job import JobKind, JobRef

PATIENCE_MS: Final[Mapping[JobKind, int]] = MappingProxyType({JobKind.TRAIN: 0, JobKind.GEN: 2000})
"""How long a job waits for a worker that holds its model already, before any worker may have it."""

LIVE_S: Final = 15.0
"""A worker that was heard of so recently counts as live."""


class QueueKey(NamedTuple):
    """What the jobs of one queue have in common; within it they differ by age only."""

    priority: int
    project: str
    model: str


class Waiting(NamedTuple):
    """A job that can be taken; entries of one queue are kept sorted.

    Attributes:
        queued_ms: when its run was queued, milliseconds since 1970.
        id: the job's id.
        ref: its full name.
    """

    queued_ms: int
    id: str
    ref: JobRef


@dataclass(frozen=True, slots=True)
class Asking:
    """A worker that asks for work.

    Attributes:
        warm_models: digests of the models it holds ready.
        held_elsewhere: digests of the models that other live workers hold ready.
        free_slots: jobs it could begin at once.
    """

    warm_models: AbstractSet[str]
    held_elsewhere: AbstractSet[str]
    free_slots: int = 1


def is_warm(model: str, asking: Asking) -> bool:
    """The worker need not load anything: it holds the model, or the job needs none in particular."""
    return not model or model in asking.warm_models


def eligible(model: str, age_ms: int, asking: Asking, patience_ms: int) -> bool:
    """A worker may have a job: it is warm, nobody else is, or the job has waited long enough for somebody warm.

    Args:
        model: digest of the model the job needs; "" when any will do.
        age_ms: how long its run has been queued.
        asking: the worker.
        patience_ms: T of the job's kind.
    """
    return is_warm(model, asking) or model not in asking.held_elsewhere or age_ms >= patience_ms


def choose(
    queues: Mapping[QueueKey, Sequence[Waiting]],
    asking: Asking,
    running: Mapping[str, int],
    *,
    patience_ms: int,
    now_ms: int,
) -> list[Waiting]:
    """Picks the jobs for a worker, best first.

    All jobs picked for one request need the same model: that is what lets a worker run them as one batch. Jobs that
    were picked count as running for the picks after them.

    Args:
        queues: jobs that can be taken, oldest first in each queue; no queue is empty.
        asking: the worker.
        running: jobs under way of each project; absent means 0.
        patience_ms: T of the kind.
        now_ms: the present, milliseconds since 1970.

    Returns:
        At most `asking.free_slots` jobs.
    """
    heads = {key: iter(jobs) for key, jobs in queues.items()}
    first = {key: _next_eligible(key, jobs, asking, patience_ms, now_ms) for key, jobs in heads.items()}
    waiting = {key: job for key, job in first.items() if job is not None}
    counts = dict(running)
    picked: list[Waiting] = []
    while waiting and len(picked) < asking.free_slots:
        best = min(waiting, key=lambda key: _rank(key, waiting[key], counts, asking))
        picked.append(waiting.pop(best))
        counts[best.project] = counts.get(best.project, 0) + 1
        if len(picked) == 1:
            waiting = {key: job for key, job in waiting.items() if key.model == best.model}
        following = _next_eligible(best, heads[best], asking, patience_ms, now_ms)
        if following:
            waiting[best] = following
    return picked


def wait_until_eligible_ms(
    queues: Mapping[QueueKey, Sequence[Waiting]], patience_ms: int, now_ms: int
) -> int | None:
    """How long until age alone makes another waiting job eligible for everybody; None when that changes nothing."""
    left = (patience_ms - (now_ms - job.queued_ms) for job in _young(queues.values(), patience_ms, now_ms))
    return min(left, default=None)


def _young(queues: Collection[Sequence[Waiting]], patience_ms: int, now_ms: int) -> Iterator[Waiting]:
    """The oldest job of each queue that is younger than the patience."""
    for jobs in queues:
        if now_ms - jobs[0].queued_ms < patience_ms:
            yield jobs[0]


def _next_eligible(
    key: QueueKey, jobs: Iterable[Waiting], asking: Asking, patience_ms: int, now_ms: int
) -> Waiting | None:
    """The queue's next job, if the worker may have it; where it may not, it may have no younger one either."""
    for job in jobs:
        return job if eligible(key.model, now_ms - job.queued_ms, asking, patience_ms) else None
    return None


def _rank(
    key: QueueKey, job: Waiting, running: Mapping[str, int], asking: Asking
) -> tuple[int, int, bool, int, str]:
    return (key.priority, running.get(key.project, 0), not is_warm(key.model, asking), job.queued_ms, job.id)
