"""The drawing child as its parent sees it: kept running, spoken to by job, replaced when it dies.

Requests are named by the caller; each gets its own stream of events. When the child dies, every stream ends with the
reason, and the next child starts with no memory of them.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final, Self

from services.adapters.child_process import ChildDied, ChildProcess

logger = logging.getLogger(__name__)

MODULE: Final = "services.inference.child"
LAST_EVENTS: Final = frozenset({"finished", "failed", "cancelled"})
MAX_DEATHS_BEFORE_READY: Final = 3
FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 30.0

Event = dict[str, Any]


class DeviceProcess:
    """A child that draws, for as long as this object is entered.

    Attributes:
        held: digests of the models it holds loaded.
        device: its device in words; empty before the first :meth:`until_ready`.
        memory_bytes: memory of that device; 0 on a CPU.
    """

    def __init__(
        self, *arguments: str, module: str = MODULE, silence_s: float = 120.0, loading_s: float = 1800.0
    ) -> None:
        """Prepares; nothing is started before it is entered.

        Args:
            arguments: the child's command line.
            module: what it runs.
            silence_s: seconds without an event after which a child is taken for hung and killed.
            loading_s: the same while it starts or loads a model.
        """
        self.held: tuple[str, ...] = ()
        self.device = ""
        self.memory_bytes = 0
        self._arguments = (module, *arguments)
        self._silence_s = silence_s
        self._loading_s = loading_s
        self._process: ChildProcess | None = None
        self._ready = asyncio.Event()
        self._streams: dict[str, asyncio.Queue[Event | ChildDied]] = {}
        self._keeping: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Starts the child."""
        self._keeping = asyncio.create_task(self._keep_running())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ends the child."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)

    @property
    def is_ready(self) -> bool:
        """A child runs and has its device."""
        return self._ready.is_set()

    async def until_ready(self) -> None:
        """Waits for a child that has its device.

        Raises:
            ChildDied: several died before they had it.
        """
        while not self._ready.is_set():  # it may have died again before this task's turn came
            waiting = asyncio.create_task(self._ready.wait())
            try:
                await asyncio.wait({waiting, self._supervisor}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
            if self._supervisor.done():
                await self._supervisor

    async def run(self) -> None:
        """Waits as long as the child can be kept running.

        Raises:
            ChildDied: several died before they had their device.
        """
        await asyncio.shield(self._supervisor)

    @property
    def _supervisor(self) -> "asyncio.Task[None]":
        if self._keeping is None:
            raise RuntimeError("not entered")
        return self._keeping

    async def draw(self, job: str, command: Mapping[str, Any]) -> AsyncGenerator[Event, None]:
        """Has one request drawn.

        Args:
            job: names it; not in use at present.
            command: `model`, `spec` and `folder` of a `draw` command.

        Yields:
            Its events; the last is `finished`, `failed` or `cancelled`.

        Raises:
            ChildDied: the child ended before the request did.
        """
        await self.until_ready()
        stream: asyncio.Queue[Event | ChildDied] = asyncio.Queue()
        self._streams[job] = stream
        try:
            await self._send({"command": "draw", "job": job, **command})
            while True:
                event = await stream.get()
                if isinstance(event, ChildDied):
                    raise event
                yield event
                if event["event"] in LAST_EVENTS:
                    return
        finally:
            del self._streams[job]

    async def cancel(self, job: str) -> None:
        """Has a request dropped; nothing happens when it has ended."""
        await self._send({"command": "cancel", "job": job})

    async def evict(self, digest: str) -> None:
        """Has a model unloaded unless it is in use."""
        await self._send({"command": "evict", "model": digest})

    async def _send(self, command: Mapping[str, Any]) -> None:
        if self._process is not None:
            await self._process.send(command)

    async def _keep_running(self) -> None:
        deaths, pause_s = 0, FIRST_PAUSE_S
        while True:
            death = await self._run_once()
            deaths = 1 if self._ready.is_set() else deaths + 1
            pause_s = FIRST_PAUSE_S if self._ready.is_set() else min(2 * pause_s, LONGEST_PAUSE_S)
            self._bury(death)
            if deaths >= MAX_DEATHS_BEFORE_READY:
                raise death
            await asyncio.sleep(pause_s)

    async def _run_once(self) -> ChildDied:
        try:
            async with await ChildProcess.start(*self._arguments, silence_s=self._loading_s) as process:
                self._process = process
                async for event in process.events():
                    self._take(process, event)
            return ChildDied("the drawing process ended")
        except ChildDied as death:
            return death
        except OSError as error:
            return ChildDied(f"the drawing process cannot be started: {error.strerror}")

    def _bury(self, death: ChildDied) -> None:
        logger.error("drawing process ended", extra={"status": death.status, "requests": len(self._streams)})
        self._ready.clear()
        self._process = None
        self.held = ()
        for stream in self._streams.values():
            stream.put_nowait(death)

    def _take(self, process: ChildProcess, event: Event) -> None:
        kind = event["event"]
        if kind == "ready":
            self.device, self.memory_bytes = event["device"], event["memory_bytes"]
            self._ready.set()
        elif kind == "models":
            self.held = tuple(event["held"])
        process.silence_s = self._loading_s if kind == "loading" else self._silence_s
        with contextlib.suppress(KeyError):  # its owner has gone away
            self._streams[event.get("job", "")].put_nowait(event)
