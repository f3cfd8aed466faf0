"""Signatures of S3 requests (AWS Signature Version 4), by the signer of the `minio` client.

Knows where the bucket is and the keys that open it; sends nothing itself.
"""

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final
from urllib.parse import SplitResult, quote, urlsplit, urlunsplit

from minio.credentials.credentials import Credentials
from minio.signer import presign_v4, sign_v4_s3

EMPTY_SHA256: Final = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket and the keys to it.

    Attributes:
        endpoint: `http(s)://host[:port]` of the store.
        name: the bucket, addressed in the path.
        region: what signatures name; most stores beside AWS take any.
        access_key: tells who asks.
        secret_key: signs; not part of the object's text.
    """

    endpoint: str
    name: str
    region: str
    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)

    def url(self, key: str = "", query: dict[str, str] | None = None) -> str:
        """The address of an object, or of the bucket when there is no key, spelled as it is signed."""
        path = f"/{self.name}/{quote(key, safe='/-_.~')}" if key else f"/{self.name}"
        pairs = sorted(
            (quote(name, safe="-_.~"), quote(value, safe="-_.~")) for name, value in (query or {}).items()
        )
        return f"{self.endpoint}{path}" + ("?" + "&".join("=".join(pair) for pair in pairs) if pairs else "")

    def signed_headers(self, method: str, url: str, headers: dict[str, str], sha256: str) -> dict[str, str]:
        """All headers of a request, its signature among them.

        Args:
            method: HTTP method.
            url: what :meth:`url` gave.
            headers: headers of the request; all of them are signed.
            sha256: digest of the body, lower-case hexadecimal: the store refuses any other body.
        """
        now, parts = datetime.now(UTC), urlsplit(url)
        unsigned: dict[str, str | list[str] | tuple[str]] = {
            **headers,
            "Host": parts.netloc,
            "x-amz-content-sha256": sha256,
            "x-amz-date": now.strftime("%Y%m%dT%H%M%SZ"),
        }
        signed = sign_v4_s3(
            method=method,
            url=parts,
            region=self.region,
            headers=unsigned,
            credentials=self._credentials(),
            content_sha256=sha256,
            date=now,
        )
        return {name: str(value) for name, value in signed.items()}

    def presigned(self, method: str, url: str, life_s: int) -> str:
        """An address that anybody may use for one method until it expires.

        Args:
            method: HTTP method.
            url: what :meth:`url` gave.
            life_s: seconds, 1 to 604 800.
        """
        parts: SplitResult = presign_v4(
            method=method,
            url=urlsplit(url),
            region=self.region,
            credentials=self._credentials(),
            date=datetime.now(UTC),
            expires=life_s,
        )
        return urlunsplit(parts)

    def _credentials(self) -> Credentials:
        return Credentials(access_key=self.access_key, secret_key=self.secret_key)
