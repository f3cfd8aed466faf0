"""The bodies of the documentation word for word, and bodies that nobody has thought of: never a fault of ours."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.gateway.dialects.sdapi.drawing import INPAINT
from services.gateway.dialects.sdapi.training import FINE_TUNE
from services.gateway.limits import Limit, RateLimiter
from services.gateway.sdapi import ROUTES, SdapiPolicy
from tests.unit.gateway.harness import KEY
from tests.unit.gateway.sdapi_world import BODY, World, world

DOCUMENTED = json.loads((Path(__file__).parent / "documented.json").read_text())
MANY = RateLimiter({name: Limit(10**6, 10**6) for name in ("start", "read", "steer")})
POLICY = SdapiPolicy(sync_wait_s=0.0, jobs_at_once=200)
STATUSES = {"success", "processing", "error", "failed", "ok"}
NAMES = sorted({row.name for row in (*FINE_TUNE, *INPAINT)} | {"request_id", "upscale", "detail"})
PATHS = [path.replace("{id}", "1234") for path in ROUTES]


@pytest.fixture
async def sd() -> AsyncIterator[World]:
    async with world(POLICY, MANY) as made:
        yield made


@pytest.mark.parametrize("name", DOCUMENTED)
async def test_a_documented_request_is_accepted(sd: World, name: str) -> None:
    path, body = DOCUMENTED[name]["path"], DOCUMENTED[name]["body"]
    assert body["key"] == ""
    answer = await sd.http.post(path, json=body, headers={"Authorization": f"Bearer {KEY}"})
    shown = answer.json()
    assert (answer.status_code, shown["status"] in ("success", "processing")) == (200, True), shown


@pytest.fixture(scope="module")
def loop() -> Iterator[tuple[asyncio.AbstractEventLoop, World]]:
    """One gateway for all random bodies, on a loop of its own: hypothesis calls plain functions."""
    made = asyncio.new_event_loop()
    manager = world(POLICY, MANY)
    yield made, made.run_until_complete(manager.__aenter__())
    made.run_until_complete(manager.__aexit__(None, None, None))
    made.close()


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(0, 60),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12),
    st.sampled_from(
        ["null", "yes", "no", "1", "7.5", "undefined", "https://f.example.org/1.png", "pocket", "\ud800"]
    ),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
)
bodies = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=6), values, max_size=8)
near = st.dictionaries(st.sampled_from(NAMES), values, max_size=2)
PICTURE = "https://f.example.org/1.png"
PLAIN = BODY | {"model_id": "pocket", "prompt": "a robot", "init_image": PICTURE, "mask_image": PICTURE}


def check(answer: Any) -> None:
    """What a strictly typed client needs of any answer."""
    assert answer.status_code == 200, answer.text
    shown = answer.json()
    if isinstance(shown, list):
        return
    assert shown["status"] in STATUSES
    assert shown.get("messege") == shown.get("message")
    if shown["status"] == "error":
        assert isinstance(shown["message"], (str, dict))
        for sentences in shown["message"].values() if isinstance(shown["message"], dict) else ():
            assert all(isinstance(sentence, str) for sentence in sentences)
    if "output" in shown:
        assert isinstance(shown["output"], list)
    if shown["status"] == "processing":
        assert isinstance(shown["eta"], int)
        assert isinstance(shown["id"], int)
        assert all(isinstance(shown["meta"][key], int) for key in ("W", "H", "steps", "seed", "n_samples"))


def asked(loop: tuple[asyncio.AbstractEventLoop, World], path: str, content: bytes) -> Any:
    """The answer to a body. A service that takes longer than 2.5 s counts as away, as may happen on a busy machine;
    an answer that is 503 whenever it is asked for is a fault."""
    runner, sd = loop
    headers = {"Authorization": f"Bearer {KEY}"}
    answer: Any = None
    for _ in range(3):
        answer = runner.run_until_complete(sd.http.post(path, content=content, headers=headers))
        if answer.status_code != 503:
            break
    return answer


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(PATHS), body=bodies)
def test_any_object_is_answered_in_form(
    loop: tuple[asyncio.AbstractEventLoop, World], path: str, body: dict[str, Any]
) -> None:
    check(asked(loop, path, json.dumps({"key": KEY} | body | {"key": KEY}).encode()))


@settings(max_examples=150, deadline=None)
@given(path=st.sampled_from(["/api/v3/fine_tune", "/api/v4/dreambooth", "/api/v3/dreambooth"]), body=near)
def test_a_good_request_with_some_strange_fields_is_answered_in_form(
    loop: tuple[asyncio.AbstractEventLoop, World], path: str, body: dict[str, Any]
) -> None:
    check(asked(loop, path, json.dumps(PLAIN | body).encode()))


@settings(max_examples=60, deadline=None)
@given(path=st.sampled_from(PATHS), content=st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_any_bytes_are_answered_in_form(
    loop: tuple[asyncio.AbstractEventLoop, World], path: str, content: bytes
) -> None:
    check(asked(loop, path, content))
