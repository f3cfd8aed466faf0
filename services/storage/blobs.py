"""Blobs over the artifact store: who may see which, digests checked on the way in, media types.

The store keeps bytes and nothing about them, so a blob's media type is told from its first bytes; links tell it from
the file name instead.
"""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

from likeness.storage.v1.artifact_pb2 import Blob, BlobUpload
from likeness.storage.v1.storage_service_pb2 import BlobHeader, WriteBlobRequest

from services.adapters.manifests import digest_of
from services.adapters.owned_folder import new_name
from services.domain.artifacts import blob_key, digest_of_key, is_blob_key, project_of_key
from services.domain.errors import BadInput, InvalidSpec, NotFound, Unavailable
from services.domain.ports import ArtifactStore, DirectTransfers, ObjectInfo

HEAD_BYTES: Final = 16
OTHER_BYTES: Final = "application/octet-stream"
_SIGNATURES: Final = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "image/png"),
    (re.compile(rb"\xff\xd8\xff"), "image/jpeg"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "image/webp"),
    (re.compile(rb"PK\x03\x04|PK\x05\x06"), "application/zip"),
    (re.compile(rb'[{\[]["}\]{\[\s]'), "application/json"),
)


class Blobs:
    """Reads and writes blobs."""

    def __init__(
        self,
        store: ArtifactStore,
        work: Path,
        direct: DirectTransfers | None = None,
        direct_bytes: int = 0,
    ) -> None:
        """Takes what it works with.

        Args:
            store: where the bytes are.
            work: folder for files on their way in; on the store's file system where that can be.
            direct: what others may read and write in the store itself; None: nothing.
            direct_bytes: blobs from this size on; for a smaller one the requests cost more than they save.
        """
        self.store = store
        self._work = work
        self._direct = direct
        self._direct_bytes = direct_bytes

    async def get(self, key: str, project: str = "") -> Blob:
        """What is known of a blob.

        Args:
            key: artifact key.
            project: who asks; empty: a trusted service.

        Raises:
            NotFound: it is not there, or belongs to another project.
        """
        info = await self.find(key, project)
        if info is None:
            raise NotFound("no such artifact")
        head = b"".join([piece async for piece in self.store.read(key, limit=HEAD_BYTES)])
        return Blob(
            key=key,
            digest=digest_of_key(key),
            size_bytes=info.size_bytes,
            media_type=media_type_of_bytes(head),
        )

    async def find(self, key: str, project: str = "") -> ObjectInfo | None:
        """Size and age of a blob; None when it is not there, or belongs to another project."""
        if not is_blob_key(key) or (project and project_of_key(key) not in (project, "")):
            return None
        return await self.store.stat(key)

    async def read(self, key: str, offset: int = 0, limit: int = 0) -> AsyncIterator[bytes]:
        """Streams a blob's bytes.

        Args:
            key: artifact key.
            offset: first byte.
            limit: bytes wanted; 0: to the end.

        Raises:
            NotFound: it is not there.
            InvalidSpec: offset or limit is negative.
        """
        if offset < 0 or limit < 0:
            raise InvalidSpec("must not be negative", "offset_bytes" if offset < 0 else "limit_bytes")
        if not is_blob_key(key):
            raise NotFound("no such artifact")
        async for piece in self.store.read(key, offset, limit or None):
            yield piece

    def url(self, blob: Blob) -> str:
        """Where a large blob can be read in the store itself; empty: nowhere, or not worth it."""
        if self._direct is None or blob.size_bytes < self._direct_bytes:
            return ""
        return self._direct.download_url(blob.key)

    async def begin_upload(self, header: BlobHeader) -> BlobUpload | None:
        """Says where others may send a blob's parts; None: only through :meth:`write`.

        Raises:
            InvalidSpec: the digest is missing.
            Unavailable: the store does not answer.
        """
        key = blob_key(header.project_id, header.digest)
        if self._direct is None or header.size_bytes < self._direct_bytes:
            return None
        begun = await self._direct.begin_upload(key, header.size_bytes)
        return BlobUpload(upload_id=begun.upload_id, part_bytes=begun.part_bytes, part_urls=begun.part_urls)

    async def finish_upload(self, header: BlobHeader, upload_id: str) -> Blob:
        """Makes a blob of the parts that others sent; done again, it changes nothing.

        Raises:
            InvalidSpec: the digest is missing, or this store takes no such uploads.
            Unavailable: parts are missing, the upload is gone, or the store does not answer.
        """
        key = blob_key(header.project_id, header.digest)
        if self._direct is None:
            raise InvalidSpec("names no upload: this store takes bytes through WriteBlob only", "upload_id")
        await self._direct.finish_upload(key, upload_id, header.size_bytes)
        return Blob(key=key, digest=header.digest, size_bytes=header.size_bytes, media_type=header.media_type)

    async def read_small(self, key: str, max_bytes: int) -> bytes:
        """All bytes of a document; raises NotFound, or BadInput when it is larger than `max_bytes`."""
        data = b"".join([piece async for piece in self.read(key, 0, max_bytes + 1)])
        if len(data) > max_bytes:
            raise BadInput(f"the document is larger than {max_bytes} bytes")
        return data

    async def write(self, requests: AsyncIterator[WriteBlobRequest]) -> Blob:
        """Stores a stream of bytes.

        Args:
            requests: the header, then the bytes.

        Returns:
            The blob.

        Raises:
            InvalidSpec: no header, or the bytes are not what it announces.
            Unavailable: the store is full or does not answer.
        """
        first = await anext(requests, None)
        if first is None or not first.HasField("header"):
            raise InvalidSpec("must come first", "header")
        header = first.header
        blob_key(header.project_id, header.digest or "0" * 64)
        path = await asyncio.to_thread(self._new_path)
        try:
            digest, size = await _received(path, first.data, requests)
            _check(header.digest, digest, header.size_bytes, size)
            return await self._stored(header.project_id, path, digest, size, header.media_type)
        finally:
            await asyncio.to_thread(path.unlink, missing_ok=True)

    async def put_bytes(self, project: str, data: bytes, media_type: str) -> Blob:
        """Stores bytes under their digest."""
        digest = digest_of(data)
        key = blob_key(project, digest)
        if await self.store.stat(key) is None:
            path = await asyncio.to_thread(self._new_path)
            try:
                await asyncio.to_thread(path.write_bytes, data)
                await self.store.put_file(key, path)
            finally:
                await asyncio.to_thread(path.unlink, missing_ok=True)
        return Blob(key=key, digest=digest, size_bytes=len(data), media_type=media_type)

    async def put_file(self, project: str, path: Path, media_type: str) -> Blob:
        """Stores a file, which must not change meanwhile, under its digest."""
        digest = await asyncio.to_thread(_hash_file, path)
        size = (await asyncio.to_thread(path.stat)).st_size
        return await self._stored(project, path, digest, size, media_type)

    async def _stored(self, project: str, path: Path, digest: str, size: int, media_type: str) -> Blob:
        key = blob_key(project, digest)
        await self.store.put_file(key, path)
        return Blob(key=key, digest=digest, size_bytes=size, media_type=media_type)

    def _new_path(self) -> Path:
        self._work.mkdir(parents=True, exist_ok=True)
        return self._work / new_name()


def media_type_of_bytes(head: bytes) -> str:
    """Media type by the first :data:`HEAD_BYTES` bytes."""
    return next((name for pattern, name in _SIGNATURES if pattern.match(head)), OTHER_BYTES)


async def _received(path: Path, first: bytes, requests: AsyncIterator[WriteBlobRequest]) -> tuple[str, int]:
    """Writes a stream to a file; returns SHA-256 and size."""
    digest, size = hashlib.sha256(), 0

    def take(file: Any, data: bytes) -> None:
        digest.update(data)
        file.write(data)

    try:
        with path.open("wb") as file:
            await asyncio.to_thread(take, file, first)
            size += len(first)
            async for request in requests:
                await asyncio.to_thread(take, file, request.data)
                size += len(request.data)
    except OSError as error:
        raise Unavailable("the artifact store is full or does not answer") from error
    return digest.hexdigest(), size


def _check(wanted: str, digest: str, wanted_size: int, size: int) -> None:
    if wanted_size and wanted_size != size:
        raise InvalidSpec(f"announces {wanted_size} bytes, {size} came", "header.size_bytes")
    if wanted and wanted != digest:
        raise InvalidSpec("is not the digest of the bytes that came", "header.digest")


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
