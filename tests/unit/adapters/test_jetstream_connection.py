"""What the server's answers mean, over a client that only says what it is told."""

import json
from dataclasses import asdict, dataclass
from typing import Any

import pytest

from services.adapters.jetstream_connection import STREAM_FULL, Connection, NoAnswer, Refused
from services.adapters.jetstream_live import _beat_of
from services.domain.job import JobKind
from services.domain.ports import Beat


@dataclass
class Answer:
    data: bytes


class Scripted:
    """A client whose server answers with one error."""

    def __init__(self, code: int, err_code: int) -> None:
        error = {"code": code, "err_code": err_code, "description": "no"}
        self.answer = Answer(json.dumps({"error": error}).encode())

    async def request(self, *args: Any, **kwargs: Any) -> Answer:
        return self.answer


def connection(code: int, err_code: int) -> Connection:
    client: Any = Scripted(code, err_code)
    return Connection(client)


@pytest.mark.parametrize("err_code", [0, 10008, 10009], ids=["bare", "starting", "not the leader"])
async def test_a_server_that_is_not_ready_has_not_answered(err_code: int) -> None:
    with pytest.raises(NoAnswer):
        await connection(503, err_code).ask("subject")


@pytest.mark.parametrize(("code", "err_code"), [(503, STREAM_FULL), (400, 10071), (404, 10037)])
async def test_a_verdict_is_an_answer(code: int, err_code: int) -> None:
    with pytest.raises(Refused) as refusal:
        await connection(code, err_code).ask("subject")
    assert refusal.value.err_code == err_code


def test_a_beat_of_a_newer_version_is_heard() -> None:
    beat = Beat(JobKind.TRAIN, "w", jobs=(("p", "j", 3),), warm_models=("m",))
    assert _beat_of(json.dumps(asdict(beat) | {"mood": "good"}).encode()) == beat
