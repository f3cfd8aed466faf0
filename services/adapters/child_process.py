"""A Python module in a process of its own: JSON lines both ways, a watchdog, and no orphans.

The parent's side is :class:`ChildProcess` (asyncio), the child's is :class:`ParentLink` (plain threads, no event
loop). They speak over one socket: commands go down, events come up, one JSON object a line. The child dies with its
parent: the kernel kills it (see `leash`), and the end of the socket ends it too. Its standard output goes to the
parent's log. It gets no settings, no keys and no names of services: only the variables that math libraries read.
"""

import asyncio
import contextlib
import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Self

from services.adapters.leash import leashed

logger = logging.getLogger(__name__)

Message = dict[str, Any]

LINK_VARIABLE = "CHILD_LINK_FD"
LONGEST_LINE = 16 * 1024 * 1024
"""Longest event in bytes; pictures and weights travel as files."""
KEPT_OUTPUT_LINES = 40
LINK_LOST = 75
"""Exit status of a child that found its parent gone."""

_PASSED_ON = ("PATH", "HOME", "USER", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV", "XDG_CACHE_HOME", "CC", "CXX")
_PASSED_ON_PREFIXES = (
    "LC_",
    "LD_",
    "PYTHON",
    "OMP_",
    "MKL_",
    "OPENBLAS_",
    "CUDA_",
    "NVIDIA_",
    "TORCH",
    "PYTORCH_",
)
# Threads that wait for their turn must sleep: where the cores were busy with something else, spinning ones made one
# picture take 12 to 37 s in place of 0.5 s.
_UNLESS_SET = {"OMP_WAIT_POLICY": "PASSIVE"}
_ALWAYS = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}

_SIGNAL_MEANS = {
    signal.SIGKILL: "out of memory, or killed by an operator",
    signal.SIGSEGV: "a fault in native code",
    signal.SIGBUS: "a fault in native code, or a full disk",
    signal.SIGABRT: "native code gave up",
    signal.SIGTERM: "asked to end",
}


class ChildDied(Exception):
    """The child ended although nobody asked it to.

    Attributes:
        status: how it ended, in words.
        output: its last lines of output.
    """

    def __init__(self, status: str, output: str = "") -> None:
        super().__init__(status)
        self.status = status
        self.output = output


class ChildHung(ChildDied):
    """The child was killed because it gave no sign of life for too long."""


def describe_exit(returncode: int) -> str:
    """Says in words how a process ended.

    Args:
        returncode: exit status, or the negated number of the signal that ended it.

    Returns:
        For instance "was ended by SIGSEGV (a fault in native code)".
    """
    if returncode >= 0:
        return "ended" if returncode == 0 else f"ended with status {returncode}"
    try:
        number = signal.Signals(-returncode)
    except ValueError:
        return f"was ended by signal {-returncode}"
    means = _SIGNAL_MEANS.get(number, "")
    return f"was ended by {number.name}" + (f" ({means})" if means else "")


