"""Routes, order of checks, errors, and the life of a job as clients see it."""

import asyncio
import json
import time
from dataclasses import replace
from typing import Any

import pytest
from likeness.training.v1.training_job_pb2 import RECIPE_EVERYDREAM

from services.domain import life_cycle as life
from services.domain.job import JobKind, JobRef
from services.gateway.dialects.runpod import everydream_v1
from services.gateway.limits import Limit, QueueLimit, RateLimiter
from services.trainer.support import OF_OTHERS, honoured
from tests.unit.gateway.harness import (
    CAPTIONED,
    EVERYDREAM,
    INPUT,
    INPUTS,
    KEY,
    OTHER_KEY,
    World,
    gateway,
)
from tests.unit.gateway.harness import DREAM_BOOTH as EP


@pytest.mark.parametrize("version", ["v1", "v2"])
async def test_a_submitted_job_is_queued_and_readable_under_both_versions(world: World, version: str) -> None:
    answer = await world.call("POST", f"/{version}/{EP}/run", json={"input": INPUT})
    assert answer.status_code == 200
    assert answer.json() == {"id": answer.json()["id"], "status": "IN_QUEUE"}
    job_id = answer.json()["id"]
    assert await world.status(job_id, "v1") == {"id": job_id, "status": "IN_QUEUE", "input": INPUT}
    assert await world.status(job_id, "v2") == {"id": job_id, "status": "IN_QUEUE"}


async def test_the_whole_life_of_a_job(world: World) -> None:
    job_id = await world.submit()
    await world.run_to_training(job_id)
    await world.report(job_id, 4)
    running = await world.status(job_id)
    assert running["status"] == "IN_PROGRESS"
    assert running["workerId"] == "trainer-1"
    assert running["output"]["progress"]["step"] == 4
    assert "output" not in await world.status(job_id, "v1")

    done = await world.submit()
    await world.succeed(done)
    body = await world.status(done)
    assert body["status"] == "COMPLETED"
    assert [picture["seed"] for picture in body["output"]] == [11, 12]
    assert body["output"][0]["image"].startswith("http://likeness.test/files/token")
    assert body["output"][0]["image"].endswith("/0-0.png")
    assert {"delayTime", "executionTime", "workerId"} <= set(body)


async def test_the_whole_life_of_a_captioned_training(world: World) -> None:
    job_id = await world.submit("v1", endpoint=EVERYDREAM)
    assert await world.status(job_id, "v1", EVERYDREAM) == {
        "id": job_id,
        "status": "IN_QUEUE",
        "input": CAPTIONED,
    }
    await world.succeed(job_id)
    output = (await world.status(job_id, endpoint=EVERYDREAM))["output"]
    assert output["train"] == {}
    assert [picture["seed"] for picture in output["inference"]] == [11, 12]
    assert {picture["passback"] for picture in output["inference"]} == {"bike-1"}
    picture = await world.call("GET", output["inference"][1]["image"], None)
    assert picture.content.startswith(b"PNG picture-")
    told = (await world.call("GET", f"/v2/{EVERYDREAM}/stream/{job_id}")).json()
    assert [chunk["output"] for chunk in told["stream"]] == output["inference"]


async def test_the_endpoints_have_queues_of_their_own(world: World) -> None:
    booth, dream, doomed = [await world.submit(endpoint=name) for name in (EP, EVERYDREAM, EVERYDREAM)]
    for job_id, other in ((booth, EVERYDREAM), (dream, EP)):
        for method, operation in (
            ("GET", "status"),
            ("GET", "stream"),
            ("POST", "cancel"),
            ("POST", "retry"),
        ):
            answer = await world.call(method, f"/v2/{other}/{operation}/{job_id}")
            assert (answer.status_code, answer.json()) == (404, {"error": "job not found"})
    assert (await world.call("GET", f"/v2/{EVERYDREAM}/health")).json()["jobs"]["inQueue"] == 2
    await world.fail(doomed)
    retried = await world.call("POST", f"/v2/{EVERYDREAM}/retry/{doomed}")
    assert retried.json() == {"id": doomed, "status": "IN_QUEUE"}
    purged = await world.call("POST", f"/v2/{EVERYDREAM}/purge-queue", content=b"")
    assert purged.json() == {"removed": 2, "status": "completed"}
    assert (await world.status(booth))["status"] == "IN_QUEUE"


