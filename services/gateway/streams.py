"""What `/stream` hands out: each progress report and each finished picture of a job once, for all its readers."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from google.protobuf.json_format import ParseDict, ParseError
from likeness.job.v1 import job_pb2
from likeness.training.v1 import training_job_pb2

from services.domain.errors import Conflict, NotFound
from services.domain.ports import ProgressEntry, ProgressLog
from services.gateway.dialects.base import FINAL_STATES
from services.gateway.jobs import Jobs, Origin

T = TypeVar("T")

MAX_CHUNKS = 100
"""Chunks of one answer."""
POLL_S = 0.4


@dataclass(frozen=True, slots=True)
class Batch:
    """What one answer carries.

    Attributes:
        job: the job at that moment.
        progress: reports that nobody has got yet, oldest first.
        pictures: positions of finished pictures that nobody has got yet.
        more: there is more than this answer carries.
    """

    job: training_job_pb2.TrainingJob
    progress: tuple[job_pb2.Progress, ...] = ()
    pictures: range = range(0)
    more: bool = False

    @property
    def is_worth_sending(self) -> bool:
        """There is something in it, or nothing will come any more."""
        return bool(self.progress or self.pictures) or self.job.state in FINAL_STATES


class Streams:
    """Reads and moves the cursors."""

    def __init__(self, jobs: Jobs, progress: ProgressLog, cancelled_stream_ms: int) -> None:
        """Takes jobs, the progress log, and for how long the stream of a cancelled job is there."""
        self._jobs = jobs
        self._progress = progress
        self._cancelled_stream_ms = cancelled_stream_ms

    async def read(
        self, origin: Origin, job_id: str, hold_s: float, render: Callable[[Batch], Awaitable[T]]
    ) -> T:
        """The next chunks as `render` shows them; waits for some up to `hold_s` seconds.

        They count as handed out once they are rendered: a fault before that loses none.

        Raises:
            NotFound: no such job, or its stream is over.
        """
        end = time.monotonic() + hold_s
        while True:
            job = await self._jobs.get(origin, job_id)
            self._check_open(job)
            batch, move = await self._look(origin.project, job)
            left_s = end - time.monotonic()
            if batch.is_worth_sending or left_s <= 0 or self._jobs.stopping.is_set():
                shown = await render(batch)
                if await move():
                    return shown
            elif await move():
                await asyncio.sleep(min(POLL_S, left_s))

    def _check_open(self, job: training_job_pb2.TrainingJob) -> None:
        if job.state != job_pb2.JOB_STATE_CANCELLED:
            return
        if time.time() * 1000 - job.times.end_time.ToMilliseconds() > self._cancelled_stream_ms:
            raise NotFound("the stream of a cancelled job is over")

    async def _look(
        self, project: str, job: training_job_pb2.TrainingJob
    ) -> tuple[Batch, Callable[[], Awaitable[bool]]]:
        """What nobody has got yet, and how to take it: false when another reader was faster."""
        if job.state == job_pb2.JOB_STATE_CANCELLED:
            return Batch(job), _taken
        cursor, expected = await self._progress.read_cursor(project, job.job_id)
        after = int(cursor.get("sequence", 0))
        entries = await self._progress.progress_after(project, job.job_id, after, MAX_CHUNKS + 1)
        batch = _batch(job, cursor, entries)
        sent = entries[:MAX_CHUNKS]
        if not sent and not batch.pictures:
            return batch, _taken
        position = {"sequence": sent[-1].sequence if sent else after, "run": job.run}
        return batch, partial(
            self._take, project, job.job_id, position | {"pictures": batch.pictures.stop}, expected
        )

    async def _take(self, project: str, job_id: str, position: Mapping[str, Any], expected: int) -> bool:
        try:
            await self._progress.write_cursor(project, job_id, position, expected)
        except Conflict:
            return False
        return True


def _batch(
    job: training_job_pb2.TrainingJob, cursor: Mapping[str, Any], entries: Sequence[ProgressEntry]
) -> Batch:
    sent = entries[:MAX_CHUNKS]
    reports = [report for report in (_report(entry.body) for entry in sent) if report is not None]
    shown = int(cursor.get("pictures", 0)) if cursor.get("run", 0) == job.run else 0
    finished = len(job.result.samples) if job.state == job_pb2.JOB_STATE_SUCCEEDED else 0
    last = min(finished, shown + MAX_CHUNKS - len(sent))
    return Batch(job, tuple(reports), range(shown, last), len(entries) > MAX_CHUNKS or last < finished)


async def _taken() -> bool:
    """There was nothing to take."""
    return True


def _report(body: Mapping[str, Any]) -> job_pb2.Progress | None:
    """Reads a stored report; events of another kind are no progress."""
    try:
        progress = ParseDict(dict(body), job_pb2.Progress(), ignore_unknown_fields=True)
    except ParseError:
        return None
    return progress if progress.stage else None
