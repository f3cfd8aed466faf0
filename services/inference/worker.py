"""The inference worker's parent process: jobs in, models down, pictures up, reports out. Without torch.

The pictures are drawn by a child (:mod:`services.inference.child`). This side holds the connections: to the api that
gives the jobs, and to storage. Several jobs are in hand at a time, so that one is drawn while another is fetched or
stored; the child lets them take turns.
"""

import asyncio
import contextlib
import hashlib
import logging
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from google.protobuf.json_format import MessageToDict
from likeness.inference.v1 import generation_job_pb2 as pb
from likeness.job.v1.job_pb2 import JobStage, Progress
from likeness.storage.v1.model_pb2 import ModelComponent, ModelFormat, ModelManifest

from services.adapters.blob_cache import BlobCache, FetchedModel
from services.adapters.child_process import ChildDied
from services.adapters.storage_client import StorageClient
from services.adapters.telemetry import bound, continued_trace
from services.domain.add_ons import adapter_of, embedding_fault, lora_fault
from services.domain.artifacts import SINGLE_FILE_CONFIG, SINGLE_FILE_NAME, digest_of_key, is_adapter
from services.domain.errors import OUTAGES, BadInput, Internal, InvalidSpec, StaleEpoch, row_of
from services.domain.job import JobFailure, Stage
from services.inference.device_process import DeviceProcess, Event
from services.jobs.worker_client import JobHandle, WorkerClient, last_word

logger = logging.getLogger(__name__)

LEAVING: Final = "the worker leaves"
DRAWABLE: Final = (
    ModelFormat.MODEL_FORMAT_DIFFUSERS,
    ModelFormat.MODEL_FORMAT_SINGLE_FILE,
    ModelFormat.MODEL_FORMAT_LORA,
)
MIN_JOBS: Final = 2
"""One is drawn while the other is fetched or stored."""
OUTAGE_PAUSE_S: Final = 5.0
"""Seconds that a job's place stays empty after it had to be given back because storage was away."""


class DrawingFailed(Exception):
    """The child gave a request up.

    Attributes:
        failure: what the job's owner is told.
        retryable: another attempt may succeed.
    """

    def __init__(self, failure: JobFailure, retryable: bool) -> None:
        super().__init__(failure.message)
        self.failure = failure
        self.retryable = retryable


@dataclass(frozen=True, slots=True)
class LentLora:
    """A LoRA as the child's `draw` command names it: an entry of `loras`."""

    name: str
    digest: str
    path: str
    strength: float


@dataclass(frozen=True, slots=True)
class LentEmbedding:
    """An embedding as the child's `draw` command names it: an entry of `embeddings`."""

    name: str
    path: str
    token: str
    negative: bool


