"""A gateway over the real TrainingService and job core in memory, with small stand-ins for storage and access."""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
from likeness.access.v1 import access_service_pb2 as access_pb
from likeness.access.v1.access_service_pb2_grpc import (
    AccessServiceServicer,
    AccessServiceStub,
    add_AccessServiceServicer_to_server,
)
from likeness.storage.v1 import storage_service_pb2 as storage_pb
from likeness.storage.v1.storage_service_pb2_grpc import (
    StorageServiceServicer,
    add_StorageServiceServicer_to_server,
)
from likeness.training.v1.training_service_pb2_grpc import (
    TrainingServiceStub,
    add_TrainingServiceServicer_to_server,
)

from services.adapters.clock import RealClock
from services.adapters.egress import Egress
from services.adapters.grpc_client import Channel
from services.adapters.grpc_server import GrpcServer
from services.adapters.memory import MemoryPlatform
from services.adapters.storage_client import StorageClient
from services.domain import life_cycle as life
from services.domain.errors import NotFound, Unauthenticated, Unavailable
from services.domain.job import JobFailure, JobKind, JobRecord, JobRef
from services.gateway.app import Parts, create_app
from services.gateway.auth import Authenticator
from services.gateway.dialects.runpod import envelope as wire
from services.gateway.files import Links
from services.gateway.jobs import Jobs
from services.gateway.limits import QueueLimit, RateLimiter
from services.gateway.openapi import ENDPOINTS
from services.gateway.runpod import RunpodApi
from services.gateway.streams import Streams
from services.jobs.core import JobCore
from services.trainer.servicer import TrainingServicer

KEY, OTHER_KEY = "lk-first", "lk-second"
INPUT = {
    "concepts": [
        {
            "instance_data": "https://files.example.org/rex.zip",
            "instance_prompt": "photo of zkw dog",
            "class_prompt": "photo of a dog",
        }
    ],
    "samples": [{"prompt": "zkw dog on the moon", "num_outputs": 2, "seed": 11}],
}
CAPTIONED: dict[str, Any] = {
    "train": {"data_url": "https://files.example.org/bikes.zip"},
    "inference": {"prompt": "a red bike in snow", "num_outputs": 2, "seed": 11, "passback": "bike-1"},
}
DREAM_BOOTH, EVERYDREAM = "dream-booth-v1", "everydream-v1"
INPUTS: dict[str, dict[str, Any]] = {DREAM_BOOTH: INPUT, EVERYDREAM: CAPTIONED}
"""An input of each endpoint; both ask for two pictures with the seeds 11 and 12."""


class FakeAccess(AccessServiceServicer):
    """Two projects with a key each; counts the questions."""

    def __init__(self) -> None:
        self.questions = 0
        self.projects = {KEY: "first", OTHER_KEY: "second"}
        self.scopes: list[str] = []
        self.limits = access_pb.Limits()
        self.down = False

    async def CheckKey(self, request: Any, context: Any) -> access_pb.CheckKeyResponse:
        self.questions += 1
        if self.down:
            raise Unavailable("access is away")
        project = self.projects.get(request.secret)
        if project is None:
            raise Unauthenticated("unknown key")
        key = access_pb.Key(key_id=f"k-{project}", project_id=project, scopes=self.scopes)
        return access_pb.CheckKeyResponse(
            key=key, project=access_pb.Project(project_id=project, limits=self.limits)
        )


