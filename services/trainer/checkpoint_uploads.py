"""Recovery checkpoints on their way to storage, beside the training that makes them, and back. Without torch.

In storage a checkpoint is a document that names its files and the checkpoint before it, so that one whose bytes have
been lost or altered costs the updates since the one before, not the training.
"""

import asyncio
import logging
import os
import shutil
from pathlib import Path, PurePath
from typing import Any

from services.adapters.storage_client import StorageClient
from services.domain.artifacts import media_type_of
from services.domain.errors import AlteredBytes, LikenessError, NotFound, StaleEpoch
from services.jobs.worker_client import JobHandle
from services.trainer.preview_uploads import DOCUMENT, PreviewUploads, as_document

logger = logging.getLogger(__name__)

KEPT = 2
"""So many checkpoints are tried, newest first."""


class CheckpointUploads:
    """Stores checkpoints while training goes on, one at a time; of several that wait only the newest.

    Args:
        storage: where they go.
        handle: the job; each stored checkpoint is reported to it.
        folder: holds on to the files of a checkpoint until it is stored, since the child keeps only the newest two.
        before: manifest key of the last checkpoint of an earlier attempt; empty: there is none.
        previews: what was drawn so far is listed with each checkpoint; None: nothing is drawn.
    """

    def __init__(
        self,
        storage: StorageClient,
        handle: JobHandle,
        folder: Path,
        before: str = "",
        previews: PreviewUploads | None = None,
    ) -> None:
        self._storage = storage
        self._handle = handle
        self._folder = folder
        self._before = before
        self._previews = previews
        self._waiting: tuple[Path, int] | None = None
        self._news = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    async def add(self, checkpoint: Path, step: int) -> None:
        """Takes a checkpoint over; its folder may vanish afterwards."""
        held = self._folder / checkpoint.name
        try:
            await asyncio.to_thread(
                shutil.copytree, checkpoint, held, copy_function=os.link, dirs_exist_ok=True
            )
        except OSError as error:
            logger.warning("checkpoint was gone before it was stored", extra={"detail": str(error)})
            return
        self._waiting = (held, step)
        self._idle.clear()
        self._news.set()

    async def drain(self) -> None:
        """Waits until the newest checkpoint is stored and reported."""
        await self._idle.wait()

    async def run(self) -> None:
        """Stores what is added, for ever. What storage cannot take now is followed by a newer one."""
        while True:
            await self._news.wait()
            self._news.clear()
            while self._waiting is not None:
                (held, step), self._waiting = self._waiting, None
                try:
                    await self._store(held, step)
                except StaleEpoch:
                    logger.info("checkpoint not wanted any more", extra={"step": step})
                except (
                    Exception
                ) as error:  # whatever it is, training goes on, and ends without waiting for it
                    level = logging.WARNING if isinstance(error, (LikenessError, OSError)) else logging.ERROR
                    logger.log(level, "checkpoint not stored", extra={"step": step}, exc_info=error)
                await asyncio.to_thread(shutil.rmtree, held, ignore_errors=True)
            self._idle.set()

    async def _store(self, held: Path, step: int) -> None:
        project = self._handle.project_id
        files = []
        for path in await asyncio.to_thread(_files_of, held):
            blob = await self._storage.upload_file(project, path, media_type_of(path.name))
            files.append({"name": path.name, "key": blob.key, "size_bytes": blob.size_bytes})
        document: dict[str, Any] = {
            "job": self._handle.job_id,
            "step": step,
            "folder": held.name,
            "files": files,
            "before": self._before,
        }
        if self._previews is not None:
            await self._previews.drain()
            document[DOCUMENT] = as_document(self._previews.stored)
        manifest = await self._storage.upload_document(project, document)
        await self._handle.checkpoint(manifest.key, step)
        self._before = manifest.key
        logger.info("checkpoint stored", extra={"step": step})


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