def test_every_parameter_of_a_captioned_training_is_carried_out() -> None:
    targets = {row.target for row in everydream_v1.TRAIN if row.target}
    assert targets <= honoured(RECIPE_EVERYDREAM) | OF_OTHERS.keys()


async def test_polling_does_not_make_new_links(world: World) -> None:
    job_id = await world.submit()
    await world.succeed(job_id)
    bodies = [await world.status(job_id) for _ in range(3)]
    assert bodies[0]["output"] == bodies[2]["output"]
    assert len(world.storage.links) == 2


async def test_a_failed_job_says_why_in_one_sentence(world: World) -> None:
    job_id = await world.submit()
    await world.fail(job_id)
    body = await world.status(job_id)
    assert body["status"] == "FAILED"
    assert body["error"] == "concepts[0].instance_data: no picture could be read"


@pytest.mark.parametrize(
    ("field", "message", "told"),
    [
        ("clip_skip", "the model has 2 layers", "train.clip_skip: the model has 2 layers"),
        ("clip_skip", "clip_skip: is beyond the model", "train.clip_skip: is beyond the model"),
        ("samples[0].num_images", "is too many", "inference.num_outputs: is too many"),
        ("train.data_url", "no picture could be read", "train.data_url: no picture could be read"),
        ("base_model", "there is no model 'x'", "base_model: there is no model 'x'"),
        ("", "the base model is damaged", "the base model is damaged"),
    ],
)
async def test_what_ends_a_job_is_told_by_the_callers_name(
    world: World, field: str, message: str, told: str
) -> None:
    job_id = await world.submit(endpoint=EVERYDREAM)
    await world.fail(job_id, message, field)
    assert (await world.status(job_id, endpoint=EVERYDREAM))["error"] == told


async def test_a_long_input_is_echoed_as_it_was_sent(world: World) -> None:
    sample = {"prompt": "zkw dog " * 100, "negative_prompt": "x" * 900}
    given = INPUT | {"samples": [sample] * 32}
    answer = await world.call("POST", f"/v1/{EP}/run", json={"input": given})
    assert (await world.status(answer.json()["id"], "v1"))["input"] == given


async def test_a_huge_unknown_key_does_not_keep_a_job_from_being_read(world: World) -> None:
    answer = await world.call("POST", f"/v1/{EP}/run", json={"input": INPUT | {"x": "y" * 6_000_000}})
    assert (await world.status(answer.json()["id"], "v1"))["input"] == INPUT


async def test_strings_that_no_encoding_holds_survive_the_echo(world: World) -> None:
    body = json.dumps({"input": INPUT | {"note": "\ud800"}}).encode()
    answer = await world.call("POST", f"/v1/{EP}/run", content=body)
    assert (await world.status(answer.json()["id"], "v1"))["input"]["note"] == "\ud800"


# --- keys and order of checks --------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [f"Bearer {KEY}", f"bearer {KEY}", f"BEARER   {KEY}", KEY])
async def test_a_key_comes_as_bearer_in_any_case_or_bare(world: World, header: str) -> None:
    answer = await world.call("GET", f"/v2/{EP}/health", None, headers={"Authorization": header})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", "Basic " + KEY, "wrong", "Bearer a b", "é"]
)
async def test_any_other_key_is_refused(world: World, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode()}
    answer = await world.call("GET", f"/v2/{EP}/health", None, headers=headers)
    assert answer.status_code == 401
    assert answer.json() == {"error": "unauthorized"}
    assert answer.headers["www-authenticate"] == "Bearer"


async def test_the_key_is_looked_up_once_in_a_few_seconds(world: World) -> None:
    for _ in range(5):
        await world.call("GET", f"/v2/{EP}/health")
        await world.call("GET", f"/v2/{EP}/health", "wrong")
    assert world.access.questions == 2


