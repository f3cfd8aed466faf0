"""Puts the gateway together and serves it: channels, job log, application, webhook sender."""

import asyncio
import contextlib
import logging
import secrets
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import uvicorn
from likeness.access.v1.access_service_pb2_grpc import AccessServiceStub
from likeness.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from likeness.training.v1.training_service_pb2_grpc import TrainingServiceStub

from services.adapters.clock import RealClock
from services.adapters.egress import Egress, EgressPolicy
from services.adapters.grpc_client import Channel, is_serving
from services.adapters.grpc_server import notify_ready
from services.adapters.jetstream import JetStreamPlatform
from services.adapters.job_platform import open_platform
from services.adapters.settings import GatewaySettings
from services.adapters.storage_client import StorageClient
from services.domain.job import JobKind
from services.domain.ports import Revision
from services.gateway.app import Parts, create_app
from services.gateway.auth import Authenticator
from services.gateway.dialects.runpod import envelope as wire
from services.gateway.dialects.sdapi import envelope as sdapi_wire
from services.gateway.dialects.sdapi import training as sdapi_trainings
from services.gateway.drawings import Drawings
from services.gateway.files import Links
from services.gateway.jobs import Jobs
from services.gateway.limits import RateLimiter
from services.gateway.openapi import ENDPOINTS
from services.gateway.runpod import RunpodApi
from services.gateway.sdapi import SdapiApi, SdapiPolicy
from services.gateway.streams import Streams
from services.gateway.webhooks import WebhookPolicy, WebhookSender
from services.jobs.documents import CachedDocuments, StorageDocuments
from services.jobs.views import Views

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
STOP_MARGIN_S = 2.0
SDAPI_TRIES = 6
"""Posts of one event in that dialect: one, and five more."""


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
        auth, links = Authenticator(AccessServiceStub(storage_channel)), Links(storage)
        runpod = RunpodApi(
            endpoints=ENDPOINTS,
            auth=auth,
            jobs=jobs,
            links=links,
            streams=Streams(jobs, platform.progress, wire.CANCELLED_STREAM_MS),
            limiter=RateLimiter(),
            check_url=egress.check_url,
        )

        sdapi = SdapiApi(
            auth=auth,
            jobs=jobs,
            drawings=Drawings(InferenceServiceStub(inference_channel), jobs.stopping),
            storage=storage,
            links=links,
            check_url=egress.check_url,
            policy=SdapiPolicy(
                strict=settings.sdapi_strict,
                jobs_at_once=settings.sdapi_jobs_at_once,
                sync_wait_s=settings.sdapi_sync_wait_s,
                sandbox_steps=settings.sdapi_sandbox_steps,
            ),
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
            sdapi=sdapi,
            sdapi_cors=settings.sdapi_cors,
        )
        senders = _webhook_senders(settings, platform, storage, runpod, sdapi, egress)
        await _run(settings, parts, jobs, senders)


def _webhook_senders(
    settings: GatewaySettings,
    platform: JetStreamPlatform,
    storage: StorageClient,
    runpod: RunpodApi,
    sdapi: SdapiApi,
    egress: Egress,
) -> list[WebhookSender]:
    views = Views(CachedDocuments(StorageDocuments(storage)), platform.progress)
    secret = settings.webhook_secret.get_secret_value().encode()
    public_url, now_ms = settings.public_url, platform.job_log.now_ms

    async def runpod_training(revision: Revision, number: int) -> bytes:
        return await runpod.webhook_document(await views.training_job(revision, now_ms()), public_url)

    async def sdapi_training(revision: Revision, number: int) -> bytes:
        job = await views.training_job(revision, now_ms())
        return await sdapi.training_document(job, number, public_url)

    async def sdapi_drawing(revision: Revision, number: int) -> bytes:
        return sdapi.drawing_document(await views.generation_job(revision, now_ms()), public_url)

    common: dict[str, Any] = {
        "feed": platform.job_feed,
        "log": platform.job_log,
        "hooks": platform.small,
        "clock": RealClock(),
        "post": egress.post_json,
        "name": secrets.token_hex(4),
    }
    return [
        WebhookSender(
            render=runpod_training,
            dialects=frozenset({wire.DIALECT}),
            policy=WebhookPolicy(secret=secret),
            **common,
        ),
        WebhookSender(
            render=sdapi_training,
            dialects=frozenset({sdapi_wire.DIALECT}),
            policy=WebhookPolicy(tries=SDAPI_TRIES, secret=secret),
            events_of=sdapi_trainings.events_of,
            **common,
        ),
        WebhookSender(
            render=sdapi_drawing,
            dialects=frozenset({sdapi_wire.DIALECT}),
            policy=WebhookPolicy(tries=SDAPI_TRIES, secret=secret),
            kind=JobKind.GEN,
            **common,
        ),
    ]


class _Server(uvicorn.Server):
    """Uvicorn without its own signal handling, which would end the process before its work is put away."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _run(settings: GatewaySettings, parts: Parts, jobs: Jobs, senders: Sequence[WebhookSender]) -> None:
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
    telling = [asyncio.create_task(sender.run()) for sender in senders]
    for task in telling:
        task.add_done_callback(lambda task: stop())
    announcing = asyncio.create_task(_announce(server, settings))
    try:
        await server.serve()
    finally:
        announcing.cancel()
        for task in telling:
            task.cancel()
        failures = await asyncio.gather(*telling, return_exceptions=True)
    for failure in failures:
        if isinstance(failure, Exception):
            raise failure


async def _announce(server: uvicorn.Server, settings: GatewaySettings) -> None:
    while not server.started:
        await asyncio.sleep(0.02)
    notify_ready(settings.ready_fd)
    logger.info("serving", extra={"address": settings.http_addr})
