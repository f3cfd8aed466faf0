"""What goes into a revision's headers, which a replay reads in place of the bodies of ended jobs."""

import json
from dataclasses import replace

import pytest

from services.adapters.job_headers import headers_of, record_of
from services.domain import life_cycle as life
from services.domain.job import MAX_RECORD_BYTES, JobKind, JobRecord, JobRef, JobState, Limits

MAX_MESSAGE_BYTES = 65_536
"""Largest message that the job log takes."""


def record_with(request: str, webhook: str = "https://h.example.org/x") -> JobRecord:
    origin = {"dialect": "runpod", "endpoint": "dream-booth-v1", "request_json": request}
    options = {"origin": origin, "webhook": {"url": webhook}}
    ref = JobRef(JobKind.TRAIN, "p", "j")
    return life.admit_training(ref, spec={"a": 1}, options=options, limits=Limits(), request="r", now_ms=1)


def test_headers_say_what_an_index_and_a_sender_of_webhooks_need() -> None:
    record = replace(record_with("{}"), state=JobState.FAILED)
    read = record_of(headers_of(record))
    assert (read.ref, read.state, read.endpoint) == (record.ref, JobState.FAILED, "dream-booth-v1")
    assert (read.webhook_url, read.options["origin"]["dialect"]) == ("https://h.example.org/x", "runpod")
    assert read.spec == {}


@pytest.mark.parametrize("letter", ["x", "\N{GRINNING FACE}", "\n"])
def test_the_largest_record_and_its_headers_are_a_message_that_the_log_takes(letter: str) -> None:
    request = letter * (MAX_RECORD_BYTES // len(letter.encode()))
    while len(record_with(json.dumps({"prompt": request}, ensure_ascii=False)).to_json()) > MAX_RECORD_BYTES:
        request = request[: len(request) * 9 // 10]
    record = record_with(json.dumps({"prompt": request}, ensure_ascii=False))
    headers = headers_of(record)
    size = len(record.to_json()) + sum(len(f"{name}: {value}\r\n") for name, value in headers.items())
    assert size < MAX_MESSAGE_BYTES * 0.9