class ModelShelf:
    """Models on this machine's disk: there as long as a job or the child needs their files."""

    def __init__(self, storage: StorageClient, cache: BlobCache, device: DeviceProcess) -> None:
        self._storage = storage
        self._cache = cache
        self._device = device
        self._models: dict[str, FetchedModel] = {}
        self._users: Counter[str] = Counter()

    @contextlib.asynccontextmanager
    async def borrowed(self, project: str, model: str) -> AsyncIterator[FetchedModel]:
        """A model's files, for as long as the context lasts.

        Args:
            project: who asks.
            model: id, alias or manifest digest.

        Raises:
            NotFound: there is no such model for this project.
            BadInput: it is not a whole model.
            Unavailable: storage does not answer, or the machine has no room.
        """
        registered = await self._storage.get_model(project, model)
        digest = digest_of_key(registered.manifest_key)
        self._users[digest] += 1
        try:
            if digest not in self._models:
                self._models[digest] = await self._cache.fetch_model(self._storage, registered)
            fetched = self._models[digest]
            if fetched.manifest.format not in DRAWABLE:
                raise BadInput("this model's format cannot be drawn with", "model")
            yield fetched
        finally:
            self._users[digest] -= 1
            await self._tidy()

    @contextlib.asynccontextmanager
    async def lent_lora(
        self, project: str, wanted: pb.LoraWeight, model: ModelManifest
    ) -> AsyncIterator[LentLora]:
        """A LoRA's file, for as long as the context lasts, to be worn by pictures of a model.

        Args:
            project: who asks.
            wanted: which, and how strongly.
            model: what is drawn with.

        Raises:
            NotFound: there is no such LoRA for this project.
            BadInput: it is no LoRA, or one for models of another family.
            Unavailable: storage does not answer, or the machine has no room.
        """
        registered = await self._storage.get_model(project, wanted.model_digest or wanted.model)
        if fault := lora_fault(registered.manifest, model):
            raise BadInput(f"'{wanted.model}' {fault}", "loras")
        file = adapter_of(registered.manifest)
        async with self._cache.lent(self._storage, file.key, file.size_bytes) as path:
            yield LentLora(wanted.model, file.digest, str(path), wanted.strength)

    @contextlib.asynccontextmanager
    async def lent_embedding(
        self, project: str, wanted: pb.Embedding, model: ModelManifest
    ) -> AsyncIterator[LentEmbedding]:
        """An embedding's file; as :meth:`lent_lora`. Its word is the first trigger word of the registry's entry."""
        registered = await self._storage.get_model(project, wanted.model_digest or wanted.model)
        if fault := embedding_fault(registered.manifest, model):
            raise BadInput(f"'{wanted.model}' {fault}", "embeddings")
        (file,) = registered.manifest.components
        token = next(iter(registered.manifest.trigger_words), "")
        async with self._cache.lent(self._storage, file.key, file.size_bytes) as path:
            yield LentEmbedding(wanted.model, str(path), token, wanted.negative)

    async def _tidy(self) -> None:
        """Gives up the files of models that neither a job nor the child uses any more."""
        for digest in list(self._models):
            # Asked anew for each: while one is given up, others may come into use.
            if digest in self._models and self._users[digest] <= 0 and digest not in self._device.held:
                await self._cache.release(self._models.pop(digest).folder)


