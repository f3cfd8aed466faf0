"""Puts the gateway together and serves it: channels, job log, application, webhook sender."""

import asyncio
import contextlib
import logging
import secrets
import signal
from collections.abc import Iterator

import uvicorn
from likeness.access.v1.access_service_pb2_grpc import AccessServiceStub
from likeness.training.v1.training_service_pb2_grpc import TrainingServiceStub

from services.adapters.clock import RealClock
from services.adapters.egress import Egress, EgressPolicy
from services.adapters.grpc_client import Channel, is_serving
from services.adapters.grpc_server import notify_ready
from services.adapters.jetstream import JetStreamPlatform
from services.adapters.job_platform import open_platform
from services.adapters.settings import GatewaySettings
from services.adapters.storage_client import StorageClient
from services.domain.ports import Revision
from services.gateway.app import Parts, create_app
from services.gateway.auth import Authenticator
from services.gateway.dialects.runpod import envelope as wire
from services.gateway.files import Links
from services.gateway.jobs import Jobs
from services.gateway.limits import RateLimiter
from services.gateway.openapi import ENDPOINTS
from services.gateway.runpod import RunpodApi
from services.gateway.streams import Streams
from services.gateway.webhooks import WebhookPolicy, WebhookSender
from services.jobs.documents import CachedDocuments, StorageDocuments
from services.jobs.views import Views

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
STOP_MARGIN_S = 2.0


async def serve(settings: GatewaySettings) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        settings: the gateway's.

    Raises:
        Unavailable: the job log does not answer at the start.
        ServerRefused: the job log is not safe to use.
        OSError: the address cannot be listened on.
    """
    async with contextlib.AsyncExitStack() as stack:
        storage_channel = await stack.enter_async_context(Channel(settings.storage_addr))
        training_channel = await stack.enter_async_context(Channel(settings.training_addr))
        inference_channel = await stack.enter_async_context(Channel(settings.inference_addr))
        platform = await stack.enter_async_context(await open_platform(settings))
        egress = Egress(EgressPolicy(allow=settings.egress_allow))
        storage = StorageClient(storage_channel)
        jobs = Jobs(TrainingServiceStub(training_channel))
        runpod = RunpodApi(
            endpoints=ENDPOINTS,
            auth=Authenticator(AccessServiceStub(storage_channel)),
            jobs=jobs,
            links=Links(storage),
            streams=Streams(jobs, platform.progress, wire.CANCELLED_STREAM_MS),
            limiter=RateLimiter(),
            check_url=egress.check_url,
        )

        async def connected() -> bool:
            return platform.connection.connected

        parts = Parts(
            runpod=runpod,
            storage=storage,
            checks={
                "storage": lambda: is_serving(storage_channel),
                "training": lambda: is_serving(training_channel),
                "inference": lambda: is_serving(inference_channel),
                "job_log": connected,
            },
            public_url=settings.public_url,
            cors_origins=settings.cors_origins,
        )
        sender = _webhook_sender(settings, platform, storage, runpod, egress)
        await _run(settings, parts, jobs, sender)


def _webhook_sender(
    settings: GatewaySettings,
    platform: JetStreamPlatform,
    storage: StorageClient,
    runpod: RunpodApi,
    egress: Egress,
) -> WebhookSender:
    views = Views(CachedDocuments(StorageDocuments(storage)), platform.progress)

    async def render(revision: Revision) -> bytes:
        job = await views.training_job(revision, platform.job_log.now_ms())
        return await runpod.webhook_document(job, settings.public_url)

    return WebhookSender(
        feed=platform.job_feed,
        log=platform.job_log,
        hooks=platform.small,
        clock=RealClock(),
        post=egress.post_json,
        render=render,
        dialects=frozenset({wire.DIALECT}),
        policy=WebhookPolicy(secret=settings.webhook_secret.get_secret_value().encode()),
        name=secrets.token_hex(4),
    )


class _Server(uvicorn.Server):
    """Uvicorn without its own signal handling, which would end the process before its work is put away."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _run(settings: GatewaySettings, parts: Parts, jobs: Jobs, sender: WebhookSender) -> None:
    host, _, port = settings.http_addr.rpartition(":")
    config = uvicorn.Config(
        create_app(parts),
        host=host.strip("[]"),
        port=int(port),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, int(settings.grace_s - STOP_MARGIN_S)),
    )
    server = _Server(config)

    def stop() -> None:
        jobs.stopping.set()
        server.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    telling = asyncio.create_task(sender.run())
    telling.add_done_callback(lambda task: stop())
    announcing = asyncio.create_task(_announce(server, settings))
    try:
        await server.serve()
    finally:
        announcing.cancel()
        telling.cancel()
        failures = await asyncio.gather(telling, return_exceptions=True)
    for failure in failures:
        if isinstance(failure, Exception):
            raise failure


async def _announce(server: uvicorn.Server, settings: GatewaySettings) -> None:
    while not server.started:
        await asyncio.sleep(0.02)
    notify_ready(settings.ready_fd)
    logger.info("serving", extra={"address": settings.http_addr})
