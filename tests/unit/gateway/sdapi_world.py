"""A gateway that serves the stablediffusionapi dialect over real job cores in memory, and a small model registry."""

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
from likeness.access.v1.access_service_pb2_grpc import AccessServiceStub, add_AccessServiceServicer_to_server
from likeness.inference.v1.inference_service_pb2_grpc import (
    InferenceServiceStub,
    add_InferenceServiceServicer_to_server,
)
from likeness.storage.v1 import artifact_pb2, model_pb2
from likeness.storage.v1 import storage_service_pb2 as storage_pb
from likeness.storage.v1.storage_service_pb2_grpc import add_StorageServiceServicer_to_server
from likeness.training.v1 import training_job_pb2
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
from services.domain.artifacts import blob_key
from services.domain.errors import BadInput, NotFound
from services.domain.job import JobFailure, JobKind, JobRecord, JobRef, Stage
from services.gateway.app import Parts, create_app
from services.gateway.auth import Authenticator
from services.gateway.dialects.runpod import envelope as runpod_wire
from services.gateway.drawings import Drawings
from services.gateway.files import Links
from services.gateway.jobs import Jobs
from services.gateway.limits import RateLimiter
from services.gateway.openapi import ENDPOINTS
from services.gateway.runpod import RunpodApi
from services.gateway.sdapi import SdapiApi, SdapiPolicy
from services.gateway.streams import Streams
from services.inference.servicer import InferenceServicer
from services.jobs.core import JobCore
from services.trainer.servicer import TrainingServicer
from tests.unit.gateway.harness import KEY, FakeAccess, FakeStorage, MemoryDocuments

BODY: dict[str, Any] = {
    "key": KEY,
    "instance_prompt": "photo of adhik person",
    "class_prompt": "photo of person",
    "base_model_id": "portraitplus-diffusion",
    "images": [f"https://files.example.org/{number}.png" for number in range(7)],
    "seed": "0",
    "training_type": "men",
    "max_train_steps": "2000",
    "webhook": "",
}


class Registry(FakeStorage):
    """Files as in :class:`FakeStorage`, and models: those of the catalogue have no owner.

    Files whose bytes begin with PNG are pictures; so is what lies behind addresses that do not end in "broken".
    """

    def __init__(self) -> None:
        super().__init__()
        defaults = model_pb2.TrainingDefaults(full_learning_rate=3e-4, num_class_images=48)
        self.models: dict[tuple[str, str], model_pb2.Model] = {}
        for name in ("pocket", "portraitplus-diffusion", "your_model_id"):
            manifest = model_pb2.ModelManifest(
                format=model_pb2.MODEL_FORMAT_DIFFUSERS, native_size_px=512, training_defaults=defaults
            )
            self.add("", name, manifest)

    def add(self, project: str, name: str, manifest: model_pb2.ModelManifest | None = None) -> None:
        """Registers a model."""
        model = model_pb2.Model(
            model=name, project_id=project, manifest=manifest, manifest_digest=f"digest-{name}"
        )
        model.create_time.GetCurrentTime()
        self.models[project, name] = model

    def found(self, project: str, name: str) -> model_pb2.Model:
        """A model of a project or of the catalogue; "" is the default."""
        name = name or "pocket"
        model = self.models.get((project, name)) or self.models.get(("", name))
        if model is None:
            raise NotFound("no such model")
        return model

    async def get_model(self, project: str, model: str = "") -> model_pb2.Model:
        """What the inference api asks for."""
        return self.found(project, model)

    async def GetModel(self, request: Any, context: Any) -> storage_pb.GetModelResponse:
        return storage_pb.GetModelResponse(model=self.found(request.project_id, request.model))

    def keep(self, project: str, data: bytes) -> str:
        """Stores bytes; returns their key."""
        key = blob_key(project, hashlib.sha256(data).hexdigest())
        self.blobs[key] = data
        return key

    async def import_dataset(
        self, project: str, source: training_job_pb2.ImageSource
    ) -> artifact_pb2.Dataset:
        """What the inference api asks for."""
        urls = [url for url in source.image_urls.urls if not url.endswith("broken")]
        keys = [key for key in source.artifacts.keys if self.blobs.get(key, b"").startswith(b"PNG")]
        keys += [self.keep(project, b"PNG of " + url.encode()) for url in urls]
        if not keys:
            raise BadInput("the list holds no readable image (0000: the file is damaged)", source.field)
        return artifact_pb2.Dataset(images=[artifact_pb2.DatasetImage(key=key) for key in keys])

    async def ImportDataset(self, request: Any, context: Any) -> storage_pb.ImportDatasetResponse:
        dataset = await self.import_dataset(request.project_id, request.source)
        return storage_pb.ImportDatasetResponse(dataset=dataset)

    async def WriteBlob(self, requests: Any, context: Any) -> storage_pb.WriteBlobResponse:
        parts = [request async for request in requests]
        key = self.keep(parts[0].header.project_id, b"".join(part.data for part in parts))
        return storage_pb.WriteBlobResponse(blob=artifact_pb2.Blob(key=key))

    async def ReadBlob(self, request: Any, context: Any) -> AsyncIterator[storage_pb.ReadBlobResponse]:
        yield storage_pb.ReadBlobResponse(data=self.blobs[request.key])

    async def ListModels(self, request: Any, context: Any) -> storage_pb.ListModelsResponse:
        own = [model for (owner, _), model in self.models.items() if owner == request.project_id]
        shared = [model for (owner, _), model in self.models.items() if not owner]
        return storage_pb.ListModelsResponse(models=own + shared)

    async def DeleteModel(self, request: Any, context: Any) -> storage_pb.DeleteModelResponse:
        if (request.project_id, request.model) not in self.models:
            raise NotFound("no such model")
        del self.models[request.project_id, request.model]
        return storage_pb.DeleteModelResponse()


