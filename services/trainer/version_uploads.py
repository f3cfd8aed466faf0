"""Versions of a model on their way into the registry, beside the training that goes on. Without torch.

The training says which of its checkpoints is to be one. A process beside it makes a model of that
(:mod:`services.trainer.versions`); this side stores and registers it as `<job>-step-<updates>`.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from likeness.storage.v1.artifact_pb2 import Blob
from likeness.storage.v1.model_pb2 import ModelExport

from services.adapters.blob_cache import FetchedModel
from services.adapters.child_process import ChildDied
from services.adapters.storage_client import StorageClient
from services.domain.artifacts import media_type_of
from services.domain.errors import AlreadyExists, NotFound
from services.jobs.worker_client import JobHandle
from services.trainer.delivery import lineage_of, model_export, model_manifest
from services.trainer.device_process import Event, TrainingProcess
from services.trainer.upload_queue import UploadQueue, held, let_go

logger = logging.getLogger(__name__)

BEGUN: Final = "version"
"""Name in the document of a checkpoint: updates of the last version that was begun by then."""
DEVICE: Final = ("--device", "cpu")
"""Where versions are made: the training has all memory of its own device."""


class VersionUploads:
    """Makes versions one at a time; of several checkpoints that wait only the newest.

    Args:
        storage: where they go.
        handle: the job; each version is reported to it.
        base: the model that the training began with.
        process: the training; another process like it makes the models.
        folder: for the files of versions that are being made.

    Attributes:
        remarks: versions that could not be made, and why, for the owner.
    """

    def __init__(
        self,
        storage: StorageClient,
        handle: JobHandle,
        base: FetchedModel,
        process: TrainingProcess,
        folder: Path,
    ) -> None:
        self.remarks: list[str] = []
        self._storage = storage
        self._handle = handle
        self._base = base
        self._process = process
        self._folder = folder
        self._begun = 0
        self._command: Mapping[str, Any] = {}
        self._queue = UploadQueue[tuple[Path, int]]("version", self._make_newest)
        self.run = self._queue.run
        self.drain = self._queue.drain

    async def prepare(self, command: dict[str, Any], document: Mapping[str, Any]) -> None:
        """Gets ready for a training, and tells it whether a version is missing.

        Args:
            command: the child's `train` command.
            document: of the checkpoint that the training goes on from; empty: there is none.

        Raises:
            Unavailable, DeadlineExceeded: storage does not answer.
        """
        self._command = command
        self._begun = int(document.get(BEGUN, 0))
        command["version_is_missing"] = bool(self._begun) and not await self._is_registered(self._begun)

    def as_document(self) -> dict[str, Any]:
        """What the document of a checkpoint says of versions."""
        return {BEGUN: self._begun} if self._begun else {}

    async def add(self, checkpoint: Path, step: int) -> None:
        """Takes over the checkpoint that is to become a version; its folder may vanish afterwards."""
        self._begun = step
        if (folder := await held(checkpoint, self._folder)) is not None:
            self._queue.add((folder, step))

    async def _make_newest(self, checkpoints: Sequence[tuple[Path, int]]) -> None:
        checkpoint, step = checkpoints[-1]
        workdir = self._folder / f"version-{step}"
        try:
            await self._register(await self._made(checkpoint, workdir), step)
        except ChildDied as error:
            logger.error("version's process died", extra={"status": error.status, "output": error.output})
            self._remark(step, "the process that made it ended unexpectedly")
        finally:
            await let_go([workdir, *(folder for folder, _ in checkpoints)])

    async def _made(self, checkpoint: Path, workdir: Path) -> Event:
        """Has a model made of a checkpoint; returns the child's last event."""
        process = self._process.another(*DEVICE)
        command = {**self._command, "checkpoint": str(checkpoint), "workdir": str(workdir)}
        try:
            async with contextlib.aclosing(process.publish(command)) as events:
                return [event async for event in events][-1]
        finally:
            await process.end()

    async def _register(self, made: Event, step: int) -> None:
        if made["event"] == "failed":
            self._remark(step, made["message"])
            return
        handle, storage = self._handle, self._storage
        spec, prepared = handle.assignment.training, handle.assignment.prepared
        files, exports = await store_files(storage, handle.project_id, made)
        lineage = lineage_of(handle.job_id, spec, prepared, made, self._process.device)
        note = f"made while its training went on, after {step} updates"
        base = self._base
        manifest = model_manifest(base.manifest, base.manifest_key, files, spec, lineage, note, exports)
        model, name = (
            version_id(handle.job_id, step),
            f"{spec.model_name or handle.job_id}, after update {step}",
        )
        try:
            await storage.register_model(handle.project_id, model, manifest, name)
        except AlreadyExists:
            there = await storage.get_model(handle.project_id, model)
            if there.manifest.lineage.job_id != handle.job_id:
                self._remark(step, f"{model} is the id of another model")
                return
            # Of an attempt that could not tell it any more; its weights are as good as these.
            logger.info("version is there already", extra={"model": model})
        await handle.version(model, step)
        logger.info("version published", extra={"model": model, "step": step})

    async def _is_registered(self, step: int) -> bool:
        try:
            await self._storage.get_model(self._handle.project_id, version_id(self._handle.job_id, step))
        except NotFound:
            return False
        return True

    def _remark(self, step: int, why: str) -> None:
        logger.warning("version not made", extra={"step": step, "detail": why})
        self.remarks.append(f"there is no version after {step} updates: {why}")


def version_id(job_id: str, step: int) -> str:
    """The registry id of the model that a training had after so many updates."""
    return f"{job_id}-step-{step:06d}"


async def store_files(
    storage: StorageClient, project: str, ended: Event, tell: Callable[[int, int], None] | None = None
) -> tuple[dict[str, Blob], list[ModelExport]]:
    """Stores what a child has exported.

    Args:
        storage: where it goes.
        project: its owner.
        ended: the child's last event.
        tell: hears before each file of the model how many are stored, of how many.

    Returns:
        The files of the model by their path in its folder, and those in other formats.
    """
    files = {}
    for number, file in enumerate(ended["files"]):
        if tell is not None:
            tell(number, len(ended["files"]))
        files[file["path"]] = await storage.upload_file(
            project, Path(file["file"]), media_type_of(file["path"])
        )
    exports = []
    for name, file in ended.get("other_formats", {}).items():
        blob = await storage.upload_file(project, Path(file), media_type_of(file))
        exports.append(model_export(name, file, blob))
    return files, exports
