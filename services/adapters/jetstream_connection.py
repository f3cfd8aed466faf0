"""One connection to the job log's server: requests, answers and their errors, and the server's clock.

This is the seam where what the client library raises becomes one of four outcomes: an answer, :class:`Refused` (the
server said no, with its error code), :class:`NoAnswer` (nothing says whether the request took effect), or
:class:`NotSent`. Callers above translate these into the errors of the domain.
"""

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Self

import nats
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from services.adapters import subjects
from services.domain.errors import Unavailable

logger = logging.getLogger(__name__)

REQUEST_TIMEOUT_S: Final = 2.0
RECONNECT_PAUSE_S: Final = 0.2
CLOCK_REFRESH_S: Final = 30.0
READ_PATIENCE_S: Final = 5.0
_FIRST_PAUSE_S: Final = 0.02
_LONGEST_PAUSE_S: Final = 1.0

WRONG_LAST_SEQUENCE: Final = 10071
WRITE_IN_FLIGHT: Final = 10164
STREAM_FULL: Final = 10077
STREAM_NOT_FOUND: Final = 10059
NO_MESSAGE: Final = 10037


class Refused(Exception):
    """The server answered with an error."""

    def __init__(self, code: int, err_code: int, text: str) -> None:
        super().__init__(f"{text} ({code}/{err_code})")
        self.code = code
        self.err_code = err_code


class NoAnswer(Exception):
    """The request went out and nothing came back: it may or may not have taken effect."""


class NotSent(Exception):
    """The connection is down: the request never left, and never will."""


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """One message of a stream.

    Attributes:
        sequence: its position.
        time_ms: when the server stored it, milliseconds since 1970.
    """

    subject: str
    sequence: int
    time_ms: int
    data: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class Backoff:
    """Pauses that double from 20 ms to 1 s, until a deadline."""

    def __init__(self, patience_s: float) -> None:
        self._deadline = time.monotonic() + patience_s
        self._pause_s = _FIRST_PAUSE_S

    @property
    def over(self) -> bool:
        """The deadline has passed."""
        return time.monotonic() >= self._deadline

    async def pause(self) -> None:
        """Waits for the next pause, never beyond the deadline."""
        await asyncio.sleep(max(0.0, min(self._pause_s, self._deadline - time.monotonic())))
        self._pause_s = min(self._pause_s * 2, _LONGEST_PAUSE_S)


class ServerClock:
    """The present by the server's clock, carried on by this machine's monotonic one between two readings."""

    def __init__(self) -> None:
        self._offset_ms = time.time() * 1000 - time.monotonic() * 1000
        self._latest_ms = 0

    def set(self, server_ms: float, sent: float, received: float) -> None:
        """Takes a reading: the server's time somewhere between two moments of the monotonic clock, in seconds."""
        self._offset_ms = server_ms - (sent + received) / 2 * 1000

    def now_ms(self) -> int:
        """Milliseconds since 1970; never less than the last time it was asked."""
        self._latest_ms = max(self._latest_ms, round(time.monotonic() * 1000 + self._offset_ms))
        return self._latest_ms


