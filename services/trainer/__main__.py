"""`python -m services.trainer ROLE`: settings, adapters, and the one role that was asked for."""

import argparse
import asyncio
from collections.abc import Callable

from services.adapters.blob_cache import BlobCache
from services.adapters.grpc_client import Channel
from services.adapters.grpc_server import GrpcServer
from services.adapters.settings import TrainerWorkerSettings, load_or_exit
from services.adapters.storage_client import StorageClient
from services.adapters.telemetry import configure_logging
from services.jobs.worker_client import WorkerClient, new_worker_id
from services.trainer.device_process import TrainingProcess
from services.trainer.worker import TrainingWorker

GRACE_SHARE = 0.75
"""Of the time between SIGTERM and the end, for reaching a checkpoint; the rest is for saying so."""


async def run_worker(settings: TrainerWorkerSettings) -> None:
    """Takes trainings until a signal comes."""
    cache = BlobCache(settings.cache_path, settings.cache_bytes)
    process = TrainingProcess(f"--device={settings.device}", f"--cpu-threads={settings.cpu_threads}")
    stopping = asyncio.Event()
    try:
        await process.until_ready()
        async with (
            Channel(settings.storage_addr) as storage,
            Channel(settings.training_addr) as api,
            WorkerClient(
                api,
                new_worker_id("trainer"),
                device=process.device,
                device_memory_bytes=process.memory_bytes,
                beat_s=settings.beat_s,
            ) as client,
            GrpcServer(
                settings.worker_health_addr, grace_s=settings.grace_s, ready_fd=settings.ready_fd
            ) as health,
        ):
            worker = TrainingWorker(
                client,
                StorageClient(storage),
                cache,
                process,
                work_root=settings.cache_path / "work",
                checkpoint_interval_s=settings.checkpoint_s,
                grace_s=settings.grace_s * GRACE_SHARE,
                one_job_within_s=settings.one_job_within_s,
            )
            await health.run_until_signalled(worker.run(stopping), stopping=stopping)
    finally:
        await process.end()
        cache.close()


def worker() -> None:
    """The role `worker`."""
    settings = load_or_exit(TrainerWorkerSettings)
    configure_logging(settings.process, level=settings.log_level, log_format=settings.log_format)
    asyncio.run(run_worker(settings))


def api() -> None:
    """The role `api`, which alone loads the job log's client."""
    from services.trainer.api import main as serve_api

    serve_api()


ROLES: dict[str, Callable[[], None]] = {"api": api, "worker": worker}


def main() -> None:
    """Reads the role from the command line, everything else from the environment."""
    parser = argparse.ArgumentParser(prog="python -m services.trainer")
    parser.add_argument("role", choices=sorted(ROLES))
    ROLES[parser.parse_args().role]()


if __name__ == "__main__":
    main()
