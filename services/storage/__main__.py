"""`python -m services.storage`: StorageService and AccessService over an artifact store."""

import asyncio

from services.adapters.settings import StorageSettings, load_or_exit
from services.adapters.telemetry import configure_logging
from services.storage.server import serve


def main() -> None:
    """Serves until SIGTERM."""
    settings = load_or_exit(StorageSettings)
    configure_logging("storage", level=settings.log_level, log_format=settings.log_format)
    asyncio.run(serve(settings))


if __name__ == "__main__":
    main()
