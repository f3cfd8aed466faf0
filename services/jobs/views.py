"""From records to messages: what callers see of a job, its events and its numbers, and what a worker gets."""

import json
from collections.abc import Collection, Mapping
from typing import Any, Final, TypeVar

from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from likeness.inference.v1.generation_job_pb2 import GenerationJob, GenerationSpec
from likeness.job.v1.job_pb2 import JobError, JobEvent, JobOptions, JobTimes, Progress, QueueStatus
from likeness.job.v1.job_pb2 import JobState as WireState
from likeness.training.v1.training_job_pb2 import (
    CheckpointRef,
    PreparedInputs,
    TrainingJob,
    TrainingSpec,
)

from services.domain.errors import InvalidSpec
from services.domain.job import Checkpoint, JobRecord, JobState, whole_fraction
from services.domain.ports import ProgressEntry, ProgressLog, Revision
from services.jobs.documents import DocumentStore
from services.jobs.index import JobIndex
from services.jobs.leases import WorkerBook
from services.jobs.progress import stage_of

M = TypeVar("M", bound=Message)

RECENT: Final = 500
"""Messages looked through for the last one that holds numbers; the log keeps no more."""


def parsed(document: Mapping[str, Any], message: M) -> M:
    """A message from what :func:`services.jobs.admission.as_json` made; unknown fields are a newer version's."""
    ParseDict(dict(document), message, ignore_unknown_fields=True)
    return message


def timestamp(ms: int) -> Timestamp:
    """A moment in milliseconds since 1970."""
    moment = Timestamp()
    moment.FromMilliseconds(ms)
    return moment


def states_of(values: Collection[int]) -> frozenset[JobState]:
    """The domain's states for the wire's.

    Raises:
        InvalidSpec: one of them is none.
    """
    names = [
        WireState.Name(value).removeprefix("JOB_STATE_") for value in values if value in WireState.values()
    ]
    known = [JobState(name) for name in names if name in JobState.__members__]
    if len(known) < len(values):
        raise InvalidSpec("must be states of jobs", "states")
    return frozenset(known)


def times_of(record: JobRecord, now_ms: int) -> JobTimes:
    """The moments of the present run; unset ones stay unset."""
    times, message = record.times, JobTimes()
    moments = {
        "create_time": times.created,
        "queue_time": times.queued,
        "start_time": times.started,
        "end_time": times.ended,
        "keep_until_time": times.keep_until,
    }
    for name, ms in moments.items():
        if ms:
            getattr(message, name).FromMilliseconds(ms)
    message.waiting_duration.FromMilliseconds(times.waited_by(times.ended or now_ms))
    return message


def error_of(record: JobRecord) -> JobError | None:
    """Why the job ended without a result."""
    error = record.error
    return JobError(reason=error.reason, message=error.message, field=error.field) if error else None


def progress_of(record: JobRecord, latest: Progress | None) -> Progress | None:
    """The numbers to show: the latest ones, or the beginning of the stage that the record has moved on to.

    Args:
        record: the job.
        latest: numbers of the present run; None: there are none yet.
    """
    if record.state is JobState.SUCCEEDED:
        shown = Progress(stage=f"JOB_STAGE_{record.stage.value}") if latest is None else latest
        shown.fraction = 1.0
        return shown
    if latest is None or record.is_final or stage_of(latest.stage, record.stage) is record.stage:
        return latest
    start = whole_fraction(record.stage, 0, 0)
    shown = Progress(stage=f"JOB_STAGE_{record.stage.value}", fraction=max(start, latest.fraction))
    shown.report_time.CopyFrom(latest.report_time)
    return shown


async def latest_progress(log: ProgressLog, record: JobRecord) -> Progress | None:
    """The newest numbers of the present run; None when there are none yet."""
    entry = await log.last_progress(record.project, record.id)
    if entry is not None and "stage" not in entry.body:
        entries = await log.progress_after(record.project, record.id, 0, RECENT)
        entry = next((entry for entry in reversed(entries) if "stage" in entry.body), None)
    if entry is None:
        return None
    progress = parsed(entry.body, Progress())
    stale = progress.HasField("report_time") and progress.report_time.ToMilliseconds() < record.times.queued
    return None if stale else progress


def event_of(revision: Revision) -> JobEvent:
    """The event that a revision is."""
    record = revision.record
    return JobEvent(
        job_id=record.id,
        sequence=revision.sequence,
        state=f"JOB_STATE_{record.state.value}",
        stage=f"JOB_STAGE_{record.stage.value}",
        message=record.why,
        event_time=timestamp(revision.time_ms),
    )