def child_environ(environ: Mapping[str, str], extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables a child gets: what libraries need, no settings, no secrets."""
    kept = {
        name: value
        for name, value in environ.items()
        if name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIXES)
    }
    return _UNLESS_SET | kept | _ALWAYS | dict(extra or {})


class ChildProcess:
    """A running child, seen from its parent. Made by :meth:`start`."""

    def __init__(
        self,
        name: str,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        silence_s: float,
    ) -> None:
        self.name = name
        self.silence_s = silence_s
        self._process = process
        self._reader = reader
        self._writer = writer
        self._events: asyncio.Queue[Message | None] = asyncio.Queue()
        self._output: deque[str] = deque(maxlen=KEPT_OUTPUT_LINES)
        self._last_event = asyncio.get_running_loop().time()
        self._asked_to_end = False
        self._hung = False
        self._tasks = [
            asyncio.create_task(work) for work in (self._read(), self._log_output(), self._watch())
        ]

    @classmethod
    async def start(
        cls,
        module: str,
        *arguments: str,
        silence_s: float = 60.0,
        extra_env: Mapping[str, str] | None = None,
    ) -> Self:
        """Starts `python -m module arguments` as a child.

        Args:
            module: dotted name; it opens its side with :meth:`ParentLink.from_environ`.
            arguments: its command line.
            silence_s: seconds without an event after which it counts as hung; may be changed while it runs.
            extra_env: variables added to the few a child inherits.

        Returns:
            The running child.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            environ = child_environ(os.environ, extra_env) | {LINK_VARIABLE: str(theirs.fileno())}
            process = await asyncio.create_subprocess_exec(
                *leashed(sys.executable, "-m", module, *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                env=environ,
                start_new_session=True,  # Ctrl-C on the terminal is the parent's to handle
            )
        reader, writer = await asyncio.open_connection(sock=ours, limit=LONGEST_LINE)
        return cls(module, process, reader, writer, silence_s)

    async def __aenter__(self) -> Self:
        """Returns the child itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ends the child if it still runs."""
        await self.stop()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.returncode is None

    @property
    def output(self) -> str:
        """Its last lines of output."""
        return "\n".join(self._output)

    async def send(self, command: Mapping[str, Any]) -> None:
        """Sends a command; a child that has just ended takes none, and :meth:`events` says why."""
        with contextlib.suppress(ConnectionError):
            self._writer.write(_line(command))
            await self._writer.drain()

    async def events(self) -> AsyncIterator[Message]:
        """The child's events, until it ends.

        Yields:
            One event after the other.

        Raises:
            ChildHung: it was killed for its silence.
            ChildDied: it ended otherwise than with status 0, and nobody had called :meth:`stop` or :meth:`kill`.
        """
        while (event := await self._events.get()) is not None:
            yield event
        self._events.put_nowait(None)
        status = await self.wait()
        if self._hung:
            raise ChildHung(f"{self.name} gave no sign of life for {self.silence_s:g} s", self.output)
        if self._process.returncode != 0 and not self._asked_to_end:
            raise ChildDied(f"{self.name} {status}", self.output)

    async def wait(self) -> str:
        """Waits for the end; returns how it was, in words."""
        return describe_exit(await self._process.wait())

    def terminate(self) -> None:
        """Asks the child to end (SIGTERM); its handler may still store a checkpoint."""
        self._asked_to_end = True
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends the child, and what it started, at once."""
        self._asked_to_end = True
        self._signal(signal.SIGKILL)

    async def stop(self, grace_s: float = 5.0) -> str:
        """Ends the child: SIGTERM, then SIGKILL after a grace.

        Args:
            grace_s: seconds between the two.

        Returns:
            How it ended, in words.
        """
        if self.running:
            self.terminate()
            try:
                async with asyncio.timeout(grace_s):
                    await self._process.wait()
            except TimeoutError:
                self.kill()
        status = await self.wait()
        self._signal(signal.SIGKILL)  # whatever it started and left behind
        await self._close()
        return status

    async def _close(self) -> None:
        self._tasks[-1].cancel()
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    async def _read(self) -> None:
        try:
            while line := await self._reader.readline():
                self._last_event = asyncio.get_running_loop().time()
                self._events.put_nowait(json.loads(line))
        except ConnectionError:  # it ended with commands unread; how it ended is told by its exit
            self._signal(signal.SIGKILL)
        except ValueError as error:
            logger.error("child's events cannot be read", extra={"child": self.name, "detail": repr(error)})
            self._signal(signal.SIGKILL)
        finally:
            self._events.put_nowait(None)

    async def _log_output(self) -> None:
        assert self._process.stdout is not None
        rest = b""
        while chunk := await self._process.stdout.read(65536):
            *lines, rest = (rest + chunk).splitlines(keepends=True) or [b""]
            if rest.endswith((b"\n", b"\r")) or len(rest) > 65536:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._say(line)
        self._say(rest)

    def _say(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        if text:
            self._output.append(text)
            logger.info(text, extra={"child": self.name})

    async def _watch(self) -> None:
        """Kills a silent child; after a pause of this process itself (SIGSTOP, a closed lid) the clock starts anew."""
        loop = asyncio.get_running_loop()
        checked = loop.time()
        while True:
            await asyncio.sleep(min(1.0, self.silence_s / 4))
            now = loop.time()
            if now - checked > 5.0:
                self._last_event = now
            checked = now
            if now - self._last_event > self.silence_s and self.running:
                self._hung = True
                logger.error(
                    "child hangs and is killed", extra={"child": self.name, "silence_s": self.silence_s}
                )
                self._signal(signal.SIGKILL)
                return


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class ParentLink:
    """The child's side: commands from the parent, events to it. Works without an event loop, from any thread."""

    def __init__(self, fd: int) -> None:
        """Opens the link.

        Args:
            fd: number of the open socket.
        """
        self._socket = socket.socket(fileno=fd)
        self._socket.set_inheritable(False)
        self._commands: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._sending = threading.Lock()
        threading.Thread(target=self._receive, name="commands", daemon=True).start()

    @classmethod
    def from_environ(cls) -> Self:
        """Opens the link whose number the parent put into the environment."""
        return cls(int(os.environ.pop(LINK_VARIABLE)))

    def commands(self) -> Iterator[Message]:
        """Commands as they come; waits between them. It never ends: a lost parent ends the process."""
        while True:
            yield self._commands.get()

    def poll(self) -> Message | None:
        """The next command if one is there; does not wait."""
        try:
            return self._commands.get_nowait()
        except queue.Empty:
            return None

    def emit(self, event: Mapping[str, Any]) -> None:
        """Sends an event to the parent.

        Args:
            event: a JSON object of at most `LONGEST_LINE` bytes.
        """
        try:
            with self._sending:
                self._socket.sendall(_line(event))
        except ConnectionError:
            os._exit(LINK_LOST)

    def _receive(self) -> None:
        with self._socket.makefile("rb") as lines, contextlib.suppress(ConnectionError):
            for line in lines:
                self._commands.put(json.loads(line))
        os._exit(
            LINK_LOST
        )  # from a thread, in the middle of a kernel: nothing gentler ends the process for sure
