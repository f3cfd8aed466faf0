"""The launcher's parts: data folder, addresses, environment, the check of nats-server, the welcome."""

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.adapters.settings import LauncherSettings
from services.gateway.dialects.runpod.dream_booth_v1 import read_input
from services.launcher import nats_server, plan
from services.launcher.__main__ import welcome
from services.launcher.home import Home, InUse
from services.launcher.platform import free_addresses
from services.launcher.supervisor import Program, Supervisor

ROOT = Path(__file__).parents[3]
GOOD: dict[str, object] = {"version": "2.15.1", "jetstream": {"config": {"sync_always": True}}}


@pytest.fixture
def listener() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def settings(**values: Any) -> LauncherSettings:
    addresses: dict[str, Any] = {
        name.removeprefix("LIKENESS_").lower(): value for name, value in free_addresses().items()
    }
    return LauncherSettings(**(addresses | values))


LOCKING = """
import os, sys
from pathlib import Path
from services.launcher.home import Home
with Home(Path(sys.argv[1])).locked():
    os._exit(9)
"""


def test_a_folder_is_used_by_one_launcher_at_a_time(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOCKING, str(tmp_path / "home")]
    with Home(tmp_path / "home").locked():
        other = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert f"is in use by another launcher (process {os.getpid()})" in other.stderr


