"""Datasets: users' pictures fetched, checked, made uniform and stored; and the manifests that list them.

Owns the rules of what is a usable set of pictures, and the texts that say why one is not. The way out belongs to
``services.adapters.egress``, decoding to :mod:`services.storage.decoding`, bytes to the artifact store. All is named
by content: importing the same bytes again writes nothing new and gives the same manifest.
"""

import asyncio
import contextlib
import logging
import shutil
import struct
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from likeness.storage.v1.artifact_pb2 import (
    CaptionTag,
    Dataset,
    DatasetImage,
    DatasetReport,
    ImageCaption,
    ImageSettings,
)
from likeness.training.v1.training_job_pb2 import ImageSource

from services.adapters.egress import Egress, with_field
from services.adapters.manifests import digest_of, from_json, to_json
from services.domain.artifacts import blob_key, digest_of_key, is_blob_key, project_of_key
from services.domain.errors import BadInput, InvalidSpec, NotFound
from services.domain.ports import ArtifactStore
from services.storage import decoding
from services.storage.archives import ArchiveLimits
from services.storage.captions import Description
from services.storage.data_report import CAPTION_SOURCES, MAX_LISTED_FILES, duplicates, report_of, warnings_of
from services.storage.decode_child import DecodeTask
from services.storage.decoding import Decoded, DecodedImage, DecodeLimits, decode
from services.storage.images import MAX_PIXELS, WHITE, Colour, RefusalKind

logger = logging.getLogger(__name__)

MAX_MANIFEST_BYTES: Final = 64 << 20

_ZIP_SIGNATURES: Final = (b"PK\x03\x04", b"PK\x05\x06")
_PNG_HEADER: Final = struct.Struct(">8s4x4sII")


@dataclass(frozen=True, slots=True)
class ImportLimits:
    """What one import may cost.

    Attributes:
        max_archive_bytes: an archive as it is fetched.
        max_image_bytes: a single picture as it is fetched.
        fetch_timeout_s: for one archive or picture, redirects and retries included.
        parallel_fetches: single pictures fetched at a time.
        parallel_imports: imports decoding at a time; others wait.
        max_pixels: pictures with more are skipped.
        background: what shows through transparent parts of pictures, 8-bit sRGB.
    """

    max_archive_bytes: int = 2 << 30
    max_image_bytes: int = 256 << 20
    fetch_timeout_s: float = 1800.0
    parallel_fetches: int = 4
    parallel_imports: int = 2
    max_pixels: int = MAX_PIXELS
    background: Colour = WHITE
    archive: ArchiveLimits = field(default_factory=ArchiveLimits)
    decode: DecodeLimits = field(default_factory=DecodeLimits)


