"""The launcher as a process, with small programs in the services' places: welcome, signals, restarts, no orphans."""

import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from services.launcher.platform import Platform, PlatformFailed

LAUNCHER = """
import os, sys
from services.launcher import __main__, plan
from services.launcher.supervisor import Program

SERVICE = '''
import os, signal, sys, time
def end(number, frame):
    print('{"level": "WARNING", "message": "leaves"}', flush=True)
    time.sleep(float(os.environ.get("SLOW_S", "0")))
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
if sys.argv[1] == "storage":
    key = os.open(os.environ["LIKENESS_HOME"] + "/api-key", os.O_WRONLY | os.O_CREAT, 0o600)
    os.write(key, b"secret")
os.write(int(os.environ["LIKENESS_READY_FD"]), b"ready")
os.close(int(os.environ["LIKENESS_READY_FD"]))
while True:
    time.sleep(60)
'''

def stages(settings, home, environ):
    environ = plan.program_environ(settings, home, environ)
    def program(name):
        return Program(name, [sys.executable, "-c", SERVICE, name], environ, "LIKENESS_READY_FD")
    return [[program("storage")], [program("gateway")]]

plan.stages = stages
raise SystemExit(__main__.main())
"""


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    platform = Platform(tmp_path, command=[sys.executable, "-c", LAUNCHER])
    yield platform
    platform.stop()


def until(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_it_welcomes_once_all_is_ready_and_leaves_nothing_behind(platform: Platform) -> None:
    platform.start()
    pids = platform.pids()
    assert sorted(pids) == ["gateway", "storage"]
    until(lambda: f"Likeness serves at {platform.url}" in platform.output)
    assert "Bearer secret" in platform.output
    assert platform.stop() == 0
    assert not [pid for pid in pids.values() if alive(pid)]
    assert platform.pids() == {}


def test_it_stops_the_gateway_before_storage(platform: Platform) -> None:
    platform.start()
    platform.stop()
    assert platform.output.index("gateway: leaves") < platform.output.index("storage: leaves")


def test_a_key_is_for_its_owner_only(platform: Platform) -> None:
    platform.start()
    assert platform.api_key == "secret"
    assert stat.S_IMODE((platform.home / "api-key").stat().st_mode) == 0o600


def test_a_killed_program_comes_back(platform: Platform) -> None:
    platform.start()
    old = platform.kill("gateway")
    assert alive(platform.wait_for_restart("gateway", old))
    assert platform.running


def test_nothing_outlives_a_killed_launcher(platform: Platform) -> None:
    platform.start()
    pids = platform.pids()
    platform.kill_launcher()
    until(lambda: not [pid for pid in pids.values() if alive(pid)])
    platform.start()
    assert set(platform.pids().values()).isdisjoint(pids.values())


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    platform = Platform(tmp_path, {"SLOW_S": "60"}, command=[sys.executable, "-c", LAUNCHER])
    platform.start()
    pids = platform.pids()
    os.kill(platform.pid, signal.SIGINT)
    until(lambda: "once more" in platform.output)
    os.kill(platform.pid, signal.SIGINT)
    until(lambda: not platform.running)
    assert not [pid for pid in pids.values() if alive(pid)]


def test_two_launchers_do_not_share_a_folder(platform: Platform, tmp_path: Path) -> None:
    platform.start()
    second = Platform(tmp_path, command=[sys.executable, "-c", LAUNCHER])
    with pytest.raises(PlatformFailed, match="in use by another launcher"):
        second.start()


def test_wrong_settings_are_all_reported(tmp_path: Path) -> None:
    platform = Platform(tmp_path, {"LIKENESS_GRACE_S": "-1", "LIKENESS_NOTHING": "1"})
    with pytest.raises(PlatformFailed, match=r"(?s)LIKENESS_GRACE_S.*LIKENESS_NOTHING: no such setting"):
        platform.start()
