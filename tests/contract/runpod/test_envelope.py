"""Requests around the input, and every body that goes back, in both versions."""

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict, ParseDict
from likeness.job.v1 import job_pb2
from likeness.training.v1 import training_job_pb2 as pb

from services.domain import errors
from services.gateway.dialects.base import JobView
from services.gateway.dialects.runpod import envelope as wire

HERE = Path(__file__).parent
NOW_MS = 100_000


def cases(name: str) -> Any:
    return json.loads((HERE / name).read_text())


ENVELOPES = cases("envelopes.json")
JOBS = cases("jobs.json")


def view_of(case: dict[str, Any]) -> JobView:
    job = ParseDict(case["job"] | {"job_id": "j"}, pb.TrainingJob())
    return JobView(job, NOW_MS, given={"a": 1})


@pytest.mark.parametrize("case", [c for c in ENVELOPES if "error" not in c], ids=lambda case: case["name"])
def test_an_envelope_is_understood(case: dict[str, Any]) -> None:
    envelope = wire.read_envelope(json.dumps(case["body"]).encode())
    assert envelope.given == case["body"]["input"]
    assert envelope.webhook == case["webhook"]
    assert MessageToDict(envelope.policy, preserving_proto_field_name=True) == case["policy"]


@pytest.mark.parametrize("case", [c for c in ENVELOPES if "error" in c], ids=lambda case: case["name"])
def test_an_envelope_is_refused_in_one_sentence(case: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidSpec) as caught:
        wire.read_envelope(json.dumps(case["body"]).encode())
    answer = wire.error_answer(caught.value)
    assert (answer.status, answer.body) == (400, {"error": case["error"]})
    assert "hunter2" not in json.dumps(answer.body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"input": {"a": NaN}}',
        b'{"input": {"a": Infinity}}',
        b'{"input": {"a": 1e999}}',
        b"[" * 100_000,
        b'{"input": {"a": ' + b"9" * 5000 + b"}}",
    ],
    ids=["empty", "cut", "no UTF-8", "NaN", "infinity", "overflow", "deep", "long number"],
)
def test_what_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(errors.InvalidSpec, match="valid JSON"):
        wire.read_envelope(body)


def test_a_body_may_be_nested_a_hundred_levels_and_no_deeper() -> None:
    def nested(levels: int) -> bytes:
        inner = levels - 2
        return b'{"input": {"a": ' + b"[" * inner + b"]" * inner + b"}}"

    assert wire.read_envelope(nested(100)).given
    with pytest.raises(errors.InvalidSpec, match="deeper than 100 levels"):
        wire.read_envelope(nested(101))


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("case", JOBS, ids=lambda case: case["name"])
def test_a_job_becomes_this_body(case: dict[str, Any], version: wire.Version) -> None:
    body = wire.status_body(view_of(case), version, ["pictures"])
    v2 = case["v2"]
    expected = case.get(version) or v2 | {"gpu": "0", "input": {"a": 1}}
    if version == "v1" and "v1" not in case and "output" in v2:
        expected = {key: value for key, value in expected.items() if key != "output"} | v2["output"]
    assert body == expected


def test_the_webhook_body_carries_input_and_webhook_in_both_versions_and_the_gpu_in_v1() -> None:
    view = view_of(next(case for case in JOBS if case["name"] == "completed on a GPU"))
    v1 = wire.webhook_body(view, "v1", ["pictures"], "https://h.example.org/")
    assert v1 == {
        "id": "j",
        "status": "COMPLETED",
        "delayTime": 1500,
        "executionTime": 59000,
        "workerId": "w",
        "gpu": "24",
        "input": {"a": 1},
        "output": ["pictures"],
        "webhook": "https://h.example.org/",
    }
    v2 = wire.webhook_body(view, "v2", ["pictures"], "https://h.example.org/")
    assert v2 == {key: value for key, value in v1.items() if key != "gpu"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, 90_000),
        ("x", 90_000),
        ("nan", 90_000),
        ("", 90_000),
        ("1000", 1000),
        ("999", 1000),
        ("0", 1000),
        ("-5", 1000),
        ("300000", 300_000),
        ("300001", 300_000),
        ("inf", 300_000),
        ("2500.7", 2500),
    ],
)
def test_wait_is_clamped_and_nonsense_means_the_default(text: str | None, expected: int) -> None:
    assert wire.wait_ms(text, 90_000) == expected


