"""Removing ended jobs: strip the record, let storage remove the job's objects, purge the revisions.

A job whose time has come stays until its webhook has been told or given up, since what is told are its revisions.
The stripped record is written first: from then on the job is gone for its owner and cannot be started again. Its
last full revision stays in the log until the objects are removed, so that whoever finds the work half done can go on.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Final

from services.domain import life_cycle as life
from services.domain.errors import LikenessError, NotFound
from services.domain.job import TOLD_STATES, JobRecord, JobRef, JobState
from services.domain.ports import Revision, SmallLog
from services.jobs.index import Line
from services.jobs.records import Records

logger = logging.getLogger(__name__)

TOMBSTONE_MS: Final = 24 * 3600 * 1000
"""How long the stripped record stays, so that a late write to the job finds it."""
FOREIGN_MS: Final = 60_000
"""How long another replica gets to end a removal that it began."""
AGAIN_MS: Final = 30_000
HOOK_PATIENCE_MS: Final = 3600_000
"""How long a job waits for its webhook beyond its time, should nobody send any."""

RemoveObjects = Callable[[Revision], Awaitable[None]]
"""Removes what a job owns in storage, given its last full revision; may be called again for the same job."""


async def nothing_to_remove(revision: Revision) -> None:
    """For jobs that own nothing in storage."""


class Removal:
    """Removes jobs of one kind."""

    def __init__(
        self, records: Records, hooks: SmallLog, remove_objects: RemoveObjects = nothing_to_remove
    ) -> None:
        """Joins the log to the cursors of webhooks and the storage of what jobs own."""
        self._records = records
        self._hooks = hooks
        self._remove_objects = remove_objects
        self._completed: set[JobRef] = set()

    async def remove(self, ref: JobRef) -> None:
        """Removes an ended job for good.

        Raises:
            NotFound: there is no such job.
            WrongState: it has not ended.
            Unavailable: the log or storage does not answer; what is left is done later.
        """
        last = await self._records.read(ref)
        await self._strip_and_complete(last, life.delete)

    async def _strip_and_complete(self, last: Revision, move: Callable[[JobRecord], JobRecord]) -> None:
        full = last

        def strip(record: JobRecord) -> JobRecord:
            nonlocal full
            full = Revision(record, last.sequence, last.time_ms)
            return move(record)

        stripped = await self._records.change(last.record.ref, strip, last)
        if stripped.record.state is JobState.DELETED:
            await self._complete(full)

    async def _complete(self, full: Revision) -> None:
        ref = full.record.ref
        await self._remove_objects(full)
        await self._records.log.purge(ref, keep_last=True)
        self._completed.add(ref)

    async def tick(self, now_ms: int) -> None:
        """Removes the jobs whose retention is over, and ends removals that others left half done."""
        for ref in list(self._records.index.expired(now_ms)):
            await self._expire(ref, now_ms)
        for line in self._records.index.deleted():
            await self._bury(line, now_ms)

    async def _expire(self, ref: JobRef, now_ms: int) -> None:
        def strip_if_due(record: JobRecord) -> JobRecord:
            due = record.is_final and record.times.keep_until <= now_ms
            return life.delete(record) if due else record

        try:
            last = await self._records.read(ref)
            if await self._owes_word(last.record, now_ms):
                self._records.index.remind(ref, now_ms + AGAIN_MS)
                return
            await self._strip_and_complete(last, strip_if_due)
        except NotFound:
            return
        except LikenessError as error:
            logger.warning("an expired job was not removed", extra={"job_id": ref.id, "detail": str(error)})
            self._records.index.remind(ref, now_ms + AGAIN_MS)

    async def _owes_word(self, record: JobRecord, now_ms: int) -> bool:
        """Whether a webhook is still to be told of the job."""
        if not record.webhook_url or now_ms - record.times.keep_until > HOOK_PATIENCE_MS:
            return False
        cursor, _ = await self._hooks.read_hook(record.project, record.id)
        after = max(0, int(cursor.get("next", 0)) - 1)
        while (revision := await self._records.log.next_revision(record.ref, after)) is not None:
            if revision.record.event and revision.record.state in TOLD_STATES:
                return True
            after = revision.sequence
        return False

    async def _bury(self, line: Line, now_ms: int) -> None:
        age_ms = now_ms - line.time_ms
        try:
            if line.ref not in self._completed and age_ms > FOREIGN_MS:
                await self._complete_foreign(line.ref)
            if age_ms > TOMBSTONE_MS:
                await self._records.log.purge(line.ref, keep_last=False)
                self._records.index.drop(line.ref)
                self._completed.discard(line.ref)
        except LikenessError as error:
            logger.warning("a removal was not ended", extra={"job_id": line.ref.id, "detail": str(error)})

    async def _complete_foreign(self, ref: JobRef) -> None:
        """Ends a removal whose replica has died: the last full revision is still there, or nothing is left to do."""
        full: Revision | None = None
        revision = await self._records.log.next_revision(ref, 0)
        while revision is not None and revision.record.state is not JobState.DELETED:
            full = revision
            revision = await self._records.log.next_revision(ref, revision.sequence)
        if full is not None:
            await self._complete(full)
        self._completed.add(ref)
