"""The trainer worker's parent process: a job in, model and pictures down, checkpoints and the result up. Without torch.

One job at a time. The training runs in a child (:mod:`services.trainer.child`); this side holds the connections: to
the api that gives the jobs, and to storage. A job that must be left is given back with its last checkpoint; whoever
takes it next goes on from there.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from google.protobuf.json_format import MessageToDict
from likeness.job.v1.job_pb2 import JobStage, Progress
from likeness.training.v1 import training_job_pb2 as pb

from services.adapters.blob_cache import BlobCache, FetchedModel
from services.adapters.child_process import ChildDied
from services.adapters.manifests import to_json
from services.adapters.storage_client import StorageClient
from services.adapters.telemetry import bound, continued_trace
from services.domain.artifacts import digest_of_key
from services.domain.errors import (
    OUTAGES,
    AlreadyExists,
    BadInput,
    Diverged,
    Internal,
    NotFound,
    StaleEpoch,
    row_of,
)
from services.domain.job import JobFailure, Stage
from services.jobs.tasks import first_of, running
from services.jobs.worker_client import JobHandle, WorkerClient, last_word
from services.trainer.checkpoint_uploads import CheckpointUploads, fetch_checkpoint, read_checkpoint
from services.trainer.delivery import concept_entries, lineage_of, model_manifest, training_result
from services.trainer.device_process import Event, TrainingProcess
from services.trainer.preview_uploads import DOCUMENT, PreviewUploads, as_document, from_document
from services.trainer.version_uploads import VersionUploads, store_files
from services.trainer.work_folder import work_folder

logger = logging.getLogger(__name__)

LEAVING: Final = "the worker leaves"
FETCHES_AT_ONCE: Final = 8
OUTAGE_PAUSE_S: Final = 5.0
"""Seconds without a new job after one had to be given back because storage was away."""


class TrainingFailed(Exception):
    """The child gave the training up.

    Attributes:
        failure: what the job's owner is told.
        retryable: another attempt may succeed.
    """

    def __init__(self, failure: JobFailure, retryable: bool) -> None:
        super().__init__(failure.message)
        self.failure = failure
        self.retryable = retryable


class TrainingYielded(Exception):
    """The child stopped at a checkpoint because the worker leaves."""


class TrainingWorker:
    """Takes trainings until told to leave.

    Args:
        client: gives jobs and takes reports; entered by the caller.
        storage: models, pictures, checkpoints.
        cache: blobs on this machine.
        process: the child; ready.
        work_root: folder for the files of the job in hand.
        checkpoint_interval_s: seconds between two recovery checkpoints.
        grace_s: seconds that the job in hand gets to reach a checkpoint when the worker leaves.
        outage_pause_s: seconds without a new job after one was given back because storage was away.
        one_job_within_s: above 0, the worker ends after one job, or when none came within so many seconds.
    """

    def __init__(
        self,
        client: WorkerClient,
        storage: StorageClient,
        cache: BlobCache,
        process: TrainingProcess,
        *,
        work_root: Path,
        checkpoint_interval_s: float = 60.0,
        grace_s: float = 15.0,
        outage_pause_s: float = OUTAGE_PAUSE_S,
        one_job_within_s: float = 0.0,
    ) -> None:
        self._client = client
        self._storage = storage
        self._cache = cache
        self._process = process
        self._work_root = work_root
        self._checkpoint_interval_s = checkpoint_interval_s
        self._grace_s = grace_s
        self._outage_pause_s = outage_pause_s
        self._one_job_within_s = one_job_within_s
        self._leaving = asyncio.Event()

    async def run(self, stopping: asyncio.Event) -> None:
        """Takes and does trainings until `stopping` is set, then gives the one in hand back.

        Raises:
            ChildDied: the training process cannot be started.
        """
        watching = asyncio.create_task(self._leave_when(stopping))
        idling = asyncio.create_task(self._leave_when_idle())
        try:
            async for handle in self._client.jobs(lambda: 1):
                idling.cancel()
                await self._serve(handle)
                if self._one_job_within_s:
                    self._client.leave()
                elif not self._leaving.is_set():
                    await self._process.until_ready()
        finally:
            idling.cancel()
            watching.cancel()
            await self._process.end()

    async def _leave_when_idle(self) -> None:
        """A worker that is meant for one job takes none after its time: the device is another's by then."""
        if self._one_job_within_s:
            await asyncio.sleep(self._one_job_within_s)
            logger.info("no training came", extra={"waited_s": self._one_job_within_s})
            self._client.leave()

    async def _leave_when(self, stopping: asyncio.Event) -> None:
        await stopping.wait()
        self._client.leave()
        self._leaving.set()

    async def _serve(self, handle: JobHandle) -> None:
        """One job from its taking to its last report."""
        fields = {"job_id": handle.job_id, "attempt": handle.attempt}
        with continued_trace(handle.assignment.traceparent), bound(**fields):
            try:
                await handle.trained(await self._within_limits(handle))
                logger.info("training done")
            except (asyncio.CancelledError, TrainingYielded, TimeoutError) as reason:
                await last_word(handle.yielded(LEAVING))
                if isinstance(reason, asyncio.CancelledError):
                    raise
            except StaleEpoch as error:
                logger.info("training dropped", extra={"detail": str(error)})
            except OUTAGES as error:
                logger.warning("training given back", extra={"detail": str(error)})
                await self._process.end()
                await last_word(handle.yielded(str(error)))
                await self._pause()
            except Exception as error:
                await last_word(self._report_failure(handle, error))
            finally:
                await self._process.end()

    async def _pause(self) -> None:
        """Waits for better times, but not beyond the moment at which the worker leaves."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._outage_pause_s):
                await self._leaving.wait()

    async def _report_failure(self, handle: JobHandle, error: Exception) -> None:
        if isinstance(error, TrainingFailed):
            await handle.failed(error.failure, retryable=error.retryable)
        elif isinstance(error, ChildDied):
            logger.error("training process died", extra={"status": error.status, "output": error.output})
            failure = JobFailure(row_of(Internal).reason, "the process that trained it ended unexpectedly")
            await handle.failed(failure, retryable=True)
        else:
            logger.warning("training failed", exc_info=error)
            await handle.failed(error)

    async def _within_limits(self, handle: JobHandle) -> pb.TrainingResult:
        """Does the job; drops it when it is another's, and lets go of it some seconds after the call to leave.

        Raises:
            StaleEpoch: the job is not this worker's any more.
            TimeoutError: the worker leaves and the training did not reach a checkpoint in time.
        """
        work = asyncio.create_task(self._work(handle))
        stopped = asyncio.create_task(handle.stopped.wait())
        late = asyncio.create_task(self._grace_over())
        try:
            await asyncio.wait({work, stopped, late}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            if stopped.done():
                raise StaleEpoch("the job is not this worker's any more")
            raise TimeoutError("no checkpoint within the grace period")
        finally:
            for task in (work, stopped, late):
                task.cancel()
            await asyncio.gather(work, stopped, late, return_exceptions=True)

    async def _grace_over(self) -> None:
        await self._leaving.wait()
        await asyncio.sleep(self._grace_s)

    async def _work(self, handle: JobHandle) -> pb.TrainingResult:
        prepared = handle.assignment.prepared
        model = await self._cache.fetch_model(self._storage, prepared.base_manifest_key)
        try:
            with work_folder(self._work_root) as folder:
                command = await self._command(handle, model, folder)
                document = await self._earlier(handle)
                beside = Beside(self._storage, handle, model, self._process, folder, document)
                await beside.versions.prepare(command, document)
                ended = await self._train(handle, command, beside)
                return await self._deliver(handle, model, ended, beside.previews.stored)
        finally:
            await self._cache.release(model.folder)

    # -- down ------------------------------------------------------------------------------------------------

    async def _command(self, handle: JobHandle, model: FetchedModel, folder: Path) -> dict[str, Any]:
        """Brings everything a training needs onto this machine; returns the child's `train` command."""
        spec, prepared = handle.assignment.training, handle.assignment.prepared
        pictures = []
        for dataset in prepared.datasets:
            data = folder / "data" / str(dataset.concept_index)
            instance = await self._fetch_pictures(dataset.instance_key, data / "instance")
            classes = await self._fetch_pictures(dataset.class_key, data / "class")
            pictures.append((instance, classes))
        return {
            "spec": MessageToDict(spec, preserving_proto_field_name=True),
            "model_folder": str(model.folder),
            "model_digest": digest_of_key(model.manifest_key),
            "concepts": concept_entries(spec, pictures),
            "workdir": str(folder),
            "resume_from": await self._fetch_checkpoint(handle, folder / "resume"),
            "start_from": await self._fetch_start(prepared, folder / "start"),
            "checkpoint_interval_s": self._checkpoint_interval_s,
            "family": model.manifest.family,
            "license": model.manifest.license,
            "dataset": await self._describe_pictures(spec, prepared, folder / "dataset.json"),
        }

    async def _describe_pictures(
        self, spec: pb.TrainingSpec, prepared: pb.PreparedInputs, file: Path
    ) -> str | None:
        """Writes down what storage says of pictures with captions of their own; other recipes need a prompt only."""
        if spec.recipe != pb.RECIPE_EVERYDREAM:
            return None
        dataset = await self._storage.get_dataset(prepared.datasets[0].instance_key)
        await asyncio.to_thread(file.write_bytes, to_json(dataset))
        return str(file)

    async def _fetch_pictures(self, key: str, folder: Path) -> list[dict[str, str]]:
        if not key:
            return []
        dataset = await self._storage.get_dataset(key)
        limit = asyncio.Semaphore(FETCHES_AT_ONCE)

        async def fetch(number: int) -> dict[str, str]:
            image = dataset.images[number]
            async with limit:
                path = await self._cache.place(
                    self._storage, image.key, folder / f"{number:05d}.png", image.size_bytes or None
                )
            return {"id": image.id, "path": str(path), "caption": image.caption}

        return list(await asyncio.gather(*map(fetch, range(len(dataset.images)))))

    async def _fetch_checkpoint(self, handle: JobHandle, folder: Path) -> str | None:
        """Brings the checkpoint of an earlier attempt here; a checkpoint that is gone costs time, not the job."""
        reference = handle.checkpoint_ref
        if reference is None:
            return None
        found = await fetch_checkpoint(self._storage, reference.manifest_key, folder)
        if found is None:
            logger.warning("checkpoint is gone, training begins anew", extra={"step": reference.step})
            return None
        logger.info("training resumes from a checkpoint", extra={"checkpoint": found.name})
        return str(found)

    async def _earlier(self, handle: JobHandle) -> Mapping[str, Any]:
        """What the checkpoint of the last attempt says; empty: there is none."""
        reference = handle.checkpoint_ref
        return {} if reference is None else await read_checkpoint(self._storage, reference.manifest_key)

    async def _fetch_start(self, prepared: pb.PreparedInputs, folder: Path) -> str | None:
        """Brings the state here that the training is to go on from, or begin with."""
        if not prepared.HasField("start_checkpoint"):
            return None
        found = await fetch_checkpoint(self._storage, prepared.start_checkpoint.manifest_key, folder)
        if found is None:
            raise BadInput("the checkpoint that was fetched is gone from storage", "resume_checkpoint_url")
        return str(found)

    # -- the training ----------------------------------------------------------------------------------------

    async def _train(self, handle: JobHandle, command: Mapping[str, Any], beside: "Beside") -> Event:
        """Follows the child to its last event, storing beside it what it makes on its way.

        Raises:
            TrainingYielded: the worker leaves; the checkpoint is stored.
            TrainingFailed: the child gave up.
            ChildDied: it ended, or hung.
        """
        begun = asyncio.Event()
        async with beside.running(), running(self._ask_to_yield(begun)):
            async with contextlib.aclosing(self._process.train(command)) as events:
                async for last in events:
                    begun.set()
                    await self._heed(handle, last, beside)
            await beside.previews.drain()
            await beside.checkpoints.drain()
            if last["event"] == "failed":
                failure = JobFailure(last["reason"], last["message"], last["field"])
                raise TrainingFailed(failure, bool(last["retryable"]))
            if last["ending"] == "yielded":
                # A version takes longer than the grace period may be; the next attempt begins it anew.
                raise TrainingYielded
            await first_of(beside.versions.drain(), self._leaving.wait())
        return {**last, "warnings": [*last["warnings"], *beside.versions.remarks]}

    async def _heed(self, handle: JobHandle, event: Event, beside: "Beside") -> None:
        kind = event["event"]
        if kind == "progress":
            handle.progress(progress_of(event))
        elif kind == "checkpoint":
            await beside.checkpoints.add(Path(event["folder"]), int(event["step"]))
        elif kind == "version":
            await beside.versions.add(Path(event["folder"]), int(event["step"]))
        elif kind == "preview":
            beside.previews.add(event)
        elif kind == "stage" and event["stage"] == "training":
            await handle.stage(Stage.TRAINING, f"training has begun: {event['detail']}")
        elif kind == "stage" and event["stage"] == "exporting":
            await handle.stage(Stage.EXPORTING, "writing the trained weights")

    async def _ask_to_yield(self, begun: asyncio.Event) -> None:
        await self._leaving.wait()
        await begun.wait()
        await self._process.ask("yield")

    # -- up --------------------------------------------------------------------------------------------------

    async def _deliver(
        self, handle: JobHandle, model: FetchedModel, ended: Event, previews: Sequence[pb.PreviewImage]
    ) -> pb.TrainingResult:
        """Stores and registers what was trained.

        Raises:
            Diverged: the training did; its last good weights are registered with a note that says so.
        """
        spec, prepared = handle.assignment.training, handle.assignment.prepared
        diverged = ended["ending"] == "diverged"
        if diverged and not ended["files"]:
            raise Diverged("the training diverged at once: loss or gradients were not finite")
        await handle.stage(Stage.UPLOADING, "storing the model")
        files, exports = await store_files(
            self._storage, handle.project_id, ended, partial(_tell_uploading, handle)
        )
        note = f"training diverged; these are its weights after {ended['step']} updates" if diverged else ""
        lineage = lineage_of(handle.job_id, spec, prepared, ended, self._process.device)
        manifest = model_manifest(model.manifest, model.manifest_key, files, spec, lineage, note, exports)
        key = await self._register(handle, manifest, spec.model_name)
        if diverged:
            raise Diverged(
                f"the training diverged: loss or gradients were not finite; the weights after {ended['step']} "
                "updates, the last good ones, are kept under the job's id"
            )
        result = training_result(
            handle.job_id, key, spec, prepared, ended, self._process.device, self._process.memory_bytes
        )
        if previews:
            document = {DOCUMENT: as_document(previews)}
            result.previews_key = (await self._storage.upload_document(handle.project_id, document)).key
        return result

    async def _register(self, handle: JobHandle, manifest: Any, name: str) -> str:
        """Registers the model under the job's id; what an earlier attempt or run left under it gives way.

        Raises:
            StaleEpoch: what is there may be a successor's: this worker was paused and lost the job meanwhile.
        """
        try:
            model = await self._storage.register_model(handle.project_id, handle.job_id, manifest, name)
        except AlreadyExists:
            await handle.stage(Stage.UPLOADING, "replacing the model of an earlier attempt")
            with contextlib.suppress(NotFound):  # the answer to a deletion was lost
                await self._storage.delete_model(handle.project_id, handle.job_id)
            model = await self._storage.register_model(handle.project_id, handle.job_id, manifest, name)
        return str(model.manifest_key)


