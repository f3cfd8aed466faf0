"""Reading jobs for their owners: one, a page of many, and a job's events as they come."""

from collections.abc import AsyncIterator, Collection
from typing import Final

from likeness.job.v1.job_pb2 import JobEvent

from services.domain.errors import LikenessError, NotFound, Unavailable
from services.domain.job import JobRecord, JobRef, JobState
from services.domain.ports import Clock, ProgressLog, Revision
from services.domain.rules import page_length
from services.jobs.records import Records
from services.jobs.tasks import first_of
from services.jobs.views import event_of, progress_event_of

PROGRESS_S: Final = 1.0
"""Seconds between two looks for new numbers of a watched job."""


class Reading:
    """What owners read of jobs of one kind."""

    def __init__(self, records: Records, progress: ProgressLog, clock: Clock) -> None:
        """Joins the log and the numbers.

        Args:
            records: log and index.
            progress: where the numbers are.
            clock: this replica's time.
        """
        self._records = records
        self._progress = progress
        self._clock = clock

    async def get(self, ref: JobRef) -> Revision:
        """The newest revision.

        Raises:
            NotFound: there is no such job.
        """
        return await self._records.read(ref)

    async def page(
        self, project: str, size: int, token: str, states: Collection[JobState], endpoint: str
    ) -> tuple[list[Revision], str]:
        """One page of a project's jobs, newest first.

        Args:
            project: the project.
            size: jobs a page, 1..200; 0: 50.
            token: of the page before; "" for the first.
            states: only jobs in these states; empty: all.
            endpoint: only jobs of this dialect endpoint; "": all.

        Returns:
            The revisions, and the token of the next page; "" on the last.

        Raises:
            InvalidSpec: size or token is malformed.
            Unavailable: this replica has just started and does not know all jobs yet.
        """
        length = page_length(size)
        if not self._records.index.is_caught_up:
            raise Unavailable("still reading the job log")
        index = self._records.index
        lines, next_token = index.page(project, length, token, states, endpoint)
        found = await self._records.log.read_many([line.ref for line in lines])
        by_ref = {revision.record.ref: revision for revision in found}
        return [by_ref[line.ref] for line in lines if line.ref in by_ref], next_token

    async def watch(self, ref: JobRef, after: int) -> AsyncIterator[JobEvent]:
        """The events of a job after a position of the log, then each new one and its progress, until it has ended.

        Raises:
            NotFound: there is no such job.
        """
        newest, position, numbers = await self._records.read(ref), after, -1
        while True:
            revision = await self._records.log.next_revision(ref, position)
            while revision is not None:
                newest, position = revision, revision.sequence
                if newest.record.event:
                    yield event_of(newest)
                revision = await self._records.log.next_revision(ref, position)
            if newest.record.is_final or newest.record.state is JobState.DELETED:
                return
            async for sequence, event in self._new_progress(newest.record, numbers):
                numbers = sequence
                yield event
            await first_of(
                self._records.index.changed(ref, max(position, newest.sequence)),
                self._clock.sleep(PROGRESS_S),
            )
            if self._records.index.line(ref) is None:
                await self._check_there(ref)

    async def _new_progress(self, record: JobRecord, after: int) -> AsyncIterator[tuple[int, JobEvent]]:
        """What came to the progress log since; at first only the newest message. Loss is harmless."""
        try:
            if after < 0:
                last = await self._progress.last_progress(record.project, record.id)
                entries = [last] if last is not None else []
            else:
                entries = await self._progress.progress_after(record.project, record.id, after)
        except LikenessError:
            return
        for entry in entries:
            yield entry.sequence, progress_event_of(record, entry, self._records.now_ms())

    async def _check_there(self, ref: JobRef) -> None:
        if await self._records.log.read(ref) is None:
            raise NotFound(f"there is no job {ref.id}")
