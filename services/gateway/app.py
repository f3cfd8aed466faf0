"""HTTP: routes, bodies, headers. The only file that knows the HTTP framework; what is answered is decided elsewhere."""

import asyncio
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from services.adapters.storage_client import StorageClient
from services.adapters.telemetry import continued_trace, trace_of
from services.domain.errors import LikenessError
from services.gateway import openapi_sdapi
from services.gateway.calls import BodyTooLarge, base_url_of
from services.gateway.dialects.base import Answer
from services.gateway.dialects.runpod import envelope as wire
from services.gateway.dialects.sdapi import envelope as sdapi_wire
from services.gateway.dialects.sdapi.drawing import TEXT_SUFFIX
from services.gateway.files import open_file
from services.gateway.open_cors import OpenCors
from services.gateway.openapi import document
from services.gateway.runpod import Call, RunpodApi, internal_answer
from services.gateway.sdapi import ROUTES, SdapiApi, SdapiCall

logger = logging.getLogger(__name__)

JOB_OPERATIONS = {
    "status": ["GET", "POST"],
    "status-sync": ["GET", "POST"],
    "stream": ["GET", "POST"],
    "cancel": ["POST"],
    "retry": ["POST"],
}
QUEUE_OPERATIONS = {"run": ["POST"], "runsync": ["POST"], "purge-queue": ["POST"], "health": ["GET"]}
CHECK_TIMEOUT_S = 3.0
SDAPI_PATHS = "/api/"
OPEN_PATHS = (SDAPI_PATHS, "/files/", "/generations/")
"""Where browser code of any page may call: the dialect that is made for it, and pictures."""

_SLASHES = re.compile("/{2,}")
_DOCS_PAGE = Path(__file__).with_name("docs.html")


@dataclass(frozen=True, slots=True)
class Parts:
    """What the app is made of.

    Attributes:
        runpod: the RunPod routes.
        storage: where files come from.
        checks: what must answer for the gateway to be ready, by name.
        public_url: base of addresses handed out; "": the request's own host.
        cors_origins: web pages that may call from a browser.
        sdapi: the stablediffusionapi routes; None: they are not served.
        sdapi_cors: any web page may call those.
    """

    runpod: RunpodApi
    storage: StorageClient
    checks: Mapping[str, Callable[[], Awaitable[bool]]] = field(default_factory=dict)
    public_url: str = ""
    cors_origins: Sequence[str] = ()
    sdapi: SdapiApi | None = None
    sdapi_cors: bool = True


