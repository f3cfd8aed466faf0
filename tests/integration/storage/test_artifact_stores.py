"""One suite over every ArtifactStore: a folder, memory, and a bucket of a real S3 server."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.adapters.folder_artifacts import FolderArtifactStore
from services.adapters.memory_artifacts import InMemoryArtifactStore
from services.adapters.s3_artifacts import S3ArtifactStore
from services.adapters.s3_requests import S3Requests
from services.domain.artifacts import CHUNK_BYTES, blob_key, ref_key
from services.domain.errors import AlreadyExists, InvalidSpec, NotFound
from services.domain.ports import ArtifactStore
from tests.integration.s3_server import BUCKET, S3Server

DATA = bytes(range(256)) * 4200  # 1 075 200 bytes: two pieces
DIGEST = hashlib.sha256(DATA).hexdigest()
KEY = blob_key("dev", DIGEST)


@pytest.fixture(params=["folder", "memory", "s3"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ArtifactStore]:
    if request.param == "memory":
        yield InMemoryArtifactStore()
    elif request.param == "folder":
        folder = FolderArtifactStore(tmp_path / "store")
        yield folder
        folder.close()
    else:
        server: S3Server = request.getfixturevalue("bucket_server")
        bucket = S3ArtifactStore(S3Requests(server.bucket(BUCKET)), tmp_path / "staging")
        yield bucket
        await bucket.close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(DATA)
    return path


async def contents(store: ArtifactStore, key: str, offset: int = 0, limit: int | None = None) -> bytes:
    return b"".join([piece async for piece in store.read(key, offset, limit)])


async def keys(store: ArtifactStore, prefix: str) -> list[str]:
    return [info.key async for info in store.list(prefix)]


async def test_a_stored_file_is_read_back(store: ArtifactStore, source: Path) -> None:
    await store.put_file(KEY, source)
    info = await store.stat(KEY)
    assert await contents(store, KEY) == DATA
    assert info is not None
    assert (info.key, info.size_bytes) == (KEY, len(DATA))


async def test_an_empty_file_is_an_object(store: ArtifactStore, tmp_path: Path) -> None:
    empty, key = tmp_path / "empty", blob_key("dev", hashlib.sha256(b"").hexdigest())
    empty.touch()
    await store.put_file(key, empty)
    info = await store.stat(key)
    assert info is not None
    assert info.size_bytes == 0
    assert await contents(store, key) == await contents(store, key, 0, 16) == b""


async def test_the_source_may_change_after_it_was_stored(store: ArtifactStore, source: Path) -> None:
    await store.put_file(KEY, source)
    await asyncio.to_thread(source.write_bytes, b"other")
    assert await contents(store, KEY) == DATA


async def test_pieces_are_at_most_one_mebibyte(store: ArtifactStore, source: Path) -> None:
    await store.put_file(KEY, source)
    sizes = [len(piece) async for piece in store.read(KEY)]
    assert sizes == [CHUNK_BYTES, len(DATA) - CHUNK_BYTES]


@pytest.mark.parametrize(
    ("offset", "limit"),
    [(0, 1), (10, 20), (CHUNK_BYTES - 1, 2), (len(DATA) - 3, 10), (len(DATA), None), (5, 0), (7, None)],
)
async def test_a_range_is_read(store: ArtifactStore, source: Path, offset: int, limit: int | None) -> None:
    await store.put_file(KEY, source)
    end = len(DATA) if limit is None else offset + limit
    assert await contents(store, KEY, offset, limit) == DATA[offset:end]


async def test_storing_what_is_there_changes_nothing(
    store: ArtifactStore, source: Path, tmp_path: Path
) -> None:
    await store.put_file(KEY, source)
    other = tmp_path / "other"
    other.write_bytes(b"other")
    await store.put_file(KEY, other)
    assert await contents(store, KEY) == DATA


async def test_what_is_absent_is_absent(store: ArtifactStore) -> None:
    assert await store.stat(KEY) is None
    assert await store.get_document(KEY) is None
    with pytest.raises(NotFound):
        await contents(store, KEY)
    await store.delete(KEY)


async def test_a_folder_of_keys_is_no_object(store: ArtifactStore, source: Path) -> None:
    await store.put_file(KEY, source)
    folder = KEY.rpartition("/")[0]
    assert await store.stat(folder) is None
    assert await store.get_document(folder) is None
    with pytest.raises(NotFound):
        await contents(store, folder)


async def test_a_deleted_object_is_gone(store: ArtifactStore, source: Path) -> None:
    await store.put_file(KEY, source)
    await store.delete(KEY)
    assert await store.stat(KEY) is None


async def test_a_document_can_be_replaced(store: ArtifactStore) -> None:
    key = ref_key("dev", "class_images", "abc")
    await store.put_document(key, b"one", create_only=False)
    await store.put_document(key, b"two", create_only=False)
    assert await store.get_document(key) == b"two"


async def test_a_create_only_document_is_not_overwritten(store: ArtifactStore) -> None:
    key = ref_key("dev", "class_images", "abc")
    await store.put_document(key, b"one", create_only=True)
    with pytest.raises(AlreadyExists):
        await store.put_document(key, b"two", create_only=True)
    assert await store.get_document(key) == b"one"


async def test_of_many_creators_one_wins(store: ArtifactStore) -> None:
    key = ref_key("dev", "class_images", "abc")
    attempts = [store.put_document(key, b"%d" % n, create_only=True) for n in range(20)]
    results = await asyncio.gather(*attempts, return_exceptions=True)
    winners = [n for n, result in enumerate(results) if result is None]
    assert len(winners) == 1
    assert await store.get_document(key) == b"%d" % winners[0]
    assert all(isinstance(result, AlreadyExists) for result in results if result is not None)


async def test_listing_follows_the_order_of_keys(store: ArtifactStore) -> None:
    wanted = ["a/b", "a/b-c/d", "a/b.c", "a/bb/c", "a/c/d/e", "b/a"]
    for key in reversed(wanted):
        await store.put_document(key, b"x", create_only=False)
    assert await keys(store, "") == sorted(wanted)
    assert await keys(store, "a/") == sorted(wanted)[:-1]
    assert await keys(store, "a/b") == ["a/b", "a/b-c/d", "a/b.c", "a/bb/c"]
    assert await keys(store, "a/c/d/") == ["a/c/d/e"]
    assert await keys(store, "zzz/") == []


@pytest.mark.parametrize(
    "key",
    [
        "",
        "a",
        "/a/b",
        "a//b",
        "a/b/",
        "../a",
        "a/../b",
        "a/.b",
        ".staging/x",
        "a\\b/c",
        "a/b\n",
        "a/b\0",
        "a/" + "x" * 600,
    ],
)
async def test_a_key_that_is_no_key_is_refused(store: ArtifactStore, source: Path, key: str) -> None:
    with pytest.raises(InvalidSpec):
        await store.put_file(key, source)
    with pytest.raises(InvalidSpec):
        await store.stat(key)
    with pytest.raises(InvalidSpec):
        await contents(store, key)
    with pytest.raises(InvalidSpec):
        await store.put_document(key, b"x", create_only=False)
    with pytest.raises(InvalidSpec):
        await store.get_document(key)
    with pytest.raises(InvalidSpec):
        await store.delete(key)