class Connection:
    """Talks to the server, survives its restarts, and never keeps a request for later."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._reconnect_listeners: set[Callable[[], None]] = set()
        self._waiting: set[asyncio.Timeout] = set()
        self._clock_task: asyncio.Task[None] | None = None
        self.clock = ServerClock()

    @classmethod
    async def open(cls, servers: Sequence[str], name: str = "likeness", timeout_s: float = 10.0) -> Self:
        """Connects.

        Args:
            servers: addresses, `nats://host:port`.
            name: how the server lists this client.
            timeout_s: how long to wait for the first connection.

        Raises:
            Unavailable: no server could be reached in that time.
        """
        connection = cls(Client())
        # With any buffer (the library's default) a write made while the server is away raises a timeout and is
        # stored after the reconnect all the same; pending_size=-1 makes it fail at once and for good.
        connecting = connection._client.connect(
            servers=list(servers),
            name=name,
            pending_size=-1,
            max_reconnect_attempts=-1,
            reconnect_time_wait=RECONNECT_PAUSE_S,  # type: ignore[arg-type]  # annotated int, used as seconds
            ping_interval=10,
            max_outstanding_pings=2,
            error_cb=connection._on_error,
            disconnected_cb=connection._on_disconnected,
            reconnected_cb=connection._on_reconnected,
        )
        try:
            async with asyncio.timeout(timeout_s):
                await connecting
        except (TimeoutError, OSError, nats.errors.Error) as error:
            raise Unavailable(f"no job log answers at {', '.join(servers)}") from error
        connection._clock_task = asyncio.create_task(connection._keep_clock())
        return connection

    async def close(self) -> None:
        """Ends the connection."""
        if self._clock_task is not None:
            self._clock_task.cancel()
            await asyncio.gather(self._clock_task, return_exceptions=True)
        await self._client.close()

    @property
    def client(self) -> Client:
        """The library's client, for subscriptions."""
        return self._client

    @property
    def connected(self) -> bool:
        """The server is reachable at this moment."""
        return self._client.is_connected

    @property
    def server_version(self) -> str:
        """Version of the server that is connected, as its greeting says; of this one server only."""
        version = self._client.connected_server_version
        return f"{version.major}.{version.minor}.{version.patch}"

    @property
    def closed(self) -> bool:
        """The connection has ended for good: closed here, or refused by the server."""
        return self._client.is_closed

    def on_reconnect(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Calls `listener` after every reconnect; returns what ends that."""
        self._reconnect_listeners.add(listener)
        return lambda: self._reconnect_listeners.discard(listener)

    async def request(
        self, subject: str, payload: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Msg:
        """Sends a request and waits for one answer.

        Raises:
            NoAnswer: none came in time, or nobody listens.
            NotSent: the connection is down.
            Unavailable: the connection has ended for good.
        """
        extra = dict(headers) if headers else None
        try:
            # The library's own timeout (asyncio.wait_for) loses a cancellation that comes together with the answer.
            async with self._answer_time():
                return await self._client.request(subject, payload, timeout=None, headers=extra)  # type: ignore[arg-type]
        except nats.errors.OutboundBufferLimitError as error:
            raise NotSent(str(error)) from error
        except nats.errors.ConnectionClosedError as error:
            raise Unavailable("the connection to the job log has ended") from error
        except (TimeoutError, nats.errors.TimeoutError, nats.errors.NoRespondersError) as error:
            raise NoAnswer(str(error)) from error

    async def ask(
        self, subject: str, body: Mapping[str, Any] | bytes = b"", headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Sends a request whose answer is JSON; raises as :meth:`request`, and Refused for an error in it."""
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer: dict[str, Any] = json.loads((await self.request(subject, payload, headers)).data)
        error = answer.get("error")
        if error is None:
            return answer
        code, err_code = int(error.get("code", 0)), int(error.get("err_code", 0))
        # A change of leaders, or a server that is starting: the request may have been passed on.
        if code == 503 and err_code != STREAM_FULL:
            raise NoAnswer(str(error))
        raise Refused(code, err_code, str(error.get("description", "")))

    async def ask_patiently(self, subject: str, body: Mapping[str, Any] | bytes = b"") -> dict[str, Any]:
        """:meth:`ask`, repeated for some seconds while nothing comes back: for requests that may be repeated.

        Raises:
            Unavailable: nothing came back until then.
            Refused: the server said no.
        """
        backoff = Backoff(READ_PATIENCE_S)
        while True:
            try:
                return await self.ask(subject, body)
            except (NoAnswer, NotSent) as error:
                if backoff.over:
                    raise Unavailable("the job log does not answer") from error
            await backoff.pause()

    async def get_message(self, stream: str, query: Mapping[str, Any]) -> StoredMessage | None:
        """One message by the stream's leader; None when there is none.

        Args:
            stream: the stream's name.
            query: `last_by_subj`, or `seq` with `next_by_subj`.
        """
        return await self._found(self.ask(subjects.stream_api("MSG.GET", stream), query))

    async def get_message_patiently(self, stream: str, query: Mapping[str, Any]) -> StoredMessage | None:
        """:meth:`get_message`, repeated for some seconds while nothing comes back."""
        return await self._found(self.ask_patiently(subjects.stream_api("MSG.GET", stream), query))

    async def _found(self, asking: Any) -> StoredMessage | None:
        try:
            raw = (await asking)["message"]
        except Refused as error:
            if error.err_code == NO_MESSAGE:
                return None
            raise
        headers = _parse_headers(base64.b64decode(raw.get("hdrs", "")))
        data = base64.b64decode(raw.get("data", ""))
        return StoredMessage(raw["subject"], raw["seq"], time_ms_of(raw["time"]), data, headers)

    async def gather(self, subject: str, body: Mapping[str, Any]) -> tuple[list[StoredMessage], int]:
        """Sends a request that any replica answers with a run of messages.

        Returns:
            The messages, and how many more there would be.

        Raises:
            NoAnswer, NotSent: as :meth:`request`.
        """
        inbox = self._client.new_inbox()
        answers: asyncio.Queue[Msg] = asyncio.Queue()

        async def keep(message: Msg) -> None:
            answers.put_nowait(message)

        subscription = await self._client.subscribe(
            inbox, cb=keep, pending_msgs_limit=-1, pending_bytes_limit=-1
        )
        try:
            await self._client.publish(subject, json.dumps(body).encode(), reply=inbox)
            return await self._collect(answers)
        except nats.errors.OutboundBufferLimitError as error:
            raise NotSent(str(error)) from error
        finally:
            await self._unsubscribe(subscription)

    async def _collect(self, answers: asyncio.Queue[Msg]) -> tuple[list[StoredMessage], int]:
        found: list[StoredMessage] = []
        while True:
            try:
                async with self._answer_time():
                    message = await answers.get()
            except TimeoutError as error:
                raise NoAnswer("the answer broke off") from error
            headers = message.headers or {}
            match headers.get("Status"):
                case None:
                    found.append(_direct_message(message, headers))
                case "204":
                    return found, int(headers.get("Nats-Num-Pending", "0"))
                case "404":
                    return found, 0
                case "503":
                    raise NoAnswer("nobody answers")
                case status:
                    raise Refused(int(status), 0, headers.get("Description", ""))

    @asynccontextmanager
    async def _answer_time(self) -> AsyncGenerator[None, None]:
        """Time for one answer; over at once when the connection is lost, since none can come then."""
        async with asyncio.timeout(REQUEST_TIMEOUT_S) as limit:
            self._waiting.add(limit)
            try:
                yield
            finally:
                self._waiting.discard(limit)

    async def _unsubscribe(self, subscription: Any) -> None:
        if not self._client.is_closed:
            await subscription.unsubscribe()

    async def read_clock(self) -> None:
        """Takes a reading of the server's clock; a missing answer leaves the last one standing."""
        sent = time.monotonic()
        try:
            answer = await self.ask(subjects.stream_api("INFO", subjects.JOBS))
        except (NoAnswer, NotSent, Refused, Unavailable):
            logger.debug("no reading of the server's clock")
            return
        self.clock.set(time_ms_of(answer["ts"]), sent, time.monotonic())

    async def _keep_clock(self) -> None:
        while True:
            await asyncio.sleep(CLOCK_REFRESH_S)
            await self.read_clock()

    async def _on_error(self, error: Exception) -> None:
        logger.debug("job log connection: %r", error)

    async def _on_disconnected(self) -> None:
        for limit in self._waiting:
            if not limit.expired():
                limit.reschedule(0)
        if not self._client.is_closed:
            logger.warning("lost the connection to the job log")

    async def _on_reconnected(self) -> None:
        logger.warning("connected to the job log again")
        for listener in list(self._reconnect_listeners):
            listener()


def _direct_message(message: Msg, headers: Mapping[str, str]) -> StoredMessage:
    return StoredMessage(
        subject=headers["Nats-Subject"],
        sequence=int(headers["Nats-Sequence"]),
        time_ms=time_ms_of(headers["Nats-Time-Stamp"]),
        data=message.data,
        headers=headers,
    )


def _parse_headers(raw: bytes) -> dict[str, str]:
    lines = raw.decode().split("\r\n")[1:]
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {name: value.strip() for name, value in pairs}


def time_ms_of(stamp: str) -> int:
    """Milliseconds since 1970 of a server's time stamp, RFC 3339 in UTC with up to nine digits."""
    whole, _, fraction = stamp.rstrip("Z").partition(".")
    seconds = datetime.fromisoformat(f"{whole}+00:00").timestamp()
    return int(seconds) * 1000 + int((fraction + "000")[:3])
