"""The inference api as a process: settings -> adapters -> job core -> InferenceService and WorkerService."""

import asyncio

from likeness.inference.v1.inference_service_pb2_grpc import add_InferenceServiceServicer_to_server
from likeness.scaling.v1.external_scaler_pb2_grpc import add_ExternalScalerServicer_to_server
from likeness.worker.v1.worker_service_pb2_grpc import add_WorkerServiceServicer_to_server

from services.adapters.clock import RealClock
from services.adapters.grpc_client import Channel
from services.adapters.grpc_server import GrpcServer
from services.adapters.job_platform import open_platform
from services.adapters.settings import InferenceApiSettings, load_or_exit
from services.adapters.storage_client import StorageClient
from services.adapters.telemetry import configure_logging
from services.domain.job import JobKind
from services.inference.servicer import InferenceServicer
from services.jobs.core import JobCore
from services.jobs.documents import StorageDocuments
from services.jobs.scaler import SERVICE as SCALER_SERVICE
from services.jobs.scaler import Scaler


async def serve(settings: InferenceApiSettings) -> None:
    """Serves until a signal comes.

    Raises:
        Unavailable: the job log did not answer at start.
        ServerRefused: the job log is not safe to use.
    """
    async with (
        Channel(settings.storage_addr) as storage_channel,
        await open_platform(settings) as platform,
        asyncio.TaskGroup() as group,
    ):
        storage = StorageClient(storage_channel)
        core = JobCore(
            JobKind.GEN, platform, RealClock(), StorageDocuments(storage), lease_s=settings.lease_s
        )
        running = group.create_task(core.run())
        await core.wait_ready()
        server = GrpcServer(settings.inference_addr, grace_s=settings.grace_s, ready_fd=settings.ready_fd)
        server.add(
            add_InferenceServiceServicer_to_server,
            InferenceServicer(core, storage),
            "likeness.inference.v1.InferenceService",
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
    settings = load_or_exit(InferenceApiSettings)
    configure_logging(settings.process, level=settings.log_level, log_format=settings.log_format)
    asyncio.run(serve(settings))
