"""The trainer api as a process: settings -> adapters -> job core -> TrainingService and WorkerService."""

import asyncio
from typing import Final

from likeness.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from likeness.scaling.v1.external_scaler_pb2_grpc import add_ExternalScalerServicer_to_server
from likeness.training.v1.training_service_pb2_grpc import add_TrainingServiceServicer_to_server
from likeness.worker.v1.worker_service_pb2_grpc import add_WorkerServiceServicer_to_server

from services.adapters.clock import RealClock
from services.adapters.grpc_client import Channel
from services.adapters.grpc_server import GrpcServer
from services.adapters.job_platform import open_platform
from services.adapters.settings import TrainerApiSettings, load_or_exit
from services.adapters.storage_client import StorageClient
from services.adapters.telemetry import configure_logging
from services.domain.job import JobKind, Phase
from services.jobs.core import JobCore
from services.jobs.documents import StorageDocuments
from services.jobs.scaler import SERVICE as SCALER_SERVICE
from services.jobs.scaler import Scaler
from services.trainer.phases import Siblings, TrainingLeader
from services.trainer.servicer import TrainingServicer

LED_AT_ONCE: Final = {Phase.PREPARE: 4}
"""Preparations of one replica at the same time; each may hold an archive's download."""


async def serve(settings: TrainerApiSettings) -> None:
    """Serves until a signal comes.

    Raises:
        Unavailable: the job log did not answer at start.
        ServerRefused: the job log is not safe to use.
    """
    async with (
        Channel(settings.storage_addr) as storage_channel,
        Channel(settings.inference_addr) as inference_channel,
        await open_platform(settings) as platform,
        asyncio.TaskGroup() as group,
    ):
        storage = StorageClient(storage_channel)
        core = JobCore(
            JobKind.TRAIN, platform, RealClock(), StorageDocuments(storage), lease_s=settings.lease_s
        )
        siblings = Siblings(storage, InferenceServiceStub(inference_channel))
        leader = TrainingLeader(platform.job_log, platform.progress, siblings, core.views.training_spec)
        core.lead_with(leader.lead, LED_AT_ONCE)
        running = group.create_task(core.run())
        await core.wait_ready()
        server = GrpcServer(settings.training_addr, grace_s=settings.grace_s, ready_fd=settings.ready_fd)
        server.add(
            add_TrainingServiceServicer_to_server,
            TrainingServicer(core, base_model=settings.base_model),
            "likeness.training.v1.TrainingService",
        )
        server.add(
            add_WorkerServiceServicer_to_server, core.worker_servicer, "likeness.worker.v1.WorkerService"
        )
        scaler = Scaler(core.index, platform.job_log.now_ms)
        server.add(add_ExternalScalerServicer_to_server, scaler, SCALER_SERVICE)
        async with server:
            await server.run_until_signalled()
            running.cancel()


def main() -> None:
    """The role `api`."""
    settings = load_or_exit(TrainerApiSettings)
    configure_logging(settings.process, level=settings.log_level, log_format=settings.log_format)
    asyncio.run(serve(settings))
