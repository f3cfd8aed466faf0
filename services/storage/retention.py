"""What expires in storage, and when.

Only what is provably nobody's is removed here: files on their way in whose writer is gone. Stored blobs stay: one that
no reference names may still be named by a job's record, which storage cannot see. Links need no sweeping, since a
token carries its own expiry.
"""

import asyncio
import logging
from typing import Final, Protocol

logger = logging.getLogger(__name__)

SWEEP_EVERY_S: Final = 3600.0


class Staged(Protocol):
    """A store that stages files on their way in."""

    def sweep(self) -> int:
        """Removes staged files of processes that are gone; returns of how many."""
        ...


class Retention:
    """Sweeps now and then."""

    def __init__(self, store: Staged, every_s: float = SWEEP_EVERY_S) -> None:
        """Takes the store, and the seconds between two sweeps."""
        self._store = store
        self._every_s = every_s

    async def run(self) -> None:
        """Sweeps for ever; a sweep that fails is tried again at its next turn."""
        while True:
            await asyncio.sleep(self._every_s)
            await self.sweep()

    async def sweep(self) -> int:
        """Sweeps once; returns of how many writers something was removed."""
        try:
            swept = await asyncio.to_thread(self._store.sweep)
        except OSError as error:
            logger.warning("sweep failed", extra={"why": error.strerror})
            return 0
        if swept:
            logger.info("staged files swept", extra={"writers": swept})
        return swept
