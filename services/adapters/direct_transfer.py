"""Bytes straight between this process and the artifact store, by addresses that storage has signed.

A transfer that an interruption cuts off goes on at the last byte that came. One that cannot be made to work raises
:class:`DirectTransferFailed`, and the caller takes the way through storage. Addresses are secrets while they live: no
text and no log line of this module has one.
"""

import asyncio
import hashlib
import io
import random
from base64 import b64encode
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from services.domain.artifacts import CHUNK_BYTES

if TYPE_CHECKING:
    from aiohttp import ClientResponse

TRIES: Final = 4
FIRST_PAUSE_S: Final = 0.2
CONNECT_S: Final = 5.0
SILENCE_S: Final = 30.0
PARTS_AT_ONCE: Final = 4


class DirectTransferFailed(Exception):
    """The store cannot be used from here; the text says what it answered, without the address."""


async def download(url: str, offset: int, size_bytes: int) -> AsyncIterator[bytes]:
    """Reads an object to its end, in pieces of at most 1 MiB.

    Args:
        url: address of the whole object.
        offset: first byte.
        size_bytes: size of the whole object.

    Raises:
        DirectTransferFailed: the store cannot be reached or refuses.
    """
    fruitless = 0
    while offset < size_bytes:
        try:
            async with _answer("GET", url, {"Range": f"bytes={offset}-"}) as response:
                if response.status != 206:
                    raise DirectTransferFailed(f"GET answered {response.status}")
                while piece := await response.content.read(CHUNK_BYTES):
                    offset, fruitless = offset + len(piece), 0
                    yield piece
        except DirectTransferFailed:
            fruitless += 1
            if fruitless >= TRIES:
                raise
            await _pause(fruitless)


async def upload(path: Path, part_urls: Sequence[str], part_bytes: int) -> str:
    """Sends a file in parts, some at once; each carries its MD5, which the store checks.

    Args:
        path: the file.
        part_urls: where each part goes.
        part_bytes: size of every part but the last.

    Returns:
        SHA-256 of what was sent, lower-case hexadecimal.

    Raises:
        DirectTransferFailed: the store cannot be reached or refuses.
    """
    digest, slots = hashlib.sha256(), asyncio.Semaphore(PARTS_AT_ONCE)

    async def send(url: str, data: bytes) -> None:
        try:
            await _send(url, data)
        finally:
            slots.release()

    try:
        with path.open("rb") as file:
            async with asyncio.TaskGroup() as group:
                for url in part_urls:
                    await slots.acquire()
                    data = await asyncio.to_thread(_read_hashed, file, part_bytes, digest)
                    group.create_task(send(url, data))
    except ExceptionGroup as faults:
        raise faults.exceptions[0] from faults
    return digest.hexdigest()


async def _send(url: str, data: bytes) -> None:
    md5 = await asyncio.to_thread(_md5, data)
    for attempt in range(1, TRIES + 1):
        try:
            async with _answer("PUT", url, {"Content-MD5": md5}, io.BytesIO(data)) as response:
                if response.status != 200:
                    raise DirectTransferFailed(f"PUT answered {response.status}")
                return
        except DirectTransferFailed:
            if attempt == TRIES:
                raise
            await _pause(attempt)


@asynccontextmanager
async def _answer(
    method: str, url: str, headers: dict[str, str], data: io.BytesIO | None = None
) -> "AsyncIterator[ClientResponse]":
    """One request; faults of the network become DirectTransferFailed."""
    # Imported at the first transfer: a platform over a folder never needs it in its workers.
    import aiohttp
    from yarl import URL

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
    skipped = ["Accept-Encoding", "Content-Type"]
    try:
        async with (
            aiohttp.ClientSession(
                timeout=timeout, auto_decompress=False, skip_auto_headers=skipped
            ) as session,
            session.request(
                method, URL(url, encoded=True), headers=headers, data=data, allow_redirects=False
            ) as response,
        ):
            yield response
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise DirectTransferFailed(f"{method}: {type(error).__name__}") from None


async def _pause(attempt: int) -> None:
    await asyncio.sleep(FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1.0))


def _read_hashed(file: Any, length: int, digest: Any) -> bytes:
    data: bytes = file.read(length)
    digest.update(data)
    return data


def _md5(data: bytes) -> str:
    return b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
