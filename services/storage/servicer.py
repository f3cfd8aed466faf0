"""StorageService: the RPCs over blobs, references, datasets, models and links; decides nothing itself."""

from collections.abc import AsyncIterator
from typing import Any

from likeness.storage.v1.artifact_pb2 import Blob
from likeness.storage.v1.model_pb2 import Model
from likeness.storage.v1.storage_service_pb2 import (
    BeginUploadRequest,
    BeginUploadResponse,
    CreateDatasetRequest,
    CreateDatasetResponse,
    CreateFileLinkRequest,
    CreateFileLinkResponse,
    DeleteModelRequest,
    DeleteModelResponse,
    FinishUploadRequest,
    FinishUploadResponse,
    GetBlobRequest,
    GetBlobResponse,
    GetDatasetRequest,
    GetDatasetResponse,
    GetModelRequest,
    GetModelResponse,
    GetRefRequest,
    GetRefResponse,
    ImportDatasetRequest,
    ImportDatasetResponse,
    ImportModelRequest,
    ImportModelResponse,
    ListModelsRequest,
    ListModelsResponse,
    PutRefRequest,
    PutRefResponse,
    ReadBlobRequest,
    ReadBlobResponse,
    ReadFileRequest,
    ReadFileResponse,
    RegisterModelRequest,
    RegisterModelResponse,
    WriteBlobRequest,
    WriteBlobResponse,
)
from likeness.storage.v1.storage_service_pb2_grpc import StorageServiceServicer

from services.domain.artifacts import media_type_of
from services.domain.errors import InvalidSpec
from services.storage.blobs import Blobs
from services.storage.catalogue import Catalogue
from services.storage.datasets import DatasetImporter
from services.storage.documents import References
from services.storage.links import FileLinks
from services.storage.model_imports import ModelImporter, Wanted
from services.storage.registry import ModelRegistry


