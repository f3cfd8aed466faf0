"""WorkerService over gRPC: thin above the dispatcher.

Turns records into assignments, beats into what the replicas tell each other, and reports into moves of the job's
life. What a report carries is checked here; whether it is accepted is decided there.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import grpc
from likeness.worker.v1 import worker_service_pb2 as pb
from likeness.worker.v1.worker_service_pb2_grpc import WorkerServiceServicer

from services.domain import life_cycle as life
from services.domain.artifacts import is_ref_name
from services.domain.errors import InvalidSpec, LikenessError
from services.domain.job import Checkpoint, JobFailure, JobKind, JobRecord, JobRef, Stage, bounded_remarks
from services.domain.ports import Beat, Revision
from services.jobs.admission import as_json
from services.jobs.dispatch import MAX_SLOTS, MAX_WAIT_S, Dispatcher, Held
from services.jobs.documents import DocumentStore
from services.jobs.progress import stage_of
from services.jobs.records import Move
from services.jobs.views import Views, checkpoint_ref, prepared_of

logger = logging.getLogger(__name__)

MAX_RESULT_BYTES: Final = 8 * 1024
"""Longest result of a drawing, as JSON, that a record carries itself."""
MAX_MESSAGE_CHARS: Final = 500
MAX_PREVIEWS_AT_ONCE: Final = 64

_WORKERS_STAGES: Final = {
    JobKind.TRAIN: {Stage.TRAINING, Stage.EXPORTING, Stage.UPLOADING},
    JobKind.GEN: {Stage.LOADING, Stage.DRAWING, Stage.UPLOADING},
}


class WorkerServicer(WorkerServiceServicer):
    """Take, Beat and Report for the workers of one api."""

    def __init__(self, dispatcher: Dispatcher, views: Views, documents: DocumentStore) -> None:
        """Joins what decides to what reads specifications and keeps results.

        Args:
            dispatcher: decides.
            views: reads specifications, wherever they are kept.
            documents: where results go that are too long for a record.
        """
        self._dispatcher = dispatcher
        self._views = views
        self._documents = documents

    async def Take(self, request: pb.TakeRequest, context: grpc.aio.ServicerContext) -> pb.TakeResponse:
        """Asks for work and waits for it."""
        slots = min(max(request.free_slots, 1), MAX_SLOTS)
        wait_s = min(max(request.wait.ToMilliseconds() / 1000, 0.0), MAX_WAIT_S)
        memory = max(request.device_memory_bytes, 0)
        taken = await self._dispatcher.take(
            request.worker_id, set(request.warm_models), slots, wait_s, memory
        )
        response = pb.TakeResponse(drain=self._dispatcher.is_draining(request.worker_id))
        for revision in taken:
            assignment = await self._assignment_or_back(revision)
            if assignment is not None:
                response.assignments.append(assignment)
        return response

    async def _assignment_or_back(self, revision: Revision) -> pb.Assignment | None:
        """The assignment; a job whose specification cannot be read now goes back instead of to a worker."""
        try:
            return await self._assignment(revision)
        except LikenessError as error:
            logger.warning("job went back", extra={"job_id": revision.record.id, "detail": str(error)})
            await self._dispatcher.return_untouched(revision)
            return None

    async def _assignment(self, revision: Revision) -> pb.Assignment:
        record = revision.record
        assignment = pb.Assignment(
            job_id=record.id,
            project_id=record.project,
            epoch=record.epoch,
            attempt=record.attempt,
            traceparent=str(record.options.get("traceparent", "")),
            accepted_reports=record.reported,
        )
        now_ms = self._dispatcher.records.now_ms()
        executable_ms = record.limits.execution_timeout_ms - record.times.executed_by(now_ms)
        assignment.time_left.FromMilliseconds(max(0, min(executable_ms, record.times.ttl_at - now_ms)))
        if record.checkpoint is not None:
            assignment.checkpoint.CopyFrom(checkpoint_ref(record.checkpoint))
        if record.kind is JobKind.TRAIN:
            assignment.training.CopyFrom(await self._views.training_spec(record))
            assignment.prepared.CopyFrom(prepared_of(record))
        else:
            assignment.generation.CopyFrom(await self._views.generation_spec(record))
        return assignment

    async def Beat(self, request: pb.BeatRequest, context: grpc.aio.ServicerContext) -> pb.BeatResponse:
        """Says that a worker lives and how its jobs progress."""
        beat = Beat(
            kind=self._dispatcher.kind,
            worker=request.worker_id,
            jobs=tuple((job.project_id, job.job_id, job.epoch) for job in request.jobs),
            warm_models=tuple(request.warm_models),
            free_slots=request.free_slots,
            leaving=request.leaving,
        )
        progress = {
            (job.project_id, job.job_id, job.epoch): job.progress
            for job in request.jobs
            if job.HasField("progress")
        }
        stop = await self._dispatcher.beat(beat, progress)
        response = pb.BeatResponse(drain=self._dispatcher.is_draining(request.worker_id))
        response.stop.extend(_reference(held) for held in stop)
        return response

    async def Report(self, request: pb.ReportRequest, context: grpc.aio.ServicerContext) -> pb.ReportResponse:
        """Gives one report on a job."""
        ref = JobRef(self._dispatcher.kind, request.project_id, request.job_id)
        move = await self._move(request)
        await self._dispatcher.report(ref, request.epoch, request.number, request.worker_id, move)
        for preview in request.previews.previews:
            await self._dispatcher.board.show(ref, preview.image.key, preview.name)
        return pb.ReportResponse()

    async def _move(self, request: pb.ReportRequest) -> Move:
        """The change that a report asks for.

        Raises:
            InvalidSpec: it holds no report, or one without sense.
            Unavailable: a long result cannot be stored now.
        """
        kind = request.WhichOneof("report")
        if kind is None:
            raise InvalidSpec("must hold a report", "report")
        moves: dict[str, Callable[[pb.ReportRequest], Move]] = {
            "stage": self._stage,
            "checkpoint": self._checkpoint,
            "previews": self._previews,
            "version": self._version,
            "trained": self._trained,
            "failed": self._failed,
            "yielded": self._yielded,
        }
        return await self._finished(request) if kind == "finished" else moves[kind](request)

    def _stage(self, request: pb.ReportRequest) -> Move:
        stage = stage_of(request.stage.stage, Stage.QUEUED)
        if stage not in _WORKERS_STAGES[self._dispatcher.kind]:
            raise InvalidSpec("is not a stage that workers enter", "stage.stage")
        why = request.stage.message[:MAX_MESSAGE_CHARS] or stage.value.lower()
        return lambda record: life.report_stage(record, request.epoch, stage, why)

    def _checkpoint(self, request: pb.ReportRequest) -> Move:
        given = request.checkpoint.checkpoint
        if not given.manifest_key or len(given.manifest_key) > 512:
            raise InvalidSpec("must name the checkpoint's manifest", "checkpoint.manifest_key")
        checkpoint = Checkpoint(given.manifest_key, given.step)
        return lambda record: life.report_checkpoint(record, request.epoch, checkpoint)

    def _previews(self, request: pb.ReportRequest) -> Move:
        previews = request.previews.previews
        if not 1 <= len(previews) <= MAX_PREVIEWS_AT_ONCE or not all(
            p.image.key and p.name for p in previews
        ):
            rule = f"must be 1 to {MAX_PREVIEWS_AT_ONCE} pictures, each with its key and name"
            raise InvalidSpec(rule, "previews.previews")
        names = "drawn while training: " + ", ".join(preview.name for preview in previews)
        return lambda record: life.report_meanwhile(record, request.epoch, names)

    def _version(self, request: pb.ReportRequest) -> Move:
        version = request.version
        if not is_ref_name(version.model) or version.step < 1:
            raise InvalidSpec("must name a model and its updates", "version.model")
        what = f"published after {version.step} updates as {version.model}"
        return lambda record: life.report_meanwhile(record, request.epoch, what)

    def _trained(self, request: pb.ReportRequest) -> Move:
        result = request.trained.result
        warnings = bounded_remarks(result.warnings)
        del result.warnings[:]
        result.warnings.extend(warnings)
        trained = as_json(result)
        return lambda record: life.report_trained(record, request.epoch, trained)

    async def _finished(self, request: pb.ReportRequest) -> Move:
        result = as_json(request.finished.result)
        text = json.dumps(result, separators=(",", ":"), ensure_ascii=False).encode()
        key = await self._documents.put(request.project_id, text) if len(text) > MAX_RESULT_BYTES else ""

        def move(record: JobRecord) -> JobRecord:
            done = life.report_finished(record, request.epoch, result, self._dispatcher.records.now_ms())
            return replace(done, result=None, result_key=key) if key else done

        return move

    def _failed(self, request: pb.ReportRequest) -> Move:
        error, retryable = request.failed.error, request.failed.retryable
        failure = JobFailure(error.reason[:64] or "INTERNAL", error.message, error.field[:200])

        def move(record: JobRecord) -> JobRecord:
            return life.report_failed(
                record, request.epoch, failure, retryable, self._dispatcher.records.now_ms()
            )

        return move

    def _yielded(self, request: pb.ReportRequest) -> Move:
        why = request.yielded.message[:MAX_MESSAGE_CHARS]
        return lambda record: life.report_yielded(
            record, request.epoch, why, self._dispatcher.records.now_ms()
        )


def _reference(held: Held) -> Any:
    return pb.JobReference(project_id=held[0], job_id=held[1], epoch=held[2])
