"""The error table at the gRPC border, both directions.

On the server an interceptor turns every exception into a `google.rpc.Status` that carries the row's reason
(ErrorInfo) and broken rules (BadRequest); on the client :func:`from_rpc_error` makes the same exception again. Both
read `domain/errors.py` and decide nothing themselves.
"""

import asyncio
import contextlib
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from services.domain.errors import (
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    Internal,
    InvalidSpec,
    LikenessError,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    Violation,
    WrongState,
    class_of,
    public_text,
    row_of,
)

logger = logging.getLogger(__name__)

ERROR_DOMAIN = "likeness"
MAX_TEXT = 1000
"""Longest error text in characters: with the details it must fit into gRPC's 8 KiB of trailing metadata."""
MAX_VIOLATIONS_BYTES = 2500
"""Largest size of the broken rules that travel as details; the text names as many as it has room for."""

MAX_READ_OUT = 256
"""Messages of a refused stream of requests that are read and thrown away, so that the refusal arrives."""
READ_OUT_S = 5.0
"""Time that this may take."""

_CUT_WHILE_SENDING = "Internal error from Core"
"""What gRPC says to a caller that was sending when the other side ended the call."""

_CLASS_OF_CODE: dict[grpc.StatusCode, type[LikenessError]] = {
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: WrongState,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
}
"""For answers without our details: made by the transport, or by something else in between."""


def to_status(error: BaseException) -> status_pb2.Status:
    """Renders an error for the wire.

    Args:
        error: any exception; one without a class of its own gets the fixed text of an internal error.

    Returns:
        Code, text, ErrorInfo and, for broken rules, BadRequest.
    """
    row = row_of(error)
    status = status_pb2.Status(
        code=code_pb2.Code.Value(row.grpc_code), message=_clipped(public_text(error), MAX_TEXT)
    )
    _attach(status, error_details_pb2.ErrorInfo(reason=row.reason, domain=ERROR_DOMAIN))
    if isinstance(error, InvalidSpec):
        _attach(status, _bad_request(error.violations))
    return status


def _attach(status: status_pb2.Status, detail: Any) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)


def _bad_request(violations: tuple[Violation, ...]) -> error_details_pb2.BadRequest:
    request = error_details_pb2.BadRequest()
    for violation in violations:
        field, rule = _clipped(violation.field, 200), _clipped(violation.rule, MAX_TEXT)
        request.field_violations.add(field=field, description=rule)
        if request.ByteSize() > MAX_VIOLATIONS_BYTES:
            del request.field_violations[-1]
            break
    return request


def _clipped(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def from_rpc_error(error: grpc.aio.AioRpcError) -> LikenessError:
    """Makes the exception that the other side raised.

    Args:
        error: what a gRPC call raised.

    Returns:
        The same class, text and broken rules; for answers without our details the class that fits the code.
    """
    status = rpc_status.from_call(cast(Any, error))
    text = error.details() or ""
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Is(info.DESCRIPTOR) and detail.Unpack(info) and info.domain == ERROR_DOMAIN:
            return _made(class_of(info.reason), text, status)
    if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidSpec(text)
    if text.startswith(_CUT_WHILE_SENDING):
        return Unavailable("the call was ended while it was being sent")
    kind = _CLASS_OF_CODE.get(error.code(), Internal)
    return kind(f"{error.code().name}: {text}" if kind is Internal else text)


def _made(kind: type[LikenessError], text: str, status: status_pb2.Status) -> LikenessError:
    if not issubclass(kind, InvalidSpec):
        return kind(text)
    request = error_details_pb2.BadRequest()
    for detail in status.details:
        if detail.Is(request.DESCRIPTOR):
            detail.Unpack(request)
    violations = [Violation(entry.field, entry.description) for entry in request.field_violations]
    return kind(violations or text)


async def abort(context: grpc.aio.ServicerContext, error: BaseException) -> None:
    """Ends a call with an error; logs what the caller does not see.

    Args:
        context: the call.
        error: what its handler raised.

    Raises:
        grpc.aio.AbortError: always; gRPC's way to end the call.
    """
    row = row_of(error)
    if row.reason == "INTERNAL":
        logger.error("call failed", exc_info=error)
    else:
        level = logging.DEBUG if row.reason == "NOT_FOUND" else logging.INFO  # asking whether is no news
        logger.log(level, "call refused", extra={"reason": row.reason, "detail": str(error)})
    await cast(Any, context).abort_with_status(rpc_status.to_status(to_status(error)))


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns what handlers raise into statuses; handlers return messages or are asynchronous generators."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wraps the handler of one method."""
        handler = await continuation(handler_call_details)
        return wrapped_handler(handler, _guarded_unary, _guarded_stream)


def _guarded_unary(behaviour: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await behaviour(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _read_out(request)
            return await abort(context, error)

    return guarded


async def _read_out(request: Any) -> None:
    """Reads what a caller is still sending, within limits, before it is refused.

    A caller whose message meets an ended call gets gRPC's own "Internal error from Core" in place of our answer.
    """
    if not hasattr(request, "__aiter__"):
        return
    left = MAX_READ_OUT
    with contextlib.suppress(TimeoutError, grpc.RpcError):
        async with asyncio.timeout(READ_OUT_S):
            async for _ in request:
                left -= 1
                if left == 0:
                    return


def _guarded_stream(behaviour: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        try:
            async for response in behaviour(request, context):
                yield response
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await abort(context, error)

    return guarded


def wrapped_handler(
    handler: Any,
    wrap_unary: Callable[[Callable[..., Awaitable[Any]]], Callable[..., Awaitable[Any]]],
    wrap_stream: Callable[[Callable[..., AsyncIterator[Any]]], Callable[..., AsyncIterator[Any]]],
) -> Any:
    """Replaces the behaviour inside a method handler and keeps its serialisers.

    Args:
        handler: what gRPC found for the method; None when there is no such method.
        wrap_unary: wraps coroutine functions.
        wrap_stream: wraps asynchronous generator functions.

    Returns:
        The handler with the wrapped behaviour.
    """
    if handler is None:
        return None
    arity = ("stream" if handler.request_streaming else "unary") + (
        "_stream" if handler.response_streaming else "_unary"
    )
    behaviour = getattr(handler, arity)
    wrap = wrap_stream if inspect.isasyncgenfunction(behaviour) else wrap_unary
    make = getattr(grpc, f"{arity}_rpc_method_handler")
    return make(wrap(behaviour), handler.request_deserializer, handler.response_serializer)
