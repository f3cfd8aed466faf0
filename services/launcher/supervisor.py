"""Keeps programs running: starts them in order, waits until each is ready, restarts what dies, stops them in order.

Every program runs on a leash (it dies with this process, however that ends) and in a session of its own (Ctrl-C on
the terminal is this process's to handle). Its output goes to a file; lines that matter are handed to `show`.
"""

import asyncio
import contextlib
import json
import os
import signal
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from services.adapters.leash import leashed

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
STABLE_S = 10.0
"""A program that ran so long is restarted without its former pauses."""
STARTS_BEFORE_GIVING_UP = 3
"""Times a program may die before it was ever ready; after that it is a fault of the installation."""
LARGEST_LOG_BYTES = 10 * 1024 * 1024
KEPT_LINES = 15

Probe = Callable[[], Awaitable[bool]]
Show = Callable[[str, str, bool], None]


class StartFailed(Exception):
    """A program did not come up; the text says which, why, and what it said last."""


@dataclass(frozen=True)
class Program:
    """One program to keep running.

    Attributes:
        name: short name, also of its log file.
        command: what to run.
        environ: its whole environment.
        ready_variable: variable that gets the number of an open file; the program writes a line to it when it is
            ready. Empty: `probe` decides.
        probe: says whether it is ready; asked again and again. May raise :class:`StartFailed`.
        ready_within_s: seconds it may take to become ready.
    """

    name: str
    command: Sequence[str]
    environ: Mapping[str, str]
    ready_variable: str = ""
    probe: Probe | None = None
    ready_within_s: float = 120.0


@dataclass
class _Running:
    """A program's present process."""

    program: Program
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    process: asyncio.subprocess.Process | None = None
    starts: int = 0
    keeper: asyncio.Task[None] | None = None
    fault: StartFailed | None = None
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))


