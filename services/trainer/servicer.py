"""TrainingService over gRPC: thin above the job core. Resolves what is asked for, and shows records as trainings."""

from collections.abc import AsyncIterator, Collection

import grpc
from likeness.job.v1.job_pb2 import JobState as WireState
from likeness.training.v1 import training_service_pb2 as pb
from likeness.training.v1.training_job_pb2 import TrainingJob, TrainingSpec
from likeness.training.v1.training_service_pb2_grpc import TrainingServiceServicer

from services.domain.errors import InvalidSpec
from services.domain.job import LONGEST_RETENTION_MS, RETENTION_WORDS, SHORTEST_RETENTION_MS, JobKind, JobRef
from services.domain.ports import Revision
from services.domain.training_spec import resolve_training_spec
from services.jobs.admission import Application
from services.jobs.core import JobCore
from services.jobs.views import queue_status, states_of
from services.trainer.support import check_supported


class TrainingServicer(TrainingServiceServicer):
    """Admits, reads, follows and ends trainings."""

    def __init__(self, core: JobCore, *, base_model: str) -> None:
        """Serves a job core.

        Args:
            core: of kind TRAIN.
            base_model: model that trainings start from which name none.
        """
        self._core = core
        self._base_model = base_model

    async def CreateTrainingJob(
        self, request: pb.CreateTrainingJobRequest, context: grpc.aio.ServicerContext
    ) -> pb.CreateTrainingJobResponse:
        """Stores a training and answers at once."""
        application = Application(
            project=request.project_id,
            job_id=request.job_id,
            request_id=request.request_id,
            asked=request.spec,
            spec=self._resolved(request.spec),
            options=request.options,
        )
        revision = await self._core.admission.admit(application)
        return pb.CreateTrainingJobResponse(job=await self._shown(revision))

    def _resolved(self, asked: TrainingSpec) -> TrainingSpec:
        spec = resolve_training_spec(asked)
        check_supported(spec)
        spec.base_model = spec.base_model or self._base_model
        return spec

    async def GetTrainingJob(
        self, request: pb.GetTrainingJobRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetTrainingJobResponse:
        """Reads one training."""
        revision = await self._core.reading.get(_ref(request.project_id, request.job_id))
        return pb.GetTrainingJobResponse(job=await self._shown(revision))

    async def ListTrainingJobs(
        self, request: pb.ListTrainingJobsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListTrainingJobsResponse:
        """Lists a project's trainings, newest first."""
        states: Collection[WireState] = request.states
        revisions, token = await self._core.reading.page(
            request.project_id, request.page_size, request.page_token, states_of(states), request.endpoint
        )
        jobs = [await self._shown(revision) for revision in revisions]
        return pb.ListTrainingJobsResponse(jobs=jobs, next_page_token=token)

    async def CancelTrainingJob(
        self, request: pb.CancelTrainingJobRequest, context: grpc.aio.ServicerContext
    ) -> pb.CancelTrainingJobResponse:
        """Ends a training; one that has ended already is returned unchanged."""
        revision = await self._core.admission.cancel(_ref(request.project_id, request.job_id))
        return pb.CancelTrainingJobResponse(job=await self._shown(revision))

    async def RetryTrainingJob(
        self, request: pb.RetryTrainingJobRequest, context: grpc.aio.ServicerContext
    ) -> pb.RetryTrainingJobResponse:
        """Starts a FAILED or TIMED_OUT training again, from its input."""
        revision = await self._core.admission.retry(_ref(request.project_id, request.job_id))
        return pb.RetryTrainingJobResponse(job=await self._shown(revision))

    async def WatchTrainingJob(
        self, request: pb.WatchTrainingJobRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.WatchTrainingJobResponse]:
        """Follows a training until it has ended."""
        ref = _ref(request.project_id, request.job_id)
        async for event in self._core.reading.watch(ref, request.after_sequence):
            yield pb.WatchTrainingJobResponse(event=event)

    async def DeleteTrainingJob(
        self, request: pb.DeleteTrainingJobRequest, context: grpc.aio.ServicerContext
    ) -> pb.DeleteTrainingJobResponse:
        """Removes a training's record; one in progress is cancelled first."""
        await self._core.admission.delete(_ref(request.project_id, request.job_id))
        return pb.DeleteTrainingJobResponse()

    async def ShortenTrainingJobRetention(
        self, request: pb.ShortenTrainingJobRetentionRequest, context: grpc.aio.ServicerContext
    ) -> pb.ShortenTrainingJobRetentionResponse:
        """Lets an ended training go earlier than its policy says, never later."""
        keep_ms = request.keep_for.ToMilliseconds()
        if not SHORTEST_RETENTION_MS <= keep_ms <= LONGEST_RETENTION_MS:
            raise InvalidSpec(f"must be {RETENTION_WORDS}", "keep_for")
        ref = _ref(request.project_id, request.job_id)
        revision = await self._core.admission.shorten_retention(ref, self._core.records.now_ms() + keep_ms)
        return pb.ShortenTrainingJobRetentionResponse(job=await self._shown(revision))

    async def GetTrainingQueueStatus(
        self, request: pb.GetTrainingQueueStatusRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetTrainingQueueStatusResponse:
        """Figures of the queue and the workers."""
        core = self._core
        status = queue_status(
            core.index, core.dispatcher.book, request.project_id, request.endpoint, core.records.now_ms()
        )
        return pb.GetTrainingQueueStatusResponse(status=status)

    async def _shown(self, revision: Revision) -> TrainingJob:
        return await self._core.views.training_job(revision, self._core.records.now_ms())


def _ref(project: str, job_id: str) -> JobRef:
    return JobRef(JobKind.TRAIN, project, job_id)
