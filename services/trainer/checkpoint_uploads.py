"""Recovery checkpoints on their way to storage, beside the training that makes them, and back. Without torch.

In storage a checkpoint is a document that names its files and the checkpoint before it, so that one whose bytes have
been lost or altered costs the updates since the one before, not the training.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from services.adapters.storage_client import StorageClient
from services.domain.artifacts import media_type_of
from services.domain.errors import AlteredBytes, NotFound
from services.jobs.worker_client import JobHandle
from services.trainer.upload_queue import UploadQueue, held, let_go

logger = logging.getLogger(__name__)

KEPT = 2
"""So many checkpoints are tried, newest first."""


class CheckpointUploads:
    """Stores checkpoints while training goes on, one at a time; of several that wait only the newest.

    Args:
        storage: where they go.
        handle: the job; each stored checkpoint is reported to it.
        folder: holds on to the files of a checkpoint until it is stored.
        before: manifest key of the last checkpoint of an earlier attempt; empty: there is none.
        extra: what else the document of a checkpoint says, at the moment at which it is stored.
    """

    def __init__(
        self,
        storage: StorageClient,
        handle: JobHandle,
        folder: Path,
        before: str = "",
        extra: Callable[[], Awaitable[Mapping[str, Any]]] | None = None,
    ) -> None:
        self._storage = storage
        self._handle = handle
        self._folder = folder
        self._before = before
        self._extra = extra
        self._queue = UploadQueue[tuple[Path, int]]("checkpoint", self._store_newest)
        self.run = self._queue.run
        self.drain = self._queue.drain

    async def add(self, checkpoint: Path, step: int) -> None:
        """Takes a checkpoint over; its folder may vanish afterwards."""
        if (folder := await held(checkpoint, self._folder)) is not None:
            self._queue.add((folder, step))

    async def _store_newest(self, checkpoints: Sequence[tuple[Path, int]]) -> None:
        try:
            await self._store(*checkpoints[-1])
        finally:
            await let_go([folder for folder, _ in checkpoints])

    async def _store(self, folder: Path, step: int) -> None:
        project = self._handle.project_id
        files = []
        for path in await asyncio.to_thread(_files_of, folder):
            blob = await self._storage.upload_file(project, path, media_type_of(path.name))
            files.append({"name": path.name, "key": blob.key, "size_bytes": blob.size_bytes})
        document: dict[str, Any] = {
            "job": self._handle.job_id,
            "step": step,
            "folder": folder.name,
            "files": files,
            "before": self._before,
            **(await self._extra() if self._extra is not None else {}),
        }
        manifest = await self._storage.upload_document(project, document)
        await self._handle.checkpoint(manifest.key, step)
        self._before = manifest.key
        logger.info("checkpoint stored", extra={"step": step})


async def read_checkpoint(storage: StorageClient, manifest_key: str) -> Mapping[str, Any]:
    """Reads the document of a stored checkpoint; that of one that is gone is empty.

    Raises:
        Unavailable, DeadlineExceeded: storage does not answer.
    """
    try:
        document = await storage.read_document(manifest_key)
    except (NotFound, AlteredBytes):
        return {}
    return document if isinstance(document, dict) else {}


async def fetch_checkpoint(storage: StorageClient, manifest_key: str, folder: Path) -> Path | None:
    """Brings a stored checkpoint here; where its bytes are gone or altered, the one before it.

    Args:
        storage: where it comes from.
        manifest_key: of the newest checkpoint.
        folder: the checkpoint becomes a folder in it.

    Returns:
        The checkpoint's folder; None: none of the newest two is there any more.

    Raises:
        Unavailable, DeadlineExceeded: storage does not answer.
    """
    for _ in range(KEPT):
        before = ""
        try:
            document = await storage.read_document(manifest_key)
            before = str(document.get("before", ""))
            return await _fetch_files(storage, document, folder)
        except (NotFound, AlteredBytes) as error:
            logger.warning("checkpoint passed over", extra={"key": manifest_key, "detail": str(error)})
        if not before:
            break
        manifest_key = before
    return None


async def _fetch_files(storage: StorageClient, document: Any, folder: Path) -> Path:
    target = folder / PurePath(document["folder"]).name
    await asyncio.to_thread(target.mkdir, parents=True, exist_ok=True)
    for file in document["files"]:
        await storage.download_blob(file["key"], target / PurePath(file["name"]).name)
    return target


def _files_of(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())
