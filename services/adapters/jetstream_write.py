"""The one write: a compare-and-set whose outcome is always found out.

Every revision of a subject names its predecessor, so a write that was stored is the message that follows the
expected one, or it is nowhere. After a lost answer the log itself is asked which of the two holds; repeating the same
bytes is harmless meanwhile, because at most one of the repeats can follow that predecessor.
"""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from services.adapters.jetstream_connection import (
    STREAM_FULL,
    WRITE_IN_FLIGHT,
    WRONG_LAST_SEQUENCE,
    Backoff,
    Connection,
    NoAnswer,
    NotSent,
    Refused,
)
from services.domain.errors import Conflict, Internal, OutcomeUnknown, QueueFull, Unavailable

logger = logging.getLogger(__name__)

WRITE_ID: Final = "L-Write"
EXPECTED: Final = "Nats-Expected-Last-Subject-Sequence"
EXPECTED_STREAM: Final = "Nats-Expected-Stream"
WRITE_PATIENCE_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Write:
    """One revision on its way.

    Attributes:
        expected: sequence of the revision it must follow; 0: the subject must be empty.
        id: random, by which it is known again.
    """

    stream: str
    subject: str
    data: bytes
    expected: int
    headers: Mapping[str, str] = field(default_factory=dict)
    id: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def all_headers(self) -> dict[str, str]:
        """The headers with those that make it a compare-and-set."""
        own = {WRITE_ID: self.id, EXPECTED: str(self.expected), EXPECTED_STREAM: self.stream}
        return {**self.headers, **own}


class Writer:
    """Sends writes and finds out what became of them.

    Args:
        connection: where to.
        in_flight: writes that may be under way at once; more than one is slower with a single server, not faster.
        patience_s: how long the outcome of a write is sought.
        on_missing_stream: called when nobody takes a write, to look after the streams.
    """

    def __init__(
        self,
        connection: Connection,
        in_flight: int = 1,
        patience_s: float = WRITE_PATIENCE_S,
        on_missing_stream: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._connection = connection
        self._room = asyncio.Semaphore(in_flight)
        self._patience_s = patience_s
        self._on_missing_stream = on_missing_stream
        self._running: set[asyncio.Task[int]] = set()

    async def write(self, write: Write) -> int:
        """Stores a revision, and goes on finding out about it when the caller is cancelled.

        Returns:
            The sequence it was stored at.

        Raises:
            Conflict: another revision follows the expected one.
            QueueFull: the stream has no room.
            OutcomeUnknown: nothing was found out until the patience ended.
        """
        task = asyncio.create_task(self._settle(write))
        self._running.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    def _forget(self, task: asyncio.Task[int]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # looked at, so that an abandoned write does not complain

    async def close(self) -> None:
        """Abandons the writes whose outcome is still sought."""
        for task in list(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _settle(self, write: Write) -> int:
        backoff = Backoff(self._patience_s)
        while True:
            full = stale = False
            try:
                return await self._publish(write)
            except Refused as error:
                full, stale = error.err_code == STREAM_FULL, error.err_code == WRONG_LAST_SEQUENCE
                self._judge(error, write)
            except (NoAnswer, NotSent) as error:
                logger.debug("write to %s: %r", write.subject, error)
            settled = await self._look(write, stale)
            if settled is not None:
                return settled
            if backoff.over:
                raise (
                    QueueFull("the job log is full")
                    if full
                    else OutcomeUnknown("the job log does not answer")
                )
            await backoff.pause()

    async def _publish(self, write: Write) -> int:
        async with self._room:
            answer = await self._connection.ask(write.subject, write.data, write.all_headers)
        return int(answer["seq"])

    def _judge(self, error: Refused, write: Write) -> None:
        """Lets those refusals pass that do not settle the matter."""
        if error.err_code in (WRONG_LAST_SEQUENCE, WRITE_IN_FLIGHT):
            return
        if error.err_code != STREAM_FULL:
            logger.error("the job log refused a write to %s: %s", write.subject, error)
            raise Internal(str(error)) from error
        if write.expected == 0:
            raise QueueFull("the job log is full") from error
        logger.error("the job log is full: a job that has begun cannot be written")

    async def _look(self, write: Write, stale: bool) -> int | None:
        """What the log says: the sequence when the write was stored, None while that is open."""
        query = {"seq": write.expected + 1, "next_by_subj": write.subject}
        try:
            follower = await self._connection.get_message(write.stream, query)
            if follower is None and stale:
                await self._require_predecessor(write)
        except (NoAnswer, NotSent, Refused):
            if self._on_missing_stream is not None and self._connection.connected:
                await self._repair()
            return None
        if follower is None:
            return None
        if follower.headers.get(WRITE_ID) == write.id:
            return follower.sequence
        raise Conflict("another change came first")

    async def _require_predecessor(self, write: Write) -> None:
        """A write that is refused although nothing follows what it expects: that must be there, or it never will."""
        newest = await self._connection.get_message(write.stream, {"last_by_subj": write.subject})
        if (newest.sequence if newest else 0) < write.expected:
            raise Conflict("the revision to change is not there any more")

    async def _repair(self) -> None:
        assert self._on_missing_stream is not None
        try:
            await self._on_missing_stream()
        except Unavailable as error:
            logger.debug("the streams cannot be looked after: %r", error)
