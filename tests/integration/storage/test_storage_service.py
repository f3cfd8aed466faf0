"""The client against the server: everything that other services ask of storage."""

import asyncio
import hashlib
import io
import os
import zipfile
from pathlib import Path

import pytest
from likeness.storage.v1.artifact_pb2 import DatasetImage
from likeness.storage.v1.model_pb2 import MODEL_FORMAT_DIFFUSERS, Lineage, ModelComponent, ModelManifest
from likeness.training.v1.training_job_pb2 import ArtifactKeys, ImageSource
from PIL import Image

from services.adapters.blob_cache import BlobCache
from services.adapters.grpc_client import Channel, is_serving
from services.adapters.settings import StorageSettings
from services.adapters.storage_client import StorageClient
from services.domain.artifacts import blob_key
from services.domain.errors import (
    AlreadyExists,
    BadInput,
    InvalidSpec,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from services.storage.server import ACCESS_SERVICE, STORAGE_SERVICE

LARGE = os.urandom(3 * 1024 * 1024 + 17)


def png(color: tuple[int, int, int], side_px: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side_px, side_px), color).save(buffer, "PNG")
    return buffer.getvalue()


async def test_both_services_are_healthy(channel: Channel) -> None:
    for name in ("", STORAGE_SERVICE, ACCESS_SERVICE):
        assert await is_serving(channel, name)


async def test_a_file_travels_there_and_back(client: StorageClient, tmp_path: Path) -> None:
    source = tmp_path / "source"
    await asyncio.to_thread(source.write_bytes, LARGE)
    blob = await client.upload_file("dev", source, "application/octet-stream")
    assert blob.key == blob_key("dev", hashlib.sha256(LARGE).hexdigest())
    assert blob.size_bytes == len(LARGE)
    assert await client.download_blob(blob.key, tmp_path / "copy") == len(LARGE)
    assert (tmp_path / "copy").read_bytes() == LARGE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "home", "source"]


async def test_a_file_that_is_there_is_not_sent_again(client: StorageClient, tmp_path: Path) -> None:
    source = tmp_path / "source"
    await asyncio.to_thread(source.write_bytes, LARGE)
    first = await client.upload_file("dev", source, "image/png")
    (tmp_path / "home/artifacts" / first.key).chmod(0o400)
    before = (tmp_path / "home/artifacts" / first.key).stat()
    assert await client.upload_file("dev", source, "image/png") == first
    after = (tmp_path / "home/artifacts" / first.key).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


async def test_documents_are_named_by_what_they_say(client: StorageClient) -> None:
    one = await client.upload_document("dev", {"b": [1, None], "a": "ü"})
    two = await client.upload_document("dev", {"a": "ü", "b": [1, None]})
    assert one == two
    assert one.media_type == "application/json"
    assert await client.read_document(one.key) == {"a": "ü", "b": [1, None]}
    text = await client.upload_bytes("dev", b"not json", "text/plain")
    with pytest.raises(BadInput):
        await client.read_document(text.key)


async def test_an_absent_blob_is_not_found(client: StorageClient, tmp_path: Path) -> None:
    key = blob_key("dev", "0" * 64)
    with pytest.raises(NotFound):
        await client.get_blob(key)
    with pytest.raises(NotFound):
        await client.download_blob(key, tmp_path / "x")
    assert not (tmp_path / "x").exists()


async def test_another_projects_blob_is_not_found(client: StorageClient) -> None:
    blob = await client.upload_bytes("dev", b"x", "text/plain")
    assert (await client.get_blob(blob.key, "dev")).size_bytes == 1
    with pytest.raises(NotFound):
        await client.get_blob(blob.key, "other")


async def test_damaged_bytes_are_noticed(client: StorageClient, tmp_path: Path) -> None:
    blob = await client.upload_bytes("dev", b"right", "text/plain")
    (tmp_path / "home/artifacts" / blob.key).write_bytes(b"wrong")
    with pytest.raises(Unavailable, match="digest"):
        await client.download_blob(blob.key, tmp_path / "x")
    with pytest.raises(Unavailable, match="digest"):
        await client.read_bytes(blob.key)
    assert not (tmp_path / "x").exists()


async def test_references_name_documents(client: StorageClient) -> None:
    assert await client.get_ref("dev", "class_images", "abc") is None
    await client.put_ref("dev", "class_images", "abc", {"keys": ["k"]})
    assert await client.get_ref("dev", "class_images", "abc") == {"keys": ["k"]}
    with pytest.raises(AlreadyExists):
        await client.put_ref("dev", "class_images", "abc", {"keys": []})
    await client.put_ref("dev", "class_images", "abc", {"keys": []}, replace=True)
    assert await client.get_ref("dev", "class_images", "abc") == {"keys": []}


async def test_the_signing_key_cannot_be_read(client: StorageClient) -> None:
    with pytest.raises(PermissionDenied):
        await client.get_ref("", "secrets", "link_signing_key")
    with pytest.raises(NotFound):
        await client.read_bytes("shared/refs/secrets/link_signing_key")