class InferenceWorker:
    """Takes drawings until told to leave.

    Args:
        client: gives jobs and takes reports; entered by the caller.
        storage: models and pictures.
        cache: models on this machine.
        device: the child; entered by the caller.
        max_jobs: jobs in hand at a time.
        grace_s: seconds that jobs in hand get to end when the worker leaves, before they are given back.
        outage_pause_s: seconds that a job's place stays empty after storage was away.
    """

    def __init__(
        self,
        client: WorkerClient,
        storage: StorageClient,
        cache: BlobCache,
        device: DeviceProcess,
        *,
        max_jobs: int = MIN_JOBS,
        grace_s: float = 10.0,
        outage_pause_s: float = OUTAGE_PAUSE_S,
    ) -> None:
        self._client = client
        self._storage = storage
        self._device = device
        self._shelf = ModelShelf(storage, cache, device)
        self._max_jobs = max_jobs
        self._grace_s = grace_s
        self._outage_pause_s = outage_pause_s
        self._jobs: set[asyncio.Task[None]] = set()

    async def run(self, stopping: asyncio.Event) -> None:
        """Takes and draws jobs until `stopping` is set, then lets go of those in hand.

        Raises:
            ChildDied: the drawing process cannot be kept running.
            LikenessError: the api refuses to give work to this worker.
        """
        leaving = asyncio.create_task(self._leave_when(stopping))
        taking = asyncio.create_task(self._take_jobs())
        failing = asyncio.create_task(self._device.run())
        try:
            await asyncio.wait({taking, failing}, return_when=asyncio.FIRST_COMPLETED)
            self._client.leave()
            await self._let_go()
            for task in (failing, taking):
                if task.done():
                    await task
        finally:
            for task in (leaving, taking, failing):
                task.cancel()
            await asyncio.gather(leaving, taking, failing, return_exceptions=True)

    async def _leave_when(self, stopping: asyncio.Event) -> None:
        await stopping.wait()
        self._client.leave()

    async def _take_jobs(self) -> None:
        async for handle in self._client.jobs(self._free_slots, lambda: self._device.held):
            task = asyncio.create_task(self._serve(handle))
            self._jobs.add(task)
            task.add_done_callback(self._jobs.discard)

    def _free_slots(self) -> int:
        return self._max_jobs - len(self._jobs) if self._device.is_ready else 0

    async def _let_go(self) -> None:
        if not self._jobs:
            return
        jobs = set(self._jobs)
        _, late = await asyncio.wait(jobs, timeout=self._grace_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)

    async def _serve(self, handle: JobHandle) -> None:
        """One job from its taking to its last report."""
        fields = {"job_id": handle.job_id, "attempt": handle.attempt}
        with continued_trace(handle.assignment.traceparent), bound(**fields):
            try:
                result = await self._unless_stopped(handle)
                await handle.finished(result)
                logger.info("drawing done", extra={"device_s": round(result.device_seconds, 3)})
            except asyncio.CancelledError:
                await last_word(handle.yielded(LEAVING))
            except StaleEpoch as error:
                logger.info("drawing dropped", extra={"detail": str(error)})
            except OUTAGES as error:
                logger.warning("drawing given back", extra={"detail": str(error)})
                await last_word(handle.yielded(str(error)))
                await asyncio.sleep(self._outage_pause_s)
            except Exception as error:
                await last_word(self._report_failure(handle, error))

    async def _report_failure(self, handle: JobHandle, error: Exception) -> None:
        if isinstance(error, DrawingFailed):
            await handle.failed(error.failure, retryable=error.retryable)
        elif isinstance(error, ChildDied):
            failure = JobFailure(row_of(Internal).reason, "the process that drew it ended unexpectedly")
            await handle.failed(failure, retryable=True)
        else:
            logger.warning("drawing failed", exc_info=error)
            await handle.failed(error)

    async def _unless_stopped(self, handle: JobHandle) -> pb.GenerationResult:
        """Draws; raises StaleEpoch as soon as the job is not this worker's any more."""
        drawing = asyncio.create_task(self._draw(handle))
        stopped = asyncio.create_task(handle.stopped.wait())
        try:
            await asyncio.wait({drawing, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not drawing.done():
                raise StaleEpoch("the job is not this worker's any more")
            return drawing.result()
        finally:
            drawing.cancel()
            stopped.cancel()
            await asyncio.gather(drawing, stopped, return_exceptions=True)

    async def _draw(self, handle: JobHandle) -> pb.GenerationResult:
        spec = handle.assignment.generation
        if not spec.num_images:
            raise InvalidSpec("must be at least 1", "num_images")
        name = f"{handle.project_id}/{handle.job_id}/{handle.epoch}"
        project, model_name = handle.project_id, spec.model_digest or spec.model
        async with contextlib.AsyncExitStack() as stack:
            model = await stack.enter_async_context(self._shelf.borrowed(project, model_name))
            loras = [
                await stack.enter_async_context(self._shelf.lent_lora(project, lora, model.manifest))
                for lora in spec.loras
            ]
            embeddings = [
                await stack.enter_async_context(self._shelf.lent_embedding(project, one, model.manifest))
                for one in spec.embeddings
            ]
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="drawing-"))
            try:
                pictures = await self._fetched_pictures(spec, Path(folder))
                command = draw_command(spec, model, folder, loras, embeddings) | {"pictures": pictures}
                return await self._follow(handle, name, command)
            except BaseException:
                await self._device.cancel(name)
                raise

    async def _fetched_pictures(self, spec: pb.GenerationSpec, folder: Path) -> dict[str, str]:
        """Files of the pictures that the drawing starts from, by the names of their fields."""
        keys = {"init_image_key": spec.init_image_key, "mask_image_key": spec.mask_image_key}
        fetched = {}
        for field, key in keys.items():
            if key:
                await self._storage.download_blob(key, folder / field)
                fetched[field] = str(folder / field)
        return fetched

    async def _follow(self, handle: JobHandle, name: str, command: dict[str, Any]) -> pb.GenerationResult:
        images: dict[int, pb.GeneratedImage] = {}
        is_drawing = False
        async with contextlib.aclosing(self._device.draw(name, command)) as events:
            async for event in events:
                kind = event["event"]
                if kind == "progress":
                    if not is_drawing:
                        is_drawing = True
                        await handle.stage(Stage.DRAWING, "drawing")
                    handle.progress(progress_of(event))
                elif kind == "drawn":
                    images[event["number"]] = await self._stored(handle.project_id, event)
                elif kind == "finished":
                    return result_of(images, event)
                elif kind == "failed":
                    raise failure_of(event)
        raise ChildDied("the request ended without a result")

    async def _stored(self, project: str, event: Event) -> pb.GeneratedImage:
        blob = await self._storage.upload_file(project, Path(event["path"]), event["media_type"])
        return pb.GeneratedImage(
            key=blob.key,
            seed=event["seed"],
            width_px=event["width_px"],
            height_px=event["height_px"],
            digest=event["digest"],
            size_bytes=event["size_bytes"],
            media_type=event["media_type"],
        )


