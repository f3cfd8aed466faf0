"""Pictures of a training that goes on, on their way to storage, beside the training that makes them. Without torch."""

import asyncio
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from likeness.inference.v1.generation_job_pb2 import GeneratedImage
from likeness.training.v1.training_job_pb2 import PreviewImage

from services.adapters.storage_client import StorageClient
from services.domain.artifacts import media_type_of
from services.jobs.worker_client import JobHandle
from services.trainer.upload_queue import UploadQueue

logger = logging.getLogger(__name__)

REPORTED_AT_ONCE: Final = 64
DOCUMENT: Final = "previews"
"""Name of the list in the document of a checkpoint, and in the one that a result names."""


class PreviewUploads:
    """Stores previews while training goes on, in their order; one that storage does not take is left out.

    Args:
        storage: where they go.
        handle: the job; stored previews are reported to it.
        known: those of an earlier attempt.
    """

    def __init__(self, storage: StorageClient, handle: JobHandle, known: Iterable[PreviewImage] = ()) -> None:
        self._storage = storage
        self._handle = handle
        self._stored = {(preview.step, preview.prompt_index): preview for preview in known}
        self._queue = UploadQueue[Mapping[str, Any]]("previews", self._store_and_report, REPORTED_AT_ONCE)
        self.run = self._queue.run
        self.drain = self._queue.drain

    @property
    def stored(self) -> list[PreviewImage]:
        """What is stored by now, by updates, then by prompts."""
        return [self._stored[place] for place in sorted(self._stored)]

    def add(self, event: Mapping[str, Any]) -> None:
        """Takes over the picture that a `preview` event of the child tells of."""
        self._queue.add(event)

    async def _store_and_report(self, events: Iterable[Mapping[str, Any]]) -> None:
        previews = [await self._store(event) for event in events]
        self._stored |= {(preview.step, preview.prompt_index): preview for preview in previews}
        await self._handle.previews(previews)
        logger.info("previews stored", extra={"previews": [preview.name for preview in previews]})

    async def _store(self, event: Mapping[str, Any]) -> PreviewImage:
        file, media_type = Path(event["file"]), media_type_of(event["name"])
        blob = await self._storage.upload_file(self._handle.project_id, file, media_type)
        await asyncio.to_thread(file.unlink, missing_ok=True)
        image = GeneratedImage(
            key=blob.key,
            seed=int(event["seed"]),
            width_px=int(event["side_px"]),
            height_px=int(event["side_px"]),
            digest=blob.digest,
            size_bytes=blob.size_bytes,
            media_type=media_type,
        )
        return PreviewImage(
            step=int(event["step"]), prompt_index=int(event["prompt_index"]), name=event["name"], image=image
        )


def as_document(previews: Iterable[PreviewImage]) -> list[dict[str, Any]]:
    """Previews as JSON values that :func:`from_document` reads."""
    return [MessageToDict(preview, preserving_proto_field_name=True) for preview in previews]


def from_document(document: Any) -> list[PreviewImage]:
    """Reads the previews of a stored document; one that has none, or odd ones, has none."""
    try:
        return [ParseDict(entry, PreviewImage()) for entry in document.get(DOCUMENT, [])]
    except (ParseError, AttributeError, TypeError) as error:
        logger.warning("previews cannot be read", extra={"detail": str(error)})
        return []