class DatasetImporter:
    """Makes datasets of users' pictures. Safe to use from several tasks at once."""

    def __init__(
        self, store: ArtifactStore, egress: Egress, work_folder: Path, limits: ImportLimits | None = None
    ) -> None:
        """Takes what it works with.

        Args:
            store: where pictures and manifests go.
            egress: the way to users' addresses.
            work_folder: for files on their way; made if missing. An import that is killed with its process leaves
                its folder there: the owner sweeps, as an artifact store does its staging folder.
            limits: what one import may cost.
        """
        self._store = store
        self._egress = egress
        self._work_folder = work_folder
        self._limits = limits or ImportLimits()
        self._turn = asyncio.Semaphore(self._limits.parallel_imports)

    async def import_source(
        self,
        project: str,
        source: ImageSource,
        *,
        read_captions: bool = False,
        min_usable_images: int = 0,
    ) -> Dataset:
        """Imports pictures from wherever a request says.

        Args:
            project: owner of what is stored.
            source: an archive's URL, pictures' URLs, stored artifacts, or a dataset made earlier.
            read_captions: also read what files beside the pictures and in their folders say of them.
            min_usable_images: fewer usable pictures fail; 0: one is enough.

        Returns:
            The dataset, stored.

        Raises:
            BadInput: the download, the archive or the pictures cannot be used; one sentence, naming the field.
            EgressRefused: an address that is not gone to; likewise.
            Unavailable: the store, or this service's decoder, does not work at the moment.
        """
        try:
            if source.WhichOneof("source") == "dataset_key":
                dataset = await self.read(source.dataset_key, project)
            else:
                dataset = await self._import(project, source, read_captions)
            if len(dataset.images) < min_usable_images:
                raise BadInput(f"{min_usable_images} usable images are needed, {len(dataset.images)} found")
            return dataset
        except NotFound as error:
            raise BadInput(str(error), source.field) from error
        except InvalidSpec as error:
            raise with_field(error, source.field) from error

    async def read(self, key: str, project: str = "") -> Dataset:
        """Reads a dataset.

        Args:
            key: artifact key of its manifest.
            project: who asks; another project's dataset is not found. Empty: a trusted service.

        Raises:
            NotFound: there is none.
            BadInput: what the key names is not a dataset.
        """
        _check_key(key, project)
        parts: list[bytes] = []
        async for part in self._store.read(key, limit=MAX_MANIFEST_BYTES):
            parts.append(part)
        dataset = from_json(b"".join(parts), Dataset)
        dataset.key, dataset.digest = key, digest_of_key(key)
        return dataset

    async def create(self, project: str, images: Sequence[DatasetImage]) -> Dataset:
        """Makes a dataset of pictures that are stored already as PNG.

        Args:
            project: owner.
            images: `id`, `key` and `caption` of each are read.

        Returns:
            The dataset, stored; its pictures in the order of ids.

        Raises:
            NotFound: a picture is not stored, or belongs to another project.
            BadInput: a picture is not a PNG, or two have the same id.
        """
        if not images:
            raise BadInput("a dataset needs at least one picture")
        if len({image.id for image in images}) != len(images):
            raise BadInput("two pictures have the same id")
        described = [await self._described(project, image) for image in images]
        described.sort(key=lambda image: image.id)
        twice = duplicates((image.id, image.digest) for image in described)
        report = DatasetReport(
            read=len(described), duplicates=twice[:MAX_LISTED_FILES], duplicate_count=len(twice)
        )
        return await self._store_manifest(project, Dataset(images=described, report=report))

    async def _import(self, project: str, source: ImageSource, read_captions: bool) -> Dataset:
        async with self._turn, self._folder() as folder:
            task = await self._gathered(project, source, folder)
            task.read_captions = read_captions
            decoded = await decode(task.frozen(folder, self._limits), self._limits.decode)
            _check_usable(decoded, "the archive holds" if task.archive else "the list holds")
            return await self._stored(project, decoded)

    @contextlib.asynccontextmanager
    async def _folder(self) -> AsyncIterator[Path]:
        """A folder of its own for one import, removed whatever happens."""
        await asyncio.to_thread(self._work_folder.mkdir, parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="import-", dir=self._work_folder))
        try:
            yield folder
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _gathered(self, project: str, source: ImageSource, folder: Path) -> "_Gathered":
        """Brings the source's bytes into the folder, and tells an archive from pictures."""
        match source.WhichOneof("source"):
            case "archive_url":
                path = folder / "archive"
                await self._fetch(source.archive_url, path, self._limits.max_archive_bytes)
                return _Gathered(archive=path)
            case "image_urls":
                return _Gathered(files=await self._fetch_all(source.image_urls.urls, folder))
            case "artifacts":
                return await self._copy_all(project, source.artifacts.keys, folder)
        raise BadInput("names no source of pictures")

    async def _fetch(self, url: str, path: Path, max_bytes: int) -> None:
        timeout_s = self._limits.fetch_timeout_s
        await self._egress.fetch_to_file(url, path, max_bytes=max_bytes, total_timeout_s=timeout_s)

    async def _fetch_all(self, urls: Sequence[str], folder: Path) -> list[tuple[str, Path]]:
        """Fetches single pictures, some at a time; the first that fails ends all."""
        files = [(_file_id(index, url), folder / f"{index:06d}.in") for index, url in enumerate(urls)]
        turn = asyncio.Semaphore(self._limits.parallel_fetches)

        async def fetch(url: str, path: Path) -> None:
            async with turn:
                await self._fetch(url, path, self._limits.max_image_bytes)

        try:
            async with asyncio.TaskGroup() as group:
                for url, (_, path) in zip(urls, files, strict=True):
                    group.create_task(fetch(url, path))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from failed
        return files

    async def _copy_all(self, project: str, keys: Sequence[str], folder: Path) -> "_Gathered":
        """Copies stored artifacts to the folder; a single one may be an archive."""
        files = []
        for index, key in enumerate(keys):
            path = folder / f"{index:06d}.in"
            await self._copy(project, key, path)
            files.append((f"{index:04d}", path))
        if len(files) == 1 and await asyncio.to_thread(_is_zip, files[0][1]):
            return _Gathered(archive=files[0][1])
        return _Gathered(files=files)

    async def _copy(self, project: str, key: str, path: Path) -> None:
        _check_key(key, project)
        size_bytes = 0
        with path.open("wb") as file:
            async for part in self._store.read(key):
                size_bytes += len(part)
                if size_bytes > self._limits.max_archive_bytes:
                    raise BadInput(f"the file is larger than {self._limits.max_archive_bytes} bytes")
                await asyncio.to_thread(file.write, part)

    async def _stored(self, project: str, decoded: Decoded) -> Dataset:
        """Stores each picture once, then the manifest that names them."""
        images = []
        for image in decoded.images:
            await self._store.put_file(blob_key(project, image.digest), image.path)
            images.append(_listed(project, image))
        report = report_of(decoded)
        dataset = Dataset(images=images, warnings=warnings_of(decoded, report), report=report)
        return await self._store_manifest(project, dataset)

    async def _store_manifest(self, project: str, dataset: Dataset) -> Dataset:
        data = to_json(dataset)
        if len(data) > MAX_MANIFEST_BYTES:
            raise BadInput(f"names and captions of the pictures take more than {MAX_MANIFEST_BYTES} bytes")
        digest = digest_of(data)
        key = blob_key(project, digest)
        async with self._folder() as folder:
            path = folder / "manifest.json"
            await asyncio.to_thread(path.write_bytes, data)
            await self._store.put_file(key, path)
        dataset.key, dataset.digest = key, digest
        logger.info("dataset stored", extra={"dataset": digest, "images": len(dataset.images)})
        return dataset

    async def _described(self, project: str, image: DatasetImage) -> DatasetImage:
        """Looks up what a stored picture is: its size in bytes and, from its first bytes, in pixels."""
        _check_key(image.key, project)
        found = await self._store.stat(image.key)
        if found is None:
            raise NotFound(f"the picture {image.id} is not stored")
        head = b"".join([part async for part in self._store.read(image.key, limit=_PNG_HEADER.size)])
        if len(head) < _PNG_HEADER.size:
            raise BadInput(f"{image.id} is not a PNG")
        signature, chunk, width_px, height_px = _PNG_HEADER.unpack(head)
        if (signature, chunk) != (b"\x89PNG\r\n\x1a\n", b"IHDR"):
            raise BadInput(f"{image.id} is not a PNG")
        return DatasetImage(
            id=image.id,
            key=image.key,
            digest=digest_of_key(image.key),
            width_px=width_px,
            height_px=height_px,
            caption=image.caption,
            size_bytes=found.size_bytes,
        )