class FakeStorage(StorageServiceServicer):
    """Pictures by key, and links to them."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.links: dict[tuple[str, str], str] = {}
        self.down = False
        self.slow_s = 0.0

    async def CreateFileLink(self, request: Any, context: Any) -> storage_pb.CreateFileLinkResponse:
        await asyncio.sleep(self.slow_s)
        if self.down:
            raise Unavailable("storage is away")
        if request.key not in self.blobs:
            raise NotFound("no such artifact")
        token = f"token{len(self.links)}"
        self.links[token, request.file_name] = request.key
        response = storage_pb.CreateFileLinkResponse()
        response.link.path = f"/files/{token}/{request.file_name}"
        response.link.expire_time.GetCurrentTime()
        response.link.expire_time.seconds += 604_800
        return response

    async def ReadFile(self, request: Any, context: Any) -> AsyncIterator[storage_pb.ReadFileResponse]:
        await asyncio.sleep(self.slow_s)
        key = self.links.get((request.token, request.file_name), "")
        if key not in self.blobs:
            raise NotFound("no such link")
        data = self.blobs[key]
        end = request.offset_bytes + request.limit_bytes if request.limit_bytes else len(data)
        first = storage_pb.ReadFileResponse()
        first.blob.key, first.blob.digest = key, hashlib.sha256(data).hexdigest()
        first.blob.size_bytes, first.blob.media_type = len(data), "image/png"
        yield first
        for start in range(request.offset_bytes, end, 1024):
            yield storage_pb.ReadFileResponse(data=data[start : min(end, start + 1024)])


class MemoryDocuments:
    """Long documents in memory."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}

    async def put(self, project: str, data: bytes) -> str:
        key = f"projects/{project}/{hashlib.sha256(data).hexdigest()}"
        self.held[key] = data
        return key

    async def get(self, key: str) -> bytes:
        return self.held[key]


@dataclass
class Behind:
    """What lies behind a gateway, served on a port.

    Attributes:
        documents: where long specifications are.
        address: where all the services are.
    """

    platform: Any
    core: JobCore
    access: FakeAccess
    storage: FakeStorage
    documents: MemoryDocuments
    address: str = ""

    async def move(
        self, job_id: str, *moves: Callable[[JobRecord, int], JobRecord], project: str = "first"
    ) -> None:
        """Writes the next revisions of a job, as the api and the workers would."""
        ref = JobRef(JobKind.TRAIN, project, job_id)
        for move in moves:
            await self.core.records.change(ref, partial(_moved, move, self.core.records.now_ms()))

    async def run_to_training(self, job_id: str) -> None:
        await self.move(
            job_id,
            life.begin_preparing,
            lambda record, now: life.make_ready(record, {}, "", now),
        )
        revision = await self.core.records.read(JobRef(JobKind.TRAIN, "first", job_id))
        await self.move(job_id, lambda record, now: life.take(record, revision.sequence, "trainer-1", now))

    async def succeed(self, job_id: str) -> None:
        """Brings a queued job to its end, with the pictures that were asked for."""
        await self.run_to_training(job_id)
        revision = await self.core.records.read(JobRef(JobKind.TRAIN, "first", job_id))
        spec = revision.record.spec["samples"][0]
        pictures = []
        for position in range(2):
            key = f"picture-{job_id}-{position}"
            self.storage.blobs[key] = f"PNG {key} ".encode() * 200
            image = {"key": key, "seed": str(11 + position), "media_type": "image/png"}
            pictures.append({"sample_index": 0, "spec": spec, "image": image})
        await self.move(
            job_id,
            lambda record, now: life.report_trained(record, record.epoch, {}),
            lambda record, now: life.finish(record, {"model": job_id, "samples": pictures}, "", now),
        )

    async def fail(
        self,
        job_id: str,
        message: str = "no picture could be read",
        field: str = "concepts[0].instance_data",
    ) -> None:
        failure = JobFailure("BAD_INPUT", message, field)
        await self.move(job_id, life.begin_preparing, lambda record, now: life.fail(record, failure, now))

    async def report(self, job_id: str, step: int, total: int = 10) -> None:
        """Publishes progress of a training."""
        body = {"stage": "JOB_STAGE_TRAINING", "step": str(step), "total_steps": str(total), "fraction": 0.5}
        await self.platform.progress.publish_progress("first", job_id, body)


