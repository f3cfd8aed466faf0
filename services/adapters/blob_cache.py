"""Local copies of blobs that several processes of one machine share, and model folders made of them.

    <root>/blobs/<sha256>              one file a blob; the access time says when it was used last
    <root>/holders/<id>/               one process's own: downloads under way
    <root>/holders/<id>/<digest>/...   and models as folders: hard links to the blobs

No lock guards the blobs. A blob appears by a rename, with its digest checked. Whoever uses one has a hard link of
its own, so that eviction can never pull a file from under a reader, and a blob with a second link counts as in use
and stays. Folders of processes that died are swept by the next one that starts.
"""

import asyncio
import contextlib
import errno
import logging
import os
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from likeness.storage.v1.model_pb2 import Model, ModelManifest

from services.adapters.owned_folder import OwnedFolder, sweep_dead
from services.adapters.storage_client import StorageClient
from services.domain.artifacts import digest_of_key
from services.domain.errors import BadInput, Unavailable

logger = logging.getLogger(__name__)

HOLDERS = "holders"


@dataclass(frozen=True, slots=True)
class FetchedModel:
    """A model on this machine.

    Attributes:
        folder: holds the components at their paths; read only, valid until released.
        manifest: what the model is made of.
        manifest_key: artifact key of the manifest.
    """

    folder: Path
    manifest: ModelManifest
    manifest_key: str


class BlobCache:
    """Blobs on this machine, up to a size; one object a process."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        """Opens the cache, and sweeps what dead processes left.

        Args:
            root: folder, made if missing; shared by processes of one machine.
            max_bytes: size above which the blobs unused for the longest time leave.
        """
        self.root = root.absolute()
        self._max_bytes = max_bytes
        self._blobs = self.root / "blobs"
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._busy: dict[str, asyncio.Lock] = {}
        sweep_dead(self.root / HOLDERS)
        self._holder = OwnedFolder(self.root / HOLDERS)

    def close(self) -> None:
        """Gives up all folders of this process."""
        self._holder.close()

    def path_of(self, key: str) -> Path:
        """Where a blob's copy is, if it is here; for looking only, since it may leave at any moment."""
        return self._blobs / digest_of_key(key)

    async def place(
        self, storage: StorageClient, key: str, target: Path, size_bytes: int | None = None
    ) -> Path:
        """Puts a blob at a path of the caller's: a hard link where the file system can, a copy elsewhere.

        Args:
            storage: where it is fetched from when it is not here.
            key: artifact key.
            target: the path, must not exist; its folder is made. The file must not be written to.
            size_bytes: known size; a copy of another size is fetched again.

        Returns:
            The target.

        Raises:
            NotFound: storage has no such blob.
            Unavailable: storage does not answer, or the machine has no room.
        """
        await asyncio.to_thread(target.parent.mkdir, parents=True, exist_ok=True)
        path = self.path_of(key)
        async with self._busy.setdefault(path.name, asyncio.Lock()):
            if not await asyncio.to_thread(_linked, path, target, size_bytes):
                await self._download(storage, key, target)
        await asyncio.to_thread(self.evict)
        return target

    @contextlib.asynccontextmanager
    async def lent(self, storage: StorageClient, key: str, size_bytes: int) -> AsyncIterator[Path]:
        """A blob as a file of this process's own for as long as the context lasts; arguments as :meth:`place`."""
        target = self._holder.new_path()
        try:
            yield await self.place(storage, key, target, size_bytes)
        finally:
            await asyncio.to_thread(target.unlink, missing_ok=True)

    async def fetch_model(self, storage: StorageClient, model: Model | str) -> FetchedModel:
        """Makes a model's folder out of the cache, fetching what is missing.

        Args:
            storage: where it comes from.
            model: a registered model, or the key of its manifest.

        Returns:
            The folder and the manifest; the same folder for the same manifest until :meth:`release`.

        Raises:
            NotFound: the manifest or a component is not stored.
            BadInput: the manifest names a path outside the folder.
            Unavailable: storage does not answer, or the machine has no room.
        """
        key = model if isinstance(model, str) else model.manifest_key
        manifest = await storage.read_manifest(key)
        folder = self._holder.path / digest_of_key(key)
        async with self._busy.setdefault(folder.name, asyncio.Lock()):
            if not folder.is_dir():
                await self._build_folder(storage, manifest, folder)
        return FetchedModel(folder, manifest, key)

    async def release(self, folder: Path) -> None:
        """Gives up a model's folder; its blobs may leave the cache afterwards."""
        if folder.parent != self._holder.path:
            raise ValueError(f"not a folder of this cache: {folder}")
        async with self._busy.setdefault(folder.name, asyncio.Lock()):
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        await asyncio.to_thread(self.evict)

    def evict(self) -> int:
        """Removes the blobs unused for the longest time, never one in use, until the size fits.

        Returns:
            Bytes of what stays.
        """
        known = sorted(self._known(), key=lambda entry: entry[1].st_atime_ns)
        total = sum(stat.st_size for _, stat in known)
        for path, stat in known:
            if total <= self._max_bytes:
                break
            if stat.st_nlink == 1:
                path.unlink(missing_ok=True)
                total -= stat.st_size
        return total

    async def _build_folder(self, storage: StorageClient, manifest: ModelManifest, folder: Path) -> None:
        building = folder.with_name(f"{folder.name}.part")
        await asyncio.to_thread(shutil.rmtree, building, ignore_errors=True)
        building.mkdir()
        for component in manifest.components:
            target = building / _checked_path(component.path)
            await self.place(storage, component.key, target, component.size_bytes)
        building.rename(folder)

    async def _download(self, storage: StorageClient, key: str, target: Path) -> None:
        """Fetches a blob; the caller's link comes before it can be evicted."""
        incoming = self._holder.new_path()
        started = time.monotonic()
        try:
            size = await storage.download_blob(key, incoming)
            incoming.chmod(0o444)
            await asyncio.to_thread(_link, incoming, target)
            os.replace(incoming, self.path_of(key))
        except OSError as error:
            raise Unavailable(f"the local cache cannot take a blob: {error.strerror}") from error
        finally:
            incoming.unlink(missing_ok=True)
        seconds = round(time.monotonic() - started, 3)
        logger.info("blob fetched", extra={"key": key, "size_bytes": size, "duration_s": seconds})

    def _known(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._blobs.iterdir():
            with contextlib.suppress(FileNotFoundError):
                yield path, path.stat()


def _linked(path: Path, target: Path, size_bytes: int | None) -> bool:
    """Links a copy and notes its use; False when it is not there (any more) or has another size."""
    try:
        stat = path.stat()
        if size_bytes is not None and stat.st_size != size_bytes:
            path.unlink(missing_ok=True)
            return False
        _link(path, target)
    except FileNotFoundError:
        return False
    with contextlib.suppress(FileNotFoundError):
        os.utime(path, ns=(time.time_ns(), stat.st_mtime_ns))
    return True


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        shutil.copyfile(source, target)


def _checked_path(text: str) -> Path:
    path = PurePosixPath(text)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in text or "\0" in text:
        raise BadInput(f"a model's file has an unusable path: {text!r}")
    return Path(path)
