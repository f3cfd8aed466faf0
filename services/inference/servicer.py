"""InferenceService over gRPC: thin above the job core. Resolves what is asked for, and shows records as drawings."""

import secrets
from collections.abc import AsyncIterator, Collection
from typing import Protocol

import grpc
from likeness.inference.v1 import inference_service_pb2 as pb
from likeness.inference.v1.generation_job_pb2 import GenerationJob, GenerationSpec
from likeness.inference.v1.inference_service_pb2_grpc import InferenceServiceServicer
from likeness.job.v1.job_pb2 import JobState as WireState
from likeness.storage.v1.model_pb2 import Model

from services.domain.errors import InvalidSpec, NotFound
from services.domain.generation_spec import RANDOM_SEED_LIMIT, check_offered, resolve_generation_spec
from services.domain.job import JobKind, JobRef
from services.domain.ports import Revision
from services.jobs.admission import Application
from services.jobs.core import JobCore
from services.jobs.views import queue_status, states_of


class Models(Protocol):
    """What admission needs of the model registry."""

    async def get_model(self, project: str, model: str = "") -> Model:
        """A model of the project or of the catalogue.

        Raises:
            NotFound: there is none.
        """
        ...


class InferenceServicer(InferenceServiceServicer):
    """Admits, reads, follows and ends drawings."""

    def __init__(self, core: JobCore, models: Models) -> None:
        """Serves a job core.

        Args:
            core: of kind GEN.
            models: the registry, which says what weights a name means now.
        """
        self._core = core
        self._models = models

    async def CreateGenerationJob(
        self, request: pb.CreateGenerationJobRequest, context: grpc.aio.ServicerContext
    ) -> pb.CreateGenerationJobResponse:
        """Stores a drawing and answers at once; the model's weights and the seed are settled here."""
        spec = resolve_generation_spec(request.spec)
        faults = check_offered(spec)
        if faults:
            raise InvalidSpec(faults)
        known = await self._core.admission.known(_application(request, spec))
        revision = known or await self._admitted(request, spec)
        return pb.CreateGenerationJobResponse(job=await self._shown(revision))

    async def _admitted(self, request: pb.CreateGenerationJobRequest, spec: GenerationSpec) -> Revision:
        model = await self._model(request.project_id, spec.model)
        spec = resolve_generation_spec(spec, model.manifest.native_size_px)
        spec.model_digest = model.manifest_digest
        if not spec.HasField("seed"):
            spec.seed = secrets.randbelow(RANDOM_SEED_LIMIT)
        return await self._core.admission.admit(_application(request, spec))

    async def _model(self, project: str, name: str) -> Model:
        try:
            return await self._models.get_model(project, name)
        except NotFound as error:
            raise NotFound(f"there is no model '{name}'") from error

    async def GetGenerationJob(
        self, request: pb.GetGenerationJobRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetGenerationJobResponse:
        """Reads one drawing."""
        revision = await self._core.reading.get(_ref(request.project_id, request.job_id))
        return pb.GetGenerationJobResponse(job=await self._shown(revision))

    async def ListGenerationJobs(
        self, request: pb.ListGenerationJobsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListGenerationJobsResponse:
        """Lists a project's drawings, newest first."""
        states: Collection[WireState] = request.states
        revisions, token = await self._core.reading.page(
            request.project_id, request.page_size, request.page_token, states_of(states), request.endpoint
        )
        jobs = [await self._shown(revision) for revision in revisions]
        return pb.ListGenerationJobsResponse(jobs=jobs, next_page_token=token)

    async def CancelGenerationJob(
        self, request: pb.CancelGenerationJobRequest, context: grpc.aio.ServicerContext
    ) -> pb.CancelGenerationJobResponse:
        """Ends a drawing; one that has ended already is returned unchanged."""
        revision = await self._core.admission.cancel(_ref(request.project_id, request.job_id))
        return pb.CancelGenerationJobResponse(job=await self._shown(revision))

    async def WatchGenerationJob(
        self, request: pb.WatchGenerationJobRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.WatchGenerationJobResponse]:
        """Follows a drawing until it has ended."""
        ref = _ref(request.project_id, request.job_id)
        async for event in self._core.reading.watch(ref, request.after_sequence):
            yield pb.WatchGenerationJobResponse(event=event)

    async def DeleteGenerationJob(
        self, request: pb.DeleteGenerationJobRequest, context: grpc.aio.ServicerContext
    ) -> pb.DeleteGenerationJobResponse:
        """Removes a drawing; one in progress is cancelled first."""
        await self._core.admission.delete(_ref(request.project_id, request.job_id))
        return pb.DeleteGenerationJobResponse()

    async def GetGenerationQueueStatus(
        self, request: pb.GetGenerationQueueStatusRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetGenerationQueueStatusResponse:
        """Figures of the queue and the workers."""
        core = self._core
        status = queue_status(
            core.index, core.dispatcher.book, request.project_id, request.endpoint, core.records.now_ms()
        )
        return pb.GetGenerationQueueStatusResponse(status=status)

    async def _shown(self, revision: Revision) -> GenerationJob:
        return await self._core.views.generation_job(revision, self._core.records.now_ms())


def _application(request: pb.CreateGenerationJobRequest, spec: GenerationSpec) -> Application:
    return Application(
        project=request.project_id,
        job_id=request.job_id,
        request_id=request.request_id,
        asked=request.spec,
        spec=spec,
        options=request.options,
        model=spec.model_digest,
        parent=request.parent_job_id,
    )


def _ref(project: str, job_id: str) -> JobRef:
    return JobRef(JobKind.GEN, project, job_id)
