import asyncio
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from likeness.storage.v1.model_pb2 import Model, ModelComponent, ModelManifest

from services.adapters.blob_cache import BlobCache
from services.domain.artifacts import blob_key
from services.domain.errors import BadInput, NotFound, Unavailable


class Storage:
    """Blobs in memory, with the two calls that the cache makes; counts the downloads."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, ModelManifest] = {}
        self.downloads: list[str] = []
        self.error: Exception | None = None

    def put(self, data: bytes) -> str:
        key = blob_key("", hashlib.sha256(data).hexdigest())
        self.blobs[key] = data
        return key

    def put_model(self, **files: bytes) -> Model:
        components = []
        for name, data in sorted(files.items()):
            key = self.put(data)
            path = name.replace("__", "/")
            components.append(ModelComponent(path=path, key=key, digest=key[-64:], size_bytes=len(data)))
        manifest = ModelManifest(components=components)
        key = self.put(manifest.SerializeToString())
        self.manifests[key] = manifest
        return Model(manifest_key=key)

    async def download_blob(self, key: str, path: Path) -> int:
        self.downloads.append(key)
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        if key not in self.blobs:
            raise NotFound("no such artifact")
        path.write_bytes(self.blobs[key])
        return len(self.blobs[key])

    async def read_manifest(self, key: str) -> ModelManifest:
        if key not in self.manifests:
            raise NotFound("no such artifact")
        return self.manifests[key]


@pytest.fixture
def storage() -> Storage:
    return Storage()


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[BlobCache]:
    made = BlobCache(tmp_path / "cache", max_bytes=1000)
    yield made
    made.close()


def cached(cache: BlobCache) -> set[str]:
    return {path.name for path in (cache.root / "blobs").iterdir()}


async def test_a_blob_is_fetched_once(cache: BlobCache, storage: Storage, tmp_path: Path) -> None:
    key = storage.put(b"hello")
    for name in ("a", "sub/b"):
        placed = await cache.place(storage, key, tmp_path / name)  # type: ignore[arg-type]
        assert placed.read_bytes() == b"hello"
    assert storage.downloads == [key]


async def test_many_at_once_fetch_a_blob_once(cache: BlobCache, storage: Storage, tmp_path: Path) -> None:
    key = storage.put(b"hello")
    targets = [tmp_path / str(number) for number in range(8)]
    await asyncio.gather(*(cache.place(storage, key, target) for target in targets))  # type: ignore[arg-type]
    assert storage.downloads == [key]


async def test_another_process_finds_what_is_here(cache: BlobCache, storage: Storage, tmp_path: Path) -> None:
    key = storage.put(b"hello")
    await cache.place(storage, key, tmp_path / "a")  # type: ignore[arg-type]
    other = BlobCache(tmp_path / "cache", max_bytes=1000)
    await other.place(storage, key, tmp_path / "b")  # type: ignore[arg-type]
    other.close()
    assert storage.downloads == [key]


async def test_a_copy_of_the_wrong_size_is_fetched_again(
    cache: BlobCache, storage: Storage, tmp_path: Path
) -> None:
    key = storage.put(b"hello")
    cache.path_of(key).write_bytes(b"")
    placed = await cache.place(storage, key, tmp_path / "a", 5)  # type: ignore[arg-type]
    assert placed.read_bytes() == b"hello"


async def test_a_blob_that_storage_lacks_leaves_nothing(
    cache: BlobCache, storage: Storage, tmp_path: Path
) -> None:
    with pytest.raises(NotFound):
        await cache.place(storage, blob_key("", "0" * 64), tmp_path / "a")  # type: ignore[arg-type]
    assert cached(cache) == set()


async def test_a_disk_that_fails_is_unavailable(cache: BlobCache, storage: Storage, tmp_path: Path) -> None:
    storage.error = OSError(28, "No space left on device")
    with pytest.raises(Unavailable, match="No space"):
        await cache.place(storage, storage.put(b"x"), tmp_path / "a")  # type: ignore[arg-type]


async def test_the_blob_unused_for_the_longest_time_leaves_first(
    cache: BlobCache, storage: Storage, tmp_path: Path
) -> None:
    keys = [storage.put(bytes([number]) * 400) for number in range(4)]
    for key in keys[:2]:
        (await cache.place(storage, key, tmp_path / "x")).unlink()  # type: ignore[arg-type]
    (await cache.place(storage, keys[0], tmp_path / "x")).unlink()  # type: ignore[arg-type]
    (await cache.place(storage, keys[2], tmp_path / "x")).unlink()  # type: ignore[arg-type]
    assert cached(cache) == {keys[0][-64:], keys[2][-64:]}


async def test_a_blob_in_use_stays_whatever_the_size(
    cache: BlobCache, storage: Storage, tmp_path: Path
) -> None:
    keys = [storage.put(bytes([number]) * 900) for number in range(3)]
    for number, key in enumerate(keys):
        await cache.place(storage, key, tmp_path / str(number))  # type: ignore[arg-type]
    assert cached(cache) == {key[-64:] for key in keys}
    (tmp_path / "1").unlink()
    assert cache.evict() == 1800
    assert cached(cache) == {keys[0][-64:], keys[2][-64:]}


async def test_a_user_keeps_its_file_when_the_blob_is_lost(
    cache: BlobCache, storage: Storage, tmp_path: Path
) -> None:
    key = storage.put(b"hello")
    placed = await cache.place(storage, key, tmp_path / "a")  # type: ignore[arg-type]
    cache.path_of(key).unlink()
    assert placed.read_bytes() == b"hello"


async def test_a_model_becomes_a_folder(cache: BlobCache, storage: Storage) -> None:
    model = storage.put_model(model_index=b"{}", unet__w=b"weights", vae__w=b"others")
    fetched = await cache.fetch_model(storage, model)  # type: ignore[arg-type]
    files = {
        path.relative_to(fetched.folder).as_posix(): path.read_bytes()
        for path in fetched.folder.rglob("*")
        if path.is_file()
    }
    assert files == {"model_index": b"{}", "unet/w": b"weights", "vae/w": b"others"}
    assert fetched.manifest_key == model.manifest_key
    again = await cache.fetch_model(storage, model.manifest_key)  # type: ignore[arg-type]
    assert again == fetched
    assert len(storage.downloads) == 3


async def test_models_share_what_they_have_in_common(cache: BlobCache, storage: Storage) -> None:
    base = storage.put_model(unet=b"base", vae=b"vae")
    tuned = storage.put_model(unet=b"tuned", vae=b"vae")
    folders = [(await cache.fetch_model(storage, model)).folder for model in (base, tuned)]  # type: ignore[arg-type]
    assert os.path.samefile(folders[0] / "vae", folders[1] / "vae")
    assert len(storage.downloads) == 3


async def test_a_model_in_use_stays_until_it_is_released(cache: BlobCache, storage: Storage) -> None:
    one = storage.put_model(unet=b"1" * 900)
    two = storage.put_model(unet=b"2" * 900)
    first = await cache.fetch_model(storage, one)  # type: ignore[arg-type]
    await cache.fetch_model(storage, two)  # type: ignore[arg-type]
    assert len(cached(cache)) == 2
    await cache.release(first.folder)
    assert not first.folder.exists()
    assert len(cached(cache)) == 1


async def test_a_model_that_cannot_be_fetched_leaves_no_folder(cache: BlobCache, storage: Storage) -> None:
    model = storage.put_model(unet=b"1", vae=b"2")
    lost = storage.blobs.pop(storage.manifests[model.manifest_key].components[1].key)
    with pytest.raises(NotFound):
        await cache.fetch_model(storage, model)  # type: ignore[arg-type]
    storage.put(lost)
    fetched = await cache.fetch_model(storage, model)  # type: ignore[arg-type]
    assert sorted(path.name for path in fetched.folder.iterdir()) == ["unet", "vae"]


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "", "a\\b"])
async def test_a_manifest_cannot_write_outside_its_folder(
    cache: BlobCache, storage: Storage, path: str
) -> None:
    model = storage.put_model(unet=b"1")
    storage.manifests[model.manifest_key].components[0].path = path
    with pytest.raises(BadInput):
        await cache.fetch_model(storage, model)  # type: ignore[arg-type]


async def test_only_an_own_folder_can_be_released(cache: BlobCache, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a folder"):
        await cache.release(tmp_path)
    assert tmp_path.is_dir()
