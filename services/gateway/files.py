"""Files that leave the system: links to stored pictures, and the bytes behind a link, whole or in part.

A link is a capability: whoever has it may read the file until it expires. It is never logged.
"""

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from likeness.storage.v1.artifact_pb2 import Blob

from services.adapters.storage_client import StorageClient
from services.domain.artifacts import media_type_of
from services.domain.errors import InvalidSpec, NotFound, Unavailable
from services.gateway.dialects.base import File

REMEMBERED_LINKS = 20_000
STORAGE_TIMEOUT_S = 2.5
"""Clients give up after 3 s. What was linked until then is remembered, so that the next request gets further."""
RENEW_SHARE = 0.5
"""A remembered link is handed out until this share of its life is over."""

_RANGE = re.compile(r"bytes=([0-9]{0,100})-([0-9]{0,100})")
"""Positions of more digits are not understood: reading them takes long, or fails."""


class Links:
    """Makes links, and remembers them, so that polling does not make a new one each time."""

    def __init__(self, storage: StorageClient, now_s: Callable[[], float] = time.time) -> None:
        """Takes storage and the clock."""
        self._storage = storage
        self._now_s = now_s
        self._known: OrderedDict[tuple[str, str, str], tuple[str, float]] = OrderedDict()

    async def urls(self, project: str, files: Iterable[File], base_url: str) -> dict[str, str]:
        """Addresses of files by artifact key; a file that is gone has none.

        Args:
            project: their owner.
            files: what is to be linked.
            base_url: scheme and host that the addresses begin with.

        Raises:
            Unavailable: storage does not answer.
        """
        found = {}
        async with _answer_of_storage():
            for file in files:
                path = await self._path(project, file)
                if path:
                    found[file.key] = base_url + path
        return found

    async def _path(self, project: str, file: File) -> str:
        known = self._known.get((project, file.key, file.name))
        if known is not None and known[1] > self._now_s():
            return known[0]
        try:
            link = await self._storage.create_file_link(project, file.key, file.name)
        except (NotFound, InvalidSpec):
            return ""
        life_s = link.expire_time.seconds - self._now_s()
        self._known[project, file.key, file.name] = link.path, self._now_s() + life_s * RENEW_SHARE
        while len(self._known) > REMEMBERED_LINKS:
            self._known.popitem(last=False)
        return link.path


@asynccontextmanager
async def _answer_of_storage() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(STORAGE_TIMEOUT_S):
            yield
    except TimeoutError as error:
        raise Unavailable("storage does not answer") from error


@dataclass(frozen=True, slots=True)
class FileAnswer:
    """A file on its way out.

    Attributes:
        status: 200, 206, 304 or 416.
        headers: of the answer.
        body: its bytes; None: there is no body.
    """

    status: int
    headers: Mapping[str, str]
    body: AsyncIterator[bytes] | None = None


async def open_file(
    storage: StorageClient, token: str, name: str, request_headers: Mapping[str, str], with_body: bool
) -> FileAnswer:
    """Answers a request for a file.

    Args:
        storage: where it lies.
        token: of the link.
        name: of the link.
        request_headers: lower-case names; `range`, `if-range` and `if-none-match` are read.
        with_body: false for HEAD.

    Raises:
        NotFound: the link is wrong or has expired, or the file is gone.
        Unavailable: storage does not answer.
    """
    blob = await _describe(storage, token, name)
    headers = _headers(blob, name)
    if _matches(request_headers.get("if-none-match", ""), headers["ETag"]):
        return FileAnswer(304, headers)
    wanted = _range_of(request_headers, blob.size_bytes, headers["ETag"])
    if wanted is None:
        headers["Content-Length"] = str(blob.size_bytes)
        return FileAnswer(200, headers, _pieces(storage, token, name, 0, 0) if with_body else None)
    first, count = wanted
    if count <= 0:
        return FileAnswer(416, {"Content-Range": f"bytes */{blob.size_bytes}"})
    headers["Content-Range"] = f"bytes {first}-{first + count - 1}/{blob.size_bytes}"
    headers["Content-Length"] = str(count)
    return FileAnswer(206, headers, _pieces(storage, token, name, first, count) if with_body else None)


async def _describe(storage: StorageClient, token: str, name: str) -> Blob:
    """What lies behind a link. The short answer is read to its end: breaking it off would cost storage more."""
    found: Blob | None = None
    async with _answer_of_storage():
        async for response in storage.read_file(token, name, limit=1):
            if found is None:
                found = Blob.FromString(response.blob.SerializeToString())
    if found is None:
        raise NotFound("no such file")
    return found


async def _pieces(
    storage: StorageClient, token: str, name: str, offset: int, limit: int
) -> AsyncIterator[bytes]:
    responses: Any = storage.read_file(token, name, offset, limit)
    async with aclosing(responses):
        async for response in responses:
            if response.data:
                yield response.data


def _headers(blob: Blob, name: str) -> dict[str, str]:
    return {
        "Content-Type": blob.media_type or media_type_of(name),
        "ETag": f'"{blob.digest}"',
        "Cache-Control": "private, max-age=86400, immutable",
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"inline; filename*=UTF-8''{quote(name)}",
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }


def _matches(header: str, etag: str) -> bool:
    return any(part.strip().removeprefix("W/") in (etag, "*") for part in header.split(",") if part.strip())


def _range_of(headers: Mapping[str, str], size: int, etag: str) -> tuple[int, int] | None:
    """First byte and number of bytes of one range (RFC 9110, 14.2); None: the whole; count 0: cannot be met."""
    match = _RANGE.fullmatch(headers.get("range", "").strip())
    if match is None or match[0] == "bytes=-" or headers.get("if-range", etag) != etag:
        return None
    if not match[1]:
        count = min(int(match[2]), size)
        return size - count, count
    first = int(match[1])
    last = min(int(match[2]) if match[2] else size - 1, size - 1)
    if match[2] and int(match[2]) < first:
        return None
    return first, last - first + 1