@dataclass
class World:
    """The gateway and what lies behind it."""

    http: httpx.AsyncClient
    api: SdapiApi
    platform: MemoryPlatform
    training: JobCore
    drawing: JobCore
    storage: Registry
    access: FakeAccess
    documents: MemoryDocuments

    async def post(self, path: str, body: Any = None, **kwargs: Any) -> Any:
        """Posts a body as JSON, with the key if it names none; returns the answer's JSON of a 200."""
        answer = await self.http.post(path, json={"key": KEY} | (body or {}), **kwargs)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def train(self, **changes: Any) -> str:
        """Starts a training and returns its id."""
        body = await self.post("/api/v3/fine_tune", BODY | changes)
        assert body["status"] == "success", body
        return str(body["training_id"])

    async def status(self, training_id: str) -> dict[str, Any]:
        return dict(await self.post(f"/api/v3/fine_tune_status/{training_id}"))

    async def record(self, training_id: str) -> JobRecord:
        revision = await self.training.records.read(JobRef(JobKind.TRAIN, "first", training_id))
        return revision.record

    async def move(self, training_id: str, *moves: Callable[[JobRecord, int], JobRecord]) -> None:
        """Writes the next revisions of a training, as the api and the workers would."""
        for move in moves:
            ref = JobRef(JobKind.TRAIN, "first", training_id)
            now_ms = self.training.records.now_ms()
            await self.training.records.change(ref, partial(_moved, move, now_ms))

    async def run_to_training(self, training_id: str) -> None:
        await self.move(
            training_id, life.begin_preparing, lambda record, now: life.make_ready(record, {}, "", now)
        )
        ref = JobRef(JobKind.TRAIN, "first", training_id)
        sequence = (await self.training.records.read(ref)).sequence
        await self.move(training_id, lambda record, now: life.take(record, sequence, "trainer-1", now))

    async def enter(self, training_id: str, stage: Stage) -> None:
        await self.move(
            training_id, lambda record, now: life.report_stage(record, record.epoch, stage, stage.value)
        )

    async def finish(self, training_id: str) -> None:
        """From the trainer's last report to the end, with a test picture and the model registered."""
        key = f"test-{training_id}"
        self.storage.blobs[key] = b"PNG" * 400
        self.storage.add("first", training_id)
        image = {"image": {"key": key, "seed": "1", "media_type": "image/png"}}
        result = {"model": training_id, "test_image": image, "final_loss": 0.125, "warnings": ["a remark"]}
        await self.move(
            training_id,
            lambda record, now: life.report_trained(record, record.epoch, {}),
            lambda record, now: life.finish(record, result, "", now),
        )

    async def succeed(self, training_id: str) -> None:
        await self.run_to_training(training_id)
        await self.finish(training_id)

    async def fail(self, training_id: str, message: str = "no picture could be read") -> None:
        failure = JobFailure("BAD_INPUT", message, "images")
        await self.move(
            training_id, life.begin_preparing, lambda record, now: life.fail(record, failure, now)
        )

    async def draw(self, job_id: str, project: str = "first") -> None:
        """Ends a drawing with its pictures, as an inference worker would."""
        ref = JobRef(JobKind.GEN, project, job_id)
        revision = await self.drawing.records.read(ref)
        spec = revision.record.spec or json.loads(self.documents.held[revision.record.spec_key])
        images = []
        for index in range(int(spec["num_images"])):
            key = self.storage.keep(project, f"PNG picture-{job_id}-{index} ".encode() * 50)
            images.append(
                {"key": key, "seed": str(int(spec.get("seed", 0)) + index), "media_type": "image/png"}
            )
        result = {"images": images, "device_seconds": 6.0, "warnings": []}
        await self.move_drawing(
            job_id,
            lambda record, now: life.take(record, revision.sequence, "drawer-1", now),
            lambda record, now: life.report_finished(record, record.epoch, result, now),
        )

    async def move_drawing(self, job_id: str, *moves: Callable[[JobRecord, int], JobRecord]) -> None:
        for move in moves:
            ref = JobRef(JobKind.GEN, "first", job_id)
            now_ms = self.drawing.records.now_ms()
            await self.drawing.records.change(ref, partial(_moved, move, now_ms))


