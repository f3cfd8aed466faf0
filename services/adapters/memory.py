"""The ports of the job core in memory, one process, nothing stored: for tests, and for trying things out.

:class:`MemoryPlatform` holds one log and offers it through the same attributes as its real twin, the
JetStreamPlatform: `job_log`, `job_feed`, `beats`, `progress`, `small`. Both pass the same conformance suite. A clock
that moves only when told is here too.
"""

import asyncio
import heapq
import json
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, Final, Self

from services.adapters.clock import RealClock
from services.adapters.job_headers import RESTING_STATES, headline
from services.domain.errors import Conflict, InvalidSpec, QueueFull, Unavailable
from services.domain.job import ID_PATTERN, MAX_RECORD_BYTES, JobKind, JobRecord, JobRef
from services.domain.ports import Beat, CaughtUp, Clock, ProgressEntry, Revision

ADMISSION_SHARE: Final = 0.8
"""Share of the log's room that new jobs may fill; the rest is for running jobs to end in."""

MAX_PROGRESS_PER_JOB: Final = 500


class ManualClock:
    """Time that stands still until a test moves it; sleepers wake in the order of their moments."""

    def __init__(self, now_ms: int = 1_700_000_000_000) -> None:
        self._start_ms = now_ms
        self._elapsed_s = 0.0
        self._order = count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def now_ms(self) -> int:
        """Milliseconds since 1970."""
        return self._start_ms + round(self._elapsed_s * 1000)

    def monotonic(self) -> float:
        """Seconds since this clock was made."""
        return self._elapsed_s

    async def sleep(self, seconds: float) -> None:
        """Waits until :meth:`advance` has moved the time far enough."""
        if seconds <= 0:
            return await asyncio.sleep(0)
        waker = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._elapsed_s + seconds, next(self._order), waker))
        await waker

    async def advance(self, seconds: float) -> None:
        """Moves the time on, and lets everyone run who wakes meanwhile."""
        until = self._elapsed_s + seconds
        await _let_others_run()
        while self._sleepers and self._sleepers[0][0] <= until:
            moment, _, waker = heapq.heappop(self._sleepers)
            self._elapsed_s = max(self._elapsed_s, moment)
            if not waker.done():
                waker.set_result(None)
            await _let_others_run()
        self._elapsed_s = until


async def _let_others_run() -> None:
    for _ in range(20):  # a woken task often needs some turns of the loop until it sleeps again
        await asyncio.sleep(0)


