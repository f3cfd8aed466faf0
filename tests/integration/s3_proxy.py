"""A wire to an S3 server that loses, cuts and alters what it carries, as told."""

import io
from collections import deque
from enum import StrEnum
from typing import Self

import aiohttp
from aiohttp import web
from yarl import URL

BUSY = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
)


class Fault(StrEnum):
    """What happens to one request."""

    NONE = "passes"
    BUSY = "is answered 503"
    LOSE_REQUEST = "is lost"
    LOSE_ANSWER = "is carried out, its answer lost"
    FLIP_REQUEST = "arrives with one byte changed"
    CUT_ANSWER = "has its answer cut in the middle"
    FLIP_ANSWER = "has one byte of its answer changed"
    PRETEND = "is answered 200 and not carried out"
    FOREIGN = "is answered by something else"
    FORBID = "is answered 403"


class S3Proxy:
    """Forwards HTTP to a port of this machine.

    Attributes:
        faults: what happens to the next requests that are meant, in order.
        always: what happens to all that are meant once `faults` is empty.
        method: requests of this method are meant.
        mark: and only those with this in their address.
        carried: methods and paths with query of what was forwarded.
    """

    def __init__(self, target_port: int) -> None:
        self.faults: deque[Fault] = deque()
        self.always = Fault.NONE
        self.method = "PUT"
        self.mark = ""
        self.carried: list[tuple[str, str]] = []
        self._target_port = target_port
        self._session: aiohttp.ClientSession | None = None
        self._runner: web.ServerRunner | None = None
        self._site: web.TCPSite | None = None

    async def __aenter__(self) -> Self:
        # Signed addresses must arrive letter by letter, so nothing here may parse a body or a query.
        self._session = aiohttp.ClientSession(
            auto_decompress=False, skip_auto_headers=["Accept-Encoding", "Content-Type", "User-Agent"]
        )
        self._runner = web.ServerRunner(web.Server(self._serve), shutdown_timeout=0.1)
        await self._runner.setup()
        self._site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await self._site.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._runner is not None
        assert self._session is not None
        await self._runner.cleanup()
        await self._session.close()

    @property
    def endpoint(self) -> str:
        """Where clients connect."""
        assert self._runner is not None
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    def _next(self, request: web.BaseRequest) -> Fault:
        if request.method != self.method or self.mark not in request.raw_path:
            return Fault.NONE
        return self.faults.popleft() if self.faults else self.always

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        fault = self._next(request)
        body = await request.content.read()
        if fault is Fault.BUSY:
            return web.Response(status=503, body=BUSY, content_type="application/xml")
        if fault is Fault.FOREIGN:
            return web.Response(status=404, text="nothing here")
        if fault is Fault.FORBID:
            return web.Response(status=403)
        if fault is Fault.PRETEND:
            return web.Response(status=200)
        if fault is Fault.LOSE_REQUEST:
            return _broken(request)
        if fault is Fault.FLIP_REQUEST:
            body = flipped(body)
        status, headers, data = await self._forward(request, body)
        if fault is Fault.LOSE_ANSWER:
            return _broken(request)
        if fault is Fault.FLIP_ANSWER:
            data = flipped(data)
        response = web.StreamResponse(status=status, headers=headers)
        await response.prepare(request)
        if fault is Fault.CUT_ANSWER:
            await response.write(data[: len(data) // 2])
            return _broken(request, response)
        if request.method != "HEAD":
            await response.write(data)
        await response.write_eof()
        return response

    async def _forward(self, request: web.BaseRequest, body: bytes) -> tuple[int, dict[str, str], bytes]:
        assert self._session is not None
        self.carried.append((request.method, request.raw_path))
        url = URL(f"http://127.0.0.1:{self._target_port}{request.raw_path}", encoded=True)
        headers = {name: value for name, value in request.headers.items() if name != "Content-Length"}
        async with self._session.request(
            request.method,
            url,
            headers=headers,
            data=io.BytesIO(body) if body else None,
            allow_redirects=False,
        ) as answer:
            kept = {
                name: value
                for name, value in answer.headers.items()
                if name not in ("Transfer-Encoding", "Connection")
            }
            return answer.status, kept, await answer.read()


def flipped(data: bytes) -> bytes:
    """The same with one bit in the middle changed."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def _broken(request: web.BaseRequest, response: web.StreamResponse | None = None) -> web.StreamResponse:
    """Ends the connection without another byte."""
    if request.transport is not None:
        request.transport.abort()
    return response or web.Response()
