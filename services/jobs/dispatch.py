"""Handing out work: takings, beats and reports of one kind of jobs.

Every decision is a compare-and-set on the job log, so any number of replicas may decide at once: two may pick the
same job, one wins and the other picks again. Nothing here knows gRPC; :mod:`services.jobs.worker_servicer` does.
"""

import asyncio
import logging
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Final

from likeness.job.v1.job_pb2 import Progress

from services.domain import life_cycle as life
from services.domain.errors import (
    Conflict,
    InvalidSpec,
    LikenessError,
    NotFound,
    StaleEpoch,
)
from services.domain.job import ID_PATTERN, JobKind, JobRecord, JobRef
from services.domain.matching import PATIENCE_MS, choose, wait_until_eligible_ms
from services.domain.ports import Beat, BeatFeed, Clock, Revision
from services.jobs.leases import ECHO_PREFIX, Leases, WorkerBook
from services.jobs.progress import ProgressBoard
from services.jobs.records import Move, Records
from services.jobs.tasks import first_of

logger = logging.getLogger(__name__)

MAX_WAIT_S: Final = 20.0
MAX_SLOTS: Final = 64

Held = tuple[str, str, int]
"""A job as a beat names it: project, id, epoch."""


class Dispatcher:
    """Gives jobs to workers and takes their account.

    Attributes:
        book: the workers known to this replica.
        leases: when each job was last named.
        board: where progress goes.
    """

    def __init__(
        self,
        kind: JobKind,
        records: Records,
        beats: BeatFeed,
        board: ProgressBoard,
        clock: Clock,
        *,
        lease_s: float = 30.0,
    ) -> None:
        """Starts without knowing any worker.

        Args:
            kind: the jobs handed out.
            records: their log and index.
            beats: how replicas tell each other of workers.
            board: where progress goes.
            clock: this replica's time.
            lease_s: seconds after which an unnamed job is given to another worker.
        """
        self.kind = kind
        self.records = records
        self.board = board
        self.book = WorkerBook(clock)
        self.leases = Leases(kind, clock, lease_s)
        self._beats = beats
        self._clock = clock
        self._draining: set[str] = set()
        self._closing = asyncio.Event()
        self._giving_back: set[asyncio.Task[None]] = set()

    # Takings

    async def take(
        self,
        worker: str,
        warm_models: Collection[str],
        free_slots: int,
        wait_s: float,
        device_memory: int = 0,
    ) -> list[Revision]:
        """Takes jobs for a worker; waits for some to come.

        A call that is cancelled while it takes gives back what it took.

        Args:
            worker: its name.
            warm_models: digests of the model manifests it holds ready.
            free_slots: jobs it could begin at once, 1..64.
            wait_s: longest wait, 0..20 s.
            device_memory: memory of its device in bytes; 0 on a CPU.

        Returns:
            The revisions in which the jobs are the worker's; none when the wait was over or the worker is to leave.

        Raises:
            InvalidSpec: the name or a number is out of range.
            Unavailable: the log does not answer.
        """
        _check_worker(worker)
        if not 1 <= free_slots <= MAX_SLOTS or not 0 <= wait_s <= MAX_WAIT_S:
            raise InvalidSpec(f"must ask for 1 to {MAX_SLOTS} jobs and wait 0 to {MAX_WAIT_S:g} s")
        end = self._clock.monotonic() + wait_s
        while not self._closing.is_set() and worker not in self._draining:
            signal = self.records.index.work_signal()
            taken = await self._unless_cancelled(worker, warm_models, free_slots, device_memory)
            left_s = end - self._clock.monotonic()
            if taken or left_s <= 0:
                return taken
            await self._wait_for_work(signal, left_s)
        return []

    async def _unless_cancelled(
        self, worker: str, warm_models: Collection[str], free_slots: int, device_memory: int
    ) -> list[Revision]:
        if not self.records.index.is_caught_up:
            return []
        taking = asyncio.create_task(self._take_now(worker, warm_models, free_slots, device_memory))
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            task = asyncio.create_task(self._give_back(taking))
            self._giving_back.add(task)
            task.add_done_callback(self._giving_back.discard)
            raise

    async def _take_now(
        self, worker: str, warm_models: Collection[str], free_slots: int, device_memory: int
    ) -> list[Revision]:
        """Takes what can be taken at this moment; a job lost to another replica is replaced by the next best."""
        self.book.ask(worker, warm_models, free_slots)
        taken: list[Revision] = []
        while len(taken) < free_slots:
            picked = self._pick(worker, warm_models, free_slots - len(taken), taken)
            if not picked:
                break
            won = await asyncio.gather(
                *(self._take_one(revision, worker, device_memory) for revision in picked)
            )
            taken.extend(revision for revision in won if revision is not None)
        return taken

    def _pick(
        self, worker: str, warm_models: Collection[str], free_slots: int, taken: list[Revision]
    ) -> list[Revision]:
        """Chooses jobs and marks them as being taken, without an await in between."""
        index = self.records.index
        queues = index.queues
        if taken:  # later picks of one request stay with its model
            model = taken[0].record.model
            queues = {key: jobs for key, jobs in queues.items() if key.model == model}
        chosen = choose(
            queues,
            self.book.asking(worker, warm_models, free_slots),
            index.running_by_project,
            patience_ms=PATIENCE_MS[self.kind],
            now_ms=self.records.now_ms(),
        )
        return [index.begin_taking(waiting.ref) for waiting in chosen]

    async def _take_one(self, revision: Revision, worker: str, device_memory: int) -> Revision | None:
        ref = revision.record.ref
        try:
            now_ms = self.records.now_ms()
            moved = life.take(revision.record, revision.sequence, worker, now_ms, device_memory)
            return await self.records.write(moved, revision.sequence)
        except Conflict:
            with suppress(NotFound):
                await self.records.read(ref)
            return None
        finally:
            self.records.index.end_taking(ref)

    async def _give_back(self, taking: "asyncio.Task[list[Revision]]") -> None:
        """Gives back what was taken for a worker that has hung up."""
        try:
            for revision in await taking:
                await self.return_untouched(revision)
        except LikenessError as error:
            logger.info("a taking was not given back", extra={"detail": str(error)})

    async def return_untouched(self, revision: Revision) -> None:
        """Gives a job back that its worker never learned of.

        Raises:
            Unavailable: the log does not answer; the lease will end instead.
        """
        record, epoch = revision.record, revision.record.epoch
        with suppress(StaleEpoch, NotFound):
            await self.records.change(
                record.ref, lambda held: life.lose_lease(held, epoch, self.records.now_ms()), revision
            )

    async def _wait_for_work(self, signal: asyncio.Event, left_s: float) -> None:
        """Waits until another job can be taken, one has waited long enough for any worker, or the time is up."""
        index = self.records.index
        if not index.is_caught_up:
            await first_of(index.wait_caught_up(), self._clock.sleep(left_s), self._closing.wait())
            return
        patience_ms = wait_until_eligible_ms(index.queues, PATIENCE_MS[self.kind], self.records.now_ms())
        pause_s = left_s if patience_ms is None else min(left_s, patience_ms / 1000)
        await first_of(signal.wait(), self._clock.sleep(pause_s), self._closing.wait())

    # Beats

    async def beat(self, beat: Beat, progress: Mapping[Held, Progress]) -> list[Held]:
        """Hears of a worker.

        Args:
            beat: what it says.
            progress: new numbers of its jobs.

        Returns:
            The jobs that do not belong to it any more.
        """
        _check_worker(beat.worker)
        self.hear(beat)
        try:
            await self._beats.publish_beat(beat)
        except LikenessError as error:
            logger.info("a beat was not passed on", extra={"worker": beat.worker, "detail": str(error)})
        stop = []
        for held in beat.jobs:
            try:
                if not await self._beat_job(held, beat.worker, progress.get(held)):
                    stop.append(held)
            except LikenessError as error:
                logger.info("a beat was not recorded", extra={"job_id": held[1], "detail": str(error)})
        return stop

    def hear(self, beat: Beat) -> None:
        """Takes over a beat, whichever replica it was sent to."""
        if self.leases.hear(beat):
            self.book.hear(beat)

    async def _beat_job(self, held: Held, worker: str, progress: Progress | None) -> bool:
        """Records one job's sign of life; False: it belongs to somebody else or to nobody."""
        ref, epoch = JobRef(self.kind, held[0], held[1]), held[2]
        revision = await self._revision_since(ref, epoch)
        if revision is None:
            return False
        if revision.sequence <= epoch:
            return True  # this replica has not heard of the taking yet
        if not _owns(revision.record, epoch, worker):
            return False
        if progress is not None:
            await self.board.tell(revision.record, progress)
        if not revision.record.beaten:
            await self._mark_beaten(revision, epoch)
        return True

    async def _revision_since(self, ref: JobRef, epoch: int) -> Revision | None:
        """The newest revision known; the log is asked where the index knows too little to refuse."""
        known = self.records.index.get(ref)
        if known is not None:
            return known
        line = self.records.index.line(ref)
        if line is not None and line.sequence > epoch:
            return None
        return await self.records.log.read(ref)

    async def _mark_beaten(self, revision: Revision, epoch: int) -> None:
        def move(record: JobRecord) -> JobRecord:
            life.check_epoch(record, epoch)
            return record if record.beaten else life.heard(record)

        with suppress(StaleEpoch, NotFound):
            await self.records.change(revision.record.ref, move, revision)

    # Reports

    async def report(self, ref: JobRef, epoch: int, number: int, worker: str, move: Move) -> Revision:
        """Accepts one report, once.

        Args:
            ref: the job.
            epoch: fencing number of the taking.
            number: the report's number within the epoch, from 1.
            worker: who reports.
            move: the change it asks for.

        Returns:
            The revision after it; of a report that was accepted before, the newest one.

        Raises:
            StaleEpoch: the job is not this worker's (any more).
            InvalidSpec: a report before this one is missing.
        """

        def checked(record: JobRecord) -> JobRecord:
            if record.epoch == epoch and 1 <= number <= record.reported:
                return record
            life.check_epoch(record, epoch, worker)
            if number != record.reported + 1:
                raise InvalidSpec(f"must be {record.reported + 1}, one more than was accepted", "number")
            return move(record)

        known = self.records.index.get(ref)
        usable = known is not None and _owns(known.record, epoch, worker)
        try:
            revision = await self.records.change(ref, checked, known if usable else None)
        except NotFound as error:
            raise StaleEpoch(str(error)) from error
        self.leases.name(ref, epoch)
        if not revision.record.worker:
            self.board.forget(revision.record)
        return revision

    # Leaving

    def drain(self, worker: str) -> None:
        """Asks a worker to finish what it has and leave."""
        self._draining.add(worker)

    def is_draining(self, worker: str) -> bool:
        """The worker was asked to leave."""
        return worker in self._draining

    async def follow_beats(self) -> None:
        """Hears the beats that other replicas received, for ever."""
        async for beat in self._beats.follow_beats(self.kind):
            self.hear(beat)

    async def echo(self) -> None:
        """Sends this replica's own sign of life, which proves the connection when it comes back."""
        try:
            await self._beats.publish_beat(self.leases.echo)
        except LikenessError as error:
            logger.info("the log does not answer", extra={"detail": str(error)})

    async def close(self) -> None:
        """Ends all waiting takings without work, and the giving back of cancelled ones."""
        self._closing.set()
        await asyncio.gather(*self._giving_back, return_exceptions=True)


def _owns(record: JobRecord, epoch: int, worker: str) -> bool:
    try:
        life.check_epoch(record, epoch, worker)
    except StaleEpoch:
        return False
    return True


def _check_worker(worker: str) -> None:
    if not ID_PATTERN.match(worker) or worker.startswith(ECHO_PREFIX):
        raise InvalidSpec(
            "must be 1 to 64 letters, digits, '_' or '-', and not begin with 'api-'", "worker_id"
        )
