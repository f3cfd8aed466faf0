"""What may be lost: workers' signs of life, and the recent progress of jobs."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Mapping
from dataclasses import asdict
from typing import Any

import nats.errors
from nats.aio.msg import Msg

from services.adapters import subjects
from services.adapters.jetstream_connection import Connection, NoAnswer, NotSent, StoredMessage
from services.adapters.jetstream_write import Write, Writer
from services.domain.errors import Unavailable
from services.domain.job import JobKind
from services.domain.ports import Beat, ProgressEntry

logger = logging.getLogger(__name__)


class JetStreamBeatFeed:
    """Beats of all workers; see :class:`~services.domain.ports.BeatFeed`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def publish_beat(self, beat: Beat) -> None:
        """Tells all replicas; lost while the server is away."""
        await _publish(self._connection, subjects.beat(beat.kind, beat.worker), asdict(beat))

    async def follow_beats(self, kind: JobKind) -> AsyncGenerator[Beat, None]:
        """Beats published from now on."""
        arrived: asyncio.Queue[bytes] = asyncio.Queue()

        async def keep(message: Msg) -> None:
            arrived.put_nowait(message.data)

        client = self._connection.client
        subscription = await client.subscribe(subjects.beats(kind), cb=keep)
        try:
            while True:
                yield _beat_of(await arrived.get())
        finally:
            if not client.is_closed:
                await subscription.unsubscribe()


def _beat_of(data: bytes) -> Beat:
    """Reads a beat; unknown keys are a newer version's."""
    raw = json.loads(data)
    jobs = tuple((project, job_id, epoch) for project, job_id, epoch in raw["jobs"])
    models = tuple(raw["warm_models"])
    known = {name: value for name, value in raw.items() if name in Beat.__dataclass_fields__}
    return Beat(**known | {"kind": JobKind(raw["kind"]), "jobs": jobs, "warm_models": models})


class JetStreamProgressLog:
    """Recent progress and cursors over it; see :class:`~services.domain.ports.ProgressLog`."""

    def __init__(self, connection: Connection, writer: Writer) -> None:
        self._connection = connection
        self._writer = writer

    async def publish_progress(self, project: str, job_id: str, body: Mapping[str, Any]) -> None:
        """Stores one message; lost while the server is away."""
        await _publish(self._connection, subjects.progress(project, job_id), body)

    async def last_progress(self, project: str, job_id: str) -> ProgressEntry | None:
        """The newest message."""
        query = {"last_by_subj": subjects.progress(project, job_id)}
        found = await self._connection.get_message_patiently(subjects.LIVE, query)
        return _entry(found) if found else None

    async def progress_after(
        self, project: str, job_id: str, after: int, limit: int = 100
    ) -> list[ProgressEntry]:
        """Messages above a sequence, oldest first."""
        query = {"seq": after + 1, "next_by_subj": subjects.progress(project, job_id), "batch": limit}
        try:
            found, _ = await self._connection.gather(subjects.direct_get(subjects.LIVE), query)
        except (NoAnswer, NotSent) as error:
            raise Unavailable("the progress log does not answer") from error
        return [_entry(message) for message in found]

    async def read_cursor(self, project: str, job_id: str) -> tuple[Mapping[str, Any], int]:
        """A reader's position, and the sequence to expect."""
        subject = subjects.cursor(project, job_id)
        return await read_document(self._connection, subjects.LIVE, subject)

    async def write_cursor(self, project: str, job_id: str, value: Mapping[str, Any], expected: int) -> int:
        """Moves a reader's position by compare-and-set."""
        subject = subjects.cursor(project, job_id)
        return await self._writer.write(Write(subjects.LIVE, subject, json.dumps(value).encode(), expected))


class JetStreamSmallLog:
    """Idempotency keys and webhook cursors; see :class:`~services.domain.ports.SmallLog`."""

    def __init__(self, connection: Connection, writer: Writer) -> None:
        self._connection = connection
        self._writer = writer

    async def create_idempotency(self, project: str, key_hash: str, value: Mapping[str, Any]) -> None:
        """Stores what an idempotency key stands for, once."""
        subject = subjects.idempotency(project, key_hash)
        await self._writer.write(Write(subjects.IDEM, subject, json.dumps(value).encode(), 0))

    async def read_idempotency(self, project: str, key_hash: str) -> Mapping[str, Any] | None:
        """What an idempotency key stands for."""
        subject = subjects.idempotency(project, key_hash)
        value, sequence = await read_document(self._connection, subjects.IDEM, subject)
        return value if sequence else None

    async def read_hook(self, project: str, job_id: str) -> tuple[Mapping[str, Any], int]:
        """A webhook's cursor, and the sequence to expect."""
        return await read_document(self._connection, subjects.HOOKS, subjects.hook(project, job_id))

    async def write_hook(self, project: str, job_id: str, value: Mapping[str, Any], expected: int) -> int:
        """Moves a webhook's cursor by compare-and-set."""
        subject = subjects.hook(project, job_id)
        return await self._writer.write(Write(subjects.HOOKS, subject, json.dumps(value).encode(), expected))


async def read_document(connection: Connection, stream: str, subject: str) -> tuple[Mapping[str, Any], int]:
    """The newest document under a subject and its sequence; ({}, 0) when there is none."""
    found = await connection.get_message_patiently(stream, {"last_by_subj": subject})
    return (json.loads(found.data), found.sequence) if found else ({}, 0)


async def _publish(connection: Connection, subject: str, body: Mapping[str, Any]) -> None:
    try:
        await connection.client.publish(subject, json.dumps(body).encode())
    except nats.errors.Error as error:
        logger.debug("a message to %s is lost: %r", subject, error)


def _entry(message: StoredMessage) -> ProgressEntry:
    return ProgressEntry(message.sequence, json.loads(message.data))
