"""Following the job log: newest revisions first, then everything new, across restarts of the server.

A reader pulls through a consumer that lives in the server's memory and holds nothing that matters: when it is gone, or
silent, or the server comes back, a new one starts behind the last sequence seen. Nothing is acknowledged. Pulls bound
what is under way; a subscription that the server pushes to would drop messages of a large replay.
"""

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

import nats.errors
from nats.aio.msg import Msg

from services.adapters import subjects
from services.adapters.jetstream_connection import Connection, NoAnswer, NotSent, Refused, StoredMessage
from services.adapters.job_headers import RESTING_STATES, record_of
from services.domain.errors import Unavailable
from services.domain.job import JobKind, JobRecord, JobRef
from services.domain.ports import CaughtUp, JobLog, Revision

logger = logging.getLogger(__name__)

REPLAY_BATCH: Final = 1000
FOLLOW_BATCH: Final = 200
BODIES_BATCH: Final = 500
PULL_EXPIRES_S: Final = 5.0
SILENCE_S: Final = 10.0
RESTART_PAUSE_S: Final = 0.2
_SECOND_NS: Final = 1_000_000_000
_TIME_OUT: Final = "408"


class ConsumerLost(Exception):
    """The consumer is gone, or does not answer."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """A message of a stream as a consumer delivers it; `pending` counts those that wait behind it."""

    message: StoredMessage
    pending: int


class PullConsumer:
    """One consumer in the server's memory, from its making to its loss.

    Args:
        connection: where the stream is.
        stream: its name.
        filter_subject: which subjects.
        start: the consumer's fields that say where it begins and what it delivers.
        batch: messages asked for at once.
    """

    def __init__(
        self, connection: Connection, stream: str, filter_subject: str, start: dict[str, Any], batch: int
    ) -> None:
        self._connection = connection
        self._stream = stream
        self._filter = filter_subject
        self._start = start
        self._batch = batch
        self._name = f"feed-{secrets.token_hex(8)}"
        self._arrived: asyncio.Queue[Msg | None] = asyncio.Queue()
        self.pending_at_start = 0

    async def messages(self) -> AsyncGenerator[Delivered | None, None]:
        """What the consumer delivers, in order; first None, once it is made.

        Raises:
            ConsumerLost: it was removed, has been silent for too long, or the connection was interrupted.
        """
        unlisten = self._connection.on_reconnect(lambda: self._arrived.put_nowait(None))
        client = self._connection.client
        inbox = client.new_inbox()
        try:
            await self._create()
            subscription = await client.subscribe(
                inbox, cb=self._keep, pending_msgs_limit=-1, pending_bytes_limit=-1
            )
            try:
                yield None
                async with aclosing(self._pulled(inbox)) as pulled:
                    async for delivered in pulled:
                        yield delivered
            finally:
                if not client.is_closed:
                    await subscription.unsubscribe()
        except (nats.errors.Error, NoAnswer, NotSent, Refused) as error:
            raise ConsumerLost(str(error)) from error
        finally:
            unlisten()

    async def remove(self) -> None:
        """Takes the consumer out of the server; one that is gone, or out of reach, goes by itself."""
        try:
            await self._connection.ask(subjects.delete_consumer(self._stream, self._name))
        except (NoAnswer, NotSent, Refused, Unavailable) as error:
            logger.debug("consumer %s is left to expire: %r", self._name, error)

    async def _keep(self, message: Msg) -> None:
        self._arrived.put_nowait(message)

    async def _create(self) -> None:
        config = {
            "name": self._name,
            "filter_subject": self._filter,
            "ack_policy": "none",
            "replay_policy": "instant",
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": 60 * _SECOND_NS,
            **self._start,
        }
        subject = subjects.create_consumer(self._stream, self._name, self._filter)
        body = {"stream_name": self._stream, "config": config, "action": "create"}
        made = await self._connection.ask(subject, body)
        self.pending_at_start = int(made.get("num_pending", 0))

    async def _pulled(self, inbox: str) -> AsyncGenerator[Delivered, None]:
        open_requests = 0
        while True:
            if open_requests == 0:
                await self._pull(inbox)
                open_requests = self._batch
            message = await self._next()
            status = (message.headers or {}).get("Status")
            if status is None:
                open_requests -= 1
                yield _delivered(message)
            elif status == _TIME_OUT:
                open_requests = 0
            else:
                raise ConsumerLost(f"{status} {(message.headers or {}).get('Description', '')}")

    async def _pull(self, inbox: str) -> None:
        request = {"batch": self._batch, "expires": int(PULL_EXPIRES_S * _SECOND_NS)}
        subject = subjects.next_messages(self._stream, self._name)
        await self._connection.client.publish(subject, json.dumps(request).encode(), reply=inbox)

    async def _next(self) -> Msg:
        if self._arrived.empty():
            try:
                async with asyncio.timeout(SILENCE_S):
                    message = await self._arrived.get()
            except TimeoutError as error:
                raise ConsumerLost("silence") from error
        else:
            message = self._arrived.get_nowait()
        if message is None:
            raise ConsumerLost("the connection was interrupted")
        return message


def _delivered(message: Msg) -> Delivered:
    """Reads place and time from the reply subject, which has 9 parts, or 12 with a domain and an account."""
    parts = message.reply.split(".")
    place = parts[4:9] if len(parts) == 9 else parts[6:11]
    _, sequence, _, stamp_ns, pending = (int(part) for part in place)
    stored = StoredMessage(
        message.subject, sequence, stamp_ns // 1_000_000, message.data, message.headers or {}
    )
    return Delivered(stored, pending)


def revision_of(message: StoredMessage) -> Revision:
    """A message of the job log as a revision.

    Raises:
        KeyError, ValueError: it is not one.
    """
    return Revision(JobRecord.from_json(message.data), message.sequence, message.time_ms)


class JetStreamJobFeed:
    """The revisions as they come; see :class:`~services.domain.ports.JobFeed`.

    Args:
        connection: where the log is.
        job_log: where the bodies of jobs that live are read.
    """

    def __init__(self, connection: Connection, job_log: JobLog) -> None:
        self._connection = connection
        self._job_log = job_log

    async def follow(self, kind: JobKind | None = None) -> AsyncGenerator[Revision | CaughtUp, None]:
        """Newest revision of every job, then CaughtUp, then every new revision, for ever."""
        position = -1
        while position < 0:
            try:
                async with aclosing(self._replay(kind)) as replay:
                    async for found in replay:
                        if isinstance(found, Revision):
                            yield found
                        else:
                            position = found
            except (ConsumerLost, Unavailable) as error:
                await self._pause("the replay of the job log begins again", error)
        async with aclosing(self._follow(kind, position)) as following:
            async for item in following:
                yield item

    async def _pause(self, what: str, reason: Exception) -> None:
        if self._connection.closed:
            raise Unavailable("the connection to the job log has ended") from reason
        logger.info("%s: %s", what, reason)
        await asyncio.sleep(RESTART_PAUSE_S)

    async def _replay(self, kind: JobKind | None) -> AsyncGenerator[Revision | int, None]:
        """The newest revision of every job; at the end the highest sequence seen, 0 when there is none."""
        start = {"deliver_policy": "last_per_subject", "headers_only": True}
        consumer = PullConsumer(self._connection, subjects.JOBS, subjects.jobs(kind), start, REPLAY_BATCH)
        gathered: list[StoredMessage] = []
        highest = 0
        async with aclosing(consumer.messages()) as messages:
            async for delivered in messages:
                if delivered is not None:
                    gathered.append(delivered.message)
                    highest = max(highest, delivered.message.sequence)
                ended = delivered.pending == 0 if delivered else consumer.pending_at_start == 0
                if ended or len(gathered) >= BODIES_BATCH:
                    for revision in await self._with_bodies(gathered):
                        yield revision
                    gathered = []
                if ended:
                    break
        await consumer.remove()
        yield highest

    async def _with_bodies(self, messages: Sequence[StoredMessage]) -> list[Revision]:
        """Ended jobs from their headers, the others from their bodies; a job purged meanwhile is left out."""
        lines = [line for message in messages for line in _headline(message)]
        live = {line.record.ref: line.sequence for line in lines if line.record.state not in RESTING_STATES}
        bodies = await self._read_bodies(live)
        whole = (bodies.get(line.record.ref) if line.record.ref in live else line for line in lines)
        return [revision for revision in whole if revision is not None]

    async def _read_bodies(self, live: Mapping[JobRef, int]) -> dict[JobRef, Revision]:
        """The bodies of jobs by any replica, and by the leader where that one is behind the sequence seen."""
        if not live:
            return {}
        found = {revision.record.ref: revision for revision in await self._job_log.read_many(list(live))}
        for ref, sequence in live.items():
            if ref not in found or found[ref].sequence < sequence:
                newest = await self._job_log.read(ref)
                if newest is not None:
                    found[ref] = newest
        return found

    async def _follow(self, kind: JobKind | None, position: int) -> AsyncGenerator[Revision | CaughtUp, None]:
        """Everything after `position`.

        It starts behind the last message that the replay delivered, not at the end of the stream as its leader knew
        it: the replica that served the replay may have lagged behind.
        """
        caught_up = False
        while True:
            start = {"deliver_policy": "by_start_sequence", "opt_start_seq": position + 1}
            consumer = PullConsumer(self._connection, subjects.JOBS, subjects.jobs(kind), start, FOLLOW_BATCH)
            try:
                async with aclosing(consumer.messages()) as messages:
                    async for delivered in messages:
                        if delivered is not None and delivered.message.sequence > position:
                            position = delivered.message.sequence
                            for revision in _body(delivered.message):
                                yield revision
                        waiting = delivered.pending if delivered else consumer.pending_at_start
                        if waiting == 0 and not caught_up:
                            caught_up = True
                            yield CaughtUp(position)
            except (ConsumerLost, Unavailable) as error:
                await self._pause(f"following the job log again after {position}", error)
            finally:
                await consumer.remove()


def _headline(message: StoredMessage) -> list[Revision]:
    try:
        return [Revision(record_of(message.headers), message.sequence, message.time_ms)]
    except (KeyError, ValueError, TypeError):
        logger.exception("message %d of the job log has no revision's headers", message.sequence)
        return []


def _body(message: StoredMessage) -> list[Revision]:
    try:
        return [revision_of(message)]
    except (KeyError, ValueError, TypeError):
        logger.exception("message %d of the job log is not a revision", message.sequence)
        return []
