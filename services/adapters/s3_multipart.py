"""Uploads in parts to an S3 bucket: parts travel side by side, the object appears with the last request or never.

Parts of an upload that nobody completes are invisible and cost room; :meth:`PartedUploads.sweep` removes them once they
are old.
"""

import asyncio
import contextlib
import math
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

from services.adapters.s3_requests import RefusedByStore, S3Requests, elements, fields, text_of
from services.domain.errors import LikenessError, NotFound, Unavailable

PARTS_AT_ONCE: Final = 4
MOST_PARTS: Final = 10_000
ONLY_NEW: Final[Mapping[str, str]] = {"If-None-Match": "*"}
"""The condition of a write that must not replace anything."""


@dataclass(frozen=True, slots=True)
class Part:
    """One stored part.

    Attributes:
        number: from 1.
        etag: the store's name for the bytes.
    """

    number: int
    etag: str
    size_bytes: int


class PartedUploads:
    """Uploads in parts to one bucket."""

    def __init__(self, requests: S3Requests, part_bytes: int, headers: Mapping[str, str]) -> None:
        """Takes what it works with.

        Args:
            requests: to the bucket.
            part_bytes: size of a part; larger where an object would need more than 10 000.
            headers: of the object, given when an upload begins.
        """
        self._requests = requests
        self._part_bytes = part_bytes
        self._headers = dict(headers)

    def part_bytes(self, size_bytes: int) -> int:
        """Size of all parts of an object but the last."""
        return max(self._part_bytes, math.ceil(size_bytes / MOST_PARTS))

    async def put_file(self, key: str, path: Path) -> None:
        """Stores a file of at least one byte; an object that is there stays.

        Raises:
            Unavailable: the store does not answer or refuses.
        """
        upload_id = await self.begin(key)
        try:
            parts = await self._send_all(key, upload_id, path)
            await self.complete(key, upload_id, parts)
        except BaseException:
            # Where this fails too, the sweep removes the parts.
            with contextlib.suppress(LikenessError):
                await self.abort(key, upload_id)
            raise

    async def begin(self, key: str) -> str:
        """Begins an upload; returns its id."""
        answer = await self._requests.ask("POST", key, {"uploads": ""}, self._headers, expected=(200,))
        upload_id = text_of(answer.body, "UploadId")
        if not upload_id:
            raise RefusedByStore(answer.status, answer.code)
        return upload_id

    async def complete(self, key: str, upload_id: str, parts: list[Part]) -> None:
        """Makes the object of its parts; one that is there stays.

        Raises:
            NotFound: the upload is gone, and there is no object.
            Unavailable: the store does not answer or refuses.
        """
        listed = "".join(
            f"<Part><PartNumber>{part.number}</PartNumber><ETag>{escape(part.etag)}</ETag></Part>"
            for part in parts
        )
        body = f"<CompleteMultipartUpload>{listed}</CompleteMultipartUpload>".encode()
        answer = await self._requests.ask(
            "POST", key, {"uploadId": upload_id}, dict(ONLY_NEW), body, expected=(200, 404, 412)
        )
        if answer.status == 412:
            await self.abort(key, upload_id)
        elif answer.status == 404:
            # A repeated request finds its upload gone when the first attempt was carried out.
            if (await self._requests.ask("HEAD", key, expected=(200, 404))).status == 404:
                raise NotFound("the upload is gone")
        elif answer.code:
            raise RefusedByStore(answer.status, answer.code)

    async def abort(self, key: str, upload_id: str) -> None:
        """Removes an upload and its parts; nothing happens when it is gone."""
        await self._requests.ask("DELETE", key, {"uploadId": upload_id}, expected=(200, 204, 404))

    async def parts(self, key: str, upload_id: str) -> list[Part]:
        """What has arrived, in the order of numbers.

        Raises:
            NotFound: there is no such upload.
        """
        found: list[Part] = []
        while True:
            query = {"uploadId": upload_id, "part-number-marker": str(found[-1].number if found else 0)}
            answer = await self._requests.ask("GET", key, query, expected=(200, 404))
            if answer.status == 404:
                raise NotFound("the upload is gone")
            page = [_part(fields(element)) for element in elements(answer.body, "Part")]
            found += page
            if not page or text_of(answer.body, "IsTruncated") != "true":
                return found

    async def sweep(self, before_ms: int) -> int:
        """Removes the uploads that began before a moment, milliseconds since 1970; returns how many."""
        old = [(key, upload) async for key, upload, began_ms in self._unfinished() if began_ms < before_ms]
        for key, upload in old:
            await self.abort(key, upload)
        return len(old)

    async def _unfinished(self) -> AsyncIterator[tuple[str, str, int]]:
        """Key, id and beginning (milliseconds since 1970) of every upload that was not completed."""
        marker = {"key-marker": "", "upload-id-marker": ""}
        while True:
            answer = await self._requests.ask("GET", "", {"uploads": "", **marker}, expected=(200,))
            for entry in map(fields, elements(answer.body, "Upload")):
                yield entry["Key"], entry["UploadId"], milliseconds(entry["Initiated"])
            following = {
                "key-marker": text_of(answer.body, "NextKeyMarker"),
                "upload-id-marker": text_of(answer.body, "NextUploadIdMarker"),
            }
            if text_of(answer.body, "IsTruncated") != "true" or following == marker:
                return
            marker = following

    async def _send_all(self, key: str, upload_id: str, path: Path) -> list[Part]:
        size = (await asyncio.to_thread(path.stat)).st_size
        part_bytes, slots = self.part_bytes(size), asyncio.Semaphore(PARTS_AT_ONCE)

        async def send(number: int) -> Part:
            async with slots:
                data = await asyncio.to_thread(_read_at, path, (number - 1) * part_bytes, part_bytes)
                return await self._send(key, upload_id, number, data)

        try:
            async with asyncio.TaskGroup() as group:
                sent = [group.create_task(send(n + 1)) for n in range(math.ceil(size / part_bytes))]
        except ExceptionGroup as faults:
            raise faults.exceptions[0] from faults
        return [task.result() for task in sent]

    async def _send(self, key: str, upload_id: str, number: int, data: bytes) -> Part:
        query = {"partNumber": str(number), "uploadId": upload_id}
        answer = await self._requests.ask("PUT", key, query, body=data, expected=(200,))
        return Part(number, answer.headers.get("ETag", ""), len(data))


def check_parts(parts: list[Part], size_bytes: int) -> None:
    """Raises Unavailable when parts are missing or their sizes do not add up."""
    whole = [part.number for part in parts] == list(range(1, len(parts) + 1))
    if not whole or sum(part.size_bytes for part in parts) != size_bytes:
        raise Unavailable("parts of the upload are missing")


def milliseconds(text: str) -> int:
    """Milliseconds since 1970 of a time as S3's documents spell it, for instance 2026-11-20T10:00:00.000Z."""
    return int(datetime.fromisoformat(text).timestamp() * 1000)


def _part(entry: dict[str, str]) -> Part:
    return Part(int(entry["PartNumber"]), entry["ETag"], int(entry["Size"]))


def _read_at(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset, os.SEEK_SET)
        return file.read(length)
