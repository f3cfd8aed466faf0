"""Children as real processes: talk, death of either side, watchdog, secrets, output."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from services.adapters.child_process import ChildDied, ChildHung, ChildProcess, child_environ, describe_exit

CHILD = """
import os, signal, subprocess, sys, time
from services.adapters.child_process import ParentLink

link = ParentLink.from_environ()
link.emit({"event": "ready", "arguments": sys.argv[1:], "environ": sorted(os.environ)})
for command in link.commands():
    if command["do"] == "echo":
        link.emit({"event": "echo", "text": command["text"]})
    if command["do"] == "say":
        print(command["text"])
        link.emit({"event": "said"})
    if command["do"] == "exit":
        print("last words")
        sys.exit(command["status"])
    if command["do"] == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if command["do"] == "poll":
        time.sleep(0.2)
        link.emit({"event": "polled", "first": link.poll(), "second": link.poll()})
    if command["do"] == "spawn":
        link.emit({"event": "spawned", "pid": subprocess.Popen(["sleep", "600"]).pid})
    if command["do"] == "ignore SIGTERM":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        link.emit({"event": "ignored"})
    if command["do"] == "babble":
        sys.stdout.flush()
        link._socket.sendall(b"no json\\n")
"""

PARENT = """
import asyncio, sys
from services.adapters.child_process import ChildProcess

async def main():
    child = await ChildProcess.start("fake_child", extra_env={"PYTHONPATH": sys.argv[1]})
    async for event in child.events():
        print(child.pid, flush=True)