def draw_command(
    spec: pb.GenerationSpec,
    model: FetchedModel,
    folder: str,
    loras: Sequence[LentLora] = (),
    embeddings: Sequence[LentEmbedding] = (),
) -> dict[str, Any]:
    """The child's `draw` command; a model trained on an inner layer of its text encoder is drawn with that layer.

    Args:
        spec: what was asked for.
        model: to draw with. One that was trained as a LoRA is its base, with its LoRAs worn at strength 1.
        folder: for the pictures.
        loras: worn beside them.
        embeddings: words for the prompts.
    """
    resolved = pb.GenerationSpec()
    resolved.CopyFrom(spec)
    resolved.clip_skip = spec.clip_skip or model.manifest.clip_skip
    return {
        "model": {
            "digest": digest_of_key(model.manifest_key),
            "folder": str(model.folder),
            "parts": part_digests(model.manifest.components),
        },
        "loras": [asdict(lora) for lora in (*own_loras(model), *loras)],
        "embeddings": [asdict(one) for one in embeddings],
        "spec": MessageToDict(resolved, preserving_proto_field_name=True),
        "folder": folder,
    }


def own_loras(model: FetchedModel) -> list[LentLora]:
    """The LoRAs among a model's files, in the order of training, each once however many parts it lies beside."""
    files = {
        component.digest: component
        for component in sorted(
            model.manifest.components, key=lambda component: PurePosixPath(component.path).name
        )
        if is_adapter(component.path)
    }
    return [
        LentLora("model", digest, str(model.folder / component.path), 1.0)
        for digest, component in files.items()
    ]


def part_digests(components: Iterable[ModelComponent]) -> dict[str, str]:
    """One digest for each of a model's parts, over the paths and digests of its files, LoRAs left out.

    What a model of one file lacks lies in folders below `config`; all its parts depend on that one file.
    """
    known = sorted(components, key=lambda component: component.path)
    whole = [component.digest for component in known if component.path == SINGLE_FILE_NAME]
    files: dict[str, list[str]] = {}
    for component in known:
        path = component.path.removeprefix(f"{SINGLE_FILE_CONFIG}/") if whole else component.path
        part, _, rest = path.partition("/")
        if rest and not is_adapter(path):
            files.setdefault(part, list(whole)).append(f"{rest} {component.digest}\n")
    return {part: hashlib.sha256("".join(lines).encode()).hexdigest() for part, lines in files.items()}


def progress_of(event: Event) -> Progress:
    """The numbers of a `progress` event; the api knows the share of the whole."""
    return Progress(
        stage=JobStage.JOB_STAGE_DRAWING, step=int(event["done"]), total_steps=int(event["total"])
    )


def result_of(images: dict[int, pb.GeneratedImage], event: Event) -> pb.GenerationResult:
    """The result of a request whose pictures are stored."""
    ordered = [images[number] for number in sorted(images)]
    return pb.GenerationResult(images=ordered, warnings=event["warnings"], device_seconds=event["device_s"])


def failure_of(event: Event) -> DrawingFailed:
    """What a `failed` event means for the job."""
    failure = JobFailure(event["reason"], event["message"], event["field"])
    return DrawingFailed(failure, bool(event["retryable"]))
