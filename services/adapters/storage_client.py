"""What the other services need of storage: blobs up and down with their digests checked, documents, names, models.

    async with Channel(settings.storage_addr) as channel:
        storage = StorageClient(channel)
        blob = await storage.upload_file(project, Path("0-0.png"), "image/png")
        await storage.download_blob(blob.key, Path("copy.png"))

Transfers go on after an interruption; unary calls are repeated by the channel. Where storage names an address in its
store, large blobs take the straight way (:mod:`services.adapters.direct_transfer`); should that fail, they go through
storage. A local copy that outlives a call is the business of :mod:`services.adapters.blob_cache`.
"""

import asyncio
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from likeness.storage.v1.artifact_pb2 import Blob, Dataset, DatasetImage, FileLink, Ref
from likeness.storage.v1.model_pb2 import Model, ModelManifest
from likeness.storage.v1.storage_service_pb2 import (
    BeginUploadRequest,
    BlobHeader,
    CreateDatasetRequest,
    CreateFileLinkRequest,
    DeleteModelRequest,
    FinishUploadRequest,
    GetBlobRequest,
    GetDatasetRequest,
    GetModelRequest,
    GetRefRequest,
    ImportDatasetRequest,
    ImportModelRequest,
    ImportModelResponse,
    ListModelsRequest,
    ListModelsResponse,
    PutRefRequest,
    ReadBlobRequest,
    ReadFileRequest,
    ReadFileResponse,
    RegisterModelRequest,
    WriteBlobRequest,
)
from likeness.storage.v1.storage_service_pb2_grpc import StorageServiceStub
from likeness.training.v1.training_job_pb2 import ImageSource

from services.adapters import direct_transfer
from services.adapters.grpc_client import Channel
from services.adapters.manifests import digest_of, from_json
from services.domain.artifacts import CHUNK_BYTES, blob_key, digest_of_key
from services.domain.errors import AlteredBytes, BadInput, NotFound, Unavailable

IMPORT_TIMEOUT_S = 1800.0
MODEL_TIMEOUT_S = 1800.0
"""The first use of a model from the hub waits for its download."""
MAX_MANIFEST_BYTES = 64 * 1024 * 1024
UPLOAD_TIMEOUT_S = 120.0
"""A store may take long to make one object of many parts."""
DIRECT_AGAIN_S = 300.0
"""After a straight transfer has failed, bytes go through storage for so long."""
TRANSFER_TRIES = 6
FIRST_PAUSE_S = 0.2

logger = logging.getLogger(__name__)

T = TypeVar("T")