class Supervisor:
    """Runs stages of programs; a later stage starts when every program of the earlier ones is ready."""

    def __init__(
        self,
        stages: Sequence[Sequence[Program]],
        *,
        logs: Path,
        grace_s: float = 20.0,
        show: Show = lambda name, line, severe: None,
        changed: Callable[[dict[str, int]], None] = lambda pids: None,
    ) -> None:
        """Prepares; nothing runs before :meth:`start`.

        Args:
            stages: programs in the order of their dependencies.
            logs: folder of their log files.
            grace_s: seconds a program gets to end after SIGTERM.
            show: takes the name of a program, a line of its log, and whether that is a warning or worse.
            changed: takes the process ids by name whenever one begins or ends.
        """
        self._stages = [[_Running(program) for program in stage] for stage in stages]
        self._logs = logs
        self._grace_s = grace_s
        self._show = show
        self._changed = changed
        self._stopping = asyncio.Event()

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of what runs, by name."""
        running = [entry for stage in self._stages for entry in stage if entry.process is not None]
        return {entry.program.name: entry.process.pid for entry in running if entry.process is not None}

    async def start(self) -> None:
        """Starts all stages.

        Raises:
            StartFailed: a program died repeatedly, or was not ready in time; call :meth:`stop` then.
        """
        self._logs.mkdir(parents=True, exist_ok=True)
        for stage in self._stages:
            for entry in stage:
                entry.keeper = asyncio.create_task(self._keep(entry))
            await asyncio.gather(*(self._until_ready(entry) for entry in stage))

    async def watch(self) -> None:
        """Waits for ever, or until a program can no longer be kept running.

        Raises:
            Exception: what ended its keeper.
        """
        keepers = [entry.keeper for stage in self._stages for entry in stage if entry.keeper is not None]
        done, _ = await asyncio.wait(keepers, return_when=asyncio.FIRST_EXCEPTION)
        for keeper in done:
            keeper.result()

    async def stop(self) -> None:
        """Stops the stages in reverse order: SIGTERM, a grace, SIGKILL."""
        self._stopping.set()
        for stage in reversed(self._stages):
            await asyncio.gather(*(self._end(entry) for entry in stage))

    def kill_all(self) -> None:
        """Ends everything at once."""
        self._stopping.set()
        for stage in self._stages:
            for entry in stage:
                _signal(entry, signal.SIGKILL)

    async def _until_ready(self, entry: _Running) -> None:
        assert entry.keeper is not None
        ready = asyncio.create_task(entry.ready.wait())
        limit_s = entry.program.ready_within_s
        try:
            await asyncio.wait({ready, entry.keeper}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        if entry.keeper.done():
            entry.keeper.result()
        if not entry.ready.is_set():
            raise StartFailed(self._told(entry, f"is not ready after {limit_s:g} s"))

    def _told(self, entry: _Running, fault: str) -> str:
        said = "\n".join(f"    {line}" for line in entry.last_lines)
        log = self._logs / f"{entry.program.name}.log"
        return f"{entry.program.name} {fault}; its log is {log}" + (f"\n{said}" if said else "")

    async def _keep(self, entry: _Running) -> None:
        """Runs one program again and again until the supervisor stops."""
        pause_s, clock = FIRST_PAUSE_S, asyncio.get_running_loop().time
        while not self._stopping.is_set():
            began = clock()
            returncode = await self._run_once(entry)
            if self._stopping.is_set():
                return
            if entry.fault is not None:
                raise entry.fault
            if not entry.ready.is_set() and entry.starts >= STARTS_BEFORE_GIVING_UP:
                raise StartFailed(self._told(entry, f"does not start (status {returncode})"))
            pause_s = FIRST_PAUSE_S if clock() - began >= STABLE_S else pause_s
            self._show(
                entry.program.name,
                f"ended with status {returncode}; starting it again in {pause_s:g} s",
                True,
            )
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    async def _run_once(self, entry: _Running) -> int:
        entry.starts += 1
        reading, writing = os.pipe()
        environ = dict(entry.program.environ)
        if entry.program.ready_variable:
            environ[entry.program.ready_variable] = str(writing)
        try:
            entry.process = await asyncio.create_subprocess_exec(
                *leashed(*entry.program.command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=environ,
                pass_fds=[writing] if entry.program.ready_variable else [],
                start_new_session=True,
            )
        finally:
            os.close(writing)
        self._changed(self.pids)
        watching = asyncio.create_task(self._watch_readiness(entry, reading))
        try:
            await self._log_output(entry, entry.process)
            return await entry.process.wait()
        finally:
            watching.cancel()
            _signal(entry, signal.SIGKILL)  # what it started and left behind
            entry.process = None
            self._changed(self.pids)

    async def _watch_readiness(self, entry: _Running, reading: int) -> None:
        with os.fdopen(reading, "rb", buffering=0) as file:
            if entry.program.ready_variable:
                reader = asyncio.StreamReader()
                loop = asyncio.get_running_loop()
                transport, _ = await loop.connect_read_pipe(
                    lambda: asyncio.StreamReaderProtocol(reader), file
                )
                with contextlib.closing(transport):
                    if not await reader.readline():
                        return
        try:
            while entry.program.probe is not None and not await entry.program.probe():
                await asyncio.sleep(0.1)
            entry.ready.set()
        except StartFailed as fault:
            entry.fault = fault
            _signal(entry, signal.SIGKILL)

    async def _log_output(self, entry: _Running, process: asyncio.subprocess.Process) -> None:
        """Copies a program's output to its file until the program and all that share its output have ended."""
        assert process.stdout is not None
        ended = asyncio.create_task(process.wait())
        with _opened_log(self._logs / f"{entry.program.name}.log") as log:
            rest = b""
            while chunk := await _chunk_or_end(process.stdout, ended):
                log.write(chunk)
                log.flush()
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self._look_at(entry, line.decode(errors="replace").rstrip())
                rest = rest[-65536:]

    def _look_at(self, entry: _Running, line: str) -> None:
        if not line:
            return
        text, severe = readable(line)
        entry.last_lines.append(text)
        self._show(entry.program.name, text, severe)

    async def _end(self, entry: _Running) -> None:
        if entry.keeper is None:
            return
        if entry.process is None:
            entry.keeper.cancel()
        else:
            _signal(entry, signal.SIGTERM)
        done, _ = await asyncio.wait({entry.keeper}, timeout=self._grace_s)
        if not done:
            self._show(entry.program.name, f"does not end within {self._grace_s:g} s and is killed", True)
            _signal(entry, signal.SIGKILL)
        await asyncio.gather(entry.keeper, return_exceptions=True)


def _signal(entry: _Running, number: signal.Signals) -> None:
    if entry.process is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(entry.process.pid, number)


async def _chunk_or_end(stream: asyncio.StreamReader, ended: asyncio.Task[int]) -> bytes:
    """Some output; nothing once the program has ended and is quiet, even if a grandchild holds the pipe open."""
    reading = asyncio.create_task(stream.read(65536))
    await asyncio.wait({reading, ended}, return_when=asyncio.FIRST_COMPLETED)
    if not reading.done():
        await asyncio.wait({reading}, timeout=0.2)
    if reading.done():
        return reading.result()
    reading.cancel()
    return b""


def _opened_log(path: Path) -> BinaryIO:
    if path.exists() and path.stat().st_size > LARGEST_LOG_BYTES:
        path.replace(path.with_suffix(".log.old"))
    return path.open("ab")


def readable(line: str) -> tuple[str, bool]:
    """Reads one line of a program's log.

    Args:
        line: a JSON line of a service, a line of nats-server, or anything else.

    Returns:
        The text for people, and whether it is a warning or worse.
    """
    with contextlib.suppress(ValueError):
        event = json.loads(line)
        if isinstance(event, dict) and "message" in event:
            level = str(event.get("level", "INFO"))
            last = str(event.get("exception", "")).rpartition("\n")[2]
            return f"{event['message']}" + (f" ({last})" if last else ""), level in (
                "WARNING",
                "ERROR",
                "CRITICAL",
            )
    return line, any(mark in line for mark in ("[WRN]", "[ERR]", "[FTL]"))