class StorageServicer(StorageServiceServicer):
    """One method an RPC; errors are those of what it calls."""

    def __init__(
        self,
        blobs: Blobs,
        references: References,
        datasets: DatasetImporter,
        registry: ModelRegistry,
        catalogue: Catalogue,
        links: FileLinks,
        models: ModelImporter,
    ) -> None:
        """Takes what it serves."""
        self._blobs = blobs
        self._references = references
        self._datasets = datasets
        self._registry = registry
        self._catalogue = catalogue
        self._links = links
        self._models = models

    async def GetBlob(self, request: GetBlobRequest, context: Any) -> GetBlobResponse:
        """Says whether a blob is there."""
        return GetBlobResponse(blob=await self._blobs.get(request.key, request.project_id))

    async def ReadBlob(self, request: ReadBlobRequest, context: Any) -> AsyncIterator[ReadBlobResponse]:
        """Streams a blob's bytes, or says where they are."""
        blob = await self._blobs.get(request.key)
        url = self._blobs.url(blob) if request.accept_url else ""
        yield ReadBlobResponse(blob=blob, url=url)
        if url:
            return
        async for piece in self._blobs.read(request.key, request.offset_bytes, request.limit_bytes):
            yield ReadBlobResponse(data=piece)

    async def WriteBlob(self, requests: AsyncIterator[WriteBlobRequest], context: Any) -> WriteBlobResponse:
        """Stores bytes under their digest."""
        return WriteBlobResponse(blob=await self._blobs.write(requests))

    async def BeginUpload(self, request: BeginUploadRequest, context: Any) -> BeginUploadResponse:
        """Says where the parts of a blob go."""
        return BeginUploadResponse(upload=await self._blobs.begin_upload(request.header))

    async def FinishUpload(self, request: FinishUploadRequest, context: Any) -> FinishUploadResponse:
        """Makes a blob of its parts."""
        return FinishUploadResponse(blob=await self._blobs.finish_upload(request.header, request.upload_id))

    async def PutRef(self, request: PutRefRequest, context: Any) -> PutRefResponse:
        """Writes a reference."""
        return PutRefResponse(ref=await self._references.put(request.ref, replace=request.replace))

    async def GetRef(self, request: GetRefRequest, context: Any) -> GetRefResponse:
        """Reads a reference."""
        return GetRefResponse(ref=await self._references.get(request.project_id, request.kind, request.name))

    async def ImportDataset(self, request: ImportDatasetRequest, context: Any) -> ImportDatasetResponse:
        """Fetches pictures, checks them, and stores them ready for training."""
        dataset = await self._datasets.import_source(
            _owner(request.project_id),
            request.source,
            read_captions=request.read_captions,
            min_usable_images=request.min_usable_images,
        )
        return ImportDatasetResponse(dataset=dataset)

    async def GetDataset(self, request: GetDatasetRequest, context: Any) -> GetDatasetResponse:
        """Reads a dataset."""
        return GetDatasetResponse(dataset=await self._datasets.read(request.key))

    async def CreateDataset(self, request: CreateDatasetRequest, context: Any) -> CreateDatasetResponse:
        """Makes a dataset of stored pictures."""
        return CreateDatasetResponse(
            dataset=await self._datasets.create(_owner(request.project_id), request.images)
        )

    async def ImportModel(self, request: ImportModelRequest, context: Any) -> ImportModelResponse:
        """Fetches a model, or the state of a training, from an address."""
        project = _owner(request.project_id)
        base = await self._model(project, request.base_model)
        wanted = Wanted(request.address, base, request.revision, request.subfolder)
        imported = await self._models.import_model(project, wanted)
        return ImportModelResponse(model=imported.model, checkpoint=imported.checkpoint)

    async def RegisterModel(self, request: RegisterModelRequest, context: Any) -> RegisterModelResponse:
        """Registers a model whose components are stored."""
        model = await self._registry.register(
            _owner(request.project_id), request.model, request.manifest, display_name=request.display_name
        )
        return RegisterModelResponse(model=model)

    async def GetModel(self, request: GetModelRequest, context: Any) -> GetModelResponse:
        """Reads a model; one of the catalogue that is not here yet is fetched first."""
        return GetModelResponse(model=await self._model(request.project_id, request.model))

    async def _model(self, project: str, name: str) -> Model:
        wanted = name or self._registry.base_model
        if not project or not await self._registry.has(project, wanted):
            await self._catalogue.ensure(wanted)
        return await self._registry.get(project, wanted)

    async def ListModels(self, request: ListModelsRequest, context: Any) -> ListModelsResponse:
        """Lists a project's models and the catalogue's."""
        await self._catalogue.wait_for_locals()
        models, token = await self._registry.list_page(
            request.project_id, request.page_size, request.page_token
        )
        return ListModelsResponse(models=models, next_page_token=token)

    async def DeleteModel(self, request: DeleteModelRequest, context: Any) -> DeleteModelResponse:
        """Removes a model from the registry."""
        await self._registry.delete(request.project_id, request.model)
        return DeleteModelResponse()

    async def CreateFileLink(self, request: CreateFileLinkRequest, context: Any) -> CreateFileLinkResponse:
        """Makes a link to an artifact."""
        await self._blobs.get(request.key, _owner(request.project_id))
        ttl = request.ttl.ToMicroseconds() / 1e6 if request.HasField("ttl") else None
        return CreateFileLinkResponse(link=self._links.create(request.key, request.file_name, ttl))

    async def ReadFile(self, request: ReadFileRequest, context: Any) -> AsyncIterator[ReadFileResponse]:
        """Streams the artifact behind a link's token."""
        blob = await self._blobs.get(self._links.check(request.token, request.file_name))
        media_type = media_type_of(request.file_name)
        yield ReadFileResponse(
            blob=Blob(key=blob.key, digest=blob.digest, size_bytes=blob.size_bytes, media_type=media_type)
        )
        async for piece in self._blobs.read(blob.key, request.offset_bytes, request.limit_bytes):
            yield ReadFileResponse(data=piece)


def _owner(project: str) -> str:
    if not project:
        raise InvalidSpec("must be given", "project_id")
    return project
