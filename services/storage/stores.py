"""Which artifact store storage works with, as its settings say; the only place that knows the kinds of stores."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from services.adapters.folder_artifacts import FolderArtifactStore
from services.adapters.settings import StorageSettings
from services.domain.errors import InvalidSpec
from services.domain.ports import ArtifactStore, DirectTransfers

STAGING = "staging"


@dataclass(frozen=True, slots=True)
class OpenStore:
    """An artifact store that can be used.

    Attributes:
        store: holds the bytes.
        work: this process's folder for files on their way in.
        sweep: removes what writers left that are gone; returns how much.
        direct: what others may read and write in the store itself; None: all bytes go through storage.
        direct_bytes: blobs from this size on are worth it.
    """

    store: ArtifactStore
    work: Path
    sweep: Callable[[], Awaitable[int]]
    direct: DirectTransfers | None = None
    direct_bytes: int = 0


@asynccontextmanager
async def opened_store(settings: StorageSettings) -> AsyncIterator[OpenStore]:
    """Opens the store that the settings name, and closes it in the end.

    Raises:
        InvalidSpec: address, bucket or keys are wrong, or the store lacks what is needed.
        Unavailable: nothing answers at the address.
    """
    opening = _folder if settings.s3_address is None else _bucket
    async with opening(settings) as opened:
        yield opened


@asynccontextmanager
async def _folder(settings: StorageSettings) -> AsyncIterator[OpenStore]:
    store = FolderArtifactStore(settings.artifacts_path)
    try:
        yield OpenStore(store, store.staging, lambda: asyncio.to_thread(store.sweep))
    finally:
        store.close()


@asynccontextmanager
async def _bucket(settings: StorageSettings) -> AsyncIterator[OpenStore]:
    # Imported late: the signer's package costs time and memory, which a folder does without.
    from services.adapters.s3_artifacts import S3ArtifactStore, S3Options
    from services.adapters.s3_requests import S3Requests
    from services.adapters.s3_signing import Bucket

    assert settings.s3_address is not None
    endpoint, name = settings.s3_address
    keys = [
        _given(settings.s3_access_key, "LIKENESS_S3_ACCESS_KEY"),
        _given(settings.s3_secret_key, "LIKENESS_S3_SECRET_KEY"),
    ]
    options = S3Options(
        part_bytes=settings.s3_part_bytes,
        encryption=settings.s3_encryption,
        encryption_key=settings.s3_encryption_key,
        orphan_s=settings.s3_orphan_s,
    )
    requests = S3Requests(Bucket(endpoint, name, settings.s3_region, *keys))
    store = S3ArtifactStore(requests, settings.home / STAGING, options)
    try:
        await store.check()
        direct = store if settings.s3_direct_bytes else None
        yield OpenStore(store, store.staging, store.sweep, direct, settings.s3_direct_bytes)
    finally:
        await store.close()


def _given(value: SecretStr, variable: str) -> str:
    """A secret's text; raises InvalidSpec when there is none."""
    if not value.get_secret_value():
        raise InvalidSpec(f"must be set, or {variable}_FILE, when artifacts lie in a bucket", variable)
    return value.get_secret_value()
