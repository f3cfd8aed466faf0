"""A worker's folder for the files of one job: its own while it lives, swept by the next worker when it died."""

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

_LOCK = ".lock"


@contextlib.contextmanager
def work_folder(root: Path) -> Iterator[Path]:
    """Makes a folder that is removed at the end of the block; folders that dead processes left are removed first.

    Args:
        root: where such folders are, made if missing; workers may share it.
    """
    root.mkdir(parents=True, exist_ok=True)
    _sweep(root)
    name = secrets.token_hex(8)
    making, folder = root.absolute() / f".{name}", root.absolute() / name
    making.mkdir()
    lock = os.open(making / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        # Locked before it can be seen under a name that others sweep.
        fcntl.flock(lock, fcntl.LOCK_EX)
        making.rename(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _sweep(root: Path) -> None:
    for folder in root.iterdir():
        if not folder.name.startswith(".") and _is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    """Nobody holds the folder's lock; the kernel lets go of it with the process, however that ended."""
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True
