"""The job platform that the settings name: opened with patience, since the log may be starting too."""

import asyncio
import logging
from typing import Final

from services.adapters.jetstream import JetStreamPlatform
from services.adapters.settings import NatsSettings
from services.domain.errors import Unavailable

logger = logging.getLogger(__name__)

PATIENCE_S: Final = 60.0
PAUSE_S: Final = 0.2


async def open_platform(settings: NatsSettings, patience_s: float = PATIENCE_S) -> JetStreamPlatform:
    """Connects to the job log and checks it.

    Args:
        settings: where it is.
        patience_s: how long a log that does not answer is tried again.

    Raises:
        Unavailable: it did not answer in time.
        ServerRefused: server or streams are not what this platform relies on.
    """
    end = asyncio.get_running_loop().time() + patience_s
    while True:
        try:
            return await JetStreamPlatform.open(
                settings.nats_servers,
                monitor_url="" if settings.nats_system_servers else settings.nats_monitor_url,
                system_servers=settings.nats_system_servers,
                replicas=settings.nats_replicas,
            )
        except Unavailable as error:
            if asyncio.get_running_loop().time() > end:
                raise
            logger.info("waiting for the job log", extra={"detail": str(error)})
            await asyncio.sleep(PAUSE_S)