def create_app(parts: Parts) -> ASGIApp:
    """Builds the application.

    Args:
        parts: what it is made of.

    Returns:
        An ASGI application.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_exception_handler(HTTPException, _http_error)
    for version in get_args(wire.Version):
        for operation, methods in (QUEUE_OPERATIONS | JOB_OPERATIONS).items():
            tail = "/{job_id}" if operation in JOB_OPERATIONS else ""
            handler = _runpod_handler(parts, version, operation)
            _add(app, f"/{version}/{{endpoint}}/{operation}{tail}", handler, methods)
    _add(app, "/files/{token}/{name}", _file_handler(parts), ["GET", "HEAD"])
    if parts.sdapi is not None:
        _add_sdapi(app, parts, parts.sdapi)
    _add_pages(app, parts)
    if parts.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=parts.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    return _Edge(OpenCors(app, OPEN_PATHS) if parts.sdapi_cors else app)


def _add_sdapi(app: FastAPI, parts: Parts, sdapi: SdapiApi) -> None:
    for path, operation in ROUTES.items():
        _add(app, path, _sdapi_handler(parts, sdapi, operation), ["POST"])
    _add(app, "/generations/{project}/{id}/{name}", _picture_handler(parts, sdapi), ["GET", "HEAD"])


def _add(
    app: FastAPI, path: str, handler: Callable[[Request], Awaitable[Response]], methods: list[str]
) -> None:
    app.add_api_route(path, handler, methods=methods, response_model=None, include_in_schema=False)


def _add_pages(app: FastAPI, parts: Parts) -> None:
    page = _DOCS_PAGE.read_text()

    async def healthz(request: Request) -> Response:
        return _json(Answer(200, {"alive": True}))

    async def readyz(request: Request) -> Response:
        checks = dict(zip(parts.checks, await _run_checks(parts.checks), strict=True))
        ready = all(checks.values())
        return _json(Answer(200 if ready else 503, {"ready": ready, "checks": checks}))

    async def openapi(request: Request) -> Response:
        description = document(_base_url(parts, request))
        if parts.sdapi is not None:
            description["paths"] |= openapi_sdapi.paths()
        return _json(Answer(200, description))

    async def docs(request: Request) -> Response:
        return HTMLResponse(page)

    for path, handler in (
        ("/healthz", healthz),
        ("/readyz", readyz),
        ("/openapi.json", openapi),
        ("/docs", docs),
    ):
        _add(app, path, handler, ["GET"])


async def _run_checks(checks: Mapping[str, Callable[[], Awaitable[bool]]]) -> list[bool]:
    async def passed(check: Callable[[], Awaitable[bool]]) -> bool:
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                return await check()
        except (TimeoutError, LikenessError):
            return False

    return list(await asyncio.gather(*(passed(check) for check in checks.values())))


def _runpod_handler(
    parts: Parts, version: wire.Version, operation: str
) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        call = Call(
            version=version,
            endpoint=request.path_params["endpoint"],
            authorization=request.headers.get("authorization"),
            base_url=_base_url(parts, request),
            job_id=request.path_params.get("job_id", ""),
            query=request.query_params,
            read_body=lambda limit: _read_body(request, limit),
        )
        start = time.monotonic()
        answer = await parts.runpod.answer(operation, call)
        extra = {"operation": operation, "http_status": answer.status, "duration_s": time.monotonic() - start}
        logger.debug("request answered", extra=extra)
        return _json(answer)

    return handle


def _sdapi_handler(parts: Parts, sdapi: SdapiApi, operation: str) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        call = SdapiCall(
            authorization=request.headers.get("authorization"),
            base_url=_base_url(parts, request),
            path=request.scope["route"].path,
            id=request.path_params.get("id", ""),
            read_body=lambda limit: _read_body(request, limit),
        )
        start = time.monotonic()
        answer = await sdapi.answer(operation, call)
        extra = {"operation": operation, "http_status": answer.status, "duration_s": time.monotonic() - start}
        logger.debug("request answered", extra=extra)
        return _json(answer, ascii_only=False)

    return handle


async def _read_body(request: Request, limit_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit_bytes:
        raise BodyTooLarge
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit_bytes:
            raise BodyTooLarge
    return bytes(body)


def _base_url(parts: Parts, request: Request) -> str:
    return base_url_of(parts.public_url, request.url.scheme, request.headers.get("host", ""))


def _file_handler(parts: Parts) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        return await _file(parts, request, request.path_params["token"], request.path_params["name"])

    return handle


def _picture_handler(parts: Parts, sdapi: SdapiApi) -> Callable[[Request], Awaitable[Response]]:
    """Pictures under names that were promised before they were drawn."""

    async def handle(request: Request) -> Response:
        found = request.path_params
        place = (found["project"], found["id"], found["name"])
        try:
            if found["name"].endswith(TEXT_SUFFIX):
                return PlainTextResponse(await sdapi.picture_text(*place))
            link = await sdapi.picture(*place)
        except LikenessError as error:
            return _json(wire.error_answer(error, "picture"))
        except Exception as error:
            return _json(internal_answer(error))
        token, name = link.rsplit("/", 2)[-2:]
        return await _file(parts, request, token, name)

    return handle


async def _file(parts: Parts, request: Request, token: str, name: str) -> Response:
    """The file behind a link, whole or in part."""
    with_body = request.method == "GET"
    try:
        file = await open_file(parts.storage, token, name, dict(request.headers), with_body)
    except LikenessError as error:
        return _json(wire.error_answer(error, "file"))
    except Exception as error:
        return _json(internal_answer(error))
    if file.status == 416:
        return _json(Answer(416, {"error": "range not satisfiable"}, file.headers))
    if file.body is None:
        return Response(status_code=file.status, headers=dict(file.headers))
    return StreamingResponse(file.body, status_code=file.status, headers=dict(file.headers))


async def _http_error(request: Request, error: Exception) -> Response:
    """Answers what the router itself refuses: no such path, or another method."""
    assert isinstance(error, HTTPException)
    text = {404: "not found", 405: "method not allowed"}.get(error.status_code, str(error.detail).lower())
    headers = dict(error.headers or {})
    if request.url.path.startswith(SDAPI_PATHS):
        headers |= {"Allow": "POST, OPTIONS"} if error.status_code == 405 else {}
        return _json(Answer(error.status_code, sdapi_wire.error_body(text), headers))
    return _json(Answer(error.status_code, {"error": text}, headers))


def _json(answer: Answer, ascii_only: bool = True) -> Response:
    """JSON, in ASCII where strings are echoed as a caller sent them: whatever they are, the body can be encoded."""
    content = json.dumps(answer.body, separators=(",", ":"), allow_nan=False, ensure_ascii=ascii_only)
    headers = {"Cache-Control": "no-store", **answer.headers}
    return Response(content, answer.status, headers, media_type="application/json")


class _Edge:
    """Around everything: repeated slashes are one, and each request continues or begins a trace."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = _SLASHES.sub("/", scope["path"])
        scope = dict(scope, path=path.rstrip("/") if path.startswith(SDAPI_PATHS) else path)
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        with continued_trace(*trace_of(headers)):
            await self._app(scope, receive, send)
