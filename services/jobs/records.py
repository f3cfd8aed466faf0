"""Reading and changing job records: the one loop in which every compare-and-set of an api happens.

What is written is applied to the index at once, so that this replica sees its own changes.
"""

from collections.abc import Callable
from typing import Final

from services.domain.errors import Conflict, NotFound
from services.domain.job import JobRecord, JobRef, JobState
from services.domain.ports import JobLog, Revision
from services.jobs.index import JobIndex

MAX_CONFLICTS: Final = 50
"""Lost races in a row after which a change gives up: more means that somebody writes without end."""

Move = Callable[[JobRecord], JobRecord]


class Records:
    """The job log of one kind, with the index that follows it."""

    def __init__(self, log: JobLog, index: JobIndex) -> None:
        """Joins a log to its index."""
        self.log = log
        self.index = index

    def now_ms(self) -> int:
        """The present by the log's clock, milliseconds since 1970."""
        return self.log.now_ms()

    async def read(self, ref: JobRef) -> Revision:
        """The newest revision, read where decisions may rest on it.

        Raises:
            NotFound: there is no such job, or it was deleted.
        """
        revision = await self.log.read(ref)
        if revision is None:
            self.index.drop(ref)
            raise NotFound(f"there is no job {ref.id}")
        self.index.apply(revision)
        if revision.record.state is JobState.DELETED:
            raise NotFound(f"there is no job {ref.id}")
        return revision

    async def write(self, record: JobRecord, expected: int) -> Revision:
        """Stores one revision; raises as :meth:`~services.domain.ports.JobLog.write` does."""
        sequence = await self.log.write(record, expected)
        revision = Revision(record, sequence, self.now_ms())
        self.index.apply(revision)
        return revision

    async def change(self, ref: JobRef, move: Move, known: Revision | None = None) -> Revision:
        """Makes a move, again from the newest revision whenever another write came first.

        Args:
            ref: the job.
            move: the record as read -> the record to write; the same object: nothing is to be written.
            known: a revision to try first, instead of reading.

        Returns:
            The revision after the move.

        Raises:
            NotFound: there is no such job.
            Conflict: others wrote without end.
            LikenessError: what `move` raised.
        """
        for _ in range(MAX_CONFLICTS):
            revision = known or await self.read(ref)
            known = None
            moved = move(revision.record)
            if moved is revision.record:
                return revision
            try:
                return await self.write(moved, revision.sequence)
            except Conflict:
                continue
        raise Conflict(f"job {ref.id} is being changed without end")
