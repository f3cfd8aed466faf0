"""Calling gRPC: keepalive, default deadlines, repeats of UNAVAILABLE, trace context, our own exceptions.

A :class:`Channel` is handed to a generated stub in place of gRPC's own:

    channel = Channel(settings.storage_addr)
    storage = StorageServiceStub(channel)
    response = await storage.GetModel(request)              # raises NotFound, Unavailable, ...
    async for event in training.WatchTrainingJob(request):  # streams have no deadline unless one is given
        ...
"""

import asyncio
import random
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.adapters.grpc_errors import from_rpc_error
from services.adapters.telemetry import outgoing_headers
from services.domain.errors import DeadlineExceeded, LikenessError, Unavailable

DEFAULT_TIMEOUT_S = 10.0
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0
MAX_RESPONSE_BYTES = 64 << 20
"""Longest answer that is taken: gRPC's own 4 MiB hold a data set of ten thousand pictures, but not their captions."""

OPTIONS = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_retries", 0),  # one place repeats calls: the loop below
)


class Channel:
    """A connection to one service; the subset of `grpc.aio.Channel` that generated stubs use."""

    def __init__(
        self, address: str, *, timeout_s: float = DEFAULT_TIMEOUT_S, wait_for_ready: bool = False
    ) -> None:
        """Prepares a connection; it is made at the first call.

        Args:
            address: `host:port`, or any gRPC target.
            timeout_s: seconds for unary calls that set no timeout; repeats included.
            wait_for_ready: calls wait for the connection, instead of failing at once and being repeated.
        """
        self.address = address
        options = (*OPTIONS, ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES))
        self._channel = grpc.aio.insecure_channel(address, options=options)
        self._timeout_s = timeout_s
        self._wait_for_ready = wait_for_ready

    async def __aenter__(self) -> Self:
        """Returns the channel itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the connection."""
        await self.close()

    async def close(self) -> None:
        """Ends the connection; running calls are cancelled."""
        await self._channel.close(None)

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Callable[..., Awaitable[Any]]:
        """Makes the callable of a method with one request and one response; UNAVAILABLE is tried again."""
        inner: Any = self._channel.unary_unary(method, *args, **kwargs)

        async def call(request: Any, *, timeout: float | None = None, retry: bool = True) -> Any:
            limit_s = self._timeout_s if timeout is None else timeout
            return await self._repeated(lambda left_s: self._one(inner, request, left_s), limit_s, retry)

        return call

    def stream_unary(self, method: str, *args: Any, **kwargs: Any) -> Callable[..., Awaitable[Any]]:
        """Makes the callable of a method that takes a stream; it is not repeated, the stream being used up."""
        inner: Any = self._channel.stream_unary(method, *args, **kwargs)

        async def call(requests: AsyncIterable[Any], *, timeout: float | None = None) -> Any:
            return await self._one(inner, requests, timeout)

        return call

    def unary_stream(self, method: str, *args: Any, **kwargs: Any) -> Callable[..., AsyncIterator[Any]]:
        """Makes the callable of a method that answers with a stream."""
        return self._streaming(self._channel.unary_stream(method, *args, **kwargs))

    def stream_stream(self, method: str, *args: Any, **kwargs: Any) -> Callable[..., AsyncIterator[Any]]:
        """Makes the callable of a method with streams both ways."""
        return self._streaming(self._channel.stream_stream(method, *args, **kwargs))

    def _streaming(self, inner: Any) -> Callable[..., AsyncIterator[Any]]:
        async def call(request: Any, *, timeout: float | None = None) -> AsyncIterator[Any]:
            running = self._begun(inner, request, timeout)
            try:
                async for response in running:
                    yield response
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from error
            finally:
                running.cancel()

        return call

    def _begun(self, inner: Any, request: Any, timeout_s: float | None) -> Any:
        metadata = tuple(outgoing_headers())
        return inner(request, timeout=timeout_s, metadata=metadata, wait_for_ready=self._wait_for_ready)

    async def _one(self, inner: Any, request: Any, timeout_s: float | None) -> Any:
        try:
            return await self._begun(inner, request, timeout_s)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def _repeated(self, attempt: Callable[[float], Awaitable[Any]], limit_s: float, retry: bool) -> Any:
        """Tries until the time is up; raises the last refusal, which says more than the deadline would."""
        loop = asyncio.get_running_loop()
        end = loop.time() + limit_s
        pause_s, refusal = FIRST_PAUSE_S, Unavailable()
        while True:
            try:
                return await attempt(max(end - loop.time(), 0.001))
            except Unavailable as error:
                refusal = error
            except DeadlineExceeded as error:
                raise (refusal if refusal.message else error) from error
            if not retry or loop.time() + pause_s >= end:
                raise refusal
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)


async def is_serving(channel: Channel, service: str = "", *, timeout_s: float = 2.0) -> bool:
    """Asks a server for its health.

    Args:
        channel: connection to it.
        service: full name of one of its services; empty: the server as a whole.
        timeout_s: seconds to wait for the answer.

    Returns:
        Whether it answered SERVING; False too when it does not answer.
    """
    stub = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=service)
    try:
        response = await stub.Check(request, timeout=timeout_s, retry=False)
    except LikenessError:
        return False
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)
