"""InferenceService over gRPC: thin above the job core. Resolves what is asked for, and shows records as drawings."""

import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from typing import Protocol

import grpc
from likeness.inference.v1 import inference_service_pb2 as pb
from likeness.inference.v1.generation_job_pb2 import Embedding, GenerationJob, GenerationSpec, LoraWeight
from likeness.inference.v1.inference_service_pb2_grpc import InferenceServiceServicer
from likeness.job.v1.job_pb2 import JobState as WireState
from likeness.storage.v1.artifact_pb2 import Dataset
from likeness.storage.v1.model_pb2 import Model, ModelManifest
from likeness.training.v1.training_job_pb2 import ArtifactKeys, ImageSource

from services.domain.add_ons import embedding_fault, lora_fault
from services.domain.errors import BadInput, InvalidSpec, NotFound, Violation
from services.domain.generation_spec import RANDOM_SEED_LIMIT, check_offered, resolve_generation_spec
from services.domain.job import JobKind, JobRef
from services.domain.ports import Revision
from services.jobs.admission import Application
from services.jobs.core import JobCore
from services.jobs.views import queue_status, states_of

PICTURE_FIELDS = ("init_image_key", "mask_image_key")
"""Fields of a specification that name pictures."""


class Models(Protocol):
    """What admission needs of storage: the model registry, and pictures."""

    async def get_model(self, project: str, model: str = "") -> Model:
        """A model of the project or of the catalogue.

        Raises:
            NotFound: there is none.
        """
        ...

    async def import_dataset(self, project: str, source: ImageSource) -> Dataset:
        """Stored pictures, checked and made uniform.

        Raises:
            BadInput: one is not there, is not the project's, or cannot be read.
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
        """Stores a drawing and answers at once; its weights, pictures and seed are settled here."""
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
        await self._settle_add_ons(request.project_id, spec, model)
        for field in PICTURE_FIELDS:
            if getattr(spec, field):
                setattr(spec, field, await self._uniform(request.project_id, getattr(spec, field), field))
        if not spec.HasField("seed"):
            spec.seed = secrets.randbelow(RANDOM_SEED_LIMIT)
        return await self._core.admission.admit(_application(request, spec))

    async def _settle_add_ons(self, project: str, spec: GenerationSpec, model: Model) -> None:
        """Fixes the weights of LoRAs and embeddings, as those of the model."""
        faults = [
            *await self._settled(project, "loras", spec.loras, lora_fault, model),
            *await self._settled(project, "embeddings", spec.embeddings, embedding_fault, model),
        ]
        if faults:
            raise InvalidSpec(faults)

    async def _settled(
        self,
        project: str,
        field: str,
        entries: Iterable[LoraWeight | Embedding],
        fault_of: Callable[[ModelManifest, ModelManifest], str],
        model: Model,
    ) -> list[Violation]:
        faults = []
        for index, entry in enumerate(entries):
            fault = "does not exist"
            with contextlib.suppress(NotFound):
                found = await self._models.get_model(project, entry.model)
                entry.model_digest = found.manifest_digest
                fault = fault_of(found.manifest, model.manifest)
            if fault:
                faults.append(Violation(f"{field}[{index}].model", f"'{entry.model}' {fault}"))
        return faults

    async def _model(self, project: str, name: str) -> Model:
        try:
            return await self._models.get_model(project, name)
        except NotFound as error:
            raise NotFound(f"there is no model '{name}'") from error

    async def _uniform(self, project: str, key: str, field: str) -> str:
        """The key of a picture as a PNG that storage has decoded, so that no worker reads what users wrote."""
        source = ImageSource(artifacts=ArtifactKeys(keys=[key]), field=field)
        try:
            dataset = await self._models.import_dataset(project, source)
        except InvalidSpec as error:
            rules = "; ".join(violation.rule for violation in error.violations)
            raise BadInput(f"is not a picture that can be used ({rules})", field) from error
        return dataset.images[0].key

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
