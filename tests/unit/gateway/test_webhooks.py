"""Webhooks: told once an event, in order, tried three times, never twice under another id."""

import asyncio
import contextlib
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Any

import pytest
from aiohttp import web

from services.adapters.clock import RealClock
from services.adapters.egress import Egress, EgressPolicy
from services.adapters.memory import ManualClock, MemoryPlatform
from services.domain import life_cycle as life
from services.domain.errors import DeadlineExceeded, EgressRefused, Unavailable
from services.domain.job import JobFailure, JobKind, JobRecord, JobRef, Limits
from services.domain.ports import Revision
from services.gateway.webhooks import WebhookPolicy, WebhookSender
from services.jobs.views import Views
from tests.unit.gateway.harness import INPUT, MemoryDocuments, World, gateway

REF = JobRef(JobKind.TRAIN, "p", "j")
FAILURE = JobFailure("BAD_INPUT", "no picture")


@dataclass
class Post:
    """A receiver that answers what it is told to; what it got is kept."""

    answers: list[int | Exception] = field(default_factory=list)
    got: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)

    async def __call__(self, url: str, body: bytes, headers: Mapping[str, str], timeout_s: float) -> int:
        self.got.append((url, json.loads(body), dict(headers)))
        answer = self.answers.pop(0) if self.answers else 200
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def ids(self) -> list[str]:
        return [headers["X-Webhook-Id"] for _, _, headers in self.got]


