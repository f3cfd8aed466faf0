"""The gateway as a process on a real job log: readiness, a graceful end, webhooks across a kill."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web

from services.adapters.jetstream import JetStreamPlatform
from tests.integration.nats_server import NatsServer
from tests.unit.gateway.harness import INPUT, KEY, Behind, services

ROOT = Path(__file__).resolve().parents[3]
EP = "/v2/dream-booth-v1"


@contextlib.asynccontextmanager
async def gateway_process(nats: NatsServer, address: str, tmp_path: Path) -> AsyncIterator["Process"]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    environment = os.environ | {
        "LIKENESS_HTTP_ADDR": f"127.0.0.1:{port}",
        "LIKENESS_NATS_URL": nats.url,
        "LIKENESS_NATS_MONITOR_URL": nats.monitor_url,
        "LIKENESS_STORAGE_ADDR": address,
        "LIKENESS_TRAINING_ADDR": address,
        "LIKENESS_INFERENCE_ADDR": address,
        "LIKENESS_EGRESS_ALLOW": "127.0.0.0/8",
        "LIKENESS_GRACE_S": "5",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "gen")]),
    }
    log = (tmp_path / "gateway.log").open("ab")
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.gateway", env=environment, stderr=log, stdout=log, cwd=ROOT
    )
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=15) as http:
        process = Process(started, http, tmp_path / "gateway.log")
        try:
            await process.wait_alive()
            yield process
        finally:
            log.close()
            with contextlib.suppress(ProcessLookupError):
                started.kill()
            await started.wait()


class Process:
    """A running gateway."""

    def __init__(self, process: asyncio.subprocess.Process, http: httpx.AsyncClient, log: Path) -> None:
        self.process, self.http, self.log = process, http, log

    async def wait_alive(self) -> None:
        for _ in range(600):
            assert self.process.returncode is None, self.log.read_text()
            with contextlib.suppress(httpx.HTTPError):
                if (await self.http.get("/healthz")).status_code == 200:
                    return
            await asyncio.sleep(0.05)
        raise AssertionError(self.log.read_text())

    async def call(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        return await self.http.request(method, path, headers={"Authorization": KEY}, **kwargs)

    async def submit(self, **envelope: Any) -> str:
        answer = await self.call("POST", f"{EP}/run", json={"input": INPUT} | envelope)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])


@pytest.fixture
async def behind(own_nats_server: NatsServer) -> AsyncIterator[Behind]:
    opened = await JetStreamPlatform.open([own_nats_server.url], monitor_url=own_nats_server.monitor_url)
    async with opened as platform, services(platform) as made:
        yield made


async def test_it_is_alive_at_once_and_ready_only_with_all_it_needs(
    own_nats_server: NatsServer, behind: Behind, tmp_path: Path
) -> None:
    async with gateway_process(own_nats_server, behind.address, tmp_path) as gateway:
        answer = await gateway.http.get("/readyz")
        assert (answer.status_code, answer.json()["ready"]) == (200, True)
        own_nats_server.kill()
        await asyncio.sleep(0.5)
        answer = await gateway.http.get("/readyz")
        assert (answer.status_code, answer.json()["checks"]["job_log"]) == (503, False)
        assert (await gateway.http.get("/healthz")).status_code == 200


async def test_without_its_services_it_says_so_and_answers_503(
    own_nats_server: NatsServer, tmp_path: Path
) -> None:
    async with gateway_process(own_nats_server, "127.0.0.1:9", tmp_path) as gateway:
        ready = await gateway.http.get("/readyz")
        assert ready.status_code == 503
        assert ready.json()["checks"] == {
            "storage": False,
            "training": False,
            "inference": False,
            "job_log": True,
        }
        answer = await gateway.call("GET", f"{EP}/health")
        assert (answer.status_code, answer.json()) == (503, {"error": "service unavailable"})


async def test_sigterm_answers_held_requests_and_ends_with_zero(
    own_nats_server: NatsServer, behind: Behind, tmp_path: Path
) -> None:
    async with gateway_process(own_nats_server, behind.address, tmp_path) as gateway:
        job_id = await gateway.submit()
        held = asyncio.create_task(gateway.call("GET", f"{EP}/status-sync/{job_id}?wait=60000"))
        await asyncio.sleep(0.5)
        gateway.process.send_signal(signal.SIGTERM)
        assert (await asyncio.wait_for(held, 5)).json()["status"] == "IN_QUEUE"
        assert await asyncio.wait_for(gateway.process.wait(), 8) == 0


async def test_a_wrong_setting_is_named_and_nothing_starts() -> None:
    environment = os.environ | {
        "LIKENESS_HTTP_ADDR": "nowhere",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'gen'}",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.gateway", env=environment, stderr=asyncio.subprocess.PIPE, cwd=ROOT
    )
    _, errors = await process.communicate()
    assert process.returncode == 78
    assert b"LIKENESS_HTTP_ADDR: must be host:port" in errors


async def test_a_webhook_is_told_by_the_next_gateway_when_one_is_killed(
    own_nats_server: NatsServer, behind: Behind, tmp_path: Path
) -> None:
    calls: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
    answers = [503, 200]

    async def take(request: web.Request) -> web.Response:
        calls.put_nowait((request.headers["X-Webhook-Id"], await request.json()))
        return web.Response(status=answers[min(calls.qsize(), 2) - 1])

    app = web.Application()
    app.router.add_post("/hook", take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook"
    async with gateway_process(own_nats_server, behind.address, tmp_path) as gateway:
        job_id = await gateway.submit(webhook=url)
        await behind.succeed(job_id)
        while calls.qsize() < 1:
            await asyncio.sleep(0.05)
        gateway.process.kill()
    async with gateway_process(own_nats_server, behind.address, tmp_path):
        while calls.qsize() < 2:
            await asyncio.sleep(0.05)
    await runner.cleanup()
    (first_id, first), (second_id, second) = calls.get_nowait(), calls.get_nowait()
    assert first_id == second_id
    assert first["status"] == second["status"] == "COMPLETED"
    assert json.dumps(second["output"]) != "[]"


async def test_logs_hold_no_key_no_prompt_and_no_address(
    own_nats_server: NatsServer, behind: Behind, tmp_path: Path
) -> None:
    async with gateway_process(own_nats_server, behind.address, tmp_path) as gateway:
        job_id = await gateway.submit(webhook="http://127.0.0.1:59999/secret-path")
        await behind.succeed(job_id)
        await gateway.call("GET", f"{EP}/status/{job_id}")
        await gateway.call(
            "POST", f"{EP}/run", json={"input": INPUT, "s3Config": {"accessSecret": "hunter2"}}
        )
        await asyncio.sleep(0.5)
    text = (tmp_path / "gateway.log").read_text()
    assert "webhook" in text
    for secret in (KEY, "hunter2", "zkw", "rex.zip", "secret-path", "/files/token"):
        assert secret not in text