def progress_event_of(record: JobRecord, entry: ProgressEntry, now_ms: int) -> JobEvent:
    """The event that a message of the progress log is: numbers, or a picture that became ready."""
    event = JobEvent(
        job_id=record.id,
        state=f"JOB_STATE_{record.state.value}",
        stage=f"JOB_STAGE_{record.stage.value}",
        event_time=timestamp(now_ms),
    )
    if "image_key" in entry.body:
        event.image_key = str(entry.body["image_key"])
        event.message = str(entry.body.get("message", ""))
        return event
    event.progress.CopyFrom(parsed(entry.body, Progress()))
    if event.progress.HasField("report_time"):
        event.event_time.CopyFrom(event.progress.report_time)
    return event


def queue_status(index: JobIndex, book: WorkerBook, project: str, endpoint: str, now_ms: int) -> QueueStatus:
    """Figures of the queue and the workers.

    Args:
        index: the jobs.
        book: the workers.
        project: only this project's jobs; "": all.
        endpoint: only jobs of this dialect endpoint; "": all.
        now_ms: the present, milliseconds since 1970.
    """
    counts, workers = index.counts(project, endpoint), book.live().values()
    busy = sum(bool(worker.jobs) for worker in workers)
    state = counts.by_state
    status = QueueStatus(
        queued_jobs=state[JobState.QUEUED],
        running_jobs=state[JobState.RUNNING],
        succeeded_jobs=state[JobState.SUCCEEDED],
        failed_jobs=state[JobState.FAILED] + state[JobState.TIMED_OUT],
        cancelled_jobs=state[JobState.CANCELLED],
        retried_jobs=counts.retried,
        idle_workers=len(workers) - busy,
        busy_workers=busy,
        ready_jobs=counts.ready,
    )
    status.oldest_wait.FromMilliseconds(max(0, now_ms - counts.oldest_ready_ms) if counts.ready else 0)
    return status


class Views:
    """Records with what lies beside them: long documents, and progress."""

    def __init__(self, documents: DocumentStore, progress: ProgressLog) -> None:
        """Joins the places where parts of a job may be."""
        self._documents = documents
        self._progress = progress

    async def training_spec(self, record: JobRecord) -> TrainingSpec:
        """What a training is to do, wherever it is kept."""
        return parsed(await self._document(record.spec, record.spec_key), TrainingSpec())

    async def generation_spec(self, record: JobRecord) -> GenerationSpec:
        """What a drawing is to do, wherever it is kept."""
        return parsed(await self._document(record.spec, record.spec_key), GenerationSpec())

    async def options(self, record: JobRecord) -> JobOptions:
        """Policy, origin and webhook, with the caller's request."""
        options = parsed(record.options, JobOptions())
        if options.origin.request_key and not options.origin.request_json:
            options.origin.request_json = (await self._documents.get(options.origin.request_key)).decode()
        return options

    async def training_job(self, revision: Revision, now_ms: int) -> TrainingJob:
        """A training as its owner sees it."""
        record = revision.record
        job = TrainingJob(
            **await self._common(revision, now_ms),
            spec=await self.training_spec(record),
            device_memory_bytes=record.device_memory,
        )
        if record.prepared is not None:
            parsed(record.prepared, job.prepared)
        if record.checkpoint is not None:
            job.checkpoint.CopyFrom(checkpoint_ref(record.checkpoint))
        result = record.result or record.trained
        if record.result_key or result is not None:
            parsed(await self._document(result or {}, record.result_key), job.result)
        return job

    async def generation_job(self, revision: Revision, now_ms: int) -> GenerationJob:
        """A drawing as its owner sees it."""
        record = revision.record
        job = GenerationJob(
            **await self._common(revision, now_ms),
            spec=await self.generation_spec(record),
            parent_job_id=record.parent,
        )
        if record.result_key or record.result is not None:
            parsed(await self._document(record.result or {}, record.result_key), job.result)
        return job

    async def _common(self, revision: Revision, now_ms: int) -> dict[str, Any]:
        """The fields that trainings and drawings show alike, by name."""
        record = revision.record
        return {
            "job_id": record.id,
            "project_id": record.project,
            "state": f"JOB_STATE_{record.state.value}",
            "stage": f"JOB_STAGE_{record.stage.value}",
            "options": await self.options(record),
            "progress": await self._shown_progress(record),
            "error": error_of(record),
            "times": times_of(record, now_ms),
            "attempt": record.attempt,
            "run": record.round,
            "worker_id": record.worker or record.last_worker,
            "sequence": revision.sequence,
        }

    async def _shown_progress(self, record: JobRecord) -> Progress | None:
        return progress_of(record, await latest_progress(self._progress, record))

    async def _document(self, inline: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        if not key:
            return inline
        document = json.loads(await self._documents.get(key))
        assert isinstance(document, dict)
        return document


def checkpoint_ref(checkpoint: Checkpoint) -> CheckpointRef:
    """Names a checkpoint on the wire."""
    return CheckpointRef(manifest_key=checkpoint.manifest_key, step=checkpoint.step)


def prepared_of(record: JobRecord) -> PreparedInputs:
    """What phase `prepare` made ready."""
    return parsed(record.prepared or {}, PreparedInputs())