async def test_a_key_for_something_else_is_refused_here(world: World) -> None:
    world.access.scopes = ["everydream-v1"]
    assert (await world.call("GET", f"/v2/{EP}/health")).status_code == 401


async def test_without_the_access_service_the_answer_is_503(world: World) -> None:
    world.access.down = True
    answer = await world.call("GET", f"/v2/{EP}/health")
    assert (answer.status_code, answer.json()) == (503, {"error": "service unavailable"})
    assert "retry-after" not in answer.headers


async def test_the_key_is_checked_before_the_endpoint_and_this_before_the_body(world: World) -> None:
    assert (await world.call("POST", "/v2/no-such/run", None, content=b"{")).status_code == 401
    answer = await world.call("POST", "/v2/no-such/run", content=b"{")
    assert (answer.status_code, answer.json()) == (404, {"error": "endpoint not found"})


@pytest.mark.parametrize("path", ["/v2/everydream-v2/run", "/v2/x/run"])
async def test_unknown_endpoints_are_not_found(world: World, path: str) -> None:
    assert (await world.call("POST", path, json={"input": INPUT})).json() == {"error": "endpoint not found"}


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", f"/v2/{EP}/run", "POST"),
        ("PUT", f"/v1/{EP}/status/x", "GET, POST"),
        ("GET", f"/v2/{EP}/cancel/x", "POST"),
        ("POST", f"/v2/{EP}/health", "GET"),
        ("DELETE", f"/v2/{EP}/purge-queue", "POST"),
    ],
)
async def test_another_method_is_405_with_allow(world: World, method: str, path: str, allowed: str) -> None:
    answer = await world.call(method, path, None)
    assert (answer.status_code, answer.json()) == (405, {"error": "method not allowed"})
    assert sorted(answer.headers["allow"].split(", ")) == sorted(allowed.split(", "))


@pytest.mark.parametrize(
    "path", ["/", "/v3/x/run", f"/v2/{EP}/requests", f"/v2/{EP}/job-take/x", f"/v2/{EP}/openai/v1"]
)
async def test_unknown_paths_are_404_in_json(world: World, path: str) -> None:
    answer = await world.call("GET", path)
    assert (answer.status_code, answer.json()) == (404, {"error": "not found"})


async def test_repeated_slashes_are_one(world: World) -> None:
    answer = await world.call("GET", f"http://likeness.test//v2//{EP}/health")
    assert answer.status_code == 200


# --- bodies --------------------------------------------------------------------------------------------------


async def test_a_refused_input_lists_every_fault_and_makes_no_job(world: World) -> None:
    answer = await world.call(
        "POST", f"/v2/{EP}/run", json={"input": {"samples": [{"prompt": "x", "num_outputs": 11}]}}
    )
    assert answer.status_code == 400
    assert answer.json() == {
        "error": "invalid input",
        "details": ["concepts: is required", "samples[0].num_outputs: must be between 1 and 10"],
    }
    assert (await world.call("GET", f"/v2/{EP}/health")).json()["jobs"]["inQueue"] == 0


