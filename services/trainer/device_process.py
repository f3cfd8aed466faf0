"""The training child as its parent sees it: started before there is work, used for one training, then replaced.

A fresh process a job means that nothing of one owner's training is in memory when the next one begins. Starting it
ahead hides the seconds that the libraries take to load.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any, Final

from services.adapters.child_process import ChildDied, ChildHung, ChildProcess

logger = logging.getLogger(__name__)

MODULE: Final = "services.trainer.child"
SILENCE_S: Final = {"starting": 600.0, "loading": 1800.0, "training": 900.0, "exporting": 1800.0}
"""Seconds without an event after which a child is taken for hung, by stage. An update of a large batch on a CPU may
take minutes; so may reading weights from a slow disk."""
LAST_EVENTS: Final = frozenset({"ended", "failed"})
IDLE_SILENCE_S: Final = 10.0 * 365 * 24 * 3600

Event = dict[str, Any]


class TrainingProcess:
    """Keeps one child ready; hands it a training; replaces it afterwards.

    Attributes:
        device: its device in words; empty before the first :meth:`until_ready`.
        memory_bytes: memory of that device; 0 on a CPU.
    """

    def __init__(
        self, *arguments: str, module: str = MODULE, silence_s: Mapping[str, float] = SILENCE_S
    ) -> None:
        """Prepares; nothing is started before :meth:`until_ready`.

        Args:
            arguments: the child's command line.
            module: what it runs.
            silence_s: seconds without an event after which it is killed, by stage.
        """
        self.device = ""
        self.memory_bytes = 0
        self._command = (module, *arguments)
        self._silence_s = silence_s
        self._process: ChildProcess | None = None
        self._events: AsyncIterator[Event] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the child, if there is one."""
        return self._process.pid if self._process is not None else None

    async def until_ready(self) -> None:
        """Starts a child unless one waits for work already, and waits until it has its device.

        Raises:
            ChildDied: it ended before.
        """
        if self._process is not None and self._process.running:
            return
        await self.end()
        self._process = await ChildProcess.start(*self._command, silence_s=self._silence_s["starting"])
        self._events = self._process.events()
        async for event in self._events:
            if event["event"] == "ready":
                self.device, self.memory_bytes = event["device"], event["memory_bytes"]
                self._process.silence_s = IDLE_SILENCE_S
                return
        raise ChildDied("the training process ended before it had its device", self._process.output)

    def another(self, *arguments: str) -> "TrainingProcess":
        """Returns one more process of this kind, for work beside a training; not started yet.

        Args:
            arguments: added to the child's command line.
        """
        module, *own = self._command
        return TrainingProcess(*own, *arguments, module=module, silence_s=self._silence_s)

    def train(self, command: Mapping[str, Any]) -> AsyncGenerator[Event, None]:
        """Has one training done.

        Args:
            command: the contents of a `train` command.

        Yields:
            Its events; the last is `ended` or `failed`.

        Raises:
            ChildDied: the child ended, or was killed for its silence, before that.
        """
        return self._do("train", command)

    def publish(self, command: Mapping[str, Any]) -> AsyncGenerator[Event, None]:
        """Has a model made of one checkpoint of a training; yields and raises as :meth:`train`.

        Args:
            command: the contents of that training's `train` command, with its own `workdir`, and `checkpoint`: the
                folder.
        """
        return self._do("publish", command)

    async def _do(self, verb: str, command: Mapping[str, Any]) -> AsyncGenerator[Event, None]:
        await self.until_ready()
        process, events = self._process, self._events
        assert process is not None
        assert events is not None
        await process.send({"command": verb, **command})
        # The watchdog counts from the last event, which may be hours ago: it starts to watch with the first new one.
        event = await self._first(events)
        process.silence_s = self._silence_s[event.get("stage", "loading")]
        yield event
        if event["event"] in LAST_EVENTS:
            return
        async for event in events:
            if event["event"] == "stage":
                process.silence_s = self._silence_s[event["stage"]]
            yield event
            if event["event"] in LAST_EVENTS:
                return
        raise ChildDied("the training process ended without a result", process.output)

    async def _first(self, events: AsyncIterator[Event]) -> Event:
        limit_s = self._silence_s["starting"]
        try:
            async with asyncio.timeout(limit_s):
                return await anext(events)
        except TimeoutError as error:
            raise ChildHung(f"the training process took no command for {limit_s:g} s") from error
        except StopAsyncIteration as error:
            raise ChildDied("the training process ended without a result") from error

    async def ask(self, request: str) -> None:
        """Asks the training under way for `checkpoint`, `yield` or `stop`."""
        if self._process is not None:
            await self._process.send({"command": request})

    async def end(self) -> None:
        """Ends the child at once, whatever it does."""
        process, self._process, self._events = self._process, None, None
        if process is not None:
            process.kill()
            await asyncio.shield(process.stop())
