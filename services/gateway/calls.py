"""What the routes of all dialects share about a call and its answer."""

import logging
import re
import secrets

logger = logging.getLogger(__name__)

_BASE_URL = re.compile(r"https?://[A-Za-z0-9._~:\[\]/-]{1,300}")


class BodyTooLarge(Exception):
    """The body is longer than the operation takes."""


def base_url_of(public_url: str, scheme: str, host: str) -> str:
    """Base of the addresses in an answer: what the operator set, else where the request came to."""
    own = f"{scheme}://{host}"
    return public_url or (own if _BASE_URL.fullmatch(own) else "")


def reference_of(error: BaseException) -> str:
    """Logs a bug; returns the reference under which the log has it, for the answer."""
    reference = secrets.token_hex(3)
    logger.error("request failed", exc_info=error, extra={"ref": reference})
    return reference
