"""The unmodified `runpod` package, both clients, as programs of their own against the gateway over real HTTP."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from services.domain.ports import Revision
from services.gateway.app import create_app
from tests.unit.gateway.harness import (
    CAPTIONED,
    DREAM_BOOTH,
    EVERYDREAM,
    INPUT,
    INPUTS,
    KEY,
    World,
    gateway,
)

HERE = Path(__file__).parent
HELD_SEED = 99_999
"""Seed of the jobs that the stand-in for a trainer leaves in the queue."""
HELD = {
    DREAM_BOOTH: INPUT | {"seed": HELD_SEED},
    EVERYDREAM: CAPTIONED | {"train": CAPTIONED["train"] | {"seed": HELD_SEED}},
}


async def work(world: World) -> None:
    """Stands in for the trainer: brings each new job to its end, a little later."""
    async with asyncio.TaskGroup() as group:
        async for item in world.platform.job_feed.follow():
            if not isinstance(item, Revision) or item.record.state != "QUEUED":
                continue
            if int(item.record.spec["seed"]) != HELD_SEED:
                group.create_task(finish(world, item.record.id))


async def finish(world: World, job_id: str) -> None:
    await asyncio.sleep(0.6)
    for step in (1, 2):
        await world.report(job_id, step, 2)
    await world.succeed(job_id)


@contextlib.asynccontextmanager
async def serving(world: World) -> AsyncIterator[str]:
    """The application on a port of its own; gives the base URL."""
    config = uvicorn.Config(create_app(world.parts), port=0, log_config=None, lifespan="off", ws="none")
    server = uvicorn.Server(config)
    config.load()
    listener = config.bind_socket()
    running = asyncio.create_task(server._serve([listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    await running
    listener.close()


async def run_client(program: str, base_url: str, endpoint: str = DREAM_BOOTH) -> dict[str, Any]:
    """Runs a program of this folder; what it said, by name."""
    environment = os.environ | {"RUNPOD_ENDPOINT_BASE_URL": base_url, "RUNPOD_LOG_LEVEL": "ERROR"}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(HERE / program),
        KEY,
        endpoint,
        json.dumps(INPUTS[endpoint]),
        json.dumps(HELD[endpoint]),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await asyncio.wait_for(process.communicate(), 90)
    assert process.returncode == 0, errors.decode()
    return dict(json.loads(line) for line in output.splitlines() if line.startswith(b"["))


@contextlib.asynccontextmanager
async def platform() -> AsyncIterator[str]:
    async with gateway() as world, serving(world) as url:
        working = asyncio.create_task(work(world))
        yield url
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


def pictures_of(output: Any) -> Any:
    return output["inference"] if isinstance(output, dict) else output


def check_pictures(output: Any, base_url: str) -> None:
    pictures = pictures_of(output)
    assert [picture["seed"] for picture in pictures] == [11, 12]
    assert all(picture["image"].startswith(f"{base_url}/files/") for picture in pictures)


@pytest.mark.parametrize(
    ("version", "endpoint"), [("v1", DREAM_BOOTH), ("v2", DREAM_BOOTH), ("v2", EVERYDREAM)]
)
async def test_the_synchronous_client_does_all_it_can(version: str, endpoint: str) -> None:
    async with platform() as url:
        said = await run_client("client_sync.py", f"{url}/{version}", endpoint)
        assert said["first status"] in ("IN_QUEUE", "IN_PROGRESS")
        check_pictures(said["output"], url)
        assert said["last status"] == "COMPLETED"
        check_pictures(said["run_sync"], url)
        steps = [chunk["progress"]["step"] for chunk in said["stream"] if "progress" in chunk]
        assert steps == [1, 2]
        check_pictures([chunk for chunk in said["stream"] if "image" in chunk], url)
        assert said["cancel"]["status"] == "CANCELLED"
        assert said["cancelled"] == "CANCELLED"
        assert said["purge"] == {"removed": 1, "status": "completed"}
        assert said["health"]["jobs"]["completed"] == 3
        assert said["bad input"].startswith("HTTPError: 400")
        assert said["unknown job"].startswith("HTTPError: 404")
        assert said["unknown endpoint"].startswith("HTTPError: 404")
        assert said["wrong key"].startswith("RuntimeError: 401")
        picture = await fetched(pictures_of(said["output"])[0]["image"])
        assert picture.startswith(b"PNG picture-")


@pytest.mark.parametrize("endpoint", INPUTS)
async def test_the_asynchronous_client_does_all_it_can(endpoint: str) -> None:
    async with platform() as url:
        said = await run_client("client_async.py", f"{url}/v2", endpoint)
        assert said["first status"] in ("IN_QUEUE", "IN_PROGRESS")
        check_pictures(said["output"], url)
        assert said["last status"] == "COMPLETED"
        check_pictures([chunk for chunk in said["stream"] if "image" in chunk], url)
        assert said["cancel"]["status"] == "CANCELLED"
        assert said["purge"] == {"removed": 1, "status": "completed"}
        assert said["health"]["jobs"]["completed"] == 2


async def test_a_base_address_with_a_trailing_slash_works() -> None:
    async with platform() as url:
        said = await run_client("client_async.py", f"{url}/v2/")
        assert said["last status"] == "COMPLETED"


async def fetched(url: str) -> bytes:
    async with httpx.AsyncClient() as http:
        answer = await http.get(url)
        assert answer.status_code == 200
        return answer.content


async def test_a_client_that_loops_without_pause_needs_few_held_requests() -> None:
    """As the JavaScript client waits: runsync, then status-sync again and again until the job has ended."""
    headers = {"Authorization": KEY}
    async with gateway() as world, serving(world) as url:
        http = httpx.AsyncClient(base_url=url, headers=headers, timeout=30)
        async with http:
            body = (await http.post("/v2/dream-booth-v1/runsync?wait=1000", json={"input": INPUT})).json()
            finishing = asyncio.create_task(finish_after(world, body["id"], 2.5))
            requests = 1
            while body["status"] not in ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"):
                body = (await http.get(f"/v2/dream-booth-v1/status-sync/{body['id']}?wait=90000")).json()
                requests += 1
            await finishing
    assert body["status"] == "COMPLETED"
    assert requests == 2


async def finish_after(world: World, job_id: str, seconds: float) -> None:
    await asyncio.sleep(seconds)
    await world.succeed(job_id)


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        (
            DREAM_BOOTH,
            """{"input": {"concepts": [
        {"instance_data": "https://LINK_TO_ZIP.FILE",
        "instance_prompt": "a unique 123xyz concept name",
        "class_prompt": "a thing doing something"}
        ], "samples": [{"prompt": "a unique 123xyz concept name as a superhero"}]}}""",
        ),
        (
            EVERYDREAM,
            """{"input": {"train": {"data_url": "https://LINK_TO_ZIP.FILE"},
    "inference": {"prompt": "a unique 123xyz concept name as a superhero"}}}""",
        ),
    ],
    ids=[DREAM_BOOTH, EVERYDREAM],
)
async def test_the_pages_own_curl_call_works(endpoint: str, body: str) -> None:
    """The call of the endpoint's page, another host in it."""
    async with platform() as url:
        process = await asyncio.create_subprocess_exec(
            "curl", "-sS", "-X", "POST", f"{url}/v1/{endpoint}/run",
            "-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {KEY}", "-d", body,
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        output, _ = await process.communicate()
    answer = json.loads(output)
    assert answer == {"id": answer["id"], "status": "IN_QUEUE"}
