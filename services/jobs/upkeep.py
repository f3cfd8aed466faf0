"""What happens by itself: lost leases, passed deadlines, retention, and the phases that the api leads.

No scan of the log: a tick over the index in memory. Any replica may do any of it, the compare-and-set decides.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from services.domain import life_cycle as life
from services.domain.errors import LikenessError
from services.domain.job import JobRecord, JobRef, Phase
from services.domain.ports import Clock, Revision
from services.jobs.dispatch import Dispatcher
from services.jobs.index import JobIndex
from services.jobs.records import Move
from services.jobs.removal import Removal
from services.jobs.tasks import first_of

logger = logging.getLogger(__name__)

Lead = Callable[[Revision], Awaitable[None]]
"""Does all that is left of the phase a job is in; returns when the job has moved on, or to be called again later."""

FIRST_PAUSE_S: Final = 2.0
LONGEST_PAUSE_S: Final = 60.0
UNLIMITED: Final = 1_000_000


class Upkeep:
    """The tick of one replica."""

    def __init__(
        self, dispatcher: Dispatcher, removal: Removal, clock: Clock, *, tick_s: float = 1.0
    ) -> None:
        """Prepares a tick.

        Args:
            dispatcher: whose leases and jobs.
            removal: what removes expired jobs.
            clock: this replica's time.
            tick_s: seconds between two ticks.
        """
        self._dispatcher = dispatcher
        self._records = dispatcher.records
        self._removal = removal
        self._clock = clock
        self._tick_s = tick_s

    async def run(self) -> None:
        """Ticks for ever."""
        await self._records.index.wait_caught_up()
        while True:
            await self._dispatcher.echo()
            await self._clock.sleep(self._tick_s)
            await self.tick()

    async def tick(self) -> None:
        """Does what is due; nothing while the log does not answer."""
        if not self._dispatcher.leases.is_connected:
            return
        await self._end_leases()
        await self._end_overdue()
        await self._removal.tick(self._records.now_ms())
        try:
            await self._dispatcher.board.flush()
        except LikenessError as error:
            logger.info("progress was not published", extra={"detail": str(error)})

    async def _end_leases(self) -> None:
        for ref, epoch in self._dispatcher.leases.lost(self._records.index.owned()):

            def lose(record: JobRecord, epoch: int = epoch) -> JobRecord:
                return life.lose_lease(record, epoch, self._records.now_ms())

            await self._try(ref, lose, "a lease is over")

    async def _end_overdue(self) -> None:
        now_ms = self._records.now_ms()
        late = [
            revision.record.ref
            for revision in self._records.index.live()
            if life.overdue(revision.record, now_ms)
        ]
        for ref in late:
            await self._try(ref, self._time_out, "a deadline has passed")

    def _time_out(self, record: JobRecord) -> JobRecord:
        now_ms = self._records.now_ms()
        why = life.overdue(record, now_ms)
        return life.time_out(record, why, now_ms) if why else record

    async def _try(self, ref: JobRef, move: Move, what: str) -> None:
        """Makes a move that another replica may have made already."""
        try:
            revision = await self._records.change(ref, move)
        except LikenessError as error:
            logger.info("not done", extra={"job_id": ref.id, "what": what, "detail": str(error)})
            return
        logger.info(what, extra={"job_id": ref.id, "state": revision.record.state.value})


_Task = tuple[JobRef, Phase, int]


class Leading:
    """Runs the leader of every job that the api must move on: once in this replica, ended when the job moves on."""

    def __init__(
        self, index: JobIndex, lead: Lead, clock: Clock, *, slots: Mapping[Phase, int], tick_s: float = 1.0
    ) -> None:
        """Prepares to lead.

        Args:
            index: where the jobs are.
            lead: what is done for one.
            clock: this replica's time.
            slots: jobs of a phase led at once; absent: as many as there are.
            tick_s: seconds after which ended leaders are looked at, at the latest.
        """
        self._index = index
        self._lead = lead
        self._clock = clock
        self._slots = slots
        self._tick_s = tick_s
        self._running: dict[_Task, asyncio.Task[None]] = {}
        self._tries: dict[_Task, int] = {}
        self._due_at: dict[_Task, float] = {}

    async def run(self) -> None:
        """Leads for ever; ends all leaders when it is cancelled."""
        await self._index.wait_caught_up()
        try:
            while True:
                signal = self._index.led_signal()
                self._sweep()
                await first_of(signal.wait(), self._clock.sleep(self._tick_s))
        finally:
            running = list(self._running.values())
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _sweep(self) -> None:
        led = {(r.record.ref, r.record.phase, r.record.round): r for r in self._index.led()}
        for key, task in list(self._running.items()):
            if task.done():
                del self._running[key]
                self._pause(key, task)
            elif key not in led:
                task.cancel()
        self._tries = {key: tries for key, tries in self._tries.items() if key in led}
        self._due_at = {key: due for key, due in self._due_at.items() if key in led}
        for key in sorted(led, key=lambda key: _rank(led[key].record)):
            self._start_if_due(key, led[key])

    def _pause(self, key: _Task, task: asyncio.Task[None]) -> None:
        """Notes when to lead again, should the job still be there."""
        if not task.cancelled() and task.exception() is not None:
            logger.error("leading failed", extra={"job_id": key[0].id}, exc_info=task.exception())
        tries = self._tries[key] = self._tries.get(key, 0) + 1
        pause_s = min(FIRST_PAUSE_S * 2 ** (tries - 1), LONGEST_PAUSE_S)
        self._due_at[key] = self._clock.monotonic() + pause_s

    def _start_if_due(self, key: _Task, revision: Revision) -> None:
        if key in self._running or self._clock.monotonic() < self._due_at.get(key, 0.0):
            return
        busy = sum(phase is key[1] for _, phase, _ in self._running)
        if busy < self._slots.get(key[1], UNLIMITED):
            self._running[key] = asyncio.create_task(self._led_to_the_end(revision))

    async def _led_to_the_end(self, revision: Revision) -> None:
        await self._lead(revision)


def _rank(record: JobRecord) -> tuple[int, int, str]:
    return record.limits.priority, record.times.queued, record.id
