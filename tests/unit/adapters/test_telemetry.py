"""Log lines and trace context."""

import contextvars
import io
import json
import logging
from collections.abc import Iterator

import pytest

from services.adapters import telemetry

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    handlers, level = logging.root.handlers[:], logging.root.level
    stream = io.StringIO()
    telemetry.configure_logging("storage", stream=stream)
    yield stream
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    logging.captureWarnings(False)


def test_a_line_is_a_json_object_with_event_and_fields(lines: io.StringIO) -> None:
    with telemetry.continued_trace(PARENT, "r-1"), telemetry.bound(job_id="j", attempt=2):
        logging.getLogger("a.b").info("stored %d", 3, extra={"duration_s": 0.5})
    line = json.loads(lines.getvalue())
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "INFO",
        "service": "storage",
        "logger": "a.b",
        "message": "stored 3",
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
        "request_id": "r-1",
        "job_id": "j",
        "attempt": 2,
        "duration_s": 0.5,
    }


def test_an_exception_stays_on_its_line(lines: io.StringIO) -> None:
    try:
        raise ValueError("no")
    except ValueError:
        logging.getLogger().exception("failed")
    assert "ValueError: no" in json.loads(lines.getvalue())["exception"]


def test_bound_fields_end_with_their_block(lines: io.StringIO) -> None:
    with telemetry.bound(job_id="j"):
        pass
    logging.getLogger().warning("later")
    assert "job_id" not in json.loads(lines.getvalue())


def test_plain_text_names_service_and_fields(lines: io.StringIO) -> None:
    telemetry.configure_logging("gateway", log_format="text", stream=lines)
    logging.getLogger().warning("slow", extra={"duration_s": 2})
    assert lines.getvalue().endswith("WARNING gateway: slow duration_s=2\n")


def test_a_trace_is_continued_with_a_span_of_its_own() -> None:
    with telemetry.continued_trace(PARENT) as trace:
        headers = dict(telemetry.outgoing_headers())
    assert trace.trace_id == "0af7651916cd43dd8448eb211c80319c"
    assert trace.span_id != "b7ad6b7169203331"
    assert headers["traceparent"].split("-")[1] == trace.trace_id
    assert telemetry.current_trace() is None


@pytest.mark.parametrize(
    "header",
    ["", "nonsense", PARENT.upper(), "00-" + "0" * 32 + "-b7ad6b7169203331-01", PARENT + "-more"],
    ids=["none", "nonsense", "upper case", "zero id", "too long"],
)
def test_a_malformed_header_begins_a_new_trace(header: str) -> None:
    with telemetry.continued_trace(header) as trace:
        assert len(trace.trace_id) == 32
        assert trace.trace_id != "0af7651916cd43dd8448eb211c80319c"


def test_a_generator_inside_a_trace_may_be_closed_from_another_context() -> None:
    def work() -> Iterator[str]:
        with telemetry.continued_trace(PARENT) as trace, telemetry.bound(job_id="j"):
            yield trace.trace_id

    generator = work()
    assert contextvars.copy_context().run(next, generator) == PARENT.split("-")[1]
    generator.close()  # type: ignore[attr-defined]
    assert telemetry.current_trace() is None


def test_a_request_id_with_strange_characters_is_dropped() -> None:
    with telemetry.continued_trace(PARENT, "a b\n"):
        assert [name for name, _ in telemetry.outgoing_headers()] == ["traceparent"]


def test_headers_are_found_whatever_their_case() -> None:
    headers: list[tuple[str, str | bytes]] = [("TraceParent", PARENT), ("X-Request-Id", "r"), ("x-bin", b"1")]
    assert telemetry.trace_of(headers) == (PARENT, "r")