@contextlib.asynccontextmanager
async def world(
    policy: SdapiPolicy | None = None,
    limiter: RateLimiter | None = None,
    settings: Mapping[str, Any] | None = None,
) -> AsyncIterator[World]:
    """Everything up, until the end of the block."""
    platform, documents = MemoryPlatform(), MemoryDocuments()
    core = JobCore(JobKind.TRAIN, platform, RealClock(), documents)
    drawing = JobCore(JobKind.GEN, platform, RealClock(), documents)
    storage, access = Registry(), FakeAccess()
    server = GrpcServer("127.0.0.1:0", grace_s=0.1)
    training = TrainingServicer(core, base_model="pocket")
    inference = InferenceServicer(drawing, storage)
    for add, servicer, name in (
        (add_InferenceServiceServicer_to_server, inference, "likeness.inference.v1.InferenceService"),
        (add_TrainingServiceServicer_to_server, training, "likeness.training.v1.TrainingService"),
        (add_StorageServiceServicer_to_server, storage, "likeness.storage.v1.StorageService"),
        (add_AccessServiceServicer_to_server, access, "likeness.access.v1.AccessService"),
    ):
        server.add(add, servicer, name)
    running = [asyncio.create_task(each.run()) for each in (core, drawing)]
    for each in (core, drawing):
        await each.wait_ready()
    async with server, Channel(server.address) as channel:
        client, jobs = StorageClient(channel), Jobs(TrainingServiceStub(channel))
        auth, links = Authenticator(AccessServiceStub(channel)), Links(client)
        api = SdapiApi(
            auth=auth,
            jobs=jobs,
            drawings=Drawings(InferenceServiceStub(channel), jobs.stopping),
            storage=client,
            links=links,
            limiter=limiter,
            check_url=Egress().check_url,
            policy=policy or SdapiPolicy(sync_wait_s=0.0),
        )
        runpod = RunpodApi(
            endpoints=ENDPOINTS,
            auth=auth,
            jobs=jobs,
            links=links,
            streams=Streams(jobs, platform.progress, runpod_wire.CANCELLED_STREAM_MS),
            limiter=RateLimiter(),
            check_url=Egress().check_url,
        )
        parts = Parts(runpod, client, sdapi=api, **(settings or {}))
        transport = httpx.ASGITransport(app=create_app(parts))
        async with httpx.AsyncClient(transport=transport, base_url="http://likeness.test") as http:
            yield World(http, api, platform, core, drawing, storage, access, documents)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


def _moved(move: Callable[[JobRecord, int], JobRecord], now_ms: int, record: JobRecord) -> JobRecord:
    return move(record, now_ms)
