"""Links to artifacts that work without a key until they expire.

A token is its own record: version, expiry, owner and digest of the artifact, and an HMAC-SHA-256 over these and the
file name. Nothing has to be stored for a link, nothing of it can be altered, and who removes the artifact ends the
link. The signing key is made once and never leaves storage.
"""

import base64
import binascii
import hashlib
import hmac
import secrets
import struct
from collections.abc import Callable
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp
from likeness.storage.v1.artifact_pb2 import FileLink

from services.domain.artifacts import blob_key, digest_of_key, is_blob_key, is_ref_name, project_of_key
from services.domain.errors import InvalidSpec, NotFound
from services.storage.documents import SECRETS, Documents

MAX_TTL_S: Final = 7 * 24 * 3600.0
SIGNING_KEY: Final = "link_signing_key"
_VERSION: Final = 1
_HEADER: Final = struct.Struct(">BQ32s")  # version, expiry in ms since 1970, digest; the project's id follows
_MAC_BYTES: Final = 32
_MAX_TOKEN: Final = 400


async def signing_key(documents: Documents) -> bytes:
    """The key that signs links, made at the first call of all."""
    made = {"key": secrets.token_hex(32)}
    return bytes.fromhex((await documents.put_if_absent("", SECRETS, SIGNING_KEY, made))["key"])


class FileLinks:
    """Makes and checks tokens."""

    def __init__(self, key: bytes, now_ms: Callable[[], int]) -> None:
        """Takes what it works with.

        Args:
            key: the signing key.
            now_ms: the present, milliseconds since 1970.
        """
        self._key = key
        self._now_ms = now_ms

    def create(self, key: str, file_name: str, ttl_s: float | None = None) -> FileLink:
        """Makes a link.

        Args:
            key: artifact key of a blob.
            file_name: last part of the link.
            ttl_s: life in seconds, above 0; None: 7 days, the most allowed.

        Raises:
            InvalidSpec: file name or life is out of range.
        """
        if not is_ref_name(file_name):
            raise InvalidSpec("must be 1 to 128 letters, digits, '_', '.' or '-'", "file_name")
        life_s = MAX_TTL_S if ttl_s is None else ttl_s
        if not 0 < life_s <= MAX_TTL_S:
            raise InvalidSpec("must be above 0 and at most 7 days", "ttl")
        expiry_ms = self._now_ms() + int(life_s * 1000)
        expire_time = Timestamp()
        expire_time.FromMilliseconds(expiry_ms)
        return FileLink(
            path=f"/files/{self._token(key, file_name, expiry_ms)}/{file_name}", expire_time=expire_time
        )

    def check(self, token: str, file_name: str) -> str:
        """Finds what a link points to.

        Args:
            token: the link's token.
            file_name: the link's file name.

        Returns:
            Artifact key.

        Raises:
            NotFound: expired, altered, or never made here; the answer is the same.
        """
        raw = _decoded(token)
        body, mac = raw[:-_MAC_BYTES], raw[-_MAC_BYTES:]
        if len(body) < _HEADER.size or not hmac.compare_digest(mac, self._mac(body, file_name)):
            raise NotFound("no such file")
        version, expiry_ms, digest = _HEADER.unpack_from(body)
        if version != _VERSION or expiry_ms <= self._now_ms():
            raise NotFound("no such file")
        return blob_key(body[_HEADER.size :].decode(), digest.hex())

    def _token(self, key: str, file_name: str, expiry_ms: int) -> str:
        if not is_blob_key(key):
            raise NotFound("no such artifact")
        header = _HEADER.pack(_VERSION, expiry_ms, bytes.fromhex(digest_of_key(key)))
        body = header + project_of_key(key).encode()
        raw = body + self._mac(body, file_name)
        return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()

    def _mac(self, body: bytes, file_name: str) -> bytes:
        message = struct.pack(">I", len(body)) + body + file_name.encode()
        return hmac.new(self._key, message, hashlib.sha256).digest()


def _decoded(token: str) -> bytes:
    """The token's bytes; only the one spelling that this module writes is taken."""
    if len(token) > _MAX_TOKEN:
        raise NotFound("no such file")
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise NotFound("no such file") from error
    if base64.urlsafe_b64encode(raw).rstrip(b"=").decode() != token:
        raise NotFound("no such file")
    return raw
