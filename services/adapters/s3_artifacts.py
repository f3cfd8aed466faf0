"""ArtifactStore in an S3 bucket: clusters, and whoever has a store already.

    <key>            an object, under the key that all stores use
    probes/<name>    what :meth:`S3ArtifactStore.check` writes and removes

An object appears with the last request of its upload. Documents that are created once rest on conditional writes
(`If-None-Match`), so a store that ignores those is refused at the start. Bytes are checked both ways: uploads carry
digests that the store compares, blobs are read against the digest in their key, documents against one stored with them.
"""

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final

import aiohttp

from services.adapters.owned_folder import OwnedFolder, sweep_dead
from services.adapters.s3_multipart import ONLY_NEW, PartedUploads, check_parts, milliseconds
from services.adapters.s3_requests import (
    BUSY,
    NETWORK_FAULTS,
    TRIES,
    Answer,
    RefusedByStore,
    S3Requests,
    elements,
    fields,
    text_of,
)
from services.domain.artifacts import CHUNK_BYTES, checked_key, digest_of_key, is_blob_key
from services.domain.errors import (
    AlreadyExists,
    AlteredBytes,
    InvalidSpec,
    NotFound,
    Unavailable,
)
from services.domain.ports import DirectUpload, ObjectInfo

PROBES: Final = "probes/"
SHA256_HEADER: Final = "x-amz-meta-sha256"
WRITE_HEADER: Final = "x-amz-meta-write"
"""Tells apart whose write it was when an answer was lost."""
URL_LIFE_S: Final = 3600
READS_OF_ALTERED: Final = 3


@dataclass(frozen=True, slots=True)
class S3Options:
    """How objects are kept.

    Attributes:
        part_bytes: files above this travel in parts of this size; 5 MiB at least, as S3 demands.
        encryption: value of `x-amz-server-side-encryption`: AES256 or aws:kms; empty: the bucket's own choice.
        encryption_key: for aws:kms, the key's name; empty: the store's default key.
        orphan_s: uploads unfinished for so many seconds are swept.
    """

    part_bytes: int = 16 << 20
    encryption: str = ""
    encryption_key: str = ""
    orphan_s: float = 86_400.0

    @property
    def headers(self) -> Mapping[str, str]:
        """What every write says of the object."""
        named = {
            "x-amz-server-side-encryption": self.encryption,
            "x-amz-server-side-encryption-aws-kms-key-id": self.encryption_key,
        }
        return {name: value for name, value in named.items() if value}


