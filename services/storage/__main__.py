"""`python -m services.storage`: StorageService and AccessService over an artifact store."""

import asyncio
import sys

from services.adapters.settings import CONFIGURATION_FAULT, StorageSettings, load_or_exit
from services.adapters.telemetry import configure_logging
from services.domain.errors import InvalidSpec, Unavailable
from services.storage.server import serve

TRY_AGAIN = 75
"""Exit status of a process that may start later (EX_TEMPFAIL of sysexits.h)."""


def main() -> None:
    """Serves until SIGTERM."""
    settings = load_or_exit(StorageSettings)
    configure_logging("storage", level=settings.log_level, log_format=settings.log_format)
    try:
        asyncio.run(serve(settings))
    except InvalidSpec as error:
        sys.stderr.write(f"wrong settings:\n  {error}\n")
        raise SystemExit(CONFIGURATION_FAULT) from None
    except Unavailable as error:
        sys.stderr.write(f"cannot start: {error}\n")
        raise SystemExit(TRY_AGAIN) from None


if __name__ == "__main__":
    main()
