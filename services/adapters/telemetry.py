"""Log format and trace context: what every line says besides its event, and how a trace crosses a process.

A line is an event with fields. Fields that hold for a stretch of work (`job_id`, `attempt`) are bound once with
:func:`bound`; fields of one event come as `extra={...}`. The trace context follows W3C Trace Context and is kept in
a context variable, so that each task of the event loop has its own. Keys and prompts are the callers' business:
nothing here looks into a message.
"""

import json
import logging
import re
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar, Token
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TextIO, TypeVar

T = TypeVar("T")

TRACEPARENT = "traceparent"
REQUEST_ID = "x-request-id"

_TRACEPARENT_FORM = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_REQUEST_ID_FORM = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_RECORD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Where the present work stands in its trace.

    Attributes:
        trace_id: 32 hexadecimal digits, the same for all work of one job or request.
        span_id: 16 hexadecimal digits, this process's part.
        flags: two hexadecimal digits; "01" means sampled.
        request_id: the caller's own name of the request; empty when it gave none.
    """

    trace_id: str
    span_id: str
    flags: str = "01"
    request_id: str = ""

    @property
    def traceparent(self) -> str:
        """The header that hands this context on."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"


_trace: ContextVar[TraceContext | None] = ContextVar("trace", default=None)
_fields: ContextVar[Mapping[str, object]] = ContextVar("fields", default={})  # noqa: B039 - never changed in place


def current_trace() -> TraceContext | None:
    """The context of the present task, if it has one."""
    return _trace.get()


@contextmanager
def continued_trace(traceparent: str = "", request_id: str = "") -> Iterator[TraceContext]:
    """Works inside a trace: the caller's where its header is well formed, a new one otherwise.

    Args:
        traceparent: W3C header value, or empty.
        request_id: the caller's request id, or empty; other forms than 1-128 of `[A-Za-z0-9._:-]` are dropped.

    Yields:
        The context with a span of its own.
    """
    given = _TRACEPARENT_FORM.fullmatch(traceparent)
    usable = given is not None and int(given[1], 16) != 0 and int(given[2], 16) != 0
    trace_id, flags = (given[1], given[3]) if given and usable else (secrets.token_hex(16), "01")
    request_id = request_id if _REQUEST_ID_FORM.fullmatch(request_id) else ""
    token = _trace.set(TraceContext(trace_id, secrets.token_hex(8), flags, request_id))
    try:
        yield _trace.get() or TraceContext(trace_id, "")
    finally:
        _restore(_trace, token)


def _restore(variable: ContextVar[T], token: Token[T]) -> None:
    """Ends a block; a generator that was dropped half way is closed in another context, with nothing to restore."""
    with suppress(ValueError):
        variable.reset(token)


def outgoing_headers() -> list[tuple[str, str]]:
    """Headers that hand the present trace on to another process, as gRPC metadata or HTTP headers."""
    trace = _trace.get()
    if trace is None:
        return []
    headers = [(TRACEPARENT, replace(trace, span_id=secrets.token_hex(8)).traceparent)]
    return headers + ([(REQUEST_ID, trace.request_id)] if trace.request_id else [])


def trace_of(headers: Iterable[tuple[str, str | bytes]]) -> tuple[str, str]:
    """Finds traceparent and request id among headers; empty strings for what is absent."""
    found = {name.lower(): value for name, value in headers if isinstance(value, str)}
    return found.get(TRACEPARENT, ""), found.get(REQUEST_ID, "")


@contextmanager
def bound(**fields: object) -> Iterator[None]:
    """Adds fields to every line logged inside, for instance `bound(job_id=..., attempt=...)`."""
    token = _fields.set({**_fields.get(), **fields})
    try:
        yield
    finally:
        _restore(_fields, token)


def _event_fields(record: logging.LogRecord) -> dict[str, object]:
    fields = dict(_fields.get())
    trace = _trace.get()
    if trace is not None:
        fields["trace_id"] = trace.trace_id
        if trace.request_id:
            fields["request_id"] = trace.request_id
    return fields | {name: value for name, value in vars(record).items() if name not in _RECORD_FIELDS}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, service, logger, message, then the fields."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """Renders a record as one line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        } | _event_fields(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """Plain text for a terminal: time, level, service, message, then `name=value` fields."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """Renders a record as one line, and a traceback below it."""
        clock = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        fields = "".join(
            f" {name}={value}" for name, value in _event_fields(record).items() if name != "trace_id"
        )
        text = f"{clock} {record.levelname:<7} {self._service}: {record.getMessage()}{fields}"
        return text + (f"\n{self.formatException(record.exc_info)}" if record.exc_info else "")


def configure_logging(
    service: str, *, level: str = "INFO", log_format: str = "auto", stream: TextIO | None = None
) -> None:
    """Sends the process's log to a stream, in the house's format; replaces what was configured before.

    Args:
        service: name of the process in each line.
        level: least severe level that is written.
        log_format: `json`, `text`, or `auto`: text where the stream is a terminal.
        stream: where lines go; standard error by default.
    """
    stream = stream or sys.stderr
    as_json = log_format == "json" or (log_format == "auto" and not stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter(service) if as_json else TextFormatter(service))
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(level)
    logging.captureWarnings(True)