async def test_an_archive_becomes_a_dataset(client: StorageClient) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", png((255, 0, 0)))
        archive.writestr("b.png", png((0, 255, 0), 80))
    zipped = await client.upload_bytes("dev", buffer.getvalue(), "application/zip")
    source = ImageSource(artifacts=ArtifactKeys(keys=[zipped.key]), field="images")
    dataset = await client.import_dataset("dev", source)
    assert [(image.id, image.width_px) for image in dataset.images] == [("a.png", 64), ("b.png", 80)]
    assert await client.get_dataset(dataset.key) == dataset
    with pytest.raises(BadInput, match="images: 3 usable images"):
        await client.import_dataset("dev", source, min_usable_images=3)


async def test_stored_pictures_become_a_dataset(client: StorageClient) -> None:
    keys = [(await client.upload_bytes("dev", png((n, 0, 0)), "image/png")).key for n in range(3)]
    images = [DatasetImage(id=f"{n}.png", key=key) for n, key in enumerate(keys)]
    dataset = await client.create_dataset("dev", images[::-1])
    assert [image.key for image in dataset.images] == keys
    assert await client.get_dataset(dataset.key) == dataset
    with pytest.raises(NotFound):
        await client.create_dataset("other", images)


async def test_the_model_called_pocket_is_the_default_base(client: StorageClient) -> None:
    model = await client.get_model("dev")
    assert (model.model, model.manifest.note) == ("pocket", "a small one")
    assert await client.read_manifest(model.manifest_key) == model.manifest
    assert [found.model for found in (await client.list_models("dev")).models] == ["pocket"]


async def test_a_fine_tune_shares_its_bases_files(client: StorageClient, tmp_path: Path) -> None:
    base = await client.get_model("dev")
    unet = await client.upload_bytes("dev", b"tuned weights", "application/octet-stream")
    manifest = ModelManifest(
        format=MODEL_FORMAT_DIFFUSERS,
        family=base.manifest.family,
        base_manifest_key=base.manifest_key,
        base_model=base.model,
        lineage=Lineage(job_id="j1", seed=7, steps=3),
    )
    path = "unet/diffusion_pytorch_model.safetensors"
    manifest.components.extend(c for c in base.manifest.components if c.path != path)
    manifest.components.append(
        ModelComponent(path=path, key=unet.key, digest=unet.digest, size_bytes=unet.size_bytes)
    )
    model = await client.register_model("dev", "j1", manifest, "My dog")
    assert await client.register_model("dev", "j1", manifest) == model
    assert (await client.get_model("dev", "j1")).manifest.lineage.seed == 7
    assert [found.model for found in (await client.list_models("dev")).models] == ["j1", "pocket"]

    cache = BlobCache(tmp_path / "cache", 10**9)
    folders = [(await cache.fetch_model(client, found)).folder for found in (base, model)]
    assert (folders[1] / path).read_bytes() == b"tuned weights"
    same = [os.path.samefile(folders[0] / c.path, folders[1] / c.path) for c in base.manifest.components]
    assert same.count(False) == 1
    cache.close()

    await client.delete_model("dev", "j1")
    with pytest.raises(NotFound):
        await client.get_model("dev", "j1")
    with pytest.raises(InvalidSpec):
        await client.delete_model("", "pocket")


async def test_a_link_works_without_a_key_until_it_expires(client: StorageClient) -> None:
    blob = await client.upload_bytes("dev", png((1, 2, 3)), "image/png")
    link = await client.create_file_link("dev", blob.key, "0-0.png", 0.5)
    _, files, token, name = link.path.split("/")
    assert (files, name) == ("files", "0-0.png")
    responses = [response async for response in client.read_file(token, name)]
    assert (responses[0].blob.media_type, responses[0].blob.size_bytes) == ("image/png", blob.size_bytes)
    assert b"".join(response.data for response in responses) == png((1, 2, 3))
    part = [response.data async for response in client.read_file(token, name, 1, 3)]
    assert b"".join(part) == b"PNG"
    with pytest.raises(NotFound):
        await anext(client.read_file(token, "other.png"))
    await asyncio.sleep(0.6)
    with pytest.raises(NotFound):
        await anext(client.read_file(token, name))


async def test_a_link_to_another_projects_artifact_is_refused(client: StorageClient) -> None:
    blob = await client.upload_bytes("dev", b"x", "text/plain")
    with pytest.raises(NotFound):
        await client.create_file_link("other", blob.key, "x.txt")
    with pytest.raises(InvalidSpec):
        await client.create_file_link("", blob.key, "x.txt")


async def test_a_link_outlives_the_server(client: StorageClient, settings: StorageSettings) -> None:
    from services.storage.server import running

    blob = await client.upload_bytes("dev", b"x", "text/plain")
    token = (await client.create_file_link("dev", blob.key, "x.txt")).path.split("/")[2]
    async with running(settings) as other, Channel(other.server.address) as channel:
        data = [response.data async for response in StorageClient(channel).read_file(token, "x.txt")]
    assert b"".join(data) == b"x"
