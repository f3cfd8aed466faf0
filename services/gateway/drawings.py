"""Drawings as the dialects see them: submit, read, wait, on canonical messages over InferenceService."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from likeness.inference.v1 import generation_job_pb2
from likeness.inference.v1 import inference_service_pb2 as pb
from likeness.job.v1 import job_pb2

from services.domain.errors import NotFound
from services.gateway.jobs import CALL_TIMEOUT_S, Origin, job_options, until_ended

Job = generation_job_pb2.GenerationJob
PICTURE_TIMEOUT_S = 60.0
"""Longest wait for the admission of a drawing that starts from pictures: they are read first."""


@dataclass(frozen=True, slots=True)
class NewDrawing:
    """What a drawing is made of.

    Attributes:
        job_id: its id.
        spec: what is drawn.
        kept: what the dialect wants to read again.
        webhook: address that is told of the end; "" for none.
        policy: limits and rank.
        labels: small values that the dialect keeps with it.
    """

    job_id: str
    spec: generation_job_pb2.GenerationSpec
    kept: Mapping[str, Any]
    webhook: str
    policy: job_pb2.JobPolicy
    labels: Mapping[str, str]


class Drawings:
    """The drawings of all projects, as far as a caller may see them."""

    def __init__(self, inference: Any, stopping: asyncio.Event | None = None) -> None:
        """Takes a stub of InferenceService, and what is set when the process ends."""
        self._inference = inference
        self._stopping = stopping or asyncio.Event()

    async def submit(self, origin: Origin, new: NewDrawing) -> Job:
        """Admits a drawing.

        Raises:
            InvalidSpec: the service found a fault that the dialect could not know of.
            AlreadyExists: the id is taken.
            NotFound: there is no such model.
            QueueFull, Unavailable: not now.
        """
        scope = job_pb2.WEBHOOK_SCOPE_FINAL
        options = job_options(origin, new.policy, new.labels, new.kept, new.webhook, scope)
        request = pb.CreateGenerationJobRequest(
            project_id=origin.project, job_id=new.job_id, spec=new.spec, options=options
        )
        timeout_s = PICTURE_TIMEOUT_S if new.spec.init_image_key else CALL_TIMEOUT_S
        response = await self._inference.CreateGenerationJob(request, timeout=timeout_s)
        return _job(response)

    async def get(self, origin: Origin, job_id: str) -> Job:
        """Reads a drawing.

        Raises:
            NotFound: there is none of this project, dialect and endpoint.
        """
        request = pb.GetGenerationJobRequest(job_id=job_id, project_id=origin.project)
        job = _job(await self._inference.GetGenerationJob(request, timeout=CALL_TIMEOUT_S))
        found = job.options.origin
        if (found.dialect, found.endpoint) != (origin.dialect, origin.endpoint):
            raise NotFound("drawing not found")
        return job

    async def wait(self, origin: Origin, job_id: str, seconds: float) -> Job:
        """Reads a drawing as soon as it has ended, and at the end of `seconds` in any case."""
        return await until_ended(
            lambda: self.get(origin, job_id),
            lambda job: self._inference.WatchGenerationJob(
                pb.WatchGenerationJobRequest(
                    job_id=job_id, project_id=origin.project, after_sequence=job.sequence
                )
            ),
            seconds,
            self._stopping,
        )

    async def count(self, origin: Origin, states: Sequence[job_pb2.JobState], most: int) -> int:
        """How many drawings of an endpoint are in these states, counted up to `most`, 1..200."""
        request = pb.ListGenerationJobsRequest(
            project_id=origin.project, page_size=most, states=states, endpoint=origin.endpoint
        )
        response = await self._inference.ListGenerationJobs(request, timeout=CALL_TIMEOUT_S)
        return len(response.jobs)

    async def queue_status(self) -> job_pb2.QueueStatus:
        """Figures of all drawings and of the workers."""
        request = pb.GetGenerationQueueStatusRequest()
        response = await self._inference.GetGenerationQueueStatus(request, timeout=CALL_TIMEOUT_S)
        status: job_pb2.QueueStatus = response.status
        return status


def _job(response: Any) -> Job:
    job: Job = response.job
    return job