class Log:
    """A job log to write events into."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.platform = MemoryPlatform(self.clock)
        self.faults: list[Exception] = []

    async def render(self, revision: Revision, number: int) -> bytes:
        if self.faults:
            raise self.faults.pop()
        return json.dumps({"state": revision.record.state, "round": revision.record.round}).encode()

    async def admit(
        self, ref: JobRef = REF, webhook: str = "https://h.example.org/x", dialect: str = "runpod"
    ) -> None:
        options = {"origin": {"dialect": dialect}, "webhook": {"url": webhook} if webhook else {}}
        record = life.admit_training(ref, spec={}, options=options, limits=Limits(), request="r", now_ms=1)
        await self.platform.job_log.write(record, 0)

    async def move(self, *moves: Callable[[JobRecord, int], JobRecord], ref: JobRef = REF) -> int:
        sequence = 0
        for move in moves:
            revision = await self.platform.job_log.read(ref)
            assert revision is not None
            record = move(revision.record, self.clock.now_ms())
            sequence = await self.platform.job_log.write(record, revision.sequence)
        return sequence

    async def fail(self, ref: JobRef = REF) -> int:
        return await self.move(
            life.begin_preparing, lambda record, now: life.fail(record, FAILURE, now), ref=ref
        )

    @contextlib.asynccontextmanager
    async def sender(self, post: Any, name: str = "a", **policy: Any) -> AsyncIterator[WebhookSender]:
        sender = WebhookSender(
            feed=self.platform.job_feed,
            log=self.platform.job_log,
            hooks=self.platform.small,
            clock=self.clock,
            post=post,
            render=self.render,
            dialects=frozenset({"runpod"}),
            policy=WebhookPolicy(**policy),
            name=name,
        )
        task = asyncio.create_task(sender.run())
        await self.clock.advance(0)
        try:
            yield sender
        finally:
            assert not task.done() or task.cancelled() or task.exception() is None
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_a_failure_is_told_once_with_its_own_id() -> None:
    log, post = Log(), Post()
    async with log.sender(post):
        await log.admit()
        sequence = await log.fail()
        await log.clock.advance(120)
    assert post.ids == [f"j.{sequence}"]
    assert post.got[0][0] == "https://h.example.org/x"
    assert post.got[0][1] == {"state": "FAILED", "round": 0}


async def test_a_cancellation_is_not_told() -> None:
    log, post = Log(), Post()
    async with log.sender(post):
        await log.admit()
        await log.move(life.begin_preparing, life.cancel)
        await log.clock.advance(120)
    assert post.got == []


async def test_jobs_without_a_webhook_and_of_other_dialects_are_left_alone() -> None:
    log, post = Log(), Post()
    other = JobRef(JobKind.TRAIN, "p", "k")
    async with log.sender(post):
        await log.admit(webhook="")
        await log.admit(other, dialect="stablediffusionapi")
        await log.fail()
        await log.fail(other)
        await log.clock.advance(60)
    assert post.got == []


async def test_what_is_not_taken_is_tried_three_times_ten_seconds_apart() -> None:
    log, post = Log(), Post([500, 302, 404, 200])
    async with log.sender(post):
        await log.admit()
        sequence = await log.fail()
        await log.clock.advance(9.9)
        assert len(post.got) == 1
        await log.clock.advance(0.2)
        assert len(post.got) == 2
        await log.clock.advance(10)
        assert len(post.got) == 3
        await log.clock.advance(600)
    assert post.ids == [f"j.{sequence}"] * 3


@pytest.mark.parametrize(
    "error", [Unavailable("no answer"), EgressRefused("private"), RuntimeError("bug")], ids=repr
)
async def test_a_refused_address_a_silent_receiver_and_a_bug_are_failed_tries(error: Exception) -> None:
    log, post = Log(), Post([error, 204])
    async with log.sender(post):
        await log.admit()
        await log.fail()
        await log.clock.advance(30)
    assert len(post.got) == 2


async def test_a_job_that_ended_while_no_sender_ran_is_told_later() -> None:
    log, post = Log(), Post()
    await log.admit()
    sequence = await log.fail()
    async with log.sender(post):
        await log.clock.advance(1)
    async with log.sender(post):
        await log.clock.advance(1)
    assert post.ids == [f"j.{sequence}"]


async def test_the_tries_go_on_after_a_restart() -> None:
    log, post = Log(), Post([500, 500, 500])
    await log.admit()
    await log.fail()
    for _ in range(5):
        async with log.sender(post):
            await log.clock.advance(11)
    assert len(post.got) == 3


async def test_a_sender_killed_between_post_and_cursor_repeats_under_the_same_id() -> None:
    log = Log()
    posted = asyncio.Event()

    async def dying(url: str, body: bytes, headers: Mapping[str, str], timeout_s: float) -> int:
        posted.set()
        await asyncio.Event().wait()
        return 200

    await log.admit()
    sequence = await log.fail()
    async with log.sender(dying):
        await posted.wait()
    post = Post()
    async with log.sender(post, "b"):
        await log.clock.advance(59)
        assert post.got == []
        await log.clock.advance(2)
        assert post.ids == [f"j.{sequence}"]
        await log.clock.advance(120)
    assert len(post.got) == 1


async def test_two_senders_tell_an_event_once() -> None:
    log, post = Log(), Post()
    async with log.sender(post, "a"), log.sender(post, "b"):
        for number in range(20):
            ref = JobRef(JobKind.TRAIN, "p", f"j{number}")
            await log.admit(ref)
            await log.fail(ref)
        await log.clock.advance(120)
    assert sorted(post.ids) == sorted(set(post.ids))
    assert len(post.got) == 20


async def test_each_run_of_a_retried_job_is_told_in_order() -> None:
    log, post = Log(), Post([500, 500])
    async with log.sender(post):
        await log.admit()
        first = await log.fail()
        await log.move(life.retry)
        second = await log.fail()
        await log.clock.advance(60)
    assert post.ids == [f"j.{first}"] * 3 + [f"j.{second}"]
    assert [body["round"] for _, body, _ in post.got] == [0, 0, 0, 1]


async def test_a_run_that_failed_before_a_restart_and_a_retry_is_still_told() -> None:
    log, post = Log(), Post()
    await log.admit()
    first = await log.fail()
    await log.move(life.retry)
    async with log.sender(post):
        await log.clock.advance(1)
    assert post.ids == [f"j.{first}"]


async def test_a_job_log_that_is_away_only_delays() -> None:
    log, post = Log(), Post()
    async with log.sender(post):
        await log.admit()
        await log.fail()
        log.platform.down = True
        await log.clock.advance(30)
        assert post.got == []
        log.platform.down = False
        await log.clock.advance(30)
    assert len(post.got) == 1


@pytest.mark.parametrize("outage", [Unavailable("storage is away"), DeadlineExceeded("storage is frozen")])
async def test_an_outage_on_this_side_costs_no_try(outage: Exception) -> None:
    log, post = Log(), Post()
    log.faults = [outage] * 10
    async with log.sender(post):
        await log.admit()
        sequence = await log.fail()
        await log.clock.advance(95)
        assert post.got == []
        await log.clock.advance(30)
    assert post.ids == [f"j.{sequence}"]


async def test_a_secret_signs_the_body() -> None:
    log, signatures = Log(), []

    async def receive(url: str, body: bytes, headers: Mapping[str, str], timeout_s: float) -> int:
        expected = hmac.new(b"shared", body, hashlib.sha256).hexdigest()
        signatures.append(headers["X-Webhook-Signature"] == f"sha256={expected}")
        return 200

    async with log.sender(receive, secret=b"shared"):
        await log.admit()
        await log.fail()
        await log.clock.advance(1)
    assert signatures == [True]


async def test_without_a_secret_nothing_is_signed() -> None:
    log, post = Log(), Post()
    async with log.sender(post):
        await log.admit()
        await log.fail()
        await log.clock.advance(1)
    assert "X-Webhook-Signature" not in post.got[0][2]


# --- against a real receiver, with the dialect's body --------------------------------------------------------


@contextlib.asynccontextmanager
async def receiver() -> AsyncIterator[tuple[str, "asyncio.Queue[tuple[dict[str, str], Any]]"]]:
    calls: asyncio.Queue[tuple[dict[str, str], Any]] = asyncio.Queue()

    async def take(request: web.Request) -> web.Response:
        calls.put_nowait((dict(request.headers), await request.json()))
        return web.Response(status=204)

    app = web.Application()
    app.router.add_post("/hook", take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        yield f"http://127.0.0.1:{port}/hook", calls
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def told(world: World, public_url: str = "") -> AsyncIterator[None]:
    """A sender as the process puts it together."""
    views = Views(MemoryDocuments(), world.platform.progress)
    egress = Egress(EgressPolicy(allow=(ip_network("127.0.0.0/8"),)))

    async def body_of(revision: Revision, number: int) -> bytes:
        job = await views.training_job(revision, world.platform.job_log.now_ms())
        return await world.api.webhook_document(job, public_url)

    sender = WebhookSender(
        feed=world.platform.job_feed,
        log=world.platform.job_log,
        hooks=world.platform.small,
        clock=RealClock(),
        post=egress.post_json,
        render=body_of,
        dialects=frozenset({"runpod"}),
    )
    task = asyncio.create_task(sender.run())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("version", ["v1", "v2"])
async def test_the_receiver_gets_the_status_body_with_input_and_webhook(version: str) -> None:
    async with gateway() as world, receiver() as (url, calls), told(world):
        world.api._check_url = lambda given: None
        job_id = await world.submit(version, webhook=url)
        await world.succeed(job_id)
        headers, body = await asyncio.wait_for(calls.get(), 10)
        shown = await world.status(job_id, version)
    assert body == shown | {"input": INPUT, "webhook": url}
    assert ("gpu" in body) is (version == "v1")
    assert body["output"][0]["image"].startswith("http://likeness.test/files/")
    assert headers["Content-Type"] == "application/json"
    assert headers["X-Webhook-Id"].startswith(job_id + ".")
    assert headers["X-Job-Id"] == job_id
    assert headers["User-Agent"].startswith("likeness")
    assert "Authorization" not in headers


async def test_the_failure_of_a_run_is_told_as_it_was_after_a_retry_replaced_it() -> None:
    async with gateway() as world, receiver() as (url, calls):
        world.api._check_url = lambda given: None
        job_id = await world.submit(webhook=url)
        await world.fail(job_id, "gone")
        await world.call("POST", f"/v2/dream-booth-v1/retry/{job_id}")
        async with told(world):
            _, body = await asyncio.wait_for(calls.get(), 10)
    assert (body["status"], body["error"]) == ("FAILED", "concepts[0].instance_data: gone")
    assert "retries" not in body