class S3ArtifactStore:
    """Objects in a bucket; files on their way in lie in a local folder."""

    def __init__(self, requests: S3Requests, staging: Path, options: S3Options | None = None) -> None:
        """Asks nothing of the store yet; see :meth:`check`.

        Args:
            requests: to the bucket; closed with the store.
            staging: local folder, made if missing; several processes may share it.
            options: how objects are kept.
        """
        self._requests = requests
        self._options = options or S3Options()
        self._parted = PartedUploads(requests, self._options.part_bytes, self._options.headers)
        self._staging_root = staging.absolute()
        sweep_dead(self._staging_root)
        self._owned = OwnedFolder(self._staging_root)

    @property
    def staging(self) -> Path:
        """This process's folder for files on their way in."""
        return self._owned.path

    async def close(self) -> None:
        """Removes the staging folder and ends all connections."""
        await asyncio.to_thread(self._owned.close)
        await self._requests.close()

    async def check(self) -> None:
        """Writes, reads and removes an object, and sees whether conditional writes are honoured.

        Raises:
            InvalidSpec: address, bucket, keys or the store itself cannot be used; the text says which and what to do.
            Unavailable: nothing answers there.
        """
        key = f"{PROBES}{secrets.token_hex(8)}"
        try:
            await self.put_document(key, b"probe", create_only=False)
            answer = await self._put(key, b"probe", dict(ONLY_NEW), (200, 412))
            await self.delete(key)
        except RefusedByStore as error:
            raise InvalidSpec(_explained(error, self._requests), "LIKENESS_ARTIFACTS") from error
        except Unavailable as error:
            raise Unavailable(f"LIKENESS_ARTIFACTS: {self._requests.bucket.endpoint}: {error}") from error
        if answer.status != 412:
            raise InvalidSpec(
                f"the store at {self._requests.bucket.endpoint} ignores conditional writes (If-None-Match), on which "
                "names that are given once rest; use a store that honours them",
                "LIKENESS_ARTIFACTS",
            )

    async def sweep(self) -> int:
        """Removes what writers left that are gone: staged files, old unfinished uploads; returns how many."""
        staged = await asyncio.to_thread(sweep_dead, self._staging_root)
        before_ms = int((time.time() - self._options.orphan_s) * 1000)
        for info in [info async for info in self.list(PROBES) if info.modified_ms < before_ms]:
            await self.delete(info.key)
        return staged + await self._parted.sweep(before_ms)

    async def put_file(self, key: str, path: Path) -> None:
        """Stores a file's bytes; what is there stays.

        Raises:
            Unavailable: the store does not answer or refuses.
        """
        if await self.stat(key) is not None:
            return
        if (await asyncio.to_thread(path.stat)).st_size > self._options.part_bytes:
            await self._parted.put_file(key, path)
        else:
            await self._put(key, await asyncio.to_thread(path.read_bytes), dict(ONLY_NEW), (200, 412))

    async def read(self, key: str, offset: int = 0, limit: int | None = None) -> AsyncIterator[bytes]:
        """Streams an object's bytes in pieces of at most 1 MiB; goes on where a connection broke.

        Raises:
            NotFound: there is no such object.
            AlteredBytes: a whole blob does not have the digest in its key; told after its last piece.
            Unavailable: the store does not answer or refuses.
        """
        if limit == 0:
            if await self.stat(key) is None:
                raise NotFound("no such artifact")
            return
        whole = is_blob_key(checked_key(key)) and offset == 0 and limit is None
        digest = hashlib.sha256()
        async for piece in self._pieces(key, offset, None if limit is None else offset + limit):
            if whole:
                digest.update(piece)
            yield piece
        if whole and digest.hexdigest() != digest_of_key(key):
            raise AlteredBytes("the artifact store sent other bytes than the digest promises")

    async def stat(self, key: str) -> ObjectInfo | None:
        """Size and age of an object; None when it is not there."""
        answer = await self._requests.ask("HEAD", checked_key(key), expected=(200, 404))
        if answer.status == 404:
            return None
        modified = parsedate_to_datetime(answer.headers["Last-Modified"])
        return ObjectInfo(key, int(answer.headers["Content-Length"]), int(modified.timestamp() * 1000))

    async def put_document(self, key: str, data: bytes, *, create_only: bool) -> None:
        """Stores a small document.

        Raises:
            AlreadyExists: `create_only`, and there is one.
            Unavailable: the store does not answer or refuses.
        """
        write = secrets.token_hex(12)
        headers = {SHA256_HEADER: hashlib.sha256(data).hexdigest(), WRITE_HEADER: write}
        condition = ONLY_NEW if create_only else {}
        answer = await self._put(checked_key(key), data, {**headers, **condition}, (200, 412))
        if answer.status == 412 and not await self._was_written_by(key, write):
            raise AlreadyExists("there is a document under this name already")

    async def get_document(self, key: str) -> bytes | None:
        """A small document's bytes; None when it is not there.

        Raises:
            AlteredBytes: it does not have the digest it was stored with, however often it is read.
            Unavailable: the store does not answer or refuses.
        """
        for _ in range(READS_OF_ALTERED):
            answer = await self._requests.ask("GET", checked_key(key), expected=(200, 404))
            if answer.status == 404:
                return None
            promised = answer.headers.get(SHA256_HEADER)
            if promised in (None, hashlib.sha256(answer.body).hexdigest()):
                return answer.body
        raise AlteredBytes("the artifact store sent another document than it was given")

    async def delete(self, key: str) -> None:
        """Removes an object; nothing happens when it is not there."""
        await self._requests.ask("DELETE", checked_key(key), expected=(200, 204, 404))

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """Every object whose key starts with `prefix`, in the order of keys."""
        # Sorted here: stores that keep folders list those in the order of their names without the slash.
        for info in sorted([info async for info in self._listed(prefix)], key=lambda info: info.key):
            yield info

    # Transfers that do not pass through this process

    def download_url(self, key: str) -> str:
        """An address that reads one object for an hour."""
        bucket = self._requests.bucket
        return bucket.presigned("GET", bucket.url(checked_key(key)), URL_LIFE_S)

    async def begin_upload(self, key: str, size_bytes: int) -> DirectUpload:
        """Begins an upload whose parts others send, each to its own address, for an hour."""
        upload_id, bucket = await self._parted.begin(checked_key(key)), self._requests.bucket
        part_bytes = self._parted.part_bytes(size_bytes)
        queries = [
            {"partNumber": str(number + 1), "uploadId": upload_id}
            for number in range(-(-size_bytes // part_bytes))
        ]
        urls = [bucket.presigned("PUT", bucket.url(key, query), URL_LIFE_S) for query in queries]
        return DirectUpload(upload_id, part_bytes, tuple(urls))

    async def finish_upload(self, key: str, upload_id: str, size_bytes: int) -> None:
        """Makes the object of the parts that came; done again, it changes nothing.

        Raises:
            Unavailable: parts are missing, the upload is gone, or the store does not answer.
        """
        try:
            parts = await self._parted.parts(checked_key(key), upload_id)
            check_parts(parts, size_bytes)
            await self._parted.complete(key, upload_id, parts)
        except NotFound as error:
            found = await self.stat(key)
            if found is None or found.size_bytes != size_bytes:
                raise Unavailable("the upload is gone; it must begin anew") from error

    async def _put(
        self, key: str, data: bytes, headers: Mapping[str, str], expected: tuple[int, ...]
    ) -> Answer:
        return await self._requests.ask(
            "PUT", checked_key(key), None, {**self._options.headers, **headers}, data, expected=expected
        )

    async def _was_written_by(self, key: str, write: str) -> bool:
        """The document is the one of this write, whose first answer was lost."""
        answer = await self._requests.ask("HEAD", key, expected=(200, 404))
        return answer.headers.get(WRITE_HEADER) == write

    async def _pieces(self, key: str, start: int, end: int | None) -> AsyncIterator[bytes]:
        """The bytes from `start` up to `end` (None: all), over as many connections as it takes."""
        position, etag, fruitless, why = start, "", 0, ""
        while fruitless < TRIES:
            await self._requests.pause(fruitless, why)
            try:
                async with self._requests.stream(key, _range(position, end, etag)) as response:
                    if not await _has_bytes(response):
                        return
                    etag = response.headers.get("ETag", "")
                    async for piece in _mebibytes(response.content):
                        position, fruitless = position + len(piece), 0
                        yield piece
                return
            except NETWORK_FAULTS as error:
                fruitless, why = fruitless + 1, type(error).__name__
        raise Unavailable(f"the artifact store does not answer ({why})")

    async def _listed(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        query = {"list-type": "2", "prefix": prefix}
        while True:
            answer = await self._requests.ask("GET", "", query, expected=(200,))
            for entry in map(fields, elements(answer.body, "Contents")):
                if not entry["Key"].endswith("/"):
                    yield ObjectInfo(entry["Key"], int(entry["Size"]), milliseconds(entry["LastModified"]))
            token = text_of(answer.body, "NextContinuationToken")
            if text_of(answer.body, "IsTruncated") != "true" or not token:
                return
            query["continuation-token"] = token


class _Busy(aiohttp.ClientError):
    """The store says that it cannot serve this now."""


async def _has_bytes(response: aiohttp.ClientResponse) -> bool:
    """Whether a GET brings bytes; False when the range begins at the end or behind it."""
    if response.status in (200, 206):
        return True
    body = await response.read()
    code = text_of(body, "Code")
    if response.status == 416:
        return False
    if response.status == 404 and code in ("", "NoSuchKey"):
        raise NotFound("no such artifact")
    if response.status in BUSY:
        raise _Busy
    if response.status == 412:
        raise Unavailable("the object changed while it was read")
    raise RefusedByStore(response.status, code)


async def _mebibytes(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    held = bytearray()
    while piece := await content.read(CHUNK_BYTES - len(held)):
        held += piece
        if len(held) == CHUNK_BYTES:
            yield bytes(held)
            held.clear()
    if held:
        yield bytes(held)


def _range(start: int, end: int | None, etag: str) -> dict[str, str]:
    """Headers that ask for a part of an object, and of no other than the one read so far."""
    headers = {"If-Match": etag} if etag else {}
    if start or end is not None:
        headers["Range"] = f"bytes={start}-" + ("" if end is None else str(end - 1))
    return headers


def _explained(error: RefusedByStore, requests: S3Requests) -> str:
    bucket = requests.bucket
    sentences = {
        "NoSuchBucket": f"there is no bucket {bucket.name} at {bucket.endpoint}; make it, or mend the name",
        "InvalidBucketName": f"{bucket.name} cannot name a bucket; S3 wants 3 to 63 lower-case letters, digits, '-'",
        "InvalidAccessKeyId": "the store does not know the access key; mend LIKENESS_S3_ACCESS_KEY or its file",
        "SignatureDoesNotMatch": "the secret key is not the access key's; mend LIKENESS_S3_SECRET_KEY or its file",
        "AccessDenied": f"the access key may not read, write, list and delete in {bucket.name}; grant it that",
        "AuthorizationHeaderMalformed": f"the store is not in {bucket.region}; mend LIKENESS_S3_REGION",
        "RequestTimeTooSkewed": "the clocks of this machine and of the store differ; set them",
    }
    other = (
        f"the store at {bucket.endpoint} refuses with {error.code} ({error.status})"
        if error.code
        else f"what answers at {bucket.endpoint} is not an S3 store (status {error.status}); mend the address"
    )
    return sentences.get(error.code, other)
