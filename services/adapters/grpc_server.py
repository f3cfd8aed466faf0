"""Serving gRPC: health, reflection, trace context, default deadlines, errors by the table, graceful stop.

A process makes one :class:`GrpcServer`, adds its servicers, enters it, and waits in `run_until_signalled`:

    server = GrpcServer(settings.storage_addr, grace_s=settings.grace_s, ready_fd=settings.ready_fd)
    server.add(add_StorageServiceServicer_to_server, servicer, "likeness.storage.v1.StorageService")
    async with server:
        await server.run_until_signalled(retention.run())
"""

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any, Self, cast

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.adapters.grpc_errors import ErrorInterceptor, wrapped_handler
from services.adapters.telemetry import continued_trace, trace_of
from services.domain.errors import DeadlineExceeded

logger = logging.getLogger(__name__)

DEFAULT_DEADLINE_S = 60.0
"""Time a unary call may take when its caller set no deadline."""

OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second process on the same port must fail, not share the calls
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
)


def notify_ready(ready_fd: int | None) -> None:
    """Writes a line to the file that the launcher opened for it, and closes it; does nothing without one."""
    if ready_fd is not None:
        os.write(ready_fd, b"ready\n")
        os.close(ready_fd)


class _TraceInterceptor(grpc.aio.ServerInterceptor):
    """Continues the caller's trace inside each handler."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        headers = trace_of(handler_call_details.invocation_metadata or ())

        def unary(behaviour: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
            async def traced(request: Any, context: grpc.aio.ServicerContext) -> Any:
                with continued_trace(*headers):
                    return await behaviour(request, context)

            return traced

        def stream(behaviour: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
            async def traced(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
                with continued_trace(*headers):
                    async for response in behaviour(request, context):
                        yield response

            return traced

        return wrapped_handler(await continuation(handler_call_details), unary, stream)


class _DeadlineInterceptor(grpc.aio.ServerInterceptor):
    """Ends unary calls whose caller set no deadline after a default one."""

    def __init__(self, default_deadline_s: float) -> None:
        self._default_deadline_s = default_deadline_s

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        return wrapped_handler(handler, self._limited, lambda behaviour: behaviour)

    def _limited(self, behaviour: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def limited(request: Any, context: grpc.aio.ServicerContext) -> Any:
            if context.time_remaining() is not None:
                return await behaviour(request, context)
            try:
                async with asyncio.timeout(self._default_deadline_s) as limit:
                    return await behaviour(request, context)
            except TimeoutError as error:
                if not limit.expired():
                    raise
                raise DeadlineExceeded(f"took longer than {self._default_deadline_s:g} s") from error

        return limited


class _OursOnly(grpc.aio.ServerInterceptor):
    """Applies interceptors to our own services; health and reflection bring handlers of another kind."""

    def __init__(self, inner: grpc.aio.ServerInterceptor) -> None:
        self._inner = inner

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        if handler_call_details.method.startswith("/grpc."):
            return await continuation(handler_call_details)
        return await self._inner.intercept_service(continuation, handler_call_details)


class GrpcServer:
    """One listening address with its services."""

    def __init__(
        self,
        address: str,
        *,
        grace_s: float = 20.0,
        default_deadline_s: float = DEFAULT_DEADLINE_S,
        ready_fd: int | None = None,
    ) -> None:
        """Prepares a server; nothing listens before it is entered.

        Args:
            address: `host:port`; port 0 takes a free one.
            grace_s: seconds that calls get to end when the server stops.
            default_deadline_s: seconds for unary calls without a deadline.
            ready_fd: open file that gets a line once the server listens and is healthy.
        """
        interceptors = (_TraceInterceptor(), ErrorInterceptor(), _DeadlineInterceptor(default_deadline_s))
        self._server = grpc.aio.server(
            interceptors=[_OursOnly(interceptor) for interceptor in interceptors], options=OPTIONS
        )
        self._address = address
        self._grace_s = grace_s
        self._ready_fd = ready_fd
        self._names: list[str] = []
        self._health: Any = cast(Any, health).aio.HealthServicer()
        self.address = address

    def add(self, add_to_server: Callable[[Any, Any], None], servicer: object, name: str) -> None:
        """Registers a service.

        Args:
            add_to_server: the generated `add_..._to_server` function.
            servicer: its implementation.
            name: full name of the service, for health and reflection.
        """
        add_to_server(servicer, self._server)
        self._names.append(name)

    async def __aenter__(self) -> Self:
        """Listens, and says SERVING; `address` then holds the real port."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            [*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server
        )
        try:
            port = self._server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self._address}: is another process using it?") from error
        self.address = f"{self._address.rpartition(':')[0]}:{port}"
        await self._server.start()
        await self.set_serving(True)
        notify_ready(self._ready_fd)
        logger.info("serving", extra={"address": self.address})
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Says NOT_SERVING, refuses new calls, and gives the running ones their grace."""
        await self.set_serving(False)
        await self._server.stop(self._grace_s)

    async def set_serving(self, serving: bool) -> None:
        """Sets the health of the server and of each of its services."""
        status = health_pb2.HealthCheckResponse
        for name in ["", *self._names]:
            await self._health.set(name, status.SERVING if serving else status.NOT_SERVING)

    async def run_until_signalled(
        self, *work: Coroutine[Any, Any, None], stopping: asyncio.Event | None = None
    ) -> None:
        """Works until SIGTERM or SIGINT comes, all work is done, or a piece of it fails.

        Args:
            work: what runs beside the calls, if anything; it is cancelled at the end.
            stopping: set at the signal. With it the work gets the grace to end by itself before it is cancelled.

        Raises:
            Exception: what a piece of work raised.
        """
        signalled = asyncio.Event()
        _on_signals(signalled)
        tasks = [asyncio.create_task(item) for item in work]
        try:
            await _first_failure_or(signalled, tasks)
            await self.set_serving(False)
            if stopping is not None and tasks:
                stopping.set()
                await asyncio.wait(tasks, timeout=self._grace_s)
        finally:
            await _ended(tasks)


def _on_signals(event: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, event.set)


async def _first_failure_or(event: asyncio.Event, tasks: list[asyncio.Task[None]]) -> None:
    """Returns when the event is set or all tasks, if there are any, are done; raises what one raised before that."""
    waiting = asyncio.create_task(event.wait())
    pending: set[asyncio.Task[Any]] = {waiting, *tasks}
    try:
        while waiting in pending and (len(pending) > 1 or not tasks):
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        waiting.cancel()


async def _ended(tasks: list[asyncio.Task[None]]) -> None:
    """Cancels what still runs; raises what a task raised while it was ending."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
            raise result