@dataclass(slots=True)
class _Gathered:
    """A source's bytes on disk: either one archive, or single files with their ids."""

    archive: Path | None = None
    files: Sequence[tuple[str, Path]] = ()
    read_captions: bool = False

    def frozen(self, folder: Path, limits: ImportLimits) -> DecodeTask:
        """The decoder's task; its PNGs go into the same folder."""
        return DecodeTask(
            folder=str(folder),
            archive=str(self.archive or ""),
            files=tuple((name, str(path)) for name, path in self.files),
            read_captions=self.read_captions,
            max_pixels=limits.max_pixels,
            background=limits.background,
            archive_limits=limits.archive,
        )


def _check_key(key: str, project: str) -> None:
    """Refuses keys of other projects with the words for absent ones; the catalogue is everybody's."""
    if not is_blob_key(key):
        raise NotFound("there is no such artifact")
    owner = project_of_key(key)
    if project and owner and owner != project:
        raise NotFound("there is no such artifact")


def _check_usable(decoded: Decoded, holder: str) -> None:
    """Fails a source without a readable picture, or with more unreadable ones than others."""
    unreadable = [file for file in decoded.skipped if file.kind is RefusalKind.UNREADABLE]
    too_small = [file for file in decoded.skipped if file.kind is RefusalKind.TOO_SMALL]
    meant = len(decoded.images) + len(unreadable) + len(too_small)
    if not decoded.images:
        raise BadInput(f"{holder} no readable image{_example([*unreadable, *too_small])}")
    if 2 * len(unreadable) > meant:
        count = f"{len(unreadable)} of {meant} images cannot be read"
        raise BadInput(f"more than half are unreadable: {count}{_example(unreadable)}")


def _example(skipped: Sequence[decoding.SkippedFile]) -> str:
    return f" ({skipped[0].id}: {skipped[0].why})" if skipped else ""


def _listed(project: str, image: DecodedImage) -> DatasetImage:
    listed = DatasetImage(
        id=image.id,
        key=blob_key(project, image.digest),
        digest=image.digest,
        width_px=image.width_px,
        height_px=image.height_px,
        caption=image.caption or "",
        size_bytes=image.size_bytes,
        source_type=image.type_name,
        warnings=[*image.changes, *image.faults],
    )
    if image.description is not None:
        listed.caption_parts.CopyFrom(_caption_parts(image.description))
        listed.settings.CopyFrom(_settings(image.description))
    return listed


def _caption_parts(description: Description) -> ImageCaption:
    return ImageCaption(
        main_prompt=description.main_prompt or "",
        text=description.text or "",
        tags=[CaptionTag(text=tag.text, weight=tag.weight) for tag in description.tags],
        source=CAPTION_SOURCES[description.source],
        max_caption_chars=description.max_caption_chars or 0,
    )


def _settings(description: Description) -> ImageSettings:
    return ImageSettings(
        multiplier=description.multiplier,
        rating=description.rating,
        caption_dropout=description.caption_dropout,
        flip_probability=description.flip_probability,
        shuffle_tags=description.shuffle_tags,
        loss_scale=description.loss_scale,
        batch_id=description.batch_id or "",
    )


def _file_id(index: int, url: str) -> str:
    """A stable id for a single picture: its place in the list, and its name without query."""
    name = url.partition("?")[0].partition("#")[0].rpartition("/")[2]
    kept = "".join(char if char.isalnum() or char in "._-" else "_" for char in name)[:100]
    return f"{index:04d}-{kept}" if kept else f"{index:04d}"


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in _ZIP_SIGNATURES