class StorageClient:
    """StorageService as plain coroutines; raises the errors of `domain/errors.py`."""

    def __init__(self, channel: Channel) -> None:
        """Speaks over a channel, which stays the caller's to close."""
        self._stub: Any = StorageServiceStub(channel)
        self._direct_from = 0.0  # by the monotonic clock

    # Blobs

    async def get_blob(self, key: str, project: str = "") -> Blob:
        """What storage knows of a blob.

        Args:
            key: artifact key.
            project: who asks; empty: a trusted service.

        Raises:
            NotFound: it is not there, or belongs to another project.
        """
        request = GetBlobRequest(key=key, project_id=project)
        blob: Blob = (await self._stub.GetBlob(request)).blob
        return blob

    async def read_blob(self, key: str) -> AsyncIterator[bytes]:
        """Streams a blob's bytes in pieces of at most 1 MiB; goes on where an interruption cut it off.

        Raises:
            NotFound: it is not there.
            Unavailable: storage stayed away.
        """
        offset, tries = 0, 0
        while True:
            try:
                async for piece in self._pieces(key, offset):
                    offset, tries = offset + len(piece), 0
                    yield piece
                return
            except direct_transfer.DirectTransferFailed as error:
                self._give_up_direct(error)
                continue
            except Unavailable:
                tries += 1
                if tries >= TRANSFER_TRIES:
                    raise
            await asyncio.sleep(FIRST_PAUSE_S * 2**tries)

    async def _pieces(self, key: str, offset: int) -> AsyncIterator[bytes]:
        """A blob's bytes from an offset on, from wherever storage says."""
        request = ReadBlobRequest(key=key, offset_bytes=offset, accept_url=self._goes_direct)
        async for response in self._stub.ReadBlob(request):
            if response.url:
                async for piece in direct_transfer.download(response.url, offset, response.blob.size_bytes):
                    yield piece
            elif response.data:
                yield response.data

    @property
    def _goes_direct(self) -> bool:
        return time.monotonic() >= self._direct_from

    def _give_up_direct(self, error: Exception) -> None:
        self._direct_from = time.monotonic() + DIRECT_AGAIN_S
        logger.warning("blobs go through storage for a while", extra={"why": str(error)})

    async def download_blob(self, key: str, path: Path) -> int:
        """Writes a blob to a file, whole or not at all.

        Args:
            key: artifact key.
            path: the file, replaced if it is there; its folder must exist.

        Returns:
            Its size in bytes.

        Raises:
            NotFound: there is no such blob.
            Unavailable: storage stayed away; AlteredBytes: it sent bytes that are not the digest's.
        """
        temporary = await asyncio.to_thread(_temporary_beside, path)
        try:
            size = await self._download_again(key, temporary)
            await asyncio.to_thread(os.replace, temporary, path)
            return size
        finally:
            await asyncio.to_thread(temporary.unlink, missing_ok=True)

    async def _download_again(self, key: str, path: Path) -> int:
        """Downloads, and once more when other bytes came: they may have changed on their way only."""
        try:
            return await self._download_checked(key, path)
        except AlteredBytes:
            logger.warning("blob came with other bytes than its digest's", extra={"key": key})
            return await self._download_checked(key, path)

    async def _download_checked(self, key: str, path: Path) -> int:
        digest, size = hashlib.sha256(), 0
        with path.open("wb") as file:
            async for piece in self.read_blob(key):
                await asyncio.to_thread(_write_hashed, file, digest, piece)
                size += len(piece)
            await asyncio.to_thread(_flush, file)
        if digest.hexdigest() != digest_of_key(key):
            raise AlteredBytes("storage sent other bytes than the digest promises")
        return size

    async def read_bytes(self, key: str, *, max_bytes: int = MAX_MANIFEST_BYTES) -> bytes:
        """A small blob's bytes, checked against its digest.

        Raises:
            NotFound: there is no such blob.
            BadInput: it is larger than `max_bytes`.
            Unavailable: storage stayed away; AlteredBytes: it sent bytes that are not the digest's.
        """
        data = bytearray()
        async for piece in self.read_blob(key):
            data += piece
            if len(data) > max_bytes:
                raise BadInput(f"the document is larger than {max_bytes} bytes")
        if digest_of(bytes(data)) != digest_of_key(key):
            raise AlteredBytes("storage sent other bytes than the digest promises")
        return bytes(data)

    async def read_document(self, key: str) -> Any:
        """A JSON document that :meth:`upload_document` stored; raises as :meth:`read_bytes`."""
        try:
            return json.loads(await self.read_bytes(key))
        except ValueError as error:
            raise BadInput("the stored document is not JSON") from error

    async def upload_file(self, project: str, path: Path, media_type: str) -> Blob:
        """Stores a file under its digest; sends nothing when storage has it already.

        Args:
            project: owner; empty for the shared catalogue.
            path: the file, which must not change meanwhile.
            media_type: for instance image/png.

        Returns:
            The blob.

        Raises:
            Unavailable: storage stayed away or is full.
        """
        digest, size = await asyncio.to_thread(_hash_file, path)
        header = BlobHeader(project_id=project, digest=digest, size_bytes=size, media_type=media_type)
        stored = await self._stored_already(header)
        if stored is not None:
            return stored
        return await _persistently(lambda: self._send_file(header, path))

    async def upload_bytes(self, project: str, data: bytes, media_type: str) -> Blob:
        """Stores bytes under their digest; arguments and errors as :meth:`upload_file`."""
        header = BlobHeader(
            project_id=project, digest=digest_of(data), size_bytes=len(data), media_type=media_type
        )
        return await _persistently(lambda: self._write(header, _memory_pieces(data)))

    async def upload_document(self, project: str, document: Any) -> Blob:
        """Stores what JSON can say, keys sorted so that equal documents are one blob."""
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return await self.upload_bytes(project, text.encode(), "application/json")

    async def _send_file(self, header: BlobHeader, path: Path) -> Blob:
        if self._goes_direct:
            try:
                sent = await self._send_direct(header, path)
            except direct_transfer.DirectTransferFailed as error:
                self._give_up_direct(error)
            else:
                if sent is not None:
                    return sent
        return await self._write(header, _file_pieces(path))

    async def _send_direct(self, header: BlobHeader, path: Path) -> Blob | None:
        """Sends a file straight to the store; None when the store takes no such uploads."""
        begun = await self._stub.BeginUpload(BeginUploadRequest(header=header), timeout=UPLOAD_TIMEOUT_S)
        if not begun.HasField("upload"):
            return None
        digest = await direct_transfer.upload(path, begun.upload.part_urls, begun.upload.part_bytes)
        if digest != header.digest:
            raise BadInput(f"the file {path.name} changed while it was sent")
        request = FinishUploadRequest(header=header, upload_id=begun.upload.upload_id)
        blob: Blob = (await self._stub.FinishUpload(request, timeout=UPLOAD_TIMEOUT_S)).blob
        return blob

    async def _stored_already(self, header: BlobHeader) -> Blob | None:
        try:
            blob = await self.get_blob(blob_key(header.project_id, header.digest))
        except NotFound:
            return None
        return Blob(
            key=blob.key, digest=blob.digest, size_bytes=blob.size_bytes, media_type=header.media_type
        )

    async def _write(self, header: BlobHeader, pieces: AsyncIterator[bytes]) -> Blob:
        async def requests() -> AsyncIterator[WriteBlobRequest]:
            yield WriteBlobRequest(header=header)
            async for piece in pieces:
                yield WriteBlobRequest(data=piece)

        blob: Blob = (await self._stub.WriteBlob(requests())).blob
        return blob

    # References

    async def put_ref(
        self, project: str, kind: str, name: str, document: Any, *, replace: bool = False
    ) -> None:
        """Writes a small JSON document under a name.

        Raises:
            AlreadyExists: another document has this name, and not `replace`.
        """
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        ref = Ref(project_id=project, kind=kind, name=name, document_json=text)
        await self._stub.PutRef(PutRefRequest(ref=ref, replace=replace))

    async def get_ref(self, project: str, kind: str, name: str) -> Any | None:
        """The document under a name; None when there is none."""
        try:
            response = await self._stub.GetRef(GetRefRequest(project_id=project, kind=kind, name=name))
        except NotFound:
            return None
        return json.loads(response.ref.document_json)

    # Datasets

    async def import_dataset(
        self,
        project: str,
        source: ImageSource,
        *,
        read_captions: bool = False,
        min_usable_images: int = 0,
        timeout_s: float = IMPORT_TIMEOUT_S,
    ) -> Dataset:
        """Has storage fetch, check and store pictures.

        Args:
            project: owner.
            source: where they come from.
            read_captions: also read captions beside the pictures.
            min_usable_images: fewer usable pictures fail; 0: none fails.
            timeout_s: seconds to wait.

        Raises:
            BadInput: the download, the archive or the pictures cannot be used.
            EgressRefused: an address that is not gone to.
            DeadlineExceeded: it took too long.
        """
        request = ImportDatasetRequest(
            project_id=project,
            source=source,
            read_captions=read_captions,
            min_usable_images=min_usable_images,
        )
        dataset: Dataset = (await self._stub.ImportDataset(request, timeout=timeout_s)).dataset
        return dataset

    async def get_dataset(self, key: str) -> Dataset:
        """A dataset by its manifest's key.

        Raises:
            NotFound: there is none.
        """
        dataset: Dataset = (await self._stub.GetDataset(GetDatasetRequest(key=key))).dataset
        return dataset

    async def create_dataset(self, project: str, images: Sequence[DatasetImage]) -> Dataset:
        """Makes a dataset of stored pictures; `id`, `key` and `caption` of each are read.

        Raises:
            NotFound: a picture is not stored.
            BadInput: a picture cannot be read.
        """
        request = CreateDatasetRequest(project_id=project, images=images)
        dataset: Dataset = (await self._stub.CreateDataset(request, timeout=IMPORT_TIMEOUT_S)).dataset
        return dataset

    # Models

    async def import_model(
        self,
        project: str,
        address: str,
        *,
        base_model: str = "",
        revision: str = "",
        subfolder: str = "",
        timeout_s: float = MODEL_TIMEOUT_S,
    ) -> ImportModelResponse:
        """Has storage fetch a model, or the state of a training, from an address.

        Args:
            project: owner.
            address: http or https, or a repository of the hub.
            base_model: has what a single file lacks; empty: the deployment's default.
            revision: of a repository.
            subfolder: in a repository or an archive.
            timeout_s: seconds to wait.

        Raises:
            NotFound: there is no such base model.
            BadInput, EgressRefused: the address, or what it leads to, cannot be used.
            DeadlineExceeded: it took too long.
        """
        request = ImportModelRequest(
            project_id=project, address=address, base_model=base_model, revision=revision, subfolder=subfolder
        )
        response: ImportModelResponse = await self._stub.ImportModel(request, timeout=timeout_s)
        return response

    async def register_model(
        self, project: str, model: str, manifest: ModelManifest, display_name: str = ""
    ) -> Model:
        """Registers a model whose components are stored; registering the same again changes nothing.

        Raises:
            InvalidSpec: a component is not stored, or belongs to another project.
            AlreadyExists: the id stands for other weights.
        """
        request = RegisterModelRequest(
            project_id=project, model=model, manifest=manifest, display_name=display_name
        )
        registered: Model = (await self._stub.RegisterModel(request, timeout=60.0)).model
        return registered

    async def get_model(self, project: str, model: str = "", *, timeout_s: float = MODEL_TIMEOUT_S) -> Model:
        """A model by id, alias or manifest digest, of the project or of the catalogue.

        Args:
            project: who asks; empty: the catalogue only.
            model: empty: the deployment's default base.
            timeout_s: seconds to wait; a model from the hub is downloaded at its first use.

        Raises:
            NotFound: there is none.
        """
        request = GetModelRequest(project_id=project, model=model)
        found: Model = (await self._stub.GetModel(request, timeout=timeout_s)).model
        return found

    async def read_manifest(self, manifest_key: str) -> ModelManifest:
        """A model's manifest by its key.

        Raises:
            NotFound: there is none.
        """
        return from_json(await self.read_bytes(manifest_key), ModelManifest)

    async def list_models(
        self, project: str, page_size: int = 50, page_token: str = ""
    ) -> ListModelsResponse:
        """One page of a project's models, newest first, and the catalogue's after them."""
        request = ListModelsRequest(project_id=project, page_size=page_size, page_token=page_token)
        response: ListModelsResponse = await self._stub.ListModels(request)
        return response

    async def delete_model(self, project: str, model: str) -> None:
        """Removes a model from the registry.

        Raises:
            NotFound: there is none.
        """
        await self._stub.DeleteModel(DeleteModelRequest(project_id=project, model=model))

    # Links

    async def create_file_link(
        self, project: str, key: str, file_name: str, ttl_s: float | None = None
    ) -> FileLink:
        """Makes a link `/files/<token>/<file_name>` that works without a key until it expires.

        Args:
            project: owner of the artifact.
            key: artifact key.
            file_name: last part of the link; decides the media type.
            ttl_s: life in seconds; None: 7 days, the most allowed.

        Raises:
            NotFound: no such artifact of this project.
        """
        request = CreateFileLinkRequest(project_id=project, key=key, file_name=file_name)
        if ttl_s is not None:
            request.ttl.CopyFrom(Duration(seconds=int(ttl_s), nanos=int(ttl_s % 1 * 1e9)))
        link: FileLink = (await self._stub.CreateFileLink(request)).link
        return link

    def read_file(
        self, token: str, file_name: str, offset: int = 0, limit: int = 0
    ) -> AsyncIterator[ReadFileResponse]:
        """Streams the artifact behind a link; `blob` (with its media type) is in the first response.

        Args:
            token: the link's token.
            file_name: the link's file name.
            offset: first byte.
            limit: bytes wanted; 0: to the end.

        Raises:
            NotFound: the link expired, was altered, or its artifact is gone.
        """
        request = ReadFileRequest(token=token, file_name=file_name, offset_bytes=offset, limit_bytes=limit)
        responses: AsyncIterator[ReadFileResponse] = self._stub.ReadFile(request)
        return responses


async def _persistently(attempt: Callable[[], Awaitable[T]]) -> T:
    """Repeats an upload while storage does not answer; writing a blob twice changes nothing."""
    for tries in range(1, TRANSFER_TRIES):
        try:
            return await attempt()
        except Unavailable:
            await asyncio.sleep(FIRST_PAUSE_S * 2**tries)
    return await attempt()


async def _file_pieces(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while piece := await asyncio.to_thread(file.read, CHUNK_BYTES):
            yield piece


async def _memory_pieces(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), CHUNK_BYTES):
        yield data[start : start + CHUNK_BYTES]


def _temporary_beside(path: Path) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".part", dir=path.parent)
    os.close(handle)
    return Path(name)


def _write_hashed(file: Any, digest: Any, piece: bytes) -> None:
    digest.update(piece)
    file.write(piece)


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _hash_file(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return digest, os.fstat(file.fileno()).st_size
