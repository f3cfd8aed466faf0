"""A real storage server, a scripted api, and a worker between them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

from google.protobuf.duration_pb2 import Duration
from likeness.job.v1.job_pb2 import JobStage, Progress
from likeness.storage.v1.artifact_pb2 import DatasetImage
from likeness.storage.v1.model_pb2 import ModelComponent, ModelFormat, ModelManifest
from likeness.training.v1 import training_job_pb2 as training
from likeness.worker.v1 import worker_service_pb2 as pb
from likeness.worker.v1 import worker_service_pb2_grpc

from services.adapters.blob_cache import BlobCache
from services.adapters.grpc_client import Channel
from services.adapters.grpc_server import GrpcServer
from services.adapters.settings import StorageSettings
from services.adapters.storage_client import StorageClient
from services.jobs.worker_client import WorkerClient
from services.storage.server import running
from services.trainer.device_process import SILENCE_S, TrainingProcess
from services.trainer.worker import TrainingWorker

PROJECT = "studio"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


class ScriptedApi(worker_service_pb2_grpc.WorkerServiceServicer):
    """Hands out what it is given, and writes down what it hears."""

    def __init__(self) -> None:
        self.waiting: list[pb.Assignment] = []
        self.reports: list[pb.ReportRequest] = []
        self.progress: list[Progress] = []
        self.to_stop: set[str] = set()
        self.refusal: Callable[[pb.ReportRequest], Exception | None] = lambda report: None
        self.changed = asyncio.Condition()

    async def Take(self, request: pb.TakeRequest, context: Any) -> pb.TakeResponse:
        if not self.waiting:
            await asyncio.sleep(0.05)
        return pb.TakeResponse(assignments=[self.waiting.pop(0)] if self.waiting else [])

    async def Beat(self, request: pb.BeatRequest, context: Any) -> pb.BeatResponse:
        async with self.changed:
            self.progress += [beat.progress for beat in request.jobs if beat.HasField("progress")]
            self.changed.notify_all()
        stop = [
            pb.JobReference(job_id=beat.job_id, project_id=beat.project_id, epoch=beat.epoch)
            for beat in request.jobs
            if beat.job_id in self.to_stop
        ]
        return pb.BeatResponse(stop=stop)

    async def Report(self, request: pb.ReportRequest, context: Any) -> pb.ReportResponse:
        refusal = self.refusal(request)
        if refusal is not None:
            raise refusal
        async with self.changed:
            self.reports.append(request)
            self.changed.notify_all()
        return pb.ReportResponse()

    async def until(self, reached: Callable[[], bool]) -> None:
        """Waits until something was heard."""
        async with asyncio.timeout(90), self.changed:
            await self.changed.wait_for(reached)

    def kinds(self) -> list[str]:
        """The reports in order: their kind, or the stage."""
        return [
            JobStage.Name(report.stage.stage).removeprefix("JOB_STAGE_").lower()
            if report.WhichOneof("report") == "stage"
            else str(report.WhichOneof("report"))
            for report in self.reports
        ]

    @property
    def last(self) -> pb.ReportRequest:
        """The newest report."""
        return self.reports[-1]


@dataclass
class Platform:
    """What a test speaks to."""

    storage: StorageClient
    api: ScriptedApi
    api_address: str
    storage_address: str
    folder: Path
    base_manifest_key: str = ""
    epochs: int = field(default=100)

    async def add_base_model(self, model_folder: Path) -> ModelManifest:
        """Stores a model folder as the base."""
        components = []
        for path in sorted(path for path in model_folder.rglob("*") if path.is_file()):
            blob = await self.storage.upload_file(PROJECT, path, "application/octet-stream")
            name = path.relative_to(model_folder).as_posix()
            components.append(
                ModelComponent(path=name, key=blob.key, digest=blob.digest, size_bytes=blob.size_bytes)
            )
        manifest = ModelManifest(
            format=ModelFormat.MODEL_FORMAT_DIFFUSERS, family="tiny", components=components
        )
        model = await self.storage.register_model(PROJECT, "base", manifest)
        self.base_manifest_key = model.manifest_key
        return manifest

    async def add_dataset(self, pictures: list[Path]) -> str:
        """Stores pictures as a dataset; returns its key."""
        images = []
        for path in pictures:
            blob = await self.storage.upload_file(PROJECT, path, "image/png")
            images.append(DatasetImage(id=path.name, key=blob.key))
        return (await self.storage.create_dataset(PROJECT, images)).key

    async def assignment(
        self,
        spec: training.TrainingSpec,
        pictures: tuple[list[Path], list[Path]],
        job: str = "job-1",
        checkpoint: training.CheckpointRef | None = None,
    ) -> pb.Assignment:
        """A job with one concept, ready to be taken."""
        keys = [await self.add_dataset(paths) for paths in pictures]
        dataset = training.DatasetRef(concept_index=0, instance_key=keys[0], class_key=keys[1])
        self.epochs += 1
        return pb.Assignment(
            job_id=job,
            project_id=PROJECT,
            epoch=self.epochs,
            attempt=1,
            training=spec,
            checkpoint=checkpoint,
            time_left=Duration(seconds=600),
            prepared=training.PreparedInputs(
                base_manifest_key=self.base_manifest_key,
                datasets=[dataset],
                warnings=["a picture was skipped"],
            ),
        )

    @asynccontextmanager
    async def worker(
        self,
        *child: str,
        module: str = "services.trainer.child",
        silence_s: dict[str, float] | None = None,
        checkpoint_interval_s: float = 3600.0,
        grace_s: float = 60.0,
        one_job_within_s: float = 0.0,
    ) -> AsyncIterator["RunningWorker"]:
        """A worker that takes jobs until the block ends."""
        cache = BlobCache(self.folder / "cache", 10**9)
        process = TrainingProcess(*child, module=module, silence_s={**SILENCE_S, **(silence_s or {})})
        async with AsyncExitStack() as stack:
            stack.callback(cache.close)
            stack.push_async_callback(process.end)
            await process.until_ready()
            storage = await stack.enter_async_context(Channel(self.storage_address))
            api = await stack.enter_async_context(Channel(self.api_address))
            client = await stack.enter_async_context(
                WorkerClient(api, "worker-1", device=process.device, beat_s=0.2, progress_s=0.05)
            )
            worker = TrainingWorker(
                client,
                StorageClient(storage),
                cache,
                process,
                work_root=self.folder / "work",
                checkpoint_interval_s=checkpoint_interval_s,
                grace_s=grace_s,
                outage_pause_s=0.1,
                one_job_within_s=one_job_within_s,
            )
            stopping = asyncio.Event()
            running_worker = RunningWorker(process, stopping, asyncio.create_task(worker.run(stopping)))
            try:
                yield running_worker
            finally:
                stopping.set()
                await asyncio.wait_for(running_worker.task, 60)


@dataclass
class RunningWorker:
    """A worker at work."""

    process: TrainingProcess
    stopping: asyncio.Event
    task: "asyncio.Task[None]"


@asynccontextmanager
async def open_platform(
    folder: Path, models: Path | None = None, reachable: tuple[IPv4Network, ...] = (), **storage_settings: Any
) -> AsyncIterator[Platform]:
    """Storage and api on free ports.

    Args:
        folder: for all files.
        models: a catalogue, imported before the block begins.
        reachable: private networks that storage may fetch from.
        storage_settings: further settings of storage.
    """
    settings = StorageSettings(
        home=folder / "home",
        storage_addr="127.0.0.1:0",
        models=models,
        egress_allow=reachable,
        **storage_settings,
    )
    api = ScriptedApi()
    server = GrpcServer("127.0.0.1:0", grace_s=0.1)
    server.add(
        worker_service_pb2_grpc.add_WorkerServiceServicer_to_server, api, "likeness.worker.v1.WorkerService"
    )
    async with running(settings) as storage, server, Channel(storage.server.address) as channel:
        if models is not None:
            await storage.catalogue.run()
        yield Platform(StorageClient(channel), api, server.address, storage.server.address, folder)
