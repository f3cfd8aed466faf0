"""Drawings that a training asks the inference service for: made under fixed ids, waited for, ended when unneeded.

Which pictures these are is the business of :mod:`services.trainer.drawings`; this is how they come to be.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

from likeness.inference.v1 import generation_job_pb2, inference_service_pb2, inference_service_pb2_grpc
from likeness.job.v1 import job_pb2

from services.domain.errors import OUTAGES, BadInput, LikenessError, NotFound, row_of
from services.domain.job import JobRecord, JobRef, Phase
from services.trainer.drawings import child_id

logger = logging.getLogger(__name__)

DRAWING_TRIES: Final = 3
LOST_DRAWING: Final = frozenset({"WORKER_LOST", "INTERNAL"})
"""Reasons for which a drawing failed through no fault of its own: it is asked for anew, under another id."""

Led = tuple[JobRef, Phase, int]
"""What is led: one phase of one run of a job."""


def led_of(record: JobRecord) -> Led:
    """The phase that a record is in."""
    return record.ref, record.phase, record.round


class DrawingJobs:
    """Asks for drawings and waits for them.

    Args:
        inference: the service that draws.
        pause: how to wait some seconds for a service that is away.
    """

    def __init__(
        self,
        inference: inference_service_pb2_grpc.InferenceServiceStub,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._inference = inference
        self._pause = pause
        self._open: dict[Led, dict[str, asyncio.Task[Any]]] = {}

    async def draw(
        self, record: JobRecord, name: str, spec: generation_job_pb2.GenerationSpec
    ) -> generation_job_pb2.GenerationResult:
        """Has pictures drawn; they come in order. A drawing that workers were lost with is asked for again."""
        for number in range(DRAWING_TRIES):
            job = await self._drawn(record, f"{name}/again/{number}" if number else name, spec)
            if job.state == job_pb2.JOB_STATE_SUCCEEDED:
                return job.result
            if job.error.reason not in LOST_DRAWING:
                break
        cause = job.error.message or f"the drawing ended {job_pb2.JobState.Name(job.state)}"
        raise BadInput(f"a picture of this job could not be drawn: {cause}")

    async def _drawn(
        self, record: JobRecord, name: str, spec: generation_job_pb2.GenerationSpec
    ) -> generation_job_pb2.GenerationJob:
        """Waits for the end of a drawing with an id fixed by parent, run and name."""
        job_id = child_id(record, name)
        options = job_pb2.JobOptions(policy=job_pb2.JobPolicy(priority=job_pb2.JOB_PRIORITY_HIGH))
        request = inference_service_pb2.CreateGenerationJobRequest(
            project_id=record.project, job_id=job_id, spec=spec, options=options, parent_job_id=record.id
        )
        open_drawings = self._open.setdefault(led_of(record), {})
        # Never given up half way: nobody could tell whether the drawing will come to be.
        creating = open_drawings[job_id] = asyncio.ensure_future(self._inference.CreateGenerationJob(request))
        await asyncio.shield(creating)
        job = await self._ended(record.project, job_id)
        open_drawings.pop(job_id, None)
        return job

    async def _ended(self, project: str, job_id: str) -> generation_job_pb2.GenerationJob:
        """Waits until a drawing has ended, through restarts of the inference api."""
        watch = inference_service_pb2.WatchGenerationJobRequest(job_id=job_id, project_id=project)
        get = inference_service_pb2.GetGenerationJobRequest(job_id=job_id, project_id=project)
        while True:
            try:
                async for _ in self._inference.WatchGenerationJob(watch):
                    pass
                job: generation_job_pb2.GenerationJob = (await self._inference.GetGenerationJob(get)).job
            except LikenessError as error:
                if not row_of(error).retry_job and not isinstance(error, OUTAGES):
                    raise
                logger.info("waiting for the inference api", extra={"job_id": job_id})
                await self._pause(0.5)
                continue
            if job.state not in (job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING):
                return job

    def under_way(self, led: Led) -> bool:
        """Whether drawings for this phase have not been heard of to their end."""
        return bool(self._open.get(led))

    async def stop(self, led: Led) -> None:
        """Ends the drawings that are under way for a phase that has moved on without them."""
        left = self._open.pop(led, {})
        await asyncio.gather(*(self._cancel(led[0].project, *drawing) for drawing in left.items()))

    def leave(self, led: Led) -> None:
        """Forgets the drawings of a phase: whoever leads it next waits for them."""
        self._open.pop(led, None)

    async def _cancel(self, project: str, job_id: str, creating: "asyncio.Task[Any]") -> None:
        await asyncio.wait({creating})
        request = inference_service_pb2.CancelGenerationJobRequest(job_id=job_id, project_id=project)
        try:
            await self._inference.CancelGenerationJob(request)
        except NotFound:
            logger.debug("drawing %s was never admitted", job_id)
        except LikenessError as error:
            logger.warning("a drawing was left behind", extra={"job_id": job_id, "error": str(error)})