@dataclass
class World:
    """A gateway and what lies behind it."""

    behind: Behind
    jobs: Jobs
    api: RunpodApi
    parts: Parts
    http: httpx.AsyncClient
    ready: dict[str, bool]

    @property
    def platform(self) -> MemoryPlatform:
        assert isinstance(self.behind.platform, MemoryPlatform)
        return self.behind.platform

    @property
    def core(self) -> JobCore:
        return self.behind.core

    @property
    def access(self) -> FakeAccess:
        return self.behind.access

    @property
    def storage(self) -> FakeStorage:
        return self.behind.storage

    async def call(self, method: str, path: str, key: str | None = KEY, **kwargs: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        headers |= kwargs.pop("headers", {})
        return await self.http.request(method, path, headers=headers, **kwargs)

    async def submit(
        self, version: str = "v2", key: str = KEY, endpoint: str = DREAM_BOOTH, **envelope: Any
    ) -> str:
        body = {"input": INPUTS[endpoint]} | envelope
        answer = await self.call("POST", f"/{version}/{endpoint}/run", key, json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    async def status(self, job_id: str, version: str = "v2", endpoint: str = DREAM_BOOTH) -> dict[str, Any]:
        answer = await self.call("GET", f"/{version}/{endpoint}/status/{job_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def run_to_training(self, job_id: str) -> None:
        await self.behind.run_to_training(job_id)

    async def succeed(self, job_id: str) -> None:
        await self.behind.succeed(job_id)

    async def fail(self, job_id: str, *failure: str) -> None:
        await self.behind.fail(job_id, *failure)

    async def report(self, job_id: str, step: int, total: int = 10) -> None:
        await self.behind.report(job_id, step, total)


@contextlib.asynccontextmanager
async def services(platform: Any) -> AsyncIterator[Behind]:
    """The real TrainingService over a job platform, and the stand-ins, until the end of the block."""
    documents = MemoryDocuments()
    core = JobCore(JobKind.TRAIN, platform, RealClock(), documents)
    behind = Behind(platform, core, FakeAccess(), FakeStorage(), documents)
    server = GrpcServer("127.0.0.1:0", grace_s=0.1)
    training = TrainingServicer(core, base_model="pocket")
    for add, servicer, name in (
        (add_TrainingServiceServicer_to_server, training, "likeness.training.v1.TrainingService"),
        (add_StorageServiceServicer_to_server, behind.storage, "likeness.storage.v1.StorageService"),
        (add_AccessServiceServicer_to_server, behind.access, "likeness.access.v1.AccessService"),
    ):
        server.add(add, servicer, name)
    running = asyncio.create_task(core.run())
    await core.wait_ready()
    async with server:
        behind.address = server.address
        yield behind
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@contextlib.asynccontextmanager
async def gateway(
    limiter: RateLimiter | None = None,
    queue_limit: QueueLimit | None = None,
    settings: Mapping[str, Any] | None = None,
) -> AsyncIterator[World]:
    """Everything up, until the end of the block."""
    async with services(MemoryPlatform()) as behind, Channel(behind.address) as channel:
        client = StorageClient(channel)
        jobs = Jobs(TrainingServiceStub(channel), queue_limit or QueueLimit())
        api = RunpodApi(
            endpoints=ENDPOINTS,
            auth=Authenticator(AccessServiceStub(channel)),
            jobs=jobs,
            links=Links(client),
            streams=Streams(jobs, behind.platform.progress, wire.CANCELLED_STREAM_MS),
            limiter=limiter or RateLimiter(),
            check_url=Egress().check_url,
            stream_hold_ms=1000,
        )
        ready = {"storage": True, "training": True}
        checks = {name: _check(ready, name) for name in ready}
        parts = Parts(api, client, checks, **(settings or {}))
        transport = httpx.ASGITransport(app=create_app(parts))
        async with httpx.AsyncClient(transport=transport, base_url="http://likeness.test") as http:
            yield World(behind, jobs, api, parts, http, ready)


def _moved(move: Callable[[JobRecord, int], JobRecord], now_ms: int, record: JobRecord) -> JobRecord:
    return move(record, now_ms)


def _check(ready: dict[str, bool], name: str) -> Callable[[], Any]:
    async def check() -> bool:
        if name == "training" and not ready[name]:
            raise Unavailable("away")
        return ready[name]

    return check
