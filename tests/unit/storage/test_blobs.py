import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from likeness.storage.v1.storage_service_pb2 import BlobHeader, WriteBlobRequest

from services.adapters.memory_artifacts import InMemoryArtifactStore
from services.domain.artifacts import blob_key
from services.domain.errors import BadInput, InvalidSpec, NotFound
from services.storage.blobs import Blobs, media_type_of_bytes

DATA = b"\x89PNG\r\n\x1a\n" + bytes(1000)
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(InMemoryArtifactStore(), tmp_path / "work")


async def requests(*parts: bytes, **header: object) -> AsyncIterator[WriteBlobRequest]:
    yield WriteBlobRequest(header=BlobHeader(**{"project_id": "dev", **header}))  # type: ignore[arg-type]
    for part in parts:
        yield WriteBlobRequest(data=part)


async def test_a_stream_is_stored_under_its_digest(blobs: Blobs) -> None:
    stream = requests(DATA[:7], DATA[7:], digest=DIGEST, size_bytes=len(DATA), media_type="image/png")
    blob = await blobs.write(stream)
    assert blob.key == blob_key("dev", DIGEST)
    assert (blob.digest, blob.size_bytes, blob.media_type) == (DIGEST, len(DATA), "image/png")
    assert await blobs.read_small(blob.key, 10_000) == DATA
    assert await blobs.get(blob.key, "dev") == blob


async def test_an_empty_blob_can_be_stored(blobs: Blobs) -> None:
    blob = await blobs.write(requests())
    assert blob.digest == hashlib.sha256(b"").hexdigest()
    assert await blobs.read_small(blob.key, 0) == b""


async def test_the_header_may_carry_the_first_bytes(blobs: Blobs) -> None:
    async def stream() -> AsyncIterator[WriteBlobRequest]:
        yield WriteBlobRequest(header=BlobHeader(project_id="dev"), data=DATA[:5])
        yield WriteBlobRequest(data=DATA[5:])

    assert (await blobs.write(stream())).digest == DIGEST


@pytest.mark.parametrize(
    ("header", "field"),
    [
        ({"digest": "0" * 64}, "header.digest"),
        ({"size_bytes": 3}, "header.size_bytes"),
        ({"digest": "../x"}, "digest"),
        ({"project_id": "../x"}, "project_id"),
    ],
)
async def test_bytes_that_are_not_as_announced_are_refused(
    blobs: Blobs, header: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidSpec) as refusal:
        await blobs.write(requests(DATA, **header))
    assert refusal.value.violations[0].field == field
    assert isinstance(blobs.store, InMemoryArtifactStore)
    assert blobs.store.objects == {}


async def test_a_stream_without_header_is_refused(blobs: Blobs) -> None:
    async def stream() -> AsyncIterator[WriteBlobRequest]:
        yield WriteBlobRequest(data=DATA)

    with pytest.raises(InvalidSpec, match="header"):
        await blobs.write(stream())


async def test_a_broken_stream_leaves_nothing(blobs: Blobs, tmp_path: Path) -> None:
    async def stream() -> AsyncIterator[WriteBlobRequest]:
        yield WriteBlobRequest(header=BlobHeader(project_id="dev"), data=DATA)
        raise RuntimeError("cut off")

    with pytest.raises(RuntimeError):
        await blobs.write(stream())
    assert list((tmp_path / "work").iterdir()) == []
    assert isinstance(blobs.store, InMemoryArtifactStore)
    assert blobs.store.objects == {}


async def test_another_projects_blob_is_not_found(blobs: Blobs) -> None:
    own = await blobs.put_bytes("dev", DATA, "image/png")
    shared = await blobs.put_bytes("", DATA, "image/png")
    with pytest.raises(NotFound):
        await blobs.get(own.key, "other")
    assert (await blobs.get(shared.key, "other")).key == shared.key
    assert (await blobs.get(own.key)).key == own.key


@pytest.mark.parametrize("key", ["", "shared/refs/secrets/link_signing_key", "../x", "shared/blobs/sha256/x"])
async def test_only_blobs_can_be_read(blobs: Blobs, key: str) -> None:
    with pytest.raises(NotFound):
        await blobs.get(key)
    with pytest.raises(NotFound):
        await blobs.read_small(key, 10)


async def test_a_range_is_read(blobs: Blobs) -> None:
    key = (await blobs.put_bytes("dev", DATA, "image/png")).key
    assert b"".join([piece async for piece in blobs.read(key, 1, 3)]) == b"PNG"
    with pytest.raises(InvalidSpec):
        await blobs.read_small(key, -2)
    with pytest.raises(BadInput):
        await blobs.read_small(key, 10)


@pytest.mark.parametrize(
    ("head", "media_type"),
    [
        (DATA, "image/png"),
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"RIFF1234WEBPVP8 ", "image/webp"),
        (b"PK\x03\x04", "application/zip"),
        (b'{"a":1}', "application/json"),
        (b"[]", "application/json"),
        (b"\x08\0\0\0\0\0\0\0{", "application/octet-stream"),
        (b"", "application/octet-stream"),
    ],
)
def test_the_media_type_is_told_from_the_first_bytes(head: bytes, media_type: str) -> None:
    assert media_type_of_bytes(head) == media_type
