"""Requests to an S3 bucket: sent, repeated while the store is busy or away, their errors told as ours.

The one seam where faults of HTTP and of S3 become :mod:`services.domain.errors`. Every request may be repeated,
here and by the HTTP library, so an answer may speak of an earlier attempt whose own answer was lost; the caller tells
them apart.
"""

import asyncio
import hashlib
import io
import logging
import random
from base64 import b64encode
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree

import aiohttp
from yarl import URL

from services.adapters.s3_signing import EMPTY_SHA256, Bucket
from services.domain.errors import Unavailable

logger = logging.getLogger(__name__)

TRIES: Final = 6
FIRST_PAUSE_S: Final = 0.2
LONGEST_PAUSE_S: Final = 5.0
BUSY: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
BUSY_CODES: Final = frozenset(
    {
        "RequestTimeout",  # with 400: the body did not come in time
        "SlowDown",
        "InternalError",
        "BadDigest",  # the body changed on its way; sent again it may not
        "XAmzContentSHA256Mismatch",
        "ConditionalRequestConflict",  # another conditional write was under way
        "OperationAborted",
    }
)
CONNECT_S: Final = 10.0
SILENCE_S: Final = 60.0
"""A connection that brings nothing for so long is given up."""

NETWORK_FAULTS: Final = (aiohttp.ClientError, TimeoutError, OSError)
"""What a request raises that got no whole answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the store answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """S3's name of the error; empty when the body does not say."""
        return text_of(self.body, "Code") if self.status >= 300 or b"<Error>" in self.body[:200] else ""


class RefusedByStore(Unavailable):
    """The store answered with an error that is not for the caller: wrong keys, no bucket, a clock that is wrong."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(f"the artifact store refuses ({status} {code or 'without a reason'})")
        self.status = status
        self.code = code


class S3Requests:
    """Signed requests to one bucket."""

    def __init__(self, bucket: Bucket, *, first_pause_s: float = FIRST_PAUSE_S) -> None:
        """Opens nothing yet; :meth:`close` when done.

        Args:
            bucket: the bucket and its keys.
            first_pause_s: seconds before the first repetition; doubled before each further one.
        """
        self.bucket = bucket
        self._first_pause_s = first_pause_s
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Ends all connections."""
        if self._session is not None:
            await self._session.close()

    async def ask(
        self,
        method: str,
        key: str = "",
        query: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
        body: bytes = b"",
        *,
        expected: tuple[int, ...] = (200, 204),
    ) -> Answer:
        """Sends a request and reads its whole answer.

        Args:
            method: HTTP method.
            key: object; empty: the bucket itself.
            query: parameters of the address.
            headers: headers beyond those that every request has.
            body: bytes sent; their MD5 and SHA-256 are checked by the store.
            expected: statuses that the caller deals with.

        Returns:
            The answer, its body as long as announced.

        Raises:
            RefusedByStore: another status.
            Unavailable: the store was busy or away at each of the :data:`TRIES` attempts.
        """
        why = ""
        for attempt in range(TRIES):
            await self.pause(attempt, why)
            try:
                answer = await self._once(method, key, query, headers, body)
            except NETWORK_FAULTS as error:
                why = type(error).__name__
                continue
            # A store may report a failure of a long operation in the body of a 200.
            busy = answer.status in BUSY or answer.code in BUSY_CODES
            if busy:
                why = f"{answer.status} {answer.code}"
                continue
            # Without its bucket nothing can be told of an object, and least of all that it is absent.
            if answer.status not in expected or answer.code == "NoSuchBucket":
                raise RefusedByStore(answer.status, answer.code)
            return answer
        raise Unavailable(f"the artifact store does not answer ({why.strip()})")

    @asynccontextmanager
    async def stream(self, key: str, headers: dict[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """Opens one GET whose body the caller reads; sent once, raises :data:`NETWORK_FAULTS`."""
        url = self.bucket.url(key)
        signed = self.bucket.signed_headers("GET", url, headers, EMPTY_SHA256)
        async with self._opened().get(
            URL(url, encoded=True), headers=signed, allow_redirects=False
        ) as response:
            yield response

    async def pause(self, attempt: int, why: str) -> None:
        """Waits before a repetition: nothing before the first attempt, then longer and longer, never in step."""
        if attempt:
            logger.info("artifact store asked again", extra={"attempt": attempt, "why": why})
            longest = min(self._first_pause_s * 2 ** (attempt - 1), LONGEST_PAUSE_S)
            await asyncio.sleep(longest * random.uniform(0.5, 1.0))

    async def _once(
        self,
        method: str,
        key: str,
        query: dict[str, str] | None,
        headers: dict[str, str] | None,
        body: bytes,
    ) -> Answer:
        url = self.bucket.url(key, query)
        sha256, md5 = await asyncio.to_thread(_digests, body) if len(body) > 65536 else _digests(body)
        wanted = dict(headers or {})
        if body:
            wanted["Content-MD5"] = md5
        signed = self.bucket.signed_headers(method, url, wanted, sha256)
        async with self._opened().request(
            method,
            URL(url, encoded=True),
            headers=signed,
            data=io.BytesIO(body) if body else None,
            allow_redirects=False,
        ) as response:
            return Answer(response.status, response.headers, await response.read())

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
            self._session = aiohttp.ClientSession(
                timeout=timeout,
                auto_decompress=False,
                skip_auto_headers=["Accept-Encoding", "Content-Type"],
                connector=aiohttp.TCPConnector(limit=64),
            )
        return self._session


def text_of(body: bytes, tag: str) -> str:
    """Text of the first element of this name in an XML answer, whatever its namespace; empty when there is none."""
    return next((element.text or "" for element in elements(body, tag)), "")


def elements(body: bytes, tag: str) -> list[ElementTree.Element]:
    """All elements of this name, whatever their namespace; none when the body is not XML."""
    try:
        root = ElementTree.fromstring(body)
    except ElementTree.ParseError:
        return []
    return [element for element in root.iter() if local_name(element) == tag]


def local_name(element: ElementTree.Element) -> str:
    """An element's name without its namespace."""
    return element.tag.rpartition("}")[2]


def fields(element: ElementTree.Element) -> dict[str, str]:
    """Texts of an element's children by name."""
    return {local_name(child): child.text or "" for child in element}


def _digests(body: bytes) -> tuple[str, str]:
    """SHA-256 in hexadecimal and MD5 in base64, as S3's headers have them."""
    md5 = hashlib.md5(body, usedforsecurity=False).digest()
    return hashlib.sha256(body).hexdigest(), b64encode(md5).decode()
