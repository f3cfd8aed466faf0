"""What `/stream` hands out: each progress report and each finished picture of a job once, for all its readers."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import ParseDict, ParseError
from likeness.job.v1 import job_pb2
from likeness.training.v1 import training_job_pb2

from services.domain.errors import Conflict, NotFound
from services.domain.ports import ProgressLog
from services.gateway.dialects.base import FINAL_STATES
from services.gateway.jobs import Jobs, Origin

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

    async def read(self, origin: Origin, job_id: str, hold_s: float) -> Batch:
        """The next chunks; waits for them up to `hold_s` seconds.

        Raises:
            NotFound: no such job, or its stream is over.
        """
        end = time.monotonic() + hold_s
        while True:
            job = await self._jobs.get(origin, job_id)
            self._check_open(job)
            try:
                batch = await self._take(origin.project, job)
            except Conflict:
                continue  # another reader took these; look for later ones
            left_s = end - time.monotonic()
            if batch.is_worth_sending or left_s <= 0 or self._jobs.stopping.is_set():
                return batch
            await asyncio.sleep(min(POLL_S, left_s))

    def _check_open(self, job: training_job_pb2.TrainingJob) -> None:
        if job.state != job_pb2.JOB_STATE_CANCELLED:
            return
        if time.time() * 1000 - job.times.end_time.ToMilliseconds() > self._cancelled_stream_ms:
            raise NotFound("the stream of a cancelled job is over")

    async def _take(self, project: str, job: training_job_pb2.TrainingJob) -> Batch:
        if job.state == job_pb2.JOB_STATE_CANCELLED:
            return Batch(job)
        cursor, expected = await self._progress.read_cursor(project, job.job_id)
        after = int(cursor.get("sequence", 0))
        entries = await self._progress.progress_after(project, job.job_id, after, MAX_CHUNKS + 1)
        reports = [_report(entry.body) for entry in entries[:MAX_CHUNKS]]
        progress = tuple(report for report in reports if report is not None)
        shown = int(cursor.get("pictures", 0)) if cursor.get("run", 0) == job.run else 0
        finished = len(job.result.samples) if job.state == job_pb2.JOB_STATE_SUCCEEDED else 0
        last = min(finished, shown + MAX_CHUNKS - len(reports))
        if entries or last > shown:
            position = {
                "sequence": entries[len(reports) - 1].sequence if entries else after,
                "pictures": last,
                "run": job.run,
            }
            await self._progress.write_cursor(project, job.job_id, position, expected)
        return Batch(job, progress, range(shown, last), len(entries) > MAX_CHUNKS or last < finished)


def _report(body: Mapping[str, Any]) -> job_pb2.Progress | None:
    """Reads a stored report; events of another kind are no progress."""
    try:
        progress = ParseDict(dict(body), job_pb2.Progress(), ignore_unknown_fields=True)
    except ParseError:
        return None
    return progress if progress.stage else None