def test_a_folder_is_free_again_when_its_launcher_is_gone(tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", LOCKING, str(tmp_path)], cwd=ROOT, check=False)
    assert gone.returncode == 9
    with Home(tmp_path).locked(), pytest.raises(InUse), Home(tmp_path).locked():
        pass


def test_what_runs_is_written_down(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.write_state("http://x", {"nats": 7})
    assert json.loads(home.state.read_text()) == {
        "launcher": os.getpid(),
        "url": "http://x",
        "pids": {"nats": 7},
    }
    home.clear_state()
    assert not home.state.exists()


def test_every_taken_address_is_named_with_its_variable(listener: str) -> None:
    wanted = plan.addresses(settings(storage_addr=listener))
    assert plan.taken(wanted) == [f"{listener} (LIKENESS_STORAGE_ADDR) is in use by another process"]


def test_a_second_launcher_says_which_port_is_taken(listener: str, tmp_path: Path) -> None:
    environ = os.environ | free_addresses() | {"LIKENESS_HTTP_ADDR": listener, "LIKENESS_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "services.launcher"]
    refused = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=ROOT)
    assert refused.returncode == 1
    assert f"{listener} (LIKENESS_HTTP_ADDR) is in use" in refused.stderr


def test_services_get_what_the_launcher_decided(tmp_path: Path) -> None:
    given = settings(storage_addr="127.0.0.1:9")
    stages = plan.stages(given, Home(tmp_path), {"PATH": "/bin", "LIKENESS_BEAT_S": "1"})
    programs = {program.name: program for stage in stages for program in stage}
    storage = programs["storage"].environ
    assert storage["LIKENESS_STORAGE_ADDR"] == "127.0.0.1:9"
    assert storage["LIKENESS_BEAT_S"] == "1"
    assert storage["LIKENESS_HOME"] == str(tmp_path)
    assert storage["LIKENESS_NATS_URL"] == f"nats://{given.nats_addr}"
    assert storage["LIKENESS_BOOTSTRAP_KEY_FILE"] == str(tmp_path / "api-key")


def test_no_service_takes_the_launchers_ready_file_for_its_own(tmp_path: Path) -> None:
    stages = plan.stages(settings(), Home(tmp_path), {"LIKENESS_READY_FD": "9"})
    services = [program for stage in stages for program in stage if program.command[0] == sys.executable]
    assert len(services) > 5
    holders = {program.name for program in services if "LIKENESS_READY_FD" in program.environ}
    assert holders <= {"examples"}, "the example pictures are served by a program that reads no settings"


def test_only_storage_may_reach_the_example_pictures(tmp_path: Path) -> None:
    stages = plan.stages(settings(), Home(tmp_path), {})
    allowed = {
        program.name: program.environ.get("LIKENESS_EGRESS_ALLOW", "")
        for stage in stages
        for program in stage
    }
    assert allowed.pop("storage") == ("127.77.0.1" if plan.has_examples() else "")
    assert set(allowed.values()) == {""}


def test_only_storage_gets_the_keys_of_the_bucket(tmp_path: Path) -> None:
    environ = {"LIKENESS_S3_SECRET_KEY": "secret", "LIKENESS_ARTIFACTS": "s3:https://store.example/likeness"}
    programs = [program for stage in plan.stages(settings(), Home(tmp_path), environ) for program in stage]
    holders = [program.name for program in programs if "LIKENESS_S3_SECRET_KEY" in program.environ]
    assert holders == ["storage"]


def test_an_own_job_log_needs_no_nats_server(tmp_path: Path) -> None:
    stages = plan.stages(settings(nats_url="nats://elsewhere:4222"), Home(tmp_path), {})
    assert "nats" not in [program.name for stage in stages for program in stage]


@pytest.mark.parametrize(
    ("varz", "fault"),
    [
        (GOOD | {"version": "2.14.9"}, "older than 2.15.1"),
        (GOOD | {"version": "2.9.30"}, "older than 2.15.1"),
        ({"jetstream": {}}, "of unknown version"),
        (GOOD | {"jetstream": {"config": {"sync_always": False}}}, "does not sync every write"),
        ({"version": "2.15.1"}, "does not sync every write"),
    ],
    ids=["older", "much older", "no version", "no sync", "no jetstream"],
)
def test_a_server_that_could_lose_jobs_is_refused(varz: dict[str, object], fault: str) -> None:
    with pytest.raises(nats_server.WrongServer, match=fault):
        nats_server.check(varz)


@pytest.mark.parametrize("version", ["2.15.1", "2.15.2-RC.1", "2.16.0", "3.0.0"])
def test_a_server_of_the_tried_version_or_newer_is_taken(version: str) -> None:
    nats_server.check(GOOD | {"version": version})


async def test_the_embedded_nats_server_runs_as_configured(tmp_path: Path) -> None:
    given, home = settings(), Home(tmp_path)
    (nats,) = [entry for entry in plan.stages(given, home, dict(os.environ))[0] if entry.name == "nats"]
    supervisor = Supervisor([[nats]], logs=home.logs, grace_s=5)
    await supervisor.start()
    assert await nats_server.is_ready(given.nats_monitor_addr)
    await supervisor.stop()
    assert not await nats_server.is_ready(given.nats_monitor_addr)


async def test_a_nats_server_without_sync_keeps_the_platform_from_starting(tmp_path: Path) -> None:
    given, home = settings(), Home(tmp_path)
    (nats,) = [entry for entry in plan.stages(given, home, dict(os.environ))[0] if entry.name == "nats"]
    home.nats_config.write_text(home.nats_config.read_text().replace("sync_interval: always", ""))
    supervisor = Supervisor(
        [[Program(nats.name, nats.command, nats.environ, probe=nats.probe)]], logs=home.logs
    )
    with pytest.raises(nats_server.WrongServer):
        await supervisor.start()
    await supervisor.stop()


def test_the_welcome_shows_three_commands_that_a_shell_understands() -> None:
    text = welcome("http://127.0.0.1:8000", "key", "/home/api-key", "127.77.0.1:8106")
    commands = text.replace("\\\n", "").split("\n")
    curls = [shlex.split(line) for line in commands if line.strip().startswith("curl")]
    assert [curl[2] for curl in curls] == [
        "http://127.0.0.1:8000/healthz",
        "http://127.0.0.1:8000/v1/dream-booth-v1/run",
        "http://127.0.0.1:8000/v1/dream-booth-v1/status/ID",
    ]
    training = json.loads(curls[1][-1])["input"]
    assert training["concepts"][0]["instance_data"] == "http://127.77.0.1:8106/robot.zip"
    assert not read_input(training, lambda: 0).ignored