class Beside:
    """What is stored beside one training while it goes on.

    Args:
        storage: where it goes.
        handle: the job.
        base: the model that the training begins with.
        process: the training.
        folder: of the job's files.
        document: of the checkpoint that the training goes on from; empty: there is none.

    Attributes:
        previews: pictures of the model that trains.
        versions: models of some of its checkpoints.
        checkpoints: all that another attempt needs, what is known of the other two among it.
    """

    def __init__(
        self,
        storage: StorageClient,
        handle: JobHandle,
        base: FetchedModel,
        process: TrainingProcess,
        folder: Path,
        document: Mapping[str, Any],
    ) -> None:
        before = handle.checkpoint_ref.manifest_key if handle.checkpoint_ref else ""
        self.previews = PreviewUploads(storage, handle, from_document(document))
        self.versions = VersionUploads(storage, handle, base, process, folder / "versions")
        self.checkpoints = CheckpointUploads(storage, handle, folder / "upload", before, self._known)

    async def _known(self) -> dict[str, Any]:
        await self.previews.drain()
        return {DOCUMENT: as_document(self.previews.stored), **self.versions.as_document()}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Stores what is added for the length of the block."""
        async with (
            running(self.previews.run()),
            running(self.versions.run()),
            running(self.checkpoints.run()),
        ):
            yield


def progress_of(event: Event) -> Progress:
    """The numbers of a `progress` event; the api knows the share of the whole."""
    progress = Progress(
        stage=JobStage.JOB_STAGE_TRAINING,
        step=int(event["step"]),
        total_steps=int(event["total_steps"]),
        seconds_left=float(event["seconds_left"]),
        learning_rate=float(event["learning_rate"]),
        images_per_second=float(event["images_per_second"]),
    )
    if math.isfinite(event["loss"]):
        progress.loss = float(event["loss"])
    if math.isfinite(event["gradient_norm"]):
        progress.gradient_norm = float(event["gradient_norm"])
    return progress


def _tell_uploading(handle: JobHandle, done: int, total: int) -> None:
    handle.progress(Progress(stage=JobStage.JOB_STAGE_UPLOADING, step=done, total_steps=total))
