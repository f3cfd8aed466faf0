"""`python -m services.gateway`: the HTTP edge."""

import asyncio
import sys

from services.adapters.settings import GatewaySettings, load_or_exit
from services.adapters.telemetry import configure_logging
from services.gateway.server import serve


def main() -> None:
    """Serves until SIGTERM."""
    settings = load_or_exit(GatewaySettings)
    configure_logging("gateway", level=settings.log_level, log_format=settings.log_format)
    try:
        asyncio.run(serve(settings))
    except OSError as error:
        sys.exit(f"gateway: {error}")


if __name__ == "__main__":
    main()
