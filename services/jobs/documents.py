"""Documents that are too long for a record: kept in storage by key, read back through a small cache."""

from collections import OrderedDict
from typing import Final, Protocol

from services.adapters.storage_client import StorageClient

CACHED_BYTES: Final = 32 * 1024 * 1024


class DocumentStore(Protocol):
    """Immutable documents by key."""

    async def put(self, project: str, data: bytes) -> str:
        """Stores JSON text; returns its key.

        Raises:
            Unavailable: storage does not answer or is full.
        """
        ...

    async def get(self, key: str) -> bytes:
        """Reads a document back.

        Raises:
            NotFound: it is not there.
            Unavailable: storage does not answer.
        """
        ...


class StorageDocuments:
    """Documents as blobs of the storage service."""

    def __init__(self, storage: StorageClient) -> None:
        """Keeps documents through a client of storage."""
        self._storage = storage

    async def put(self, project: str, data: bytes) -> str:
        """Stores JSON text under its digest."""
        return (await self._storage.upload_bytes(project, data, "application/json")).key

    async def get(self, key: str) -> bytes:
        """Reads a document back, checked against its digest."""
        return await self._storage.read_bytes(key)


class CachedDocuments:
    """Remembers the documents read and written last; they never change."""

    def __init__(self, store: DocumentStore, max_bytes: int = CACHED_BYTES) -> None:
        """Stands before another store."""
        self._store = store
        self._max_bytes = max_bytes
        self._size_bytes = 0
        self._held: OrderedDict[str, bytes] = OrderedDict()

    async def put(self, project: str, data: bytes) -> str:
        """Stores a document and remembers it."""
        key = await self._store.put(project, data)
        self._remember(key, data)
        return key

    async def get(self, key: str) -> bytes:
        """Reads a document, from memory if it is there."""
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        data = await self._store.get(key)
        self._remember(key, data)
        return data

    def _remember(self, key: str, data: bytes) -> None:
        if key in self._held or len(data) > self._max_bytes // 4:
            return
        self._held[key] = data
        self._size_bytes += len(data)
        while self._size_bytes > self._max_bytes:
            self._size_bytes -= len(self._held.popitem(last=False)[1])
