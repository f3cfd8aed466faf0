"""Imports from end to end: a real server on loopback, the confined decoder, a store in memory."""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import AsyncIterator, Mapping
from ipaddress import ip_network
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from google.protobuf import json_format
from likeness.storage.v1.artifact_pb2 import CaptionSource, DatasetImage, FindingKind, ImageCaption
from likeness.training.v1.training_job_pb2 import ArtifactKeys, ImageSource, ImageUrls
from PIL import Image

from services.adapters.egress import Egress, EgressPolicy
from services.adapters.memory_artifacts import InMemoryArtifactStore
from services.domain.artifacts import blob_key
from services.domain.errors import BadInput, EgressRefused, LikenessError, NotFound
from services.storage.archives import ArchiveLimits
from services.storage.datasets import DatasetImporter, ImportLimits

PROJECT = "studio"
FIELD = "concepts[0].instance_data"


def picture(colour: str = "red", size: tuple[int, int] = (80, 72), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def zipped(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, body in files.items():
            archive.writestr(name, body)
    return buffer.getvalue()


class Web:
    """Files by path on a real server."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.origin = ""

    def put(self, name: str, body: bytes) -> str:
        self.files[f"/{name}"] = body
        return f"{self.origin}/{name}"

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = self.files.get(request.path)
        return web.Response(status=404) if body is None else web.Response(body=body)


@pytest.fixture
async def site() -> AsyncIterator[Web]:
    site = Web()
    app = web.Application()
    app.router.add_get("/{tail:.*}", site.answer)
    async with TestServer(app, host="127.0.0.1") as server:
        site.origin = f"http://127.0.0.1:{server.port}"
        yield site


@pytest.fixture
def store() -> InMemoryArtifactStore:
    return InMemoryArtifactStore()


@pytest.fixture
def importer(store: InMemoryArtifactStore, tmp_path: Path) -> DatasetImporter:
    egress = Egress(EgressPolicy(allow=(ip_network("127.0.0.1"),), retry_pause_s=0.01))
    limits = ImportLimits(max_archive_bytes=1 << 20, max_image_bytes=1 << 16, fetch_timeout_s=10.0)
    return DatasetImporter(store, egress, tmp_path / "work", limits)


def archive_at(url: str) -> ImageSource:
    return ImageSource(archive_url=url, field=FIELD)


async def failure(
    kind: type[LikenessError],
    importer: DatasetImporter,
    source: ImageSource,
    tmp_path: Path,
    at_least: int = 0,
) -> str:
    """Imports, expects the failure, checks that no file stays behind, returns the sentence."""
    with pytest.raises(kind) as caught:
        await importer.import_source(PROJECT, source, min_usable_images=at_least)
    assert not any(files for _, _, files in os.walk(tmp_path / "work"))
    return str(caught.value)


async def test_archive_becomes_a_stored_dataset(
    importer: DatasetImporter, store: InMemoryArtifactStore, site: Web, tmp_path: Path
) -> None:
    files = {
        "rex/2.jpg": picture("blue", kind="JPEG"),
        "rex/1.png": picture("red"),
        "rex/again.bmp": picture("red", kind="BMP"),
        "rex/notes.pdf": b"%PDF-1.7",
        "rex/1.txt": b"a red wall",
        "__MACOSX/rex/._1.png": b"x",
    }
    url = site.put("rex.zip", zipped(files))
    dataset = await importer.import_source(PROJECT, archive_at(url), read_captions=True)
    assert [(image.id, image.source_type, image.caption) for image in dataset.images] == [
        ("rex/1.png", "PNG", "a red wall"),
        ("rex/2.jpg", "JPEG", ""),
        ("rex/again.bmp", "BMP", ""),
    ]
    for image in dataset.images:
        data = store.objects[image.key][0]
        assert hashlib.sha256(data).hexdigest() == image.digest
        assert (image.key, image.size_bytes) == (blob_key(PROJECT, image.digest), len(data))
        assert (image.width_px, image.height_px) == (80, 72)
        with Image.open(io.BytesIO(data)) as stored:
            assert (stored.format, stored.mode, stored.size) == ("PNG", "RGB", (80, 72))
    assert (dataset.report.read, dataset.report.ignored) == (3, 2)
    assert (dataset.report.skipped_count, dataset.report.duplicate_count) == (1, 1)
    assert list(dataset.report.duplicates) == ["rex/again.bmp"]
    assert [(file.id, file.why) for file in dataset.report.skipped] == [("rex/notes.pdf", "is not a picture")]
    assert list(dataset.warnings) == [
        "rex/notes.pdf was skipped: is not a picture",
        "rex/again.bmp has the same pixels as an earlier picture",
    ]
    assert os.listdir(tmp_path / "work") == []


async def test_manifest_is_a_json_blob_that_reads_back(
    importer: DatasetImporter, store: InMemoryArtifactStore, site: Web
) -> None:
    dataset = await importer.import_source(
        PROJECT, archive_at(site.put("a.zip", zipped({"a.png": picture()})))
    )
    assert dataset.key == blob_key(PROJECT, dataset.digest)
    body = store.objects[dataset.key][0]
    assert hashlib.sha256(body).hexdigest() == dataset.digest
    assert json.loads(body)["images"][0]["id"] == "a.png"
    assert await importer.read(dataset.key, PROJECT) == dataset
    again = await importer.import_source(PROJECT, ImageSource(dataset_key=dataset.key, field=FIELD))
    assert again == dataset


async def test_same_contents_give_the_same_manifest_and_write_nothing_new(
    importer: DatasetImporter, store: InMemoryArtifactStore, site: Web
) -> None:
    files = {"b.png": picture("blue"), "a.png": picture("red")}
    first = await importer.import_source(PROJECT, archive_at(site.put("1.zip", zipped(files))))
    before = dict(store.objects)
    turned = dict(reversed(files.items()))
    second = await importer.import_source(PROJECT, archive_at(site.put("2.zip", zipped(turned))))
    assert second == first
    assert store.objects == before


async def test_single_pictures_are_fetched_in_the_order_given(importer: DatasetImporter, site: Web) -> None:
    urls = [site.put(f"{name}.png", picture(name)) + "?token=hunter2" for name in ("red", "green", "blue")]
    dataset = await importer.import_source(PROJECT, ImageSource(image_urls=ImageUrls(urls=urls), field=FIELD))
    assert [image.id for image in dataset.images] == ["0000-red.png", "0001-green.png", "0002-blue.png"]


async def test_stored_artifacts_are_imported_as_pictures_or_as_one_archive(
    importer: DatasetImporter, store: InMemoryArtifactStore
) -> None:
    keys = []
    for body in (picture("red", kind="JPEG"), picture("blue"), zipped({"in/a.png": picture()})):
        keys.append(blob_key(PROJECT, hashlib.sha256(body).hexdigest()))
        store.objects[keys[-1]] = (body, 0)
    pictures = await importer.import_source(PROJECT, ImageSource(artifacts=ArtifactKeys(keys=keys[:2])))
    archive = await importer.import_source(PROJECT, ImageSource(artifacts=ArtifactKeys(keys=keys[2:])))
    assert [image.id for image in pictures.images] == ["0000", "0001"]
    assert [image.id for image in archive.images] == ["in/a.png"]


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "the archive holds no readable image"),
        ({"readme.md": b"hello", "x.pdf": b"%PDF"}, "the archive holds no readable image"),
        ({"a.jpg": b"<html>"}, "the archive holds no readable image (a.jpg: is not a picture)"),
        (
            {"a.heic": b"\0\0\0\x18ftypheic" + bytes(30)},
            "the archive holds no readable image (a.heic: HEIC pictures are not supported)",
        ),
        (
            {"a.png": picture(size=(20, 20))},
            "the archive holds no readable image (a.png: 20x20 pixels are too few: both sides need 64)",
        ),
        (
            {"1.png": picture(), "2.png": picture()[:60], "3.png": picture()[:60]},
            "more than half are unreadable: 2 of 3 images cannot be read (2.png: the file is truncated)",
        ),
        ({"../a.png": picture()}, "the archive holds a file name that leads outside of it"),
    ],
    ids=["empty", "no picture", "html", "heic", "small", "half", "traversal"],
)
async def test_useless_archive_fails_with_one_sentence_and_stores_nothing(
    files: dict[str, bytes],
    sentence: str,
    importer: DatasetImporter,
    store: InMemoryArtifactStore,
    site: Web,
    tmp_path: Path,
) -> None:
    source = archive_at(site.put("a.zip", zipped(files)) + "?token=hunter2")
    assert await failure(BadInput, importer, source, tmp_path) == f"{FIELD}: {sentence}"
    assert store.objects == {}


async def test_half_unreadable_is_still_good_and_warned_about(importer: DatasetImporter, site: Web) -> None:
    url = site.put("a.zip", zipped({"1.png": picture(), "2.png": picture()[:60]}))
    dataset = await importer.import_source(PROJECT, archive_at(url))
    assert list(dataset.warnings) == ["2.png was skipped: the file is truncated"]


async def test_file_that_is_no_archive_is_named_as_such(
    importer: DatasetImporter, site: Web, tmp_path: Path
) -> None:
    source = archive_at(site.put("a.zip", b"<html>login</html>"))
    assert await failure(BadInput, importer, source, tmp_path) == f"{FIELD}: not a zip archive"


async def test_missing_and_oversize_files_are_named_without_their_query(
    importer: DatasetImporter, site: Web, tmp_path: Path
) -> None:
    missing = archive_at(f"{site.origin}/gone.zip?X-Signature=hunter2")
    assert await failure(BadInput, importer, missing, tmp_path) == f"{FIELD}: {site.origin} answered 404"
    large = archive_at(site.put("large.zip", bytes(2 << 20)))
    sentence = await failure(BadInput, importer, large, tmp_path)
    assert sentence == f"{FIELD}: the file is larger than 1048576 bytes"


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://10.0.0.1/a.zip", "the address 10.0.0.1 is not reachable from this service (private)"),
        ("http://[::1]/a.zip", "the address ::1 is not reachable from this service (loopback)"),
        ("http://u:hunter2@example.org/", "credentials in the address are not accepted"),
        ("file:///etc/passwd", "only http and https addresses are fetched"),
    ],
)
async def test_forbidden_address_is_named_with_its_field(
    url: str, sentence: str, importer: DatasetImporter, tmp_path: Path
) -> None:
    assert await failure(EgressRefused, importer, archive_at(url), tmp_path) == f"{FIELD}: {sentence}"


async def test_one_bad_address_in_a_list_fails_the_import(
    importer: DatasetImporter, site: Web, tmp_path: Path
) -> None:
    urls = [site.put("a.png", picture()), f"{site.origin}/gone.png"]
    source = ImageSource(image_urls=ImageUrls(urls=urls), field=FIELD)
    assert await failure(BadInput, importer, source, tmp_path) == f"{FIELD}: {site.origin} answered 404"


async def test_too_few_usable_pictures_fail(importer: DatasetImporter, site: Web, tmp_path: Path) -> None:
    source = archive_at(site.put("a.zip", zipped({"1.png": picture()})))
    sentence = await failure(BadInput, importer, source, tmp_path, at_least=3)
    assert sentence == f"{FIELD}: 3 usable images are needed, 1 found"


async def test_another_projects_artifacts_are_not_found(
    importer: DatasetImporter, store: InMemoryArtifactStore, site: Web, tmp_path: Path
) -> None:
    theirs = await importer.import_source(
        "rivals", archive_at(site.put("a.zip", zipped({"a.png": picture()})))
    )
    for source in (
        ImageSource(dataset_key=theirs.key, field=FIELD),
        ImageSource(artifacts=ArtifactKeys(keys=[theirs.images[0].key]), field=FIELD),
        ImageSource(artifacts=ArtifactKeys(keys=["../../etc/passwd"]), field=FIELD),
        ImageSource(dataset_key=blob_key(PROJECT, "0" * 64), field=FIELD),
    ):
        assert (await failure(BadInput, importer, source, tmp_path)).startswith(f"{FIELD}: ")
    with pytest.raises(NotFound):
        await importer.create(PROJECT, [DatasetImage(id="a", key=theirs.images[0].key)])


async def test_dataset_is_made_of_stored_pictures(
    importer: DatasetImporter, store: InMemoryArtifactStore
) -> None:
    keys = {}
    for colour in ("red", "blue"):
        body = picture(colour, (70, 90))
        keys[colour] = blob_key(PROJECT, hashlib.sha256(body).hexdigest())
        store.objects[keys[colour]] = (body, 0)
    given = [
        DatasetImage(id="drawn/1.png", key=keys["blue"], caption="a wall"),
        DatasetImage(id="drawn/0.png", key=keys["red"]),
        DatasetImage(id="drawn/2.png", key=keys["red"]),
    ]
    dataset = await importer.create(PROJECT, given)
    assert [(image.id, image.key, image.caption) for image in dataset.images] == [
        ("drawn/0.png", keys["red"], ""),
        ("drawn/1.png", keys["blue"], "a wall"),
        ("drawn/2.png", keys["red"], ""),
    ]
    assert {(image.width_px, image.height_px) for image in dataset.images} == {(70, 90)}
    assert list(dataset.report.duplicates) == ["drawn/2.png"]
    assert await importer.read(dataset.key) == dataset


async def test_dataset_is_not_made_of_anything_but_stored_png_files(
    importer: DatasetImporter, store: InMemoryArtifactStore
) -> None:
    body = picture(kind="JPEG")
    key = blob_key(PROJECT, hashlib.sha256(body).hexdigest())
    store.objects[key] = (body, 0)
    with pytest.raises(BadInput, match="not a PNG"):
        await importer.create(PROJECT, [DatasetImage(id="a", key=key)])
    with pytest.raises(BadInput, match="same id"):
        await importer.create(PROJECT, [DatasetImage(id="a", key=key)] * 2)
    with pytest.raises(BadInput, match="at least one"):
        await importer.create(PROJECT, [])
    with pytest.raises(NotFound):
        await importer.create(PROJECT, [DatasetImage(id="a", key=blob_key(PROJECT, "0" * 64))])


async def test_source_without_a_kind_is_bad_input(importer: DatasetImporter, tmp_path: Path) -> None:
    assert (
        await failure(BadInput, importer, ImageSource(field=FIELD), tmp_path)
        == f"{FIELD}: names no source of pictures"
    )


async def test_captions_and_settings_reach_the_dataset_s_document(
    importer: DatasetImporter, store: InMemoryArtifactStore, site: Web
) -> None:
    files = {
        "rex/1.png": picture("red"),
        "rex/1.yaml": b"main_prompt: rex\ntags: [asleep, {tag: red, weight: 2}]\nmax_caption_length: 50\nrating: 2",
        "rex/2_night.png": picture("blue"),
        "rex/global.yaml": b"tags: [a dog]\nmultiply: much",
        "rex/flip_p.txt": b"0.5",
        "3.png": picture("green"),
        "3.txt": b"a lake",
    }
    url = site.put("rex.zip", zipped(files))
    dataset = await importer.import_source(PROJECT, archive_at(url), read_captions=True)
    lake, first, second = dataset.images
    assert json_format.MessageToDict(first.caption_parts) == {
        "mainPrompt": "rex",
        "tags": [{"text": "asleep"}, {"text": "red", "weight": 2.0}, {"text": "a dog"}],
        "source": "CAPTION_SOURCE_YAML",
        "maxCaptionChars": 50,
    }
    assert json_format.MessageToDict(first.settings) == {"rating": 2.0, "flipProbability": 0.5}
    assert json_format.MessageToDict(second.caption_parts) == {
        "text": "2",
        "tags": [{"text": "a dog"}],
        "source": "CAPTION_SOURCE_FILE_NAME",
    }
    assert lake.HasField("settings")
    assert [image.caption for image in dataset.images] == ["a lake", "rex, asleep, red, a dog", ""]
    assert {count.source: count.images for count in dataset.report.captions} == {
        CaptionSource.CAPTION_SOURCE_YAML: 1,
        CaptionSource.CAPTION_SOURCE_TEXT: 1,
        CaptionSource.CAPTION_SOURCE_FILE_NAME: 1,
    }
    (fault,) = dataset.report.findings
    assert (fault.kind, fault.count) == (FindingKind.FINDING_KIND_DESCRIPTION_FAULT, 1)
    sentence = "'multiply' is not a number from 0 to 1000 and was ignored"
    assert [(file.id, file.detail) for file in fault.files] == [("rex/global.yaml", sentence)]
    assert list(dataset.warnings) == [f"rex/global.yaml: {sentence}"]
    assert await importer.read(dataset.key, PROJECT) == dataset


async def test_sidecar_files_say_nothing_unless_they_are_asked(importer: DatasetImporter, site: Web) -> None:
    files = {"1.png": picture("red"), "1.txt": b"a wall", "multiply.txt": b"lots"}
    dataset = await importer.import_source(PROJECT, archive_at(site.put("a.zip", zipped(files))))
    (image,) = dataset.images
    assert (image.caption, image.HasField("caption_parts"), image.HasField("settings")) == ("", False, False)
    assert list(dataset.warnings) == []
    assert list(dataset.report.captions) == []


async def test_single_pictures_have_settings_of_their_own_and_no_caption(
    importer: DatasetImporter, site: Web
) -> None:
    source = ImageSource(image_urls=ImageUrls(urls=[site.put("a robot_1.png", picture())]), field=FIELD)
    dataset = await importer.import_source(PROJECT, source, read_captions=True)
    (image,) = dataset.images
    assert image.HasField("caption_parts")
    assert image.caption_parts == ImageCaption()


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        (ImportLimits(archive=ArchiveLimits(max_files=1)), "the archive holds more than 1 files"),
        (
            ImportLimits(archive=ArchiveLimits(max_unpacked_bytes=99)),
            "the archive unpacks to more than 99 bytes",
        ),
        (
            ImportLimits(max_pixels=5000),
            "the archive holds no readable image (1.png: 80x72 pixels are more than 0.005 megapixels)",
        ),
    ],
    ids=["files", "unpacked", "pixels"],
)
async def test_the_operator_s_limits_reach_the_decoder(
    limits: ImportLimits, sentence: str, store: InMemoryArtifactStore, site: Web, tmp_path: Path
) -> None:
    egress = Egress(EgressPolicy(allow=(ip_network("127.0.0.1"),)))
    importer = DatasetImporter(store, egress, tmp_path / "work", limits)
    source = archive_at(site.put("a.zip", zipped({"1.png": picture(), "2.png": picture("blue")})))
    assert await failure(BadInput, importer, source, tmp_path) == f"{FIELD}: {sentence}"


async def test_the_operator_s_background_reaches_the_decoder(
    store: InMemoryArtifactStore, site: Web, tmp_path: Path
) -> None:
    egress = Egress(EgressPolicy(allow=(ip_network("127.0.0.1"),)))
    importer = DatasetImporter(store, egress, tmp_path / "work", ImportLimits(background=(1, 2, 3)))
    buffer = io.BytesIO()
    Image.new("RGBA", (80, 72)).save(buffer, "PNG")
    dataset = await importer.import_source(
        PROJECT, archive_at(site.put("a.zip", zipped({"a.png": buffer.getvalue()})))
    )
    with Image.open(io.BytesIO(store.objects[dataset.images[0].key][0])) as stored:
        assert stored.getpixel((9, 9)) == (1, 2, 3)
