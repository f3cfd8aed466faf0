"""A working folder that belongs to one process, and that others may clear away once that process is gone.

    <parent>/<pid>-<random>/lock      held (flock) as long as the owner lives

The kernel lets go of the lock with the process, however that ended, so no process id has to be trusted. A folder gets
its final name only after it is locked: whoever can see it can tell whether somebody owns it.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import time
from pathlib import Path

LOCK = "lock"
UNFINISHED_PREFIX = ".new-"
UNFINISHED_LIFE_S = 3600.0
"""An owner needs microseconds from making its folder to naming it; one that took longer died in between."""


class OwnedFolder:
    """A new, empty, locked folder under a parent."""

    def __init__(self, parent: Path) -> None:
        """Makes the folder, and the parent if it is missing.

        Args:
            parent: holds the folders of all owners; nothing else may live in it.
        """
        parent.mkdir(parents=True, exist_ok=True)
        name = f"{os.getpid()}-{secrets.token_hex(4)}"
        making = parent / f"{UNFINISHED_PREFIX}{name}"
        making.mkdir(mode=0o700)
        self._lock = os.open(making / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = making.rename(parent / name)

    def new_path(self) -> Path:
        """A path in the folder where nothing is yet."""
        return self.path / new_name()

    def close(self) -> None:
        """Removes the folder with all that is in it."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def new_name() -> str:
    """A file name that nobody else has."""
    return secrets.token_hex(12)


def sweep_dead(parent: Path) -> int:
    """Removes the folders whose owners are gone.

    Args:
        parent: what was given to :class:`OwnedFolder`; need not exist.

    Returns:
        How many were removed.
    """
    dead = [folder for folder in _listed(parent) if _is_dead(folder)]
    for folder in dead:
        shutil.rmtree(folder, ignore_errors=True)
    return len(dead)


def _listed(parent: Path) -> list[Path]:
    with contextlib.suppress(FileNotFoundError):
        return sorted(parent.iterdir())
    return []


def _is_dead(folder: Path) -> bool:
    try:
        if folder.name.startswith(UNFINISHED_PREFIX):
            return time.time() - folder.stat().st_mtime > UNFINISHED_LIFE_S
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return folder.is_dir() and not folder.name.startswith(UNFINISHED_PREFIX)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