async def test_a_webhook_to_a_private_address_is_refused_at_once(world: World) -> None:
    body = {"input": INPUT, "webhook": "http://127.0.0.1:9000/x"}
    answer = await world.call("POST", f"/v2/{EP}/run", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("webhook: the address 127.0.0.1 is not reachable")


@pytest.mark.parametrize(("operation", "megabytes"), [("run", 10), ("runsync", 20)])
@pytest.mark.parametrize("declared", [True, False], ids=["declared", "streamed"])
async def test_a_body_over_the_limit_is_413(
    world: World, operation: str, megabytes: int, declared: bool
) -> None:
    async def pieces() -> Any:
        for _ in range(megabytes + 1):
            yield b" " * 2**20

    content = b" " * (megabytes * 2**20 + 1) if declared else pieces()
    answer = await world.call("POST", f"/v2/{EP}/{operation}", content=content)
    assert (answer.status_code, answer.json()) == (413, {"error": f"request body exceeds {megabytes} MB"})


@pytest.mark.parametrize("content", [b"", b"{}", b"not json"])
async def test_bodies_of_other_operations_are_not_read(world: World, content: bytes) -> None:
    job_id = await world.submit()
    headers = {"Content-Type": "application/json"}
    answer = await world.call("POST", f"/v2/{EP}/cancel/{job_id}", content=content, headers=headers)
    assert answer.json()["status"] == "CANCELLED"


async def test_every_answer_is_json(world: World) -> None:
    job_id = await world.submit()
    for method, path in (
        ("GET", f"/v2/{EP}/status/{job_id}"),
        ("GET", "/nowhere"),
        ("GET", f"/v2/{EP}/run"),
        ("POST", f"/v2/{EP}/run"),
        ("GET", "/files/a/b.png"),
    ):
        answer = await world.call(method, path)
        assert answer.headers["content-type"] == "application/json"
        assert isinstance(answer.json(), dict)


async def test_a_bug_shows_a_reference_and_nothing_else(world: World, caplog: Any) -> None:
    async def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("secret detail")

    world.jobs.get = broken  # type: ignore[method-assign, assignment]
    answer = await world.call("GET", f"/v2/{EP}/status/x")
    assert answer.status_code == 500
    assert answer.json()["error"] == "internal error"
    reference = answer.json()["details"][0].removeprefix("ref ")
    assert "secret" not in answer.text
    assert any(getattr(record, "ref", "") == reference for record in caplog.records)


# --- reading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("operation", ["status", "status-sync", "stream"])
async def test_reading_works_by_get_and_post(world: World, method: str, operation: str) -> None:
    job_id = await world.submit()
    await world.fail(job_id)
    answer = await world.call(method, f"/v2/{EP}/{operation}/{job_id}")
    assert (answer.status_code, answer.json()["status"]) == (200, "FAILED")


@pytest.mark.parametrize("operation", ["status", "status-sync", "stream", "cancel", "retry"])
async def test_unknown_foreign_and_malformed_jobs_are_not_found(world: World, operation: str) -> None:
    foreign = await world.submit(key=OTHER_KEY)
    for job_id in ("no-such", foreign, "a.b", "x" * 65):
        answer = await world.call("POST", f"/v2/{EP}/{operation}/{job_id}")
        assert (answer.status_code, answer.json()) == (404, {"error": "job not found"})


async def test_a_job_of_another_dialect_is_not_found(world: World) -> None:
    job_id = await world.submit()
    ref = JobRef(JobKind.TRAIN, "first", job_id)
    revision = await world.core.records.read(ref)
    options = {**revision.record.options, "origin": {"dialect": "other", "endpoint": EP}}
    copied = replace(revision.record, id="copy", options=options)
    await world.core.records.write(copied, 0)
    assert (await world.call("GET", f"/v2/{EP}/status/copy")).status_code == 404


@pytest.mark.parametrize("ttl", ["9999", "x"])
async def test_a_ttl_below_ten_seconds_is_refused(world: World, ttl: str) -> None:
    job_id = await world.submit()
    assert (await world.call("GET", f"/v2/{EP}/status/{job_id}?ttl={ttl}")).status_code == 400


async def test_a_ttl_for_a_job_that_is_retried_meanwhile_changes_nothing(world: World) -> None:
    job_id = await world.submit()
    await world.fail(job_id)
    read = world.jobs.get

    async def read_then_retry(*args: Any) -> Any:
        job = await read(*args)
        await world.behind.move(job_id, life.retry)
        return job

    world.jobs.get = read_then_retry  # type: ignore[method-assign, assignment]
    answer = await world.call("GET", f"/v2/{EP}/status/{job_id}?ttl=10000")
    assert (answer.status_code, answer.json()["status"]) == (200, "FAILED")


async def test_a_ttl_lets_a_finished_job_go_sooner_and_never_later(world: World) -> None:
    job_id = await world.submit()
    assert (await world.call("GET", f"/v2/{EP}/status/{job_id}?ttl=10000")).json()["status"] == "IN_QUEUE"
    await world.fail(job_id)
    ref = JobRef(JobKind.TRAIN, "first", job_id)
    for ttl, kept_s in (("60000", 60), ("99999999999", 60), ("10000", 10)):
        assert (await world.call("GET", f"/v2/{EP}/status/{job_id}?ttl={ttl}")).json()["status"] == "FAILED"
        keep_until = (await world.core.records.read(ref)).record.times.keep_until
        assert kept_s - 5 < (keep_until - world.core.records.now_ms()) / 1000 <= kept_s


async def test_runsync_answers_with_the_result_as_soon_as_it_is_there(world: World) -> None:
    finishing = asyncio.create_task(finish_when_listed(world))
    start = time.monotonic()
    answer = await world.call("POST", f"/v2/{EP}/runsync?wait=20000", json={"input": INPUT})
    await finishing
    assert answer.json()["id"].startswith("sync-")
    assert answer.json()["status"] == "COMPLETED"
    assert time.monotonic() - start < 10


async def finish_when_listed(world: World) -> None:
    """Ends the first job that appears."""
    async for item in world.platform.job_feed.follow():
        if hasattr(item, "record"):
            await asyncio.sleep(0.2)
            await world.succeed(item.record.id)
            return


async def test_runsync_outlived_by_its_job_answers_at_the_end_of_wait(world: World) -> None:
    start = time.monotonic()
    answer = await world.call("POST", f"/v2/{EP}/runsync?wait=1000", json={"input": INPUT})
    assert 0.7 < time.monotonic() - start < 1.6
    assert (answer.status_code, answer.json()["status"]) == (200, "IN_QUEUE")
    assert (await world.status(answer.json()["id"]))["status"] == "IN_QUEUE"


async def test_status_sync_is_held_until_the_job_ends(world: World) -> None:
    job_id = await world.submit()
    waiting = asyncio.create_task(world.call("GET", f"/v2/{EP}/status-sync/{job_id}?wait=20000"))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    await world.fail(job_id)
    assert (await asyncio.wait_for(waiting, 5)).json()["status"] == "FAILED"


async def test_held_requests_are_answered_when_the_process_ends(world: World) -> None:
    job_id = await world.submit()
    waiting = asyncio.create_task(world.call("GET", f"/v2/{EP}/status-sync/{job_id}?wait=20000"))
    await asyncio.sleep(0.2)
    world.jobs.stopping.set()
    assert (await asyncio.wait_for(waiting, 2)).json()["status"] == "IN_QUEUE"


# --- steering ------------------------------------------------------------------------------------------------


async def test_cancel_ends_a_job_and_is_repeatable(world: World) -> None:
    job_id = await world.submit()
    first = await world.call("POST", f"/v2/{EP}/cancel/{job_id}")
    again = await world.call("POST", f"/v2/{EP}/cancel/{job_id}")
    assert first.json()["status"] == "CANCELLED"
    assert again.json() == first.json()
    assert first.json()["executionTime"] == 0
    assert first.json()["workerId"] == ""


async def test_cancel_of_a_finished_job_changes_nothing(world: World) -> None:
    job_id = await world.submit()
    await world.succeed(job_id)
    answer = await world.call("POST", f"/v2/{EP}/cancel/{job_id}")
    assert (answer.status_code, answer.json()["status"]) == (200, "COMPLETED")


async def test_a_failed_job_can_be_retried_and_another_cannot(world: World) -> None:
    job_id = await world.submit()
    refused = await world.call("POST", f"/v2/{EP}/retry/{job_id}")
    assert refused.status_code == 400
    assert refused.json() == {"error": "only FAILED or TIMED_OUT jobs can be retried; this one is IN_QUEUE"}
    await world.fail(job_id)
    answer = await world.call("POST", f"/v2/{EP}/retry/{job_id}")
    assert answer.json() == {"id": job_id, "status": "IN_QUEUE"}
    assert await world.status(job_id) == {"id": job_id, "status": "IN_QUEUE", "retries": 1}
    await world.succeed(job_id)
    refused = await world.call("POST", f"/v2/{EP}/retry/{job_id}")
    assert refused.json()["error"].endswith("this one is COMPLETED")


async def test_purge_cancels_what_is_queued_and_nothing_else(world: World) -> None:
    queued = [await world.submit() for _ in range(3)]
    running = await world.submit()
    foreign = await world.submit(key=OTHER_KEY)
    await world.run_to_training(running)
    answer = await world.call("POST", f"/v2/{EP}/purge-queue", content=b"")
    assert answer.json() == {"removed": 3, "status": "completed"}
    assert {(await world.status(job_id))["status"] for job_id in queued} == {"CANCELLED"}
    assert (await world.status(running))["status"] == "IN_PROGRESS"
    assert (await world.call("GET", f"/v2/{EP}/status/{foreign}", OTHER_KEY)).json()["status"] == "IN_QUEUE"


async def test_health_counts_the_callers_jobs(world: World) -> None:
    await world.submit()
    await world.submit(key=OTHER_KEY)
    failed = await world.submit()
    await world.fail(failed)
    jobs = (await world.call("GET", f"/v2/{EP}/health")).json()["jobs"]
    assert jobs == {"completed": 0, "failed": 1, "inProgress": 0, "inQueue": 1, "retried": 0}


# --- limits --------------------------------------------------------------------------------------------------


async def test_one_request_too_many_is_429_with_a_short_retry_after() -> None:
    limits = {name: Limit(2, 10) for name in ("run", "runsync", "status", "cancel", "purge-queue", "health")}
    async with gateway(limiter=RateLimiter(limits)) as world:
        answers = [await world.call("POST", f"/v2/{EP}/run", json={"input": INPUT}) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert answers[2].headers["retry-after"] == "1"
        assert answers[2].json() == {"error": "too many requests"}
        other = await world.call("POST", f"/v2/{EP}/run", OTHER_KEY, json={"input": INPUT})
        assert other.status_code == 200
        assert (await world.call("GET", f"/v2/{EP}/health")).status_code == 200


async def test_an_invalid_input_is_told_before_the_rate() -> None:
    limits = {name: Limit(0, 0) for name in ("run", "runsync", "status", "cancel", "purge-queue", "health")}
    async with gateway(limiter=RateLimiter(limits)) as world:
        assert (await world.call("POST", f"/v2/{EP}/run", json={"input": {}})).status_code == 400
        assert (await world.call("POST", f"/v2/{EP}/run", json={"input": INPUT})).status_code == 429


async def test_a_project_may_have_a_limit_of_its_own(world: World) -> None:
    world.access.limits.operation_requests_per_ten_seconds["run"] = 1
    answers = [await world.call("POST", f"/v2/{EP}/run", json={"input": INPUT}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]


async def test_a_full_queue_is_429_with_retry_after_two() -> None:
    async with gateway(queue_limit=QueueLimit(floor=1, per_worker=1)) as world:
        for _ in range(2):
            await world.submit()
        await asyncio.sleep(1.1)
        answer = await world.call("POST", f"/v2/{EP}/run", json={"input": INPUT})
        assert (answer.status_code, answer.json()) == (429, {"error": "queue is full"})
        assert answer.headers["retry-after"] == "2"


# --- stream --------------------------------------------------------------------------------------------------


async def test_stream_hands_out_each_report_and_picture_once(world: World) -> None:
    job_id = await world.submit()
    await world.run_to_training(job_id)
    await world.report(job_id, 1)
    await world.report(job_id, 2)
    first = (await world.call("GET", f"/v2/{EP}/stream/{job_id}")).json()
    assert first["status"] == "IN_PROGRESS"
    assert [chunk["output"]["progress"]["step"] for chunk in first["stream"]] == [1, 2]
    await world.report(job_id, 3)
    second = (await world.call("GET", f"/v1/{EP}/stream/{job_id}")).json()
    assert [chunk["output"]["progress"]["step"] for chunk in second["stream"]] == [3]


async def test_stream_ends_with_the_pictures_and_then_with_an_empty_list(world: World) -> None:
    job_id = await world.submit()
    await world.succeed(job_id)
    first = (await world.call("GET", f"/v2/{EP}/stream/{job_id}")).json()
    assert first["status"] == "COMPLETED"
    assert [chunk["output"]["seed"] for chunk in first["stream"]] == [11, 12]
    last = (await world.call("GET", f"/v2/{EP}/stream/{job_id}")).json()
    assert last == {"id": job_id, "status": "COMPLETED", "stream": []}


async def test_pictures_that_could_not_be_linked_are_handed_out_later(world: World) -> None:
    job_id = await world.submit()
    await world.succeed(job_id)
    world.storage.down = True
    answer = await world.call("GET", f"/v2/{EP}/stream/{job_id}")
    assert answer.status_code == 503
    world.storage.down = False
    answer = await world.call("GET", f"/v2/{EP}/stream/{job_id}")
    assert [chunk["output"]["seed"] for chunk in answer.json()["stream"]] == [11, 12]


async def test_stream_says_in_progress_while_more_remains_than_it_carries(world: World) -> None:
    job_id = await world.submit()
    for step in range(150):
        await world.report(job_id, step, 1000)
    await world.succeed(job_id)
    first = (await world.call("GET", f"/v2/{EP}/stream/{job_id}")).json()
    assert (first["status"], len(first["stream"])) == ("IN_PROGRESS", 100)
    second = (await world.call("GET", f"/v2/{EP}/stream/{job_id}")).json()
    assert (second["status"], len(second["stream"])) == ("COMPLETED", 52)


async def test_stream_holds_while_there_is_nothing_to_say(world: World) -> None:
    job_id = await world.submit()
    start = time.monotonic()
    answer = await world.call("GET", f"/v2/{EP}/stream/{job_id}")
    assert 0.8 < time.monotonic() - start < 2.5
    assert answer.json() == {"id": job_id, "status": "IN_QUEUE", "stream": []}


async def test_two_readers_of_a_stream_share_its_chunks(world: World) -> None:
    job_id = await world.submit()
    for step in range(20):
        await world.report(job_id, step, 100)
    await world.succeed(job_id)
    paths = [f"/v2/{EP}/stream/{job_id}"] * 2
    answers = await asyncio.gather(*(world.call("GET", path) for path in paths))
    assert sorted(len(answer.json()["stream"]) for answer in answers) == [0, 22]


async def test_the_stream_of_a_cancelled_job_is_gone_after_a_minute(world: World) -> None:
    job_id = await world.submit()
    await world.call("POST", f"/v2/{EP}/cancel/{job_id}")
    answer = await world.call("GET", f"/v2/{EP}/stream/{job_id}")
    assert answer.json() == {"id": job_id, "status": "CANCELLED", "stream": []}
    ref = JobRef(JobKind.TRAIN, "first", job_id)
    minute = 61_000
    revision = await world.core.records.read(ref)
    times = replace(revision.record.times, ended=revision.record.times.ended - minute)
    await world.core.records.write(replace(revision.record, times=times), revision.sequence)
    assert (await world.call("GET", f"/v2/{EP}/stream/{job_id}")).status_code == 404
    assert (await world.status(job_id))["status"] == "CANCELLED"


async def test_the_stream_of_a_retried_job_shows_its_pictures_again(world: World) -> None:
    job_id = await world.submit()
    await world.fail(job_id)
    await world.call("GET", f"/v2/{EP}/stream/{job_id}")
    await world.call("POST", f"/v2/{EP}/retry/{job_id}")
    await world.succeed(job_id)
    assert len((await world.call("GET", f"/v2/{EP}/stream/{job_id}")).json()["stream"]) == 2


# --- pages ---------------------------------------------------------------------------------------------------


async def test_alive_and_ready_are_two_things(world: World) -> None:
    assert (await world.call("GET", "/healthz", None)).json() == {"alive": True}
    assert (await world.call("GET", "/readyz", None)).json() == {
        "ready": True,
        "checks": {"storage": True, "training": True},
    }
    world.ready["training"] = False
    answer = await world.call("GET", "/readyz", None)
    assert (answer.status_code, answer.json()["ready"]) == (503, False)
    assert (await world.call("GET", "/healthz", None)).status_code == 200


async def test_the_description_is_openapi_and_its_examples_are_accepted(world: World) -> None:
    api = (await world.call("GET", "/openapi.json", None)).json()
    assert api["openapi"] == "3.1.0"
    for endpoint in INPUTS:
        assert set(api["paths"][f"/v2/{endpoint}/status/{{id}}"]) == {"get", "post"}
        run = api["paths"][f"/v2/{endpoint}/run"]["post"]
        example = run["requestBody"]["content"]["application/json"]["example"]
        assert (await world.call("POST", f"/v2/{endpoint}/run", json=example)).status_code == 200
        refusal = await world.call("POST", f"/v2/{endpoint}/run", json={"input": {"nonsense": 1}})
        described = run["responses"]["400"]["content"]["application/json"]["example"]
        assert (refusal.status_code, refusal.json()) == (400, described)


async def test_operations_have_names_of_their_own(world: World) -> None:
    api = (await world.call("GET", "/openapi.json", None)).json()
    operations = [operation for path in api["paths"].values() for operation in path.values()]
    names = [operation["operationId"] for operation in operations if "operationId" in operation]
    assert names
    assert len(names) == len(set(names))


@pytest.mark.parametrize("endpoint", INPUTS)
@pytest.mark.parametrize("version", ["v1", "v2"])
async def test_described_bodies_have_the_keys_of_real_ones(world: World, version: str, endpoint: str) -> None:
    api = (await world.call("GET", "/openapi.json", None)).json()
    root = f"/{version}/{endpoint}"

    def described(path: str, method: str) -> Any:
        answer = api["paths"][root + path][method]["responses"]["200"]
        return answer["content"]["application/json"]["example"]

    def shape(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shape(inner) for key, inner in value.items()}
        return [shape(inner) for inner in value] if isinstance(value, list) else None

    running, cancelled, done = [await world.submit(endpoint=endpoint) for _ in range(3)]
    await world.run_to_training(running)
    await world.succeed(done)
    gone = await world.call("POST", f"{root}/cancel/{cancelled}")
    finished = await world.status(done, version, endpoint)
    assert set(described("/status/{id}", "get")) == set(await world.status(running, version, endpoint))
    assert set(described("/status-sync/{id}", "post")) == set(finished)
    assert set(described("/runsync", "post")) == set(finished)
    assert shape(described("/runsync", "post")["output"]) == shape(finished["output"])
    assert set(described("/cancel/{id}", "post")) == set(gone.json())


async def test_every_described_path_exists_with_its_methods(world: World) -> None:
    api = (await world.call("GET", "/openapi.json", None)).json()
    for path, methods in api["paths"].items():
        for method in methods:
            concrete = path.replace("{id}", "x").replace("{token}", "t").replace("{name}", "n")
            answer = await world.call(method.upper(), concrete, None)
            assert answer.status_code not in (405, 500), (method, path)
            assert answer.json() != {"error": "not found"}, (method, path)


async def test_the_documentation_needs_nothing_from_elsewhere(world: World) -> None:
    page = await world.call("GET", "/docs", None)
    assert page.headers["content-type"].startswith("text/html")
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert 'fetch("openapi.json")' in page.text


async def test_pages_of_other_origins_may_call_only_when_the_operator_says_so(world: World) -> None:
    headers = {"Origin": "https://studio.example.org"}
    answer = await world.call("GET", "/healthz", None, headers=headers)
    assert "access-control-allow-origin" not in answer.headers
    async with gateway(settings={"cors_origins": ("https://studio.example.org",)}) as open_world:
        answer = await open_world.call("GET", "/healthz", None, headers=headers)
        assert answer.headers["access-control-allow-origin"] == "https://studio.example.org"


async def test_addresses_begin_with_what_the_operator_set() -> None:
    async with gateway(settings={"public_url": "https://pictures.example.org"}) as world:
        job_id = await world.submit()
        await world.succeed(job_id)
        image = (await world.status(job_id))["output"][0]["image"]
        assert image.startswith("https://pictures.example.org/files/")
