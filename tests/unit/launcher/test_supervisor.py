"""Supervision with small real programs: order, readiness, restart, pauses, stop, death of the supervisor itself."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import psutil
import pytest

from services.launcher import supervisor as supervision
from services.launcher.supervisor import Program, StartFailed, Supervisor, readable

ROOT = Path(__file__).parents[3]
READY = "READY_FD"

SERVICE = """
import os, signal, sys, time
name, diary = sys.argv[1], sys.argv[2]

def note(what):
    with open(diary, "a") as file:
        file.write(f"{name} {what}\\n")

def end(number, frame):
    note("ends")
    sys.exit(0)

signal.signal(signal.SIGTERM, end)
time.sleep(float(os.environ.get("SLOW_S", "0")))
note("ready")
os.write(int(os.environ["READY_FD"]), b"ready\\n")
while True:
    time.sleep(60)
"""
STUBBORN = SERVICE.replace('note("ends")\n    sys.exit(0)', "pass")
BROKEN = "import sys; print('no such file'); sys.exit(4)"

SUPERVISING = """
import asyncio, os, sys
from pathlib import Path
from services.launcher.supervisor import Program, Supervisor

async def main():
    program = Program("a", [sys.executable, "-c", sys.argv[1], "a", sys.argv[2]], dict(os.environ), "READY_FD")
    supervisor = Supervisor([[program]], logs=Path(sys.argv[2]).parent)
    await supervisor.start()
    print(supervisor.pids["a"], flush=True)
    await supervisor.watch()

asyncio.run(main())
"""

Made = Callable[..., Supervisor]


@pytest.fixture
def diary(tmp_path: Path) -> Path:
    return tmp_path / "diary"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
async def made(tmp_path: Path, said: list[str]) -> AsyncIterator[Made]:
    supervisors: list[Supervisor] = []

    def make(*stages: Sequence[Program], grace_s: float = 5.0) -> Supervisor:
        def show(name: str, line: str, severe: bool) -> None:
            if severe:
                said.append(f"{name}: {line}")

        supervisors.append(Supervisor(stages, logs=tmp_path / "logs", grace_s=grace_s, show=show))
        return supervisors[-1]

    yield make
    for supervisor in supervisors:
        await supervisor.stop()


def program(
    name: str, diary: Path, code: str = SERVICE, slow_s: float = 0, ready_within_s: float = 20
) -> Program:
    environ = dict(os.environ) | {"SLOW_S": str(slow_s)}
    return Program(name, [sys.executable, "-c", code, name, str(diary)], environ, READY, None, ready_within_s)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


async def until(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        await asyncio.sleep(0.02)


def ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


async def test_stages_start_in_order_and_stop_in_reverse(made: Made, diary: Path) -> None:
    supervisor = made([program("a", diary, slow_s=0.3)], [program("b", diary)], [program("c", diary)])
    await supervisor.start()
    await supervisor.stop()
    assert lines(diary) == ["a ready", "b ready", "c ready", "c ends", "b ends", "a ends"]
    assert supervisor.pids == {}


async def test_a_dead_program_is_started_again(made: Made, diary: Path, said: list[str]) -> None:
    supervisor = made([program("a", diary)])
    await supervisor.start()
    first = supervisor.pids["a"]
    os.kill(first, signal.SIGKILL)
    await until(lambda: supervisor.pids.get("a", first) != first)
    await until(lambda: diary.read_text().count("a ready") == 2)
    assert said == ["a: ended with status -9; starting it again in 0.2 s"]


async def test_pauses_grow_up_to_a_limit(
    made: Made, diary: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(supervision, "LONGEST_PAUSE_S", 0.04)
    short = SERVICE.replace("while True:\n    time.sleep(60)", "sys.exit(1)")
    await made([program("a", diary, short)]).start()
    await until(lambda: len(said) >= 4)
    assert [line.rpartition(" in ")[2] for line in said[:4]] == ["0.01 s", "0.02 s", "0.04 s", "0.04 s"]


async def test_a_program_that_never_starts_is_reported_with_its_last_words(made: Made, diary: Path) -> None:
    with pytest.raises(StartFailed, match=r"(?s)a does not start \(status 4\).*no such file"):
        await made([program("a", diary, BROKEN)]).start()


async def test_a_program_that_is_not_ready_in_time_is_reported(made: Made, diary: Path) -> None:
    with pytest.raises(StartFailed, match=r"a is not ready after 0.2 s"):
        await made([program("a", diary, slow_s=30, ready_within_s=0.2)]).start()


async def test_a_probe_decides_where_there_is_no_file(made: Made, diary: Path) -> None:
    answers = [True, False, False]

    async def probe() -> bool:
        return answers.pop()

    await made([Program("a", ["sleep", "60"], dict(os.environ), probe=probe)]).start()
    assert answers == []


async def test_a_probe_can_refuse_what_it_finds(made: Made) -> None:
    async def probe() -> bool:
        raise StartFailed("too old")

    with pytest.raises(StartFailed, match="too old"):
        await made([Program("a", ["sleep", "60"], dict(os.environ), probe=probe)]).start()


async def test_a_stubborn_program_is_killed_after_its_grace(made: Made, diary: Path, said: list[str]) -> None:
    supervisor = made([program("a", diary, STUBBORN)], grace_s=0.2)
    await supervisor.start()
    pid = supervisor.pids["a"]
    await supervisor.stop()
    assert ended(pid)
    assert said == ["a: does not end within 0.2 s and is killed"]


async def test_output_is_kept_in_a_file(made: Made, diary: Path, tmp_path: Path) -> None:
    talking = SERVICE.replace('note("ready")', 'note("ready"); print("hello", flush=True)')
    await made([program("a", diary, talking)]).start()
    await until(lambda: "hello" in (tmp_path / "logs" / "a.log").read_text())


def test_no_program_outlives_a_killed_supervisor(diary: Path) -> None:
    command = [sys.executable, "-c", SUPERVISING, SERVICE, str(diary)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as supervisor:
        assert supervisor.stdout is not None
        pid = int(supervisor.stdout.readline())
        assert not ended(pid)
        supervisor.kill()
        asyncio.run(until(lambda: ended(pid)))
    assert "ends" not in diary.read_text()


@pytest.mark.parametrize(
    ("line", "text", "severe"),
    [
        ('{"level": "INFO", "message": "serving"}', "serving", False),
        (
            '{"level": "ERROR", "message": "failed", "exception": "Trace\\nValueError: no"}',
            "failed (ValueError: no)",
            True,
        ),
        ("[12] 2026/11/20 17:00:00 [WRN] slow disk", "[12] 2026/11/20 17:00:00 [WRN] slow disk", True),
        ("[1, 2]", "[1, 2]", False),
        ("Traceback", "Traceback", False),
    ],
    ids=["info", "error", "nats", "other json", "text"],
)
def test_a_line_is_read_for_people(line: str, text: str, severe: bool) -> None:
    assert readable(line) == (text, severe)
