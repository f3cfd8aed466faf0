"""The job core of one api replica, put together: what `__main__` makes, serves and runs.

core = JobCore(JobKind.TRAIN, platform, RealClock(), StorageDocuments(storage), lease_s=settings.lease_s)
leader = TrainingLeader(platform.job_log, platform.progress, siblings, core.views.training_spec)
core.lead_with(leader.lead, {Phase.PREPARE: 4})
server.add(add_WorkerServiceServicer_to_server, core.worker_servicer, "likeness.worker.v1.WorkerService")
await server.run_until_signalled(core.run())
"""

import asyncio
from collections.abc import Mapping
from typing import Final, Protocol

from services.domain.job import JobKind, Limits, Phase
from services.domain.ports import BeatFeed, Clock, JobFeed, JobLog, ProgressLog, SmallLog
from services.jobs.admission import Admission
from services.jobs.dispatch import Dispatcher
from services.jobs.documents import CachedDocuments, DocumentStore
from services.jobs.index import JobIndex
from services.jobs.progress import ProgressBoard
from services.jobs.reading import Reading
from services.jobs.records import Records
from services.jobs.removal import Removal, RemoveObjects, nothing_to_remove
from services.jobs.upkeep import Lead, Leading, Upkeep
from services.jobs.views import Views
from services.jobs.worker_servicer import WorkerServicer

LONGEST_TICK_S: Final = 1.0
TICKS_PER_LEASE: Final = 10


class Platform(Protocol):
    """The ports of the job core, as both platforms offer them."""

    @property
    def job_log(self) -> JobLog:
        """Every revision of every job."""
        ...

    @property
    def job_feed(self) -> JobFeed:
        """The revisions as they come."""
        ...

    @property
    def beats(self) -> BeatFeed:
        """Beats of all workers."""
        ...

    @property
    def progress(self) -> ProgressLog:
        """Recent progress of jobs."""
        ...

    @property
    def small(self) -> SmallLog:
        """Idempotency keys and webhook cursors."""
        ...


class JobCore:
    """Everything that an api does with jobs of one kind.

    Attributes:
        index: what this replica knows of all jobs.
        records: the log, changed by compare-and-set.
        dispatcher: takings, beats, reports.
        admission: what owners change.
        reading: what owners read.
        views: records as messages.
        worker_servicer: WorkerService, to be served.
    """

    def __init__(
        self,
        kind: JobKind,
        platform: Platform,
        clock: Clock,
        documents: DocumentStore,
        *,
        lease_s: float = 30.0,
        tick_s: float | None = None,
        defaults: Limits | None = None,
        remove_objects: RemoveObjects = nothing_to_remove,
    ) -> None:
        """Puts the parts together; nothing happens before :meth:`run`.

        Args:
            kind: the jobs of this api.
            platform: the ports.
            clock: this replica's time.
            documents: where long specifications and results are kept.
            lease_s: seconds after which a silent worker's jobs are given away.
            tick_s: seconds between two looks for what is due, well below a third of the lease, since each look is
                also the sign of life by which this replica knows that it is connected; None: as it should be.
            defaults: limits of jobs that name none.
            remove_objects: removes what a job owns in storage.
        """
        self._feed = platform.job_feed
        self._clock = clock
        tick_s = min(LONGEST_TICK_S, lease_s / TICKS_PER_LEASE) if tick_s is None else tick_s
        self._tick_s = tick_s
        self._leading: Leading | None = None
        cached = CachedDocuments(documents)
        self.index = JobIndex(kind)
        self.records = Records(platform.job_log, self.index)
        board = ProgressBoard(platform.progress, clock)
        self.dispatcher = Dispatcher(kind, self.records, platform.beats, board, clock, lease_s=lease_s)
        removal = Removal(self.records, platform.small, remove_objects)
        self.admission = Admission(kind, self.records, platform.small, cached, removal, defaults)
        self.reading = Reading(self.records, platform.progress, clock)
        self.views = Views(cached, platform.progress)
        self.worker_servicer = WorkerServicer(self.dispatcher, self.views, cached)
        self._upkeep = Upkeep(self.dispatcher, removal, clock, tick_s=tick_s)

    def lead_with(self, lead: Lead, slots: Mapping[Phase, int]) -> None:
        """Sets what moves the jobs on that the api leads, and how many of a phase at once (absent: any number)."""
        self._leading = Leading(self.index, lead, self._clock, slots=slots, tick_s=self._tick_s)

    async def run(self) -> None:
        """Follows the log and the workers, and does what is due, until it is cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.index.follow(self._feed))
                group.create_task(self.dispatcher.follow_beats())
                group.create_task(self._upkeep.run())
                if self._leading is not None:
                    group.create_task(self._leading.run())
        finally:
            await self.dispatcher.close()

    async def wait_ready(self) -> None:
        """Waits until everything stored so far is known; the process is ready from then on."""
        await self.index.wait_caught_up()
