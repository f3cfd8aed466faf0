"""What expires in storage, and when.

Only what is provably nobody's is removed here: files on their way in whose writer is gone, and uploads into a bucket
that nobody finished for a day. Stored blobs stay: one that
no reference names may still be named by a job's record, which storage cannot see. Links need no sweeping, since a
token carries its own expiry.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from services.domain.errors import Unavailable

logger = logging.getLogger(__name__)

SWEEP_EVERY_S: Final = 3600.0


class Retention:
    """Sweeps now and then."""

    def __init__(self, sweep: Callable[[], Awaitable[int]], every_s: float = SWEEP_EVERY_S) -> None:
        """Takes a store's own sweep, which says how much it removed, and the seconds between two sweeps."""
        self._sweep = sweep
        self._every_s = every_s

    async def run(self) -> None:
        """Sweeps for ever; a sweep that fails is tried again at its next turn."""
        while True:
            await asyncio.sleep(self._every_s)
            await self.sweep()

    async def sweep(self) -> int:
        """Sweeps once; returns how many writers' files and uploads were removed."""
        try:
            swept = await self._sweep()
        except (OSError, Unavailable) as error:
            logger.warning("sweep failed", extra={"why": str(error)})
            return 0
        if swept:
            logger.info("unfinished writes swept", extra={"swept": swept})
        return swept
