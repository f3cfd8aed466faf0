"""`python -m services.inference ROLE`: settings, adapters, and the one role that was asked for."""

import argparse
import asyncio
import logging
from collections.abc import Callable

from services.adapters.blob_cache import BlobCache
from services.adapters.grpc_client import Channel
from services.adapters.grpc_server import GrpcServer
from services.adapters.settings import InferenceWorkerSettings, load_or_exit
from services.adapters.storage_client import StorageClient
from services.adapters.telemetry import configure_logging
from services.inference.device_process import DeviceProcess
from services.inference.worker import MIN_JOBS, InferenceWorker
from services.jobs.worker_client import WorkerClient, new_worker_id

logger = logging.getLogger(__name__)


async def run_worker(settings: InferenceWorkerSettings) -> None:
    """Takes drawings until a signal comes."""
    cache = BlobCache(settings.cache_path, settings.cache_bytes)
    stopping = asyncio.Event()
    try:
        async with (
            Channel(settings.storage_addr) as storage,
            Channel(settings.inference_addr) as api,
            DeviceProcess(*_child_arguments(settings)) as device,
        ):
            await device.until_ready()
            async with (
                WorkerClient(
                    api,
                    new_worker_id("inference"),
                    device=device.device,
                    device_memory_bytes=device.memory_bytes,
                    beat_s=settings.beat_s,
                ) as client,
                GrpcServer(
                    settings.worker_health_addr, grace_s=settings.grace_s, ready_fd=settings.ready_fd
                ) as health,
            ):
                worker = InferenceWorker(
                    client,
                    StorageClient(storage),
                    cache,
                    device,
                    max_jobs=max(MIN_JOBS, settings.batch_cap),
                    grace_s=settings.grace_s / 2,
                )
                await health.run_until_signalled(worker.run(stopping), stopping=stopping)
    finally:
        cache.close()


def _child_arguments(settings: InferenceWorkerSettings) -> list[str]:
    return [
        f"--device={settings.device}",
        f"--cpu-threads={settings.cpu_threads}",
        f"--batch-cap={settings.batch_cap}",
        f"--model-memory-bytes={settings.model_memory_bytes}",
        f"--adapter-memory-bytes={settings.adapter_memory_bytes}",
    ]


def worker() -> None:
    """The role `worker`."""
    settings = load_or_exit(InferenceWorkerSettings)
    configure_logging(settings.process, level=settings.log_level, log_format=settings.log_format)
    asyncio.run(run_worker(settings))


def api() -> None:
    """The role `api`, which alone loads the job log's client."""
    from services.inference.api import main as serve_api

    serve_api()


ROLES: dict[str, Callable[[], None]] = {"api": api, "worker": worker}


def main() -> None:
    """Reads the role from the command line, everything else from the environment."""
    parser = argparse.ArgumentParser(prog="python -m services.inference")
    parser.add_argument("role", choices=sorted(ROLES))
    ROLES[parser.parse_args().role]()


if __name__ == "__main__":
    main()