@pytest.mark.parametrize("text", ["9999", "0", "-1", "x", "", "10000.0", "१००००", "9" * 400])
def test_a_ttl_below_ten_seconds_or_no_number_is_refused(text: str) -> None:
    with pytest.raises(errors.InvalidSpec, match="ttl must be"):
        wire.check_ttl(text)


def test_a_ttl_of_ten_seconds_is_read() -> None:
    assert wire.check_ttl("10000") == 10_000
    assert wire.check_ttl(None) is None


@pytest.mark.parametrize(
    ("error", "status", "body", "headers"),
    [
        (errors.Unauthenticated("x"), 401, {"error": "unauthorized"}, {"WWW-Authenticate": "Bearer"}),
        (errors.PermissionDenied("x"), 401, {"error": "unauthorized"}, {"WWW-Authenticate": "Bearer"}),
        (errors.NotFound("x"), 404, {"error": "job not found"}, {}),
        (errors.QueueFull("x"), 429, {"error": "queue is full"}, {"Retry-After": "2"}),
        (errors.RateLimited("x"), 429, {"error": "too many requests"}, {"Retry-After": "1"}),
        (errors.Unavailable("the bus"), 503, {"error": "service unavailable"}, {}),
        (errors.OutcomeUnknown("x"), 503, {"error": "service unavailable"}, {}),
        (errors.AlteredBytes("x"), 503, {"error": "service unavailable"}, {}),
        (errors.DeadlineExceeded("x"), 503, {"error": "service unavailable"}, {}),
        (errors.Conflict("x"), 503, {"error": "service unavailable"}, {}),
        (errors.Cancelled("x"), 503, {"error": "service unavailable"}, {}),
        (errors.InvalidSpec("is bad", "a"), 400, {"error": "invalid input", "details": ["a: is bad"]}, {}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_becomes_this_answer(error: Any, status: int, body: Any, headers: dict[str, str]) -> None:
    answer = wire.error_answer(error)
    assert (answer.status, answer.body, dict(answer.headers)) == (status, body, headers)


def test_no_error_body_looks_like_a_job() -> None:
    for kind in errors.ERROR_TABLE:
        assert "status" not in wire.error_answer(kind("x")).body


def test_no_answer_asks_to_wait_longer_than_two_seconds_and_none_is_a_408() -> None:
    answers = [wire.error_answer(kind("x")) for kind in errors.ERROR_TABLE]
    assert all(int(answer.headers.get("Retry-After", "0")) <= 2 for answer in answers)
    assert all("Retry-After" not in answer.headers for answer in answers if answer.status == 503)
    assert 408 not in {answer.status for answer in answers}


def test_health_names_all_eleven_figures() -> None:
    status = job_pb2.QueueStatus(
        queued_jobs=1,
        running_jobs=2,
        succeeded_jobs=3,
        failed_jobs=4,
        retried_jobs=5,
        idle_workers=6,
        busy_workers=7,
    )
    assert wire.health_body(status) == {
        "jobs": {"completed": 3, "failed": 4, "inProgress": 2, "inQueue": 1, "retried": 5},
        "workers": {"idle": 6, "initializing": 0, "ready": 13, "running": 7, "throttled": 0, "unhealthy": 0},
    }


def test_stream_chunks_lie_under_output() -> None:
    assert wire.stream_body("j", "IN_PROGRESS", [1, {"a": 2}]) == {
        "id": "j",
        "status": "IN_PROGRESS",
        "stream": [{"output": 1}, {"output": {"a": 2}}],
    }


def test_error_texts_are_cut_at_two_thousand_characters() -> None:
    assert len(wire.error_text(job_pb2.JobError(message="x" * 3000))) == 2000
