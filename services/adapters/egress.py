"""The only way out to addresses that users name: archives and models to fetch, webhooks to call.

Owns resolving, checking, pinning and connecting: a name is resolved once per connection, every address of the answer
is judged, and exactly those addresses are connected to, so that a name that changes its answer gains nothing. Each
redirect starts anew. Size, time, rate and encodings are capped. What is an acceptable address is decided by
``services.domain.addresses``; what the bytes mean is the business of the caller.
"""

import asyncio
import contextlib
import hashlib
import ipaddress
import logging
import socket
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import aiohttp
import yarl
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

from services.domain import addresses
from services.domain.addresses import Network, Target
from services.domain.errors import BadInput, EgressRefused, InvalidSpec, Unavailable

logger = logging.getLogger(__name__)

CHUNK_BYTES = 256 * 1024
USER_AGENT = "likeness/1"
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers that a server gives when it may answer otherwise a moment later."""


@dataclass(frozen=True, slots=True)
class EgressPolicy:
    """What egress may do.

    Attributes:
        allow: ranges that may be reached although they are not public (``LIKENESS_EGRESS_ALLOW``).
        max_redirects: how many redirects one fetch follows; each is checked like a new address.
        connect_timeout_s: for resolving, connecting and the TLS handshake together.
        read_timeout_s: longest silence of a server that is sending.
        min_bytes_per_s: a body slower than this, averaged over ``rate_window_s``, is given up.
        rate_window_s: length of the window in which the rate is measured.
        attempts: how often a fetch is tried when the server fails in passing.
        retry_pause_s: pause before the second try; it doubles with each further one.
    """

    allow: tuple[Network, ...] = ()
    max_redirects: int = 5
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 30.0
    min_bytes_per_s: int = 1024
    rate_window_s: float = 30.0
    attempts: int = 3
    retry_pause_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a fetch brought.

    Attributes:
        path: the file that was written.
        size_bytes: its length.
        digest: sha256 of its bytes, 64 hexadecimal digits.
        content_type: what the server called it, lower case, without parameters; may be empty.
    """

    path: Path
    size_bytes: int
    digest: str
    content_type: str


class _PassingFault(Exception):
    """The server failed in a way that may pass; the text is a sentence for the caller."""


