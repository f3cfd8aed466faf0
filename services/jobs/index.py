"""What a replica knows of all jobs of one kind: an index in memory that follows the job log.

Live jobs are held whole, ended ones as a light line. The index never decides anything: what it says may be a moment
old, and every change is a compare-and-set on the log that finds out. A revision is applied only when its sequence is
higher than the one held, so that revisions may come twice and in any order, from the feed and from one's own writes.
"""

import asyncio
import heapq
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from services.domain.errors import InvalidSpec
from services.domain.job import JobKind, JobRecord, JobRef, JobState, Phase
from services.domain.matching import QueueKey, Waiting
from services.domain.ports import JobFeed, Revision

API_PHASES: Final = frozenset({Phase.PREPARE, Phase.FINISH})


@dataclass(frozen=True, slots=True)
class Line:
    """What is kept of every job, ended ones included."""

    ref: JobRef
    sequence: int
    time_ms: int
    state: JobState
    created_ms: int
    keep_until_ms: int
    round: int
    endpoint: str
    parent: str

    @property
    def place(self) -> tuple[int, str]:
        """Position in a listing: newest first is descending."""
        return self.created_ms, self.ref.id


def _line_of(revision: Revision) -> Line:
    record = revision.record
    return Line(
        ref=record.ref,
        sequence=revision.sequence,
        time_ms=revision.time_ms,
        state=record.state,
        created_ms=record.times.created,
        keep_until_ms=record.times.keep_until,
        round=record.round,
        endpoint=record.endpoint,
        parent=record.parent,
    )


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of jobs by state, of all or of some."""

    by_state: Mapping[JobState, int]
    retried: int
    ready: int
    oldest_ready_ms: int


class JobIndex:
    """All jobs of one kind, as far as this replica has heard."""

    def __init__(self, kind: JobKind) -> None:
        """Starts empty; :meth:`follow` fills it."""
        self.kind = kind
        self._live: dict[JobRef, Revision] = {}
        self._lines: dict[JobRef, Line] = {}
        self._queues: dict[QueueKey, list[Waiting]] = {}
        self._being_taken: set[JobRef] = set()
        self._running: Counter[str] = Counter()
        self._owned: set[JobRef] = set()
        self._led: set[JobRef] = set()
        self._deleted: set[JobRef] = set()
        self._counts: Counter[tuple[str, str, JobState]] = Counter()
        self._retried: Counter[tuple[str, str]] = Counter()
        self._places: dict[str, list[tuple[int, str]]] = {}
        self._children: dict[tuple[str, str], set[str]] = {}
        self._expiry: list[tuple[int, str, str]] = []
        self._caught_up = asyncio.Event()
        self._work_came = asyncio.Event()
        self._led_changed = asyncio.Event()
        self._watchers: dict[JobRef, asyncio.Event] = {}

    # Following

    async def follow(self, feed: JobFeed) -> None:
        """Applies everything the feed delivers, for ever."""
        async for item in feed.follow(self.kind):
            if isinstance(item, Revision):
                self.apply(item)
            else:
                self._caught_up.set()

    @property
    def is_caught_up(self) -> bool:
        """Everything stored before following began has been applied."""
        return self._caught_up.is_set()

    async def wait_caught_up(self) -> None:
        """Waits until everything stored before following began has been applied."""
        await self._caught_up.wait()

    def apply(self, revision: Revision) -> bool:
        """Takes over a revision; one that is not newer than what is held changes nothing.

        Returns:
            Whether it was news.
        """
        record = revision.record
        ref = record.ref
        held = self._lines.get(ref)
        if record.kind is not self.kind or (held is not None and held.sequence >= revision.sequence):
            return False
        self._remove(ref)
        self._insert(revision)
        self._tell(ref)
        return True

    def drop(self, ref: JobRef) -> None:
        """Forgets a job whose revisions are gone."""
        self._remove(ref)
        self._tell(ref)

    def _insert(self, revision: Revision) -> None:
        record, ref, line = revision.record, revision.record.ref, _line_of(revision)
        self._lines[ref] = line
        if record.state is JobState.DELETED:
            self._deleted.add(ref)
            return
        self._counts[ref.project, line.endpoint, record.state] += 1
        self._retried[ref.project, line.endpoint] += record.round > 0
        insort(self._places.setdefault(ref.project, []), line.place)
        if line.parent:
            self._children.setdefault((ref.project, line.parent), set()).add(ref.id)
        if record.is_final:
            heapq.heappush(self._expiry, (line.keep_until_ms, ref.project, ref.id))
        else:
            self._insert_live(revision)

    def _insert_live(self, revision: Revision) -> None:
        record, ref = revision.record, revision.record.ref
        self._live[ref] = revision
        if record.worker:
            self._running[ref.project] += 1
            self._owned.add(ref)
        elif record.ready:
            self._enqueue(record)
        elif record.phase in API_PHASES:
            self._led.add(ref)
            self._led_changed.set()

    def _remove(self, ref: JobRef) -> None:
        line = self._lines.pop(ref, None)
        if line is None:
            return
        self._remove_live(ref)
        if line.state is JobState.DELETED:
            self._deleted.discard(ref)
            return
        self._counts[ref.project, line.endpoint, line.state] -= 1
        self._retried[ref.project, line.endpoint] -= line.round > 0
        places = self._places[ref.project]
        del places[bisect_left(places, line.place)]
        if not places:
            del self._places[ref.project]
        if line.parent:
            self._forget_child(ref, line.parent)

    def _forget_child(self, ref: JobRef, parent: str) -> None:
        siblings = self._children[ref.project, parent]
        siblings.discard(ref.id)
        if not siblings:
            del self._children[ref.project, parent]

    def _remove_live(self, ref: JobRef) -> None:
        revision = self._live.pop(ref, None)
        if revision is None:
            return
        record = revision.record
        if ref in self._owned:
            self._owned.discard(ref)
            self._running[ref.project] -= 1
            if not self._running[ref.project]:
                del self._running[ref.project]
        elif record.ready:
            self._dequeue(record)
        elif ref in self._led:
            self._led.discard(ref)
            self._led_changed.set()

    def _tell(self, ref: JobRef) -> None:
        watcher = self._watchers.pop(ref, None)
        if watcher is not None:
            watcher.set()

    # Work that can be taken

    def _enqueue(self, record: JobRecord) -> None:
        if record.ref in self._being_taken:
            return
        jobs, waiting = self._queues.setdefault(_queue_of(record), []), _waiting_of(record)
        place = bisect_left(jobs, waiting)
        if jobs[place : place + 1] != [waiting]:
            jobs.insert(place, waiting)
            self._work_came.set()

    def _dequeue(self, record: JobRecord) -> None:
        key, waiting = _queue_of(record), _waiting_of(record)
        jobs = self._queues.get(key, [])
        place = bisect_left(jobs, waiting)
        if place < len(jobs) and jobs[place] == waiting:
            del jobs[place]
        if not jobs:
            self._queues.pop(key, None)

    @property
    def queues(self) -> Mapping[QueueKey, list[Waiting]]:
        """Jobs that can be taken and that nobody in this replica is taking, oldest first in each queue."""
        return self._queues

    @property
    def running_by_project(self) -> Mapping[str, int]:
        """Jobs that workers have, by project."""
        return self._running

    def begin_taking(self, ref: JobRef) -> Revision:
        """Marks a ready job as being taken, so that no other request of this replica picks it."""
        revision = self._live[ref]
        self._dequeue(revision.record)
        self._being_taken.add(ref)
        return revision

    def end_taking(self, ref: JobRef) -> None:
        """Removes the mark; a job that is still ready waits again."""
        self._being_taken.discard(ref)
        revision = self._live.get(ref)
        if revision is not None and revision.record.ready:
            self._enqueue(revision.record)

    def work_signal(self) -> asyncio.Event:
        """An event that is set once another job can be taken; ask for it before looking, then wait for it."""
        if self._work_came.is_set():
            self._work_came = asyncio.Event()
        return self._work_came

    # Reading

    def get(self, ref: JobRef) -> Revision | None:
        """The whole record of a live job; None for ended and unknown ones."""
        return self._live.get(ref)

    def line(self, ref: JobRef) -> Line | None:
        """The line of any job; None for unknown ones."""
        return self._lines.get(ref)

    def live(self) -> list[Revision]:
        """All jobs that have not ended."""
        return list(self._live.values())

    def owned(self) -> list[Revision]:
        """The jobs that workers have."""
        return [self._live[ref] for ref in self._owned]

    def led(self) -> list[Revision]:
        """The jobs that the api itself must move on: phases prepare and finish."""
        return [self._live[ref] for ref in self._led]

    def deleted(self) -> list[Line]:
        """Jobs whose stripped record waits for its purge."""
        return [self._lines[ref] for ref in self._deleted]

    def led_signal(self) -> asyncio.Event:
        """An event that is set once the jobs led by the api change; ask for it before looking."""
        if self._led_changed.is_set():
            self._led_changed = asyncio.Event()
        return self._led_changed

    async def changed(self, ref: JobRef, after: int) -> None:
        """Waits until a revision of the job with a sequence above `after` is known, or the job is forgotten."""
        while True:
            line = self._lines.get(ref)
            if line is not None and line.sequence > after:
                return
            watcher = self._watchers.setdefault(ref, asyncio.Event())
            await watcher.wait()
            if ref not in self._lines:
                return

    def children(self, project: str, parent: str) -> list[Line]:
        """The jobs that belong to another one, in the order of their ids."""
        ids = sorted(self._children.get((project, parent), ()))
        return [self._lines[JobRef(self.kind, project, id_)] for id_ in ids]

    def expired(self, now_ms: int) -> Iterator[JobRef]:
        """Takes out the ended jobs whose time has come, the longest overdue first; an abandoned one comes again
        only through :meth:`remind`."""
        while self._expiry and self._expiry[0][0] <= now_ms:
            due_ms, project, job_id = heapq.heappop(self._expiry)
            ref = JobRef(self.kind, project, job_id)
            line = self._lines.get(ref)
            if line is not None and line.keep_until_ms <= due_ms and line.state not in _UNENDED:
                yield ref

    def remind(self, ref: JobRef, at_ms: int) -> None:
        """Lets :meth:`expired` name an ended job again, at this moment."""
        heapq.heappush(self._expiry, (at_ms, ref.project, ref.id))

    def page(
        self,
        project: str,
        size: int,
        token: str = "",
        states: Collection[JobState] = (),
        endpoint: str = "",
    ) -> tuple[list[Line], str]:
        """One page of a project's jobs, newest first.

        Args:
            project: the project.
            size: jobs a page, at least 1.
            token: what the page before returned; "" for the first.
            states: only jobs in these states; empty: all.
            endpoint: only jobs of this dialect endpoint; "": all.

        Returns:
            The lines, and the token of the next page; "" on the last.
        """
        places = self._places.get(project, [])
        at = bisect_left(places, _read_token(token)) if token else len(places)
        found: list[Line] = []
        while at > 0:
            at -= 1
            line = self._lines[JobRef(self.kind, project, places[at][1])]
            if (not states or line.state in states) and (not endpoint or line.endpoint == endpoint):
                if len(found) == size:
                    return found, f"{found[-1].created_ms}.{found[-1].ref.id}"
                found.append(line)
        return found, ""

    def counts(self, project: str = "", endpoint: str = "") -> Counts:
        """Numbers of jobs, of all or only of a project or an endpoint ("": all)."""
        by_state: Counter[JobState] = Counter()
        for (of_project, of_endpoint, state), number in self._counts.items():
            if project in ("", of_project) and endpoint in ("", of_endpoint):
                by_state[state] += number
        retried = sum(
            number
            for (of_project, of_endpoint), number in self._retried.items()
            if project in ("", of_project) and endpoint in ("", of_endpoint)
        )
        waits = [
            record.times.waiting_since
            for record in (revision.record for revision in self._live.values())
            if record.ready and project in ("", record.project) and endpoint in ("", record.endpoint)
        ]
        return Counts(by_state, retried, len(waits), min(waits, default=0))


_UNENDED: Final = frozenset({JobState.QUEUED, JobState.RUNNING, JobState.DELETED})


def _queue_of(record: JobRecord) -> QueueKey:
    return QueueKey(record.limits.priority, record.project, record.model)


def _waiting_of(record: JobRecord) -> Waiting:
    return Waiting(record.times.queued, record.id, record.ref)


def _read_token(token: str) -> tuple[int, str]:
    created, _, job_id = token.partition(".")
    if not created.isdecimal() or not job_id:
        raise InvalidSpec("is not a token of this listing", "page_token")
    return int(created), job_id
