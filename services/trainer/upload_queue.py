"""What is stored beside a training while it goes on: one piece of work after the other, none of which can end it.

Without torch. What a piece is, and how it is stored, its owner knows: previews, checkpoints, versions of the model.
"""

import asyncio
import logging
import os
import shutil
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from services.domain.errors import LikenessError, StaleEpoch

logger = logging.getLogger(__name__)

T = TypeVar("T")


class UploadQueue(Generic[T]):
    """Hands over what is added, in its order. What cannot be stored is logged and left out: training goes on.

    Args:
        what: of the pieces, for the log: "previews".
        store: stores some pieces; called for one batch at a time.
        at_once: most pieces of a batch; None: all that wait.
    """

    def __init__(
        self, what: str, store: Callable[[Sequence[T]], Awaitable[None]], at_once: int | None = None
    ) -> None:
        self._what = what
        self._store = store
        self._at_once = at_once
        self._waiting: list[T] = []
        self._news = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def add(self, piece: T) -> None:
        """Takes a piece over."""
        self._waiting.append(piece)
        self._idle.clear()
        self._news.set()

    async def drain(self) -> None:
        """Waits until nothing is waiting; for ever, unless :meth:`run` runs."""
        await self._idle.wait()

    async def run(self) -> None:
        """Stores what is added, for ever."""
        while True:
            await self._news.wait()
            self._news.clear()
            while batch := self._next_batch():
                try:
                    await self._store(batch)
                except StaleEpoch:
                    logger.info("%s not wanted any more", self._what)
                except Exception as error:
                    # Whatever it is, training goes on, and ends without waiting for it.
                    level = logging.WARNING if isinstance(error, (LikenessError, OSError)) else logging.ERROR
                    logger.log(level, "%s not stored", self._what, exc_info=error)
            self._idle.set()

    def _next_batch(self) -> list[T]:
        batch = self._waiting[: self._at_once]
        del self._waiting[: self._at_once]
        return batch


async def held(checkpoint: Path, folder: Path) -> Path | None:
    """Holds on to the files of a checkpoint, since the child that writes them keeps only the newest two.

    Args:
        checkpoint: its folder, which may vanish.
        folder: gets a folder of the same name with links to the files.

    Returns:
        The second folder; None: the first one had vanished already.
    """
    copy = folder / checkpoint.name
    try:
        await asyncio.to_thread(shutil.copytree, checkpoint, copy, copy_function=os.link, dirs_exist_ok=True)
    except OSError as error:
        logger.warning("checkpoint was gone before it was stored", extra={"detail": str(error)})
        return None
    return copy


async def let_go(folders: Sequence[Path]) -> None:
    """Removes folders that were held."""
    for folder in folders:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