class Egress:
    """Fetches files and posts JSON, within a policy. Holds no connections between calls."""

    def __init__(
        self,
        policy: EgressPolicy | None = None,
        resolver: AbstractResolver | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """Takes the policy and, for tests, another resolver or other trusted certificates.

        Args:
            policy: limits and allowed ranges.
            resolver: asked for the addresses of names; the system's by default. Its answers are checked.
            ssl_context: trust for https; the system's certificates by default.
        """
        self._policy = policy or EgressPolicy()
        self._resolver = resolver
        self._ssl = ssl_context

    def check_url(self, url: str) -> Target:
        """Checks what can be checked without resolving: for refusing a bad URL when it is submitted.

        Raises:
            EgressRefused: the URL is malformed, has credentials, or names a port or address that is not visited.
        """
        return self._check_target(addresses.parse_target(url))

    async def fetch_to_file(self, url: str, path: Path, *, max_bytes: int, total_timeout_s: float) -> Fetched:
        """Fetches one file. Redirects are followed, each after the same checks.

        Args:
            url: http or https address from a user.
            path: file to write; removed again when the fetch fails.
            max_bytes: longest acceptable body; the declared length and the real one are both held to it.
            total_timeout_s: for everything, retries included.

        Returns:
            Size, digest and media type of what was written.

        Raises:
            EgressRefused: the URL, an address behind it, or a redirect is not acceptable.
            BadInput: the server does not deliver: status, size, time, encoding, broken transfer.
        """
        target = self.check_url(url)
        try:
            async with asyncio.timeout(total_timeout_s):
                return await self._fetch_with_retries(target, path, max_bytes)
        except TimeoutError as error:
            _discard(path)
            raise BadInput(f"{target.origin} did not deliver within {total_timeout_s:g} s") from error
        except BaseException:
            _discard(path)
            raise

    async def post_json(self, url: str, body: bytes, headers: Mapping[str, str], timeout_s: float) -> int:
        """Posts a JSON body once; follows no redirect and reads nothing of the answer but its status.

        Args:
            url: http or https address from a user.
            body: encoded JSON.
            headers: further headers; ``Content-Type`` and ``User-Agent`` are set here.
            timeout_s: for everything from resolving to the status line.

        Returns:
            The HTTP status of the answer, whatever it is.

        Raises:
            EgressRefused: the URL or an address behind it is not acceptable.
            Unavailable: no answer: resolving, connecting, TLS or time failed.
        """
        target = self.check_url(url)
        sent = {**headers, "Content-Type": "application/json"}
        try:
            async with asyncio.timeout(timeout_s), self._request("POST", target, sent, body) as response:
                return response.status
        except TimeoutError as error:
            raise Unavailable(f"{target.origin} did not answer within {timeout_s:g} s") from error
        except _PassingFault as error:
            raise Unavailable(str(error)) from error
        except BadInput as error:
            raise Unavailable(str(error)) from error

    def _check_target(self, target: Target) -> Target:
        addresses.check_port(target)
        if target.address is not None:
            check_address(str(target.address), self._policy.allow, shown=target.host)
        return target

    async def _fetch_with_retries(self, target: Target, path: Path, max_bytes: int) -> Fetched:
        for attempt in range(1, self._policy.attempts + 1):
            try:
                return await self._fetch_once(target, path, max_bytes)
            except _PassingFault as fault:
                if attempt == self._policy.attempts:
                    raise BadInput(str(fault)) from fault
                logger.info("fetch will be tried again", extra={"origin": target.origin, "attempt": attempt})
            await asyncio.sleep(self._policy.retry_pause_s * 2 ** (attempt - 1))
        raise AssertionError("a policy has at least one attempt")

    async def _fetch_once(self, target: Target, path: Path, max_bytes: int) -> Fetched:
        for _ in range(self._policy.max_redirects + 1):
            async with self._request("GET", target) as response:
                if response.status not in _REDIRECTS:
                    return await self._receive(response, target, path, max_bytes)
                location = response.headers.get("Location", "")
            target = self._redirected(target, location)
        raise BadInput(f"the address redirects more than {self._policy.max_redirects} times")

    def _redirected(self, target: Target, location: str) -> Target:
        if not location:
            raise BadInput(f"{target.origin} redirects to nowhere")
        try:
            return self._check_target(target.joined(location))
        except EgressRefused as error:
            raise EgressRefused(f"redirect refused: {error}") from error
        except ValueError as error:
            raise EgressRefused("redirect refused: the address is not a valid http or https URL") from error

    @contextlib.asynccontextmanager
    async def _request(
        self, method: str, target: Target, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One request over one new, pinned connection; foreign exceptions are translated here."""
        sent = {**(headers or {}), "User-Agent": USER_AGENT, "Accept-Encoding": "identity", "Accept": "*/*"}
        url = yarl.URL(target.url, encoded=True)
        try:
            async with (
                self._session() as session,
                session.request(method, url, headers=sent, data=body, allow_redirects=False) as response,
            ):
                yield response
        except aiohttp.ClientError as error:
            raise self._translated(error, target) from error

    def _session(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            resolver=_CheckedResolver(self._resolver or ThreadedResolver(), self._policy.allow),
            use_dns_cache=False,
            force_close=True,
            socket_factory=self._checked_socket,
            ssl=self._ssl or True,
        )
        timeout = aiohttp.ClientTimeout(
            total=None, connect=self._policy.connect_timeout_s, sock_read=self._policy.read_timeout_s
        )
        return aiohttp.ClientSession(
            connector=connector,
            timeout=timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
        )

    def _checked_socket(self, info: aiohttp.AddrInfoType) -> socket.socket:
        """The last gate: no socket is made for an address that the policy refuses, however it got here."""
        family, kind, protocol, _, sockaddr = info
        if addresses.refusal_of(ipaddress.ip_address(sockaddr[0]), self._policy.allow) is not None:
            raise PermissionError("address refused")
        return socket.socket(family=family, type=kind, proto=protocol)

    async def _receive(
        self, response: aiohttp.ClientResponse, target: Target, path: Path, max_bytes: int
    ) -> Fetched:
        _check_answer(response, target, max_bytes)
        digest = hashlib.sha256()
        size_bytes = 0
        with path.open("wb") as file:
            pace = _Pace(self._policy)
            while chunk := await response.content.read(CHUNK_BYTES):
                size_bytes += len(chunk)
                if size_bytes > max_bytes:
                    raise BadInput(f"the file is larger than {max_bytes} bytes")
                if pace.is_too_slow(len(chunk)):
                    raise BadInput(f"{target.origin} sends too slowly")
                await asyncio.to_thread(_store, chunk, file, digest)
        if response.content_length is not None and size_bytes != response.content_length:
            raise _PassingFault(f"the transfer from {target.origin} broke off")
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        return Fetched(path, size_bytes, digest.hexdigest(), kind)

    def _translated(self, error: aiohttp.ClientError, target: Target) -> Exception:
        """One sentence for each way a server can fail; details stay in the chain of exceptions."""
        origin = target.origin
        if isinstance(error, aiohttp.ClientConnectorDNSError):
            return _PassingFault(f"the host {target.host} is not known")
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            return BadInput(f"the certificate of {origin} is not valid")
        if isinstance(error, aiohttp.ClientSSLError):
            return BadInput(f"no secure connection with {origin} came about")
        if isinstance(error, aiohttp.ServerTimeoutError):
            return _PassingFault(f"{origin} does not answer in time")
        if isinstance(error, aiohttp.ClientConnectorError):
            return _PassingFault(f"{origin} cannot be reached")
        if isinstance(
            error, (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)
        ):
            return _PassingFault(f"the transfer from {origin} broke off")
        return BadInput(f"{origin} does not answer in valid HTTP")


class _Pace:
    """Measures a body's rate in windows, so that a server cannot trickle for as long as the whole fetch may take."""

    def __init__(self, policy: EgressPolicy) -> None:
        self._policy = policy
        self._start_s = time.monotonic()
        self._bytes = 0

    def is_too_slow(self, arrived_bytes: int) -> bool:
        """Counts bytes; true when a window has just ended that brought too few."""
        self._bytes += arrived_bytes
        elapsed_s = time.monotonic() - self._start_s
        if elapsed_s < self._policy.rate_window_s:
            return False
        slow = self._bytes < self._policy.min_bytes_per_s * elapsed_s
        self._start_s, self._bytes = time.monotonic(), 0
        return slow


class _CheckedResolver(AbstractResolver):
    """Judges every address that another resolver finds; what passes is what the connector connects to."""

    def __init__(self, inner: AbstractResolver, allow: tuple[Network, ...]) -> None:
        self._inner = inner
        self._allow = allow

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        for entry in found:
            check_address(entry["host"], self._allow, shown=host)
        if not found:
            raise OSError("no address")
        return found

    async def close(self) -> None:
        await self._inner.close()


def check_address(text: str, allow: tuple[Network, ...], *, shown: str) -> None:
    """Refuses an address that is not public and not allowed.

    Args:
        text: the address, as a resolver or a URL gives it.
        allow: ranges that may be reached although they are not public.
        shown: what the message names: the user's own spelling, never what an inner name resolves to.

    Raises:
        EgressRefused: the address is refused; the sentence says what kind it is.
    """
    try:
        kind = addresses.refusal_of(ipaddress.ip_address(text), allow)
    except ValueError:
        kind = "reserved"
    if "%" in text:
        kind = "link-local"
    if kind is not None:
        raise EgressRefused(f"the address {shown} is not reachable from this service ({kind})")


def with_field(error: InvalidSpec, field: str) -> InvalidSpec:
    """The same refusal, naming the field of the request that it is about: ``concepts[0].instance_data``."""
    return type(error)("; ".join(violation.rule for violation in error.violations), field)


def _check_answer(response: aiohttp.ClientResponse, target: Target, max_bytes: int) -> None:
    """Looks at status and headers before a byte of the body is read."""
    if response.status in _PASSING:
        raise _PassingFault(f"{target.origin} answered {response.status}")
    if response.status != 200:
        raise BadInput(f"{target.origin} answered {response.status}")
    encodings = {
        part.strip().lower()
        for value in response.headers.getall("Content-Encoding", ())
        for part in value.split(",")
    }
    transfer = response.headers.get("Transfer-Encoding", "chunked").strip().lower()
    if encodings - {"", "identity"} or transfer not in {"chunked", "identity"}:
        raise BadInput(f"{target.origin} sends an encoded body, which is not accepted")
    if response.content_length is not None and response.content_length > max_bytes:
        raise BadInput(f"the file is larger than {max_bytes} bytes")


def _discard(path: Path) -> None:
    path.unlink(missing_ok=True)


def _store(chunk: bytes, file: BinaryIO, digest: "hashlib._Hash") -> None:
    digest.update(chunk)
    file.write(chunk)