asyncio.run(main())
"""

Start = Callable[..., Any]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    (tmp_path / "fake_child.py").write_text(CHILD)
    async with contextlib.AsyncExitStack() as children:

        async def started(
            *arguments: str, **options: Any
        ) -> tuple[ChildProcess, AsyncIterator[dict[str, Any]]]:
            extra_env = {"PYTHONPATH": search_path(tmp_path)}
            child = await ChildProcess.start("fake_child", *arguments, extra_env=extra_env, **options)
            await children.enter_async_context(child)
            return child, child.events()

        yield started


def search_path(folder: Path) -> str:
    return os.pathsep.join([str(folder), str(Path(__file__).parents[3])])


async def gone(pid: int, within_s: float = 5.0) -> bool:
    for _ in range(int(within_s / 0.02)):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        await asyncio.sleep(0.02)
    return False


async def test_commands_go_down_and_events_come_up_in_order(start: Start) -> None:
    child, events = await start("--fast")
    ready = await anext(events)
    assert ready["arguments"] == ["--fast"]
    for number in range(50):
        await child.send({"do": "echo", "text": f"ä{number}"})
    assert [(await anext(events))["text"] for _ in range(50)] == [f"ä{number}" for number in range(50)]


async def test_a_long_event_arrives_whole(start: Start) -> None:
    child, events = await start()
    await anext(events)
    await child.send({"do": "echo", "text": "x" * 1_000_000})
    assert len((await anext(events))["text"]) == 1_000_000


async def test_a_child_can_look_for_commands_without_waiting(start: Start) -> None:
    child, events = await start()
    await anext(events)
    await child.send({"do": "poll"})
    await child.send({"do": "stop after this step"})
    assert await anext(events) == {"event": "polled", "first": {"do": "stop after this step"}, "second": None}


async def test_a_child_sees_no_settings_and_no_secrets(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LIKENESS_S3_SECRET_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "canary")
    _, events = await start()
    names = (await anext(events))["environ"]
    assert "PATH" in names
    assert not [name for name in names if name.startswith(("LIKENESS_", "AWS_")) or "TOKEN" in name]


def test_only_what_libraries_need_is_passed_on() -> None:
    given = {"PATH": "/bin", "OMP_NUM_THREADS": "1", "LIKENESS_HOME": "/x", "API_KEY": "k"}
    assert child_environ(given, {"A": "1"}).keys() >= {"PATH", "OMP_NUM_THREADS", "A"}
    assert child_environ(given).keys().isdisjoint({"LIKENESS_HOME", "API_KEY"})


def test_math_threads_sleep_while_they_wait_unless_the_operator_says_otherwise() -> None:
    assert child_environ({})["OMP_WAIT_POLICY"] == "PASSIVE"
    assert child_environ({"OMP_WAIT_POLICY": "ACTIVE"})["OMP_WAIT_POLICY"] == "ACTIVE"


async def test_a_child_that_ends_well_ends_its_events(start: Start) -> None:
    child, events = await start()
    await anext(events)
    await child.send({"do": "exit", "status": 0})
    assert [event async for event in events] == []
    assert await child.wait() == "ended"


async def test_a_failed_child_is_reported_with_status_and_last_words(start: Start) -> None:
    child, events = await start()
    await anext(events)
    await child.send({"do": "exit", "status": 3})
    with pytest.raises(ChildDied, match="fake_child ended with status 3") as caught:
        await anext(events)
    assert "last words" in caught.value.output


async def test_a_crash_in_native_code_is_named(start: Start) -> None:
    child, events = await start()
    await anext(events)
    await child.send({"do": "crash"})
    with pytest.raises(ChildDied, match=r"SIGSEGV \(a fault in native code\)"):
        await anext(events)


async def test_a_silent_child_is_killed_by_the_watchdog(start: Start) -> None:
    child, events = await start(silence_s=10.0)
    await anext(events)
    child.silence_s = 0.3
    with pytest.raises(ChildHung, match=r"no sign of life for 0.3 s"):
        await anext(events)
    assert not child.running


async def test_a_child_that_talks_nonsense_is_killed(start: Start) -> None:
    child, events = await start()
    await anext(events)
    await child.send({"do": "babble"})
    with pytest.raises(ChildDied):
        await anext(events)


async def test_a_child_that_is_killed_with_commands_unread_logs_no_fault(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    child, events = await start()
    await anext(events)
    await child.send({"do": "poll"})
    await asyncio.sleep(0.1)
    await child.send({"do": "echo", "text": "never read"})
    child.kill()
    assert [event async for event in events] == []
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


async def test_stop_ends_a_child_that_ignores_sigterm_and_what_it_started(start: Start) -> None:
    child, events = await start()
    await anext(events)
    await child.send({"do": "spawn"})
    grandchild = (await anext(events))["pid"]
    await child.send({"do": "ignore SIGTERM"})
    await anext(events)
    assert "SIGKILL" in await child.stop(grace_s=0.2)
    assert await gone(grandchild)


async def test_stop_of_an_ended_child_is_harmless(start: Start) -> None:
    child, events = await start()
    await anext(events)
    await child.send({"do": "exit", "status": 0})
    await child.wait()
    assert await child.stop() == "ended"
    await child.send({"do": "echo", "text": "too late"})


async def test_output_of_a_child_goes_to_the_log(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    child, events = await start()
    await anext(events)
    await child.send({"do": "say", "text": "loading"})
    await anext(events)
    await child.stop()
    assert "loading" in [record.getMessage() for record in caplog.records]


def test_a_child_dies_when_its_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "fake_child.py").write_text(CHILD)
    path = search_path(tmp_path)
    command = [sys.executable, "-c", PARENT, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        parent.send_signal(signal.SIGKILL)
        assert asyncio.run(gone(pid))


@pytest.mark.parametrize(
    ("returncode", "words"),
    [
        (0, "ended"),
        (9, "ended with status 9"),
        (-9, "was ended by SIGKILL (out of memory, or killed by an operator)"),
        (-12, "was ended by SIGUSR2"),
        (-200, "was ended by signal 200"),
    ],
)
def test_an_exit_is_described_in_words(returncode: int, words: str) -> None:
    assert describe_exit(returncode) == words
