"""The job core's ports on NATS JetStream: the job log, and the platform that holds all five ports.

One stream holds every revision of every job. Connection and errors are in :mod:`.jetstream_connection`, the streams'
configuration in :mod:`.jetstream_streams`, the one write in :mod:`.jetstream_write`, following in
:mod:`.jetstream_feed`, what may be lost in :mod:`.jetstream_live`.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Self

from services.adapters import job_headers, subjects
from services.adapters.jetstream_connection import (
    READ_PATIENCE_S,
    Backoff,
    Connection,
    NoAnswer,
    NotSent,
    StoredMessage,
)
from services.adapters.jetstream_feed import JetStreamJobFeed, revision_of
from services.adapters.jetstream_live import JetStreamBeatFeed, JetStreamProgressLog, JetStreamSmallLog
from services.adapters.jetstream_streams import (
    check_cluster,
    check_monitor,
    check_version,
    ensure_streams,
    stream_configs,
)
from services.adapters.jetstream_write import WRITE_PATIENCE_S, Write, Writer
from services.domain.errors import InvalidSpec, QueueFull, Unavailable
from services.domain.job import MAX_RECORD_BYTES, JobRecord, JobRef
from services.domain.ports import Revision

logger = logging.getLogger(__name__)

ADMISSION_SHARE: Final = 0.8
"""Share of the log's room that new jobs may fill; the rest is for running jobs to end in."""

FILL_READING_S: Final = 1.0
READ_MANY_BATCH: Final = 500
WRITES_IN_FLIGHT: Final = {1: 1, 3: 32}
"""By the number of replicas. Alone, a server stores about 2,000 writes a second one at a time and 300 to 700 with two
or more under way; three of them 837 with one under way and 4,796 with 32."""


class JetStreamJobLog:
    """Every revision of every job; see :class:`~services.domain.ports.JobLog`."""

    def __init__(self, connection: Connection, writer: Writer, max_bytes: int) -> None:
        self._connection = connection
        self._writer = writer
        self._max_bytes = max_bytes
        self._fill = 0.0
        self._fill_read_at = -FILL_READING_S

    async def write(self, record: JobRecord, expected: int) -> int:
        """Stores a revision by compare-and-set."""
        stamped = record.stamped()
        body = stamped.to_json()
        if len(body) > MAX_RECORD_BYTES:
            raise InvalidSpec(f"the record of job {record.id} is larger than {MAX_RECORD_BYTES} bytes")
        if expected == 0:
            await self._check_room()
        headers = job_headers.headers_of(stamped)
        write = Write(subjects.JOBS, subjects.job(record.ref), body, expected, headers, stamped.write)
        try:
            return await self._writer.write(write)
        except QueueFull:
            self._note_fill(1.0)
            raise

    async def _check_room(self) -> None:
        """Refuses a new job while the log is nearly full, by a reading that is at most about a second old."""
        if time.monotonic() - self._fill_read_at >= FILL_READING_S:
            try:
                await self._read_fill(self._connection.ask)
            except (NoAnswer, NotSent):
                logger.debug("no reading of the job log's fill; the last one stands")
        if self._fill >= ADMISSION_SHARE:
            raise QueueFull("the job log is full")

    async def read(self, ref: JobRef) -> Revision | None:
        """The newest revision, by the stream's leader."""
        return await self._get({"last_by_subj": subjects.job(ref)})

    async def next_revision(self, ref: JobRef, after: int) -> Revision | None:
        """The first revision of the job above a sequence, by the stream's leader."""
        return await self._get({"seq": after + 1, "next_by_subj": subjects.job(ref)})

    async def _get(self, query: dict[str, Any]) -> Revision | None:
        found = await self._connection.get_message_patiently(subjects.JOBS, query)
        return revision_of(found) if found else None

    async def read_many(self, refs: Sequence[JobRef]) -> list[Revision]:
        """The newest revisions of several jobs, in the order of `refs`; any replica answers."""
        found: dict[str, StoredMessage] = {}
        wanted = [subjects.job(ref) for ref in refs]
        for start in range(0, len(wanted), READ_MANY_BATCH):
            found |= await self._read_batch(wanted[start : start + READ_MANY_BATCH])
        return [revision_of(found[subject]) for subject in wanted if subject in found]

    async def _read_batch(self, wanted: list[str]) -> dict[str, StoredMessage]:
        found: dict[str, StoredMessage] = {}
        while missing := [subject for subject in wanted if subject not in found]:
            messages, left = await self._gather_patiently({"multi_last": missing})
            found |= {message.subject: message for message in messages}
            if left == 0 or not messages:
                break
        return found

    async def _gather_patiently(self, query: dict[str, Any]) -> tuple[list[StoredMessage], int]:
        backoff = Backoff(READ_PATIENCE_S)
        while True:
            try:
                return await self._connection.gather(subjects.direct_get(subjects.JOBS), query)
            except (NoAnswer, NotSent) as error:
                if backoff.over:
                    raise Unavailable("the job log does not answer") from error
            await backoff.pause()

    async def purge(self, ref: JobRef, keep_last: bool) -> None:
        """Removes all revisions of a job, or all but the newest."""
        request: dict[str, Any] = {"filter": subjects.job(ref)}
        if keep_last:
            request["keep"] = 1
        await self._connection.ask_patiently(subjects.stream_api("PURGE", subjects.JOBS), request)

    async def fill(self) -> float:
        """Share of the log's room that is used, 0..1."""
        return await self._read_fill(self._connection.ask_patiently)

    async def _read_fill(self, ask: Callable[[str], Awaitable[dict[str, Any]]]) -> float:
        answer = await ask(subjects.stream_api("INFO", subjects.JOBS))
        return self._note_fill(answer["state"]["bytes"] / self._max_bytes)

    def _note_fill(self, share: float) -> float:
        self._fill, self._fill_read_at = share, time.monotonic()
        return share

    def now_ms(self) -> int:
        """The present by the server's clock."""
        return self._connection.clock.now_ms()


