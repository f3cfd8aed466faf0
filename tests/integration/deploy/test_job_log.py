"""The cluster's job log as it is rendered: real nats-servers with that configuration and fresh passwords."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from services.adapters.jetstream import JetStreamPlatform
from services.adapters.jetstream_connection import NoAnswer
from services.domain.errors import OutcomeUnknown
from services.domain.job import JobKind
from services.domain.ports import Beat, CaughtUp
from services.storage.access import is_secret
from tests.integration.nats_server import BINARY, answers, free_ports
from tests.unit.deploy.manifests import K8S, WORKLOADS, of_kind, pod_of, rendered
from tests.unit.jobs.harness import drawing, training

PATIENCE_S = 0.3
GIB = 1 << 30


def new_secrets(replicas: int) -> dict[str, Mapping[str, str]]:
    """The Secrets that an operator would make, by name: file -> content."""
    command = [sys.executable, str(K8S / "new_secrets.py"), f"--replicas={replicas}"]
    listed = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    return {each["metadata"]["name"]: each["stringData"] for each in listed["items"]}


def test_an_operator_s_secrets_are_those_that_the_pods_mount_and_never_the_same() -> None:
    made, again = new_secrets(3), new_secrets(3)
    mounted = {
        volume["secret"]["secretName"]
        for each in of_kind(rendered("production"), *WORKLOADS)
        for volume in pod_of(each)["volumes"]
        if "secret" in volume
    }
    assert set(made) == mounted
    assert is_secret(made["storage-secrets"]["api-key"])
    assert all(made[name][file] != again[name][file] for name in made for file in made[name])


class RenderedServers:
    """The servers of one overlay on loopback ports; only addresses and folders differ from what a cluster runs."""

    def __init__(self, overlay: str, replicas: int, folder: Path) -> None:
        self.secrets = new_secrets(replicas)
        files = next(
            each["data"] for each in of_kind(rendered(overlay), "ConfigMap") if "nats.conf" in each["data"]
        )
        self.ports, self.monitors, routes = (free_ports(3 * replicas)[n::3] for n in range(3))
        self.processes = []
        for number in range(replicas):
            home = folder / f"nats-{number}"
            (home / "secrets").mkdir(parents=True)
            local = {
                "0.0.0.0:4222": f"127.0.0.1:{self.ports[number]}",
                "0.0.0.0:8222": f"127.0.0.1:{self.monitors[number]}",
                "0.0.0.0:6222": f"127.0.0.1:{routes[number]}",
                "/data": str(home / "data"),
                "/run/nats/nats.pid": str(home / "nats.pid"),
                # A disk of the test's machine need not have the room; the streams are as large as the test makes them.
                "MAX_FILE: 36GB": "MAX_FILE: 2GB",
            } | {f"nats-{n}.nats-peers:6222": f"127.0.0.1:{port}" for n, port in enumerate(routes)}
            written = files | {f"secrets/{name}": text for name, text in self.secrets["nats-secrets"].items()}
            for name, text in written.items():
                for there, here in local.items():
                    text = text.replace(there, here)
                (home / name).write_text(text)
            with (home / "log").open("wb") as log:
                environ = os.environ | {"POD_NAME": f"nats-{number}"}
                command = [str(BINARY), "--config", str(home / "nats.conf")]
                self.processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environ))
        self.folder = folder

    def addresses(self, service: str, file: str = "nats-url") -> list[str]:
        """Where a service connects, as its Secret says, on the loopback ports."""
        url = self.secrets[f"{service}-secrets"][file]
        return [url.replace("@nats:4222", f"@127.0.0.1:{port}") for port in self.ports]

    async def open(self, service: str) -> JetStreamPlatform:
        """The job log as that service opens it."""
        opened = await JetStreamPlatform.open(
            self.addresses(service),
            system_servers=self.addresses(service, "nats-system-url"),
            replicas=len(self.ports),
            jobs_max_bytes=GIB,
            write_patience_s=PATIENCE_S,
        )
        return opened

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def wait_until_healthy(self, patience_s: float = 40.0) -> None:
        """Waits until every server says that it is well; fails with their logs when one does not."""
        end = time.monotonic() + patience_s
        while not all(answers(f"http://127.0.0.1:{port}/healthz") for port in self.monitors):
            if time.monotonic() > end or any(process.poll() is not None for process in self.processes):
                logs = [path.read_text()[-1500:] for path in sorted(self.folder.glob("*/log"))]
                pytest.fail("the job log does not start:\n" + "\n".join(logs))
            time.sleep(0.05)


@pytest.fixture
def servers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RenderedServers]:
    overlay, replicas = request.param
    running = RenderedServers(overlay, replicas, tmp_path)
    try:
        running.wait_until_healthy()
        yield running
    finally:
        running.stop()


@pytest.mark.parametrize("servers", [("small", 1)], indirect=True, ids=["small"])
async def test_each_service_may_do_its_own_work_in_the_job_log_and_no_other(servers: RenderedServers) -> None:
    async with (
        await servers.open("trainer-api") as trainer,
        await servers.open("inference-api") as inference,
        await servers.open("gateway") as gateway,
    ):
        await trainer.job_log.write(training("t1"), 0)
        await inference.job_log.write(drawing("d1"), 0)
        await trainer.small.create_idempotency("p", "a" * 64, {"id": "t1"})
        await trainer.progress.publish_progress("p", "t1", {"step": 1})
        await gateway.small.write_hook("p", "t1", {"next": 1}, 0)
        await gateway.progress.write_cursor("p", "t1", {"at": 1}, 0)
        assert [entry.body["step"] for entry in await gateway.progress.progress_after("p", "t1", 0)] == [1]
        assert await followed(gateway, JobKind.TRAIN) == ["t1"]
        assert await followed(inference, JobKind.GEN) == ["d1"]
        await beats_are_heard(trainer, JobKind.TRAIN)
        await beats_are_heard(inference, JobKind.GEN)
        await trainer.job_log.purge(training("t1").ref, keep_last=True)

        forbidden = {
            "a trainer api's drawing": trainer.job_log.write(drawing("d2"), 0),
            "an inference api's training": inference.job_log.write(training("t2"), 0),
            "a gateway's training": gateway.job_log.write(training("t2"), 0),
            "an api's webhook": trainer.small.write_hook("p", "t1", {"next": 2}, 1),
            "a gateway's key": gateway.small.create_idempotency("p", "b" * 64, {}),
            "a gateway's purge": gateway.connection.ask("$JS.API.STREAM.PURGE.JOBS"),
        } | {
            f"{verb} by {name}": platform.connection.ask(f"$JS.API.STREAM.{verb}.JOBS")
            for verb in ("DELETE", "UPDATE")
            for name, platform in (("trainer", trainer), ("inference", inference), ("gateway", gateway))
        }
        outcomes = await asyncio.gather(*forbidden.values(), return_exceptions=True)
        done = [what for what, outcome in zip(forbidden, outcomes, strict=True) if not is_unanswered(outcome)]
        assert done == []


def is_unanswered(outcome: object) -> bool:
    """What becomes of a message that its sender may not send: the server drops it."""
    return isinstance(outcome, OutcomeUnknown | NoAnswer)


async def followed(platform: JetStreamPlatform, kind: JobKind) -> list[str]:
    found: list[str] = []
    async for item in platform.job_feed.follow(kind):
        if isinstance(item, CaughtUp):
            return found
        found.append(item.record.id)
    return found


async def beats_are_heard(platform: JetStreamPlatform, kind: JobKind) -> None:
    heard: list[Beat] = []

    async def listen() -> None:
        async for beat in platform.beats.follow_beats(kind):
            heard.append(beat)

    listening = asyncio.create_task(listen())
    async with asyncio.timeout(10):
        while not heard:
            await platform.beats.publish_beat(Beat(kind=kind, worker="w"))
            await asyncio.sleep(0.02)
    listening.cancel()


@pytest.mark.parametrize("servers", [("production", 3)], indirect=True, ids=["production"])
async def test_three_servers_keep_what_was_written_when_one_is_lost(servers: RenderedServers) -> None:
    async with await servers.open("inference-api") as inference:
        inference._writer._patience_s = 30
        sequence = await inference.job_log.write(drawing("d1"), 0)
        servers.processes[0].kill()
        await inference.job_log.write(drawing("d2"), 0)
        kept = await inference.job_log.read(drawing("d1").ref)
        assert kept is not None
        assert kept.sequence == sequence
