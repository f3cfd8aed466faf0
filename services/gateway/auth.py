"""Who calls: the key in a request, checked by AccessService and remembered for a few seconds."""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from likeness.access.v1 import access_service_pb2 as pb

from services.domain.errors import Unauthenticated

MAX_SECRET_CHARS = 512
REMEMBERED_KEYS = 10_000
REMEMBER_S = 5.0
"""A revoked key works for at most this long; one lookup in this time is what a busy caller costs."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is.

    Attributes:
        key_id: names the key in limits and logs.
        project: owner of everything the request makes or sees.
        scopes: what the key may do; empty: everything.
        requests_per_ten_seconds: the project's own limit for each operation; 0: the deployment's.
        operation_limits: finer limits by operation.
    """

    key_id: str
    project: str
    scopes: frozenset[str] = frozenset()
    requests_per_ten_seconds: int = 0
    operation_limits: Mapping[str, int] | None = None

    def may(self, dialect: str, endpoint: str) -> bool:
        """The key is good for an endpoint."""
        return not self.scopes or bool(self.scopes & {dialect, endpoint})


def secret_of(header: str | None) -> str:
    """The key in an Authorization header: `Bearer <key>`, or the bare key.

    Raises:
        Unauthenticated: there is none.
    """
    words = (header or "").split()
    if len(words) == 2 and words[0].lower() == "bearer":
        words = words[1:]
    if len(words) != 1 or len(words[0]) > MAX_SECRET_CHARS or not words[0].isascii():
        raise Unauthenticated("no key")
    return words[0]


class Authenticator:
    """Checks keys; remembers the answer under the key's digest, never the key."""

    def __init__(self, access: Any, monotonic: Callable[[], float] = time.monotonic) -> None:
        """Takes a stub of AccessService."""
        self._access = access
        self._monotonic = monotonic
        self._known: OrderedDict[bytes, tuple[float, Caller | None]] = OrderedDict()

    async def caller(self, header: str | None) -> Caller:
        """Says whose key a request carries.

        Raises:
            Unauthenticated: no key, or one that is not known.
            Unavailable: the access service does not answer.
        """
        secret = secret_of(header)
        digest = hashlib.sha256(secret.encode()).digest()
        until, caller = self._known.get(digest, (0.0, None))
        if until <= self._monotonic():
            caller = await self._look_up(secret)
            self._remember(digest, caller)
        if caller is None:
            raise Unauthenticated("unknown key")
        return caller

    async def _look_up(self, secret: str) -> Caller | None:
        try:
            response = await self._access.CheckKey(pb.CheckKeyRequest(secret=secret), timeout=2.5)
        except Unauthenticated:
            return None
        limits = response.project.limits
        return Caller(
            key_id=response.key.key_id,
            project=response.key.project_id,
            scopes=frozenset(response.key.scopes),
            requests_per_ten_seconds=limits.requests_per_ten_seconds,
            operation_limits=dict(limits.operation_requests_per_ten_seconds),
        )

    def _remember(self, digest: bytes, caller: Caller | None) -> None:
        self._known[digest] = self._monotonic() + REMEMBER_S, caller
        self._known.move_to_end(digest)
        while len(self._known) > REMEMBERED_KEYS:
            self._known.popitem(last=False)
