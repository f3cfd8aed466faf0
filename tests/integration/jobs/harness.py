"""Apis over real gRPC on loopback ports, on a log in memory or on a real one, and workers' clients to them."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from likeness.inference.v1.inference_service_pb2_grpc import add_InferenceServiceServicer_to_server
from likeness.scaling.v1.external_scaler_pb2_grpc import add_ExternalScalerServicer_to_server
from likeness.storage.v1.artifact_pb2 import Dataset, DatasetImage
from likeness.storage.v1.model_pb2 import Model, ModelFormat
from likeness.training.v1.training_job_pb2 import ImageSource
from likeness.training.v1.training_service_pb2_grpc import add_TrainingServiceServicer_to_server
from likeness.worker.v1.worker_service_pb2_grpc import add_WorkerServiceServicer_to_server

from services.adapters.clock import RealClock
from services.adapters.grpc_client import Channel
from services.adapters.grpc_server import GrpcServer
from services.domain.errors import BadInput, NotFound
from services.domain.job import JobKind
from services.inference.servicer import InferenceServicer
from services.jobs.core import JobCore, Platform
from services.jobs.scaler import SERVICE as SCALER_SERVICE
from services.jobs.scaler import Scaler
from services.jobs.worker_client import WorkerClient
from services.trainer.servicer import TrainingServicer
from tests.unit.jobs.harness import MemoryDocuments

LEASE_S = 1.2
TICK_S = 0.05
BEAT_S = 0.1


def digest_of(model: str) -> str:
    """What `OneModel` says of a model's weights."""
    return hashlib.sha256(model.encode()).hexdigest()


class OneModel:
    """A registry that knows the model `pocket`, and `rex` and `stranger`, a LoRA of its family and one of another.

    Of stored files, those are pictures whose key begins with "picture".
    """

    async def get_model(self, project: str, model: str = "") -> Model:
        families = {"pocket": "flat", "rex": "flat", "stranger": "sdxl"}
        if model not in families:
            raise NotFound("no such model")
        found = Model(model=model, manifest_digest=digest_of(model))
        found.manifest.family = families[model]
        found.manifest.native_size_px = 512
        if model != "pocket":
            found.manifest.format = ModelFormat.MODEL_FORMAT_LORA
            found.manifest.components.add(path="unet/lora-000.safetensors")
        return found

    async def import_dataset(self, project: str, source: ImageSource) -> Dataset:
        (key,) = source.artifacts.keys
        if not key.startswith("picture"):
            raise BadInput("the list holds no readable image", source.field)
        return Dataset(images=[DatasetImage(key=f"{project}'s PNG of {key}")])


class Api:
    """One replica: a job core and the address it is served at."""

    def __init__(self, core: JobCore, address: str) -> None:
        self.core = core
        self.address = address


@asynccontextmanager
async def serving(
    platform: Platform,
    kind: JobKind = JobKind.GEN,
    *,
    documents: MemoryDocuments | None = None,
    address: str = "127.0.0.1:0",
    wrap: Callable[[Any], Any] = lambda servicer: servicer,
    lease_s: float = LEASE_S,
) -> AsyncIterator[Api]:
    core = JobCore(
        kind, platform, RealClock(), documents or MemoryDocuments(), lease_s=lease_s, tick_s=TICK_S
    )
    running = asyncio.create_task(core.run())
    await core.wait_ready()
    server = GrpcServer(address, grace_s=0.2)
    server.add(
        add_WorkerServiceServicer_to_server, wrap(core.worker_servicer), "likeness.worker.v1.WorkerService"
    )
    scaler = Scaler(core.index, platform.job_log.now_ms, look_s=TICK_S)
    server.add(add_ExternalScalerServicer_to_server, scaler, SCALER_SERVICE)
    if kind is JobKind.GEN:
        drawings = InferenceServicer(core, OneModel())
        server.add(add_InferenceServiceServicer_to_server, drawings, "likeness.inference.v1.InferenceService")
    else:
        trainings = TrainingServicer(core, base_model="pocket")
        server.add(add_TrainingServiceServicer_to_server, trainings, "likeness.training.v1.TrainingService")
    try:
        async with server:
            yield Api(core, server.address)
            await core.dispatcher.close()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@asynccontextmanager
async def worker(api: Api, name: str = "w1", **options: Any) -> AsyncIterator[WorkerClient]:
    given: dict[str, Any] = {"beat_s": BEAT_S, "lease_s": LEASE_S, "progress_s": 0.02, "take_wait_s": 2.0}
    async with Channel(api.address) as channel, WorkerClient(channel, name, **(given | options)) as client:
        yield client


async def eventually(condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
    """Waits until a condition holds."""
    async with asyncio.timeout(timeout_s):
        while True:
            found = condition()
            if await found if asyncio.iscoroutine(found) else found:
                return
            await asyncio.sleep(0.01)
