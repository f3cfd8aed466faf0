"""ArtifactStore in a folder of one machine: laptops, tests, and clusters with a shared volume.

    <root>/<key>               an object
    <root>/.staging/<owner>/   files on their way in; swept when their owner is gone

An object appears by a link or a rename of a file that is complete and on disk, so that a reader, or a machine that
loses its power, sees it whole or not at all.
"""

import asyncio
import contextlib
import errno
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from services.adapters.owned_folder import OwnedFolder, sweep_dead
from services.domain.artifacts import CHUNK_BYTES, checked_key
from services.domain.errors import AlreadyExists, NotFound, Unavailable
from services.domain.ports import ObjectInfo

STAGING = ".staging"
T = TypeVar("T")


class FolderArtifactStore:
    """Objects as files below a root."""

    def __init__(self, root: Path) -> None:
        """Opens the store, and sweeps what writers that died left.

        Args:
            root: the folder, made if missing. Several processes may work in it.
        """
        self.root = root.absolute()
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.sweep()
        self._owned = OwnedFolder(self.root / STAGING)

    @property
    def staging(self) -> Path:
        """This process's folder on the store's file system; :meth:`put_file` takes files in it without copying."""
        return self._owned.path

    def close(self) -> None:
        """Removes the staging folder."""
        self._owned.close()

    def sweep(self) -> int:
        """Removes staged files of processes that are gone; returns of how many."""
        return sweep_dead(self.root / STAGING)

    async def put_file(self, key: str, path: Path) -> None:
        """Stores a file's bytes; a file in :attr:`staging` is shared with the store and must not change again.

        Raises:
            Unavailable: the disk is full or broken.
        """
        await _in_thread(lambda: self._put_file(self._path(key), path))

    async def read(self, key: str, offset: int = 0, limit: int | None = None) -> AsyncIterator[bytes]:
        """Streams an object's bytes in pieces of at most 1 MiB.

        Raises:
            NotFound: there is no such object.
        """
        path = self._path(key)
        file = await _in_thread(lambda: _opened(path, offset))
        try:
            left = limit
            while left is None or left > 0:
                wanted = CHUNK_BYTES if left is None else min(left, CHUNK_BYTES)
                piece = await asyncio.to_thread(file.read, wanted)
                if not piece:
                    return
                left = None if left is None else left - len(piece)
                yield piece
        finally:
            file.close()

    async def stat(self, key: str) -> ObjectInfo | None:
        """Size and age of an object; None when it is not there."""
        return await _in_thread(lambda: _info(key, self._path(key)))

    async def put_document(self, key: str, data: bytes, *, create_only: bool) -> None:
        """Stores a small document.

        Raises:
            AlreadyExists: `create_only`, and there is one.
            Unavailable: the disk is full or broken.
        """
        await _in_thread(lambda: self._put_document(self._path(key), data, create_only))

    async def get_document(self, key: str) -> bytes | None:
        """A small document's bytes; None when it is not there."""
        return await _in_thread(lambda: _contents(self._path(key)))

    async def delete(self, key: str) -> None:
        """Removes an object; nothing happens when it is not there."""
        path = self._path(key)
        await _in_thread(lambda: path.unlink(missing_ok=True))

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """Every object whose key starts with `prefix`, in the order of keys."""
        found = await _in_thread(lambda: list(self._walk(prefix)))
        for info in found:
            yield info

    def _path(self, key: str) -> Path:
        return self.root / checked_key(key)

    def _put_file(self, path: Path, source: Path) -> None:
        if path.exists():
            return
        staged = self._owned.new_path()
        try:
            if source.is_relative_to(self.staging):
                os.link(source, staged)
            else:
                shutil.copyfile(source, staged)
            _flush(staged)
            with contextlib.suppress(AlreadyExists):
                _publish(staged, path, create_only=True)
        finally:
            staged.unlink(missing_ok=True)

    def _put_document(self, path: Path, data: bytes, create_only: bool) -> None:
        staged = self._owned.new_path()
        try:
            staged.write_bytes(data)
            _flush(staged)
            _publish(staged, path, create_only=create_only)
        finally:
            staged.unlink(missing_ok=True)

    def _walk(self, prefix: str) -> Iterator[ObjectInfo]:
        start = prefix.rpartition("/")[0]
        yield from self._below(checked_key(f"{start}/x").removesuffix("/x") if start else "", prefix)

    def _below(self, folder: str, prefix: str) -> Iterator[ObjectInfo]:
        for name in _names(self.root / folder):
            key = f"{folder}/{name}".lstrip("/")
            if key.endswith("/"):
                if key.startswith(prefix) or prefix.startswith(key):
                    yield from self._below(key[:-1], prefix)
            elif key.startswith(prefix) and (info := _info(key, self.root / key)):
                yield info


async def _in_thread(call: Callable[[], T]) -> T:
    """Runs file work off the event loop; the one seam where faults of the disk become ours."""
    work: Awaitable[T] = asyncio.to_thread(call)
    try:
        return await work
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise Unavailable(f"the artifact store {'is full' if full else 'does not answer'}") from error


def _opened(path: Path, offset: int) -> BinaryIO:
    try:
        file = path.open("rb")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise NotFound("no such artifact") from error
    file.seek(offset)
    return file


def _contents(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        return None


def _info(key: str, path: Path) -> ObjectInfo | None:
    if not path.is_file():
        return None
    with contextlib.suppress(FileNotFoundError):
        stat = path.stat()
        return ObjectInfo(key, stat.st_size, stat.st_mtime_ns // 1_000_000)
    return None


def _names(folder: Path) -> list[str]:
    """Entries in the order of the keys they lead to: a folder sorts as its name with the slash."""
    try:
        with os.scandir(folder) as entries:
            return sorted(
                f"{entry.name}/" if entry.is_dir() else entry.name
                for entry in entries
                if not entry.name.startswith(".")
            )
    except (FileNotFoundError, NotADirectoryError):
        return []


def _publish(staged: Path, path: Path, *, create_only: bool) -> None:
    """Gives a finished file its name, and makes the name last.

    Raises:
        AlreadyExists: `create_only`, and the name is taken.
    """
    _make_folder(path.parent)
    try:
        (os.link if create_only else os.replace)(staged, path)
    except FileExistsError as error:
        raise AlreadyExists("there is a document under this name already") from error
    _flush(path.parent)


def _make_folder(folder: Path) -> None:
    """Makes a folder and those above it, each name on disk before the next."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _flush(folder.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
