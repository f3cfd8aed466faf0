"""Paths that any web page may call: browser code uses them directly, with whatever headers it likes to send.

They answer to a key in the body or to a secret in the path, never to cookies, so there is nothing that another page
could borrow.
"""

from collections.abc import Sequence
from typing import Any

Headers = list[tuple[bytes, bytes]]

MAX_AGE_S = 600


class OpenCors:
    """ASGI middleware around the whole application; other paths pass through untouched."""

    def __init__(self, app: Any, prefixes: Sequence[str]) -> None:
        """Takes the application, and how the open paths begin."""
        self._app = app
        self._prefixes = tuple(prefixes)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(self._prefixes):
            await self._app(scope, receive, send)
            return
        if scope["method"] == "OPTIONS":
            await send(
                {"type": "http.response.start", "status": 204, "headers": _preflight(scope["headers"])}
            )
            await send({"type": "http.response.body", "body": b""})
            return

        async def send_open(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": _opened(message["headers"])}
            await send(message)

        await self._app(scope, receive, send_open)


def _preflight(asked: Headers) -> Headers:
    """The answer to a preflight: any origin, and the headers that were asked for."""
    wanted = dict(asked).get(b"access-control-request-headers", b"content-type")
    return [
        (b"access-control-allow-origin", b"*"),
        (b"access-control-allow-methods", b"GET, HEAD, POST, OPTIONS"),
        (b"access-control-allow-headers", wanted),
        (b"access-control-max-age", str(MAX_AGE_S).encode()),
        (b"allow", b"GET, HEAD, POST, OPTIONS"),
        (b"content-length", b"0"),
    ]


def _opened(headers: Headers) -> Headers:
    kept = [(name, value) for name, value in headers if name.lower() != b"access-control-allow-origin"]
    return [*kept, (b"access-control-allow-origin", b"*")]