class MemoryPlatform:
    """All ports of the job core over one log in memory.

    Attributes:
        clock: whose time is stamped on revisions.
        down: while true every call raises Unavailable, as if the server were gone; feeds wait.
    """

    def __init__(self, clock: Clock | None = None, max_bytes: int = 1 << 30) -> None:
        self.clock: Clock = clock or RealClock()
        self.down = False
        self.job_log = MemoryJobLog(self, max_bytes)
        self.job_feed = MemoryJobFeed(self)
        self.beats = MemoryBeatFeed(self)
        self.progress = MemoryProgressLog(self)
        self.small = MemorySmallLog(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Nothing to release."""

    def check_up(self) -> None:
        """Raises Unavailable while the platform is down."""
        if self.down:
            raise Unavailable("the job log does not answer")


class MemoryJobLog:
    """Every revision of every job; see :class:`~services.domain.ports.JobLog`."""

    def __init__(self, platform: MemoryPlatform, max_bytes: int) -> None:
        self._platform = platform
        self._max_bytes = max_bytes
        self._used_bytes = 0
        self._log: dict[int, tuple[Revision, int]] = {}
        self._chains: dict[JobRef, list[int]] = {}
        self._last = 0
        self._listeners: set[asyncio.Event] = set()

    async def write(self, record: JobRecord, expected: int) -> int:
        """Stores a revision by compare-and-set."""
        self._platform.check_up()
        await asyncio.sleep(0)  # as the real one, it lets others run in between
        chain = self._chains.get(record.ref, [])
        if (chain[-1] if chain else 0) != expected:
            raise Conflict(f"job {record.id} was changed meanwhile")
        body = record.stamped().to_json()
        self._check_room(record, len(body), create=expected == 0)
        self._last += 1
        stored = Revision(JobRecord.from_json(body), self._last, self.now_ms())
        self._log[self._last] = stored, len(body)
        self._chains.setdefault(record.ref, []).append(self._last)
        self._used_bytes += len(body)
        for listener in self._listeners:
            listener.set()
        return self._last

    def _check_room(self, record: JobRecord, size_bytes: int, create: bool) -> None:
        if size_bytes > MAX_RECORD_BYTES:
            raise InvalidSpec(f"the record of job {record.id} is larger than {MAX_RECORD_BYTES} bytes")
        share = ADMISSION_SHARE if create else 1.0
        if self._used_bytes + size_bytes > self._max_bytes * share:
            raise QueueFull("the job log is full")

    async def read(self, ref: JobRef) -> Revision | None:
        """The newest revision."""
        self._platform.check_up()
        await asyncio.sleep(0)
        chain = self._chains.get(ref)
        return self._log[chain[-1]][0] if chain else None

    async def next_revision(self, ref: JobRef, after: int) -> Revision | None:
        """The first revision of the job above a sequence."""
        self._platform.check_up()
        found = next((sequence for sequence in self._chains.get(ref, []) if sequence > after), None)
        return self._log[found][0] if found is not None else None

    async def read_many(self, refs: Sequence[JobRef]) -> list[Revision]:
        """The newest revisions of several jobs, in the order of `refs`."""
        found = [await self.read(ref) for ref in refs]
        return [revision for revision in found if revision is not None]

    async def purge(self, ref: JobRef, keep_last: bool) -> None:
        """Removes all revisions of a job, or all but the newest."""
        self._platform.check_up()
        chain = self._chains.pop(ref, [])
        kept = chain[-1:] if keep_last else []
        if kept:
            self._chains[ref] = kept
        for sequence in chain[: len(chain) - len(kept)]:
            self._used_bytes -= self._log.pop(sequence)[1]

    async def fill(self) -> float:
        """Share of the log's room that is used, 0..1."""
        self._platform.check_up()
        return self._used_bytes / self._max_bytes

    def now_ms(self) -> int:
        """The present by the platform's clock."""
        return self._platform.clock.now_ms()

    @property
    def last_sequence(self) -> int:
        """Sequence of the newest revision of all; 0 when there never was one."""
        return self._last

    def newest_of_each(self, kind: JobKind | None) -> list[Revision]:
        """The newest revision of every job of a kind, in the order of sequences."""
        newest = sorted(chain[-1] for ref, chain in self._chains.items() if kind in (None, ref.kind))
        return [self._log[sequence][0] for sequence in newest]

    def between(self, kind: JobKind | None, after: int, until: int) -> list[Revision]:
        """The revisions of a kind with a sequence above `after` and up to `until`."""
        span = (self._log.get(sequence) for sequence in range(after + 1, until + 1))
        return [entry[0] for entry in span if entry is not None and kind in (None, entry[0].record.kind)]

    @contextmanager
    def listening(self) -> Iterator[asyncio.Event]:
        """An event that is set at every write."""
        event = asyncio.Event()
        self._listeners.add(event)
        try:
            yield event
        finally:
            self._listeners.discard(event)


class MemoryJobFeed:
    """The revisions as they come; see :class:`~services.domain.ports.JobFeed`."""

    def __init__(self, platform: MemoryPlatform) -> None:
        self._platform = platform

    async def follow(self, kind: JobKind | None = None) -> AsyncGenerator[Revision | CaughtUp, None]:
        """Newest revision of every job, then CaughtUp, then every new revision, for ever."""
        log = self._platform.job_log
        with log.listening() as written:
            position = log.last_sequence
            for revision in log.newest_of_each(kind):
                yield _replayed(revision)
            yield CaughtUp(position)
            while True:
                written.clear()
                newest = log.last_sequence
                for revision in log.between(kind, position, newest):
                    yield revision
                position = newest
                if log.last_sequence == position:
                    await written.wait()


def _replayed(revision: Revision) -> Revision:
    if revision.record.state not in RESTING_STATES:
        return revision
    return Revision(headline(revision.record), revision.sequence, revision.time_ms)


class MemoryBeatFeed:
    """Beats of all workers; see :class:`~services.domain.ports.BeatFeed`."""

    def __init__(self, platform: MemoryPlatform) -> None:
        self._platform = platform
        self._followers: dict[asyncio.Queue[Beat], JobKind] = {}

    async def publish_beat(self, beat: Beat) -> None:
        """Tells all followers; lost while the platform is down."""
        _check_token("worker_id", beat.worker)
        if self._platform.down:
            return
        for queue, kind in self._followers.items():
            if kind is beat.kind:
                queue.put_nowait(beat)

    async def follow_beats(self, kind: JobKind) -> AsyncGenerator[Beat, None]:
        """Beats published from now on."""
        queue: asyncio.Queue[Beat] = asyncio.Queue()
        self._followers[queue] = kind
        try:
            while True:
                yield await queue.get()
        finally:
            del self._followers[queue]


class MemoryProgressLog:
    """Recent progress and cursors over it; see :class:`~services.domain.ports.ProgressLog`."""

    def __init__(self, platform: MemoryPlatform) -> None:
        self._platform = platform
        self._sequence = count(1)
        self._entries: dict[tuple[str, str], deque[ProgressEntry]] = {}
        self._cursors: dict[tuple[str, str], tuple[bytes, int]] = {}

    async def publish_progress(self, project: str, job_id: str, body: Mapping[str, Any]) -> None:
        """Stores one message; lost while the platform is down."""
        key = _checked(project, job_id)
        if self._platform.down:
            return
        entry = ProgressEntry(next(self._sequence), json.loads(json.dumps(body)))
        self._entries.setdefault(key, deque(maxlen=MAX_PROGRESS_PER_JOB)).append(entry)

    async def last_progress(self, project: str, job_id: str) -> ProgressEntry | None:
        """The newest message."""
        self._platform.check_up()
        entries = self._entries.get(_checked(project, job_id))
        return entries[-1] if entries else None

    async def progress_after(
        self, project: str, job_id: str, after: int, limit: int = 100
    ) -> list[ProgressEntry]:
        """Messages above a sequence, oldest first."""
        self._platform.check_up()
        entries = self._entries.get(_checked(project, job_id), ())
        return [entry for entry in entries if entry.sequence > after][:limit]

    async def read_cursor(self, project: str, job_id: str) -> tuple[Mapping[str, Any], int]:
        """A reader's position, and the sequence to expect."""
        self._platform.check_up()
        data, sequence = self._cursors.get(_checked(project, job_id), (b"{}", 0))
        return json.loads(data), sequence

    async def write_cursor(self, project: str, job_id: str, value: Mapping[str, Any], expected: int) -> int:
        """Moves a reader's position by compare-and-set."""
        self._platform.check_up()
        return _swap(self._cursors, _checked(project, job_id), value, expected, next(self._sequence))


class MemorySmallLog:
    """Idempotency keys and webhook cursors; see :class:`~services.domain.ports.SmallLog`."""

    def __init__(self, platform: MemoryPlatform) -> None:
        self._platform = platform
        self._sequence = count(1)
        self._keys: dict[tuple[str, str], tuple[bytes, int]] = {}
        self._hooks: dict[tuple[str, str], tuple[bytes, int]] = {}

    async def create_idempotency(self, project: str, key_hash: str, value: Mapping[str, Any]) -> None:
        """Stores what an idempotency key stands for, once."""
        self._platform.check_up()
        await asyncio.sleep(0)
        _swap(self._keys, _checked(project, key_hash), value, 0, next(self._sequence))

    async def read_idempotency(self, project: str, key_hash: str) -> Mapping[str, Any] | None:
        """What an idempotency key stands for."""
        self._platform.check_up()
        found = self._keys.get(_checked(project, key_hash))
        return json.loads(found[0]) if found else None

    async def read_hook(self, project: str, job_id: str) -> tuple[Mapping[str, Any], int]:
        """A webhook's cursor, and the sequence to expect."""
        self._platform.check_up()
        data, sequence = self._hooks.get(_checked(project, job_id), (b"{}", 0))
        return json.loads(data), sequence

    async def write_hook(self, project: str, job_id: str, value: Mapping[str, Any], expected: int) -> int:
        """Moves a webhook's cursor by compare-and-set."""
        self._platform.check_up()
        await asyncio.sleep(0)
        return _swap(self._hooks, _checked(project, job_id), value, expected, next(self._sequence))


def _swap(
    stored: dict[tuple[str, str], tuple[bytes, int]],
    key: tuple[str, str],
    value: Mapping[str, Any],
    expected: int,
    sequence: int,
) -> int:
    if stored.get(key, (b"", 0))[1] != expected:
        raise Conflict("the document was changed meanwhile")
    stored[key] = json.dumps(value).encode(), sequence
    return sequence


def _checked(project: str, name: str) -> tuple[str, str]:
    _check_token("project_id", project)
    _check_token("job_id", name)
    return project, name


def _check_token(field: str, value: str) -> None:
    if not ID_PATTERN.match(value):
        raise InvalidSpec("must be 1 to 64 letters, digits, '_' or '-'", field)