class JetStreamPlatform:
    """All ports of the job core on one connection.

    Attributes:
        connection: the connection; for what no port offers.
    """

    def __init__(
        self, connection: Connection, configs: dict[str, dict[str, Any]], write_patience_s: float
    ) -> None:
        self.connection = connection
        self._configs = configs
        self._ensuring = asyncio.Lock()
        replicas = int(configs[subjects.JOBS]["num_replicas"])
        self._writer = Writer(connection, WRITES_IN_FLIGHT[replicas], write_patience_s, self.ensure_streams)
        self.job_log = JetStreamJobLog(connection, self._writer, configs[subjects.JOBS]["max_bytes"])
        self.job_feed = JetStreamJobFeed(connection, self.job_log)
        self.beats = JetStreamBeatFeed(connection)
        self.progress = JetStreamProgressLog(connection, self._writer)
        self.small = JetStreamSmallLog(connection, self._writer)

    @classmethod
    async def open(
        cls,
        servers: Sequence[str],
        *,
        monitor_url: str = "",
        system_servers: Sequence[str] = (),
        replicas: int = 1,
        jobs_max_bytes: int | None = None,
        write_patience_s: float = WRITE_PATIENCE_S,
    ) -> Self:
        """Connects, checks the server, makes or compares the streams.

        Args:
            servers: addresses, `nats://host:port`.
            monitor_url: monitor of the one server, for the check that it syncs every write.
            system_servers: for a cluster, instead: addresses with a user of the system account.
            replicas: copies of each stream: 1, or 3 on a cluster.
            jobs_max_bytes: room for job records; default 4 GiB, on a cluster 32 GiB.
            write_patience_s: how long the outcome of a write is sought.

        Raises:
            Unavailable: the server does not answer.
            ServerRefused: server or streams are not what this platform relies on.
        """
        if not (monitor_url or system_servers):
            raise ValueError("without monitor_url or system_servers nothing can tell whether writes are safe")
        connection = await Connection.open(servers)
        try:
            platform = cls(connection, stream_configs(replicas, jobs_max_bytes), write_patience_s)
            check_version(connection.server_version)
            await (check_cluster(system_servers, replicas) if system_servers else check_monitor(monitor_url))
            await platform.ensure_streams()
            await connection.read_clock()
        except BaseException:
            await connection.close()
            raise
        return platform

    async def ensure_streams(self) -> None:
        """Makes the streams that are missing; raises ServerRefused for one that differs."""
        async with self._ensuring:
            await ensure_streams(self.connection, self._configs)

    async def close(self) -> None:
        """Ends the connection; writes whose outcome is open are abandoned."""
        await self._writer.close()
        await self.connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()
