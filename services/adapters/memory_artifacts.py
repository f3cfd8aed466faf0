"""ArtifactStore in memory: the twin of the real ones, for tests that need no disk."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from services.domain.artifacts import CHUNK_BYTES, checked_key
from services.domain.errors import AlreadyExists, NotFound
from services.domain.ports import ObjectInfo


@dataclass
class InMemoryArtifactStore:
    """Objects in a dictionary.

    Attributes:
        objects: bytes and time of writing, in milliseconds since 1970, by key; tests may look.
        now_ms: the present.
    """

    objects: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    now_ms: Callable[[], int] = lambda: 0

    async def put_file(self, key: str, path: Path) -> None:
        """Stores a file's bytes; what is there stays."""
        data = await asyncio.to_thread(path.read_bytes)
        self.objects.setdefault(checked_key(key), (data, self.now_ms()))

    async def read(self, key: str, offset: int = 0, limit: int | None = None) -> AsyncIterator[bytes]:
        """Streams an object's bytes in pieces of at most 1 MiB.

        Raises:
            NotFound: there is no such object.
        """
        if checked_key(key) not in self.objects:
            raise NotFound("no such artifact")
        data = self.objects[key][0]
        end = len(data) if limit is None else min(len(data), offset + limit)
        for start in range(offset, end, CHUNK_BYTES):
            yield data[start : min(start + CHUNK_BYTES, end)]

    async def stat(self, key: str) -> ObjectInfo | None:
        """Size and age of an object; None when it is not there."""
        found = self.objects.get(checked_key(key))
        return None if found is None else ObjectInfo(key, len(found[0]), found[1])

    async def put_document(self, key: str, data: bytes, *, create_only: bool) -> None:
        """Stores a small document.

        Raises:
            AlreadyExists: `create_only`, and there is one.
        """
        if create_only and checked_key(key) in self.objects:
            raise AlreadyExists("there is a document under this name already")
        self.objects[checked_key(key)] = (data, self.now_ms())

    async def get_document(self, key: str) -> bytes | None:
        """A small document's bytes; None when it is not there."""
        found = self.objects.get(checked_key(key))
        return None if found is None else found[0]

    async def delete(self, key: str) -> None:
        """Removes an object; nothing happens when it is not there."""
        self.objects.pop(checked_key(key), None)

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """Every object whose key starts with `prefix`, in the order of keys."""
        for key in sorted(self.objects):
            if key.startswith(prefix):
                yield ObjectInfo(key, len(self.objects[key][0]), self.objects[key][1])
