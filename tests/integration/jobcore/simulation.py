"""Two api replicas and some workers over a real job log, in fast motion, with everything going wrong that may.

Requests and acknowledgements are lost, workers crash after a taking, in the middle and after the end, or are paused
past their lease, the server is killed, owners cancel and retry. What remains is the log, for the checker.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

from services.adapters import subjects
from services.adapters.jetstream import JetStreamPlatform
from services.adapters.jetstream_connection import Connection, NoAnswer
from services.adapters.jetstream_streams import MIB, stream_configs
from services.domain import life_cycle as job
from services.domain.errors import Conflict, LikenessError, StaleEpoch, Unavailable
from services.domain.job import (
    RETRYABLE_STATES,
    Checkpoint,
    JobFailure,
    JobKind,
    JobRecord,
    JobRef,
    JobState,
    Limits,
    Phase,
    Stage,
)
from services.domain.ports import Revision
from tests.integration.jobcore.checker import Outcomes, violations, whole_chain
from tests.integration.nats_server import NatsCluster, NatsServer

Move = Callable[[JobRecord], JobRecord]
Crash = Callable[[float], Awaitable[None]]


@dataclass(frozen=True)
class Plan:
    """One run. Shares are probabilities, times seconds.

    Attributes:
        blind_workers: the control: workers write what they hold over whatever is there.
        patience_s: how long the run may take until every job has ended.
    """

    seed: int
    jobs: int = 200
    workers: int = 8
    kills: int = 3
    lost_requests: float = 0.05
    lost_acks: float = 0.05
    accidents: float = 0.12
    cancelled: float = 0.5
    lease_s: float = 0.5
    blind_workers: bool = False
    patience_s: float = 45.0


class LossyConnection(Connection):
    """Loses writes of jobs: before they are sent, or their acknowledgements."""

    chance = random.Random(0)
    lost_requests = 0.0
    lost_acks = 0.0

    async def ask(
        self, subject: str, body: Mapping[str, Any] | bytes = b"", headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        draw = self.chance.random() if subject.startswith("job.") else 1.0
        if draw < self.lost_requests:
            raise NoAnswer("the request was lost")
        answer = await super().ask(subject, body, headers)
        if draw < self.lost_requests + self.lost_acks:
            raise NoAnswer("the acknowledgement was lost")
        return answer


async def stubbornly(action: Callable[[], Any]) -> Any:
    """Repeats what the log does not answer."""
    while True:
        try:
            return await action()
        except Unavailable:
            await asyncio.sleep(0.05)


class Replica:
    """An api: follows the log, hands out jobs, writes reports, looks after leases and deadlines."""

    def __init__(
        self, platform: JetStreamPlatform, plan: Plan, outcomes: Outcomes, marks: "count[int]"
    ) -> None:
        self.platform = platform
        self.log = platform.job_log
        self.index: dict[JobRef, Revision] = {}
        self.heard: dict[tuple[JobRef, int], float] = {}
        self._plan = plan
        self._outcomes = outcomes
        self._marks = marks
        self._being_taken: set[JobRef] = set()

    async def write(self, record: JobRecord, expected: int) -> int:
        """Writes a revision with a mark, and keeps what was said about it."""
        mark = str(next(self._marks))
        self._outcomes.unknown.add(mark)  # and stays there when the caller is cancelled
        marked = replace(record, why=f"{record.why.partition('#')[0]}#{mark}")
        try:
            sequence = await self.log.write(marked, expected)
        except Conflict:
            self._outcomes.unknown.discard(mark)
            self._outcomes.refused.add(mark)
            raise
        self._outcomes.unknown.discard(mark)
        self._outcomes.stored[mark] = sequence
        return sequence

    async def change(self, ref: JobRef, move: Move) -> Revision | None:
        """Reads, moves, writes; again after a conflict. None when the move leaves the record as it is."""
        while True:
            found = await stubbornly(lambda: self.log.read(ref))
            moved = move(found.record)
            if moved is found.record:
                return None
            try:
                return Revision(moved, await self.write(moved, found.sequence), 0)
            except (Conflict, Unavailable):
                continue

    async def follow(self) -> None:
        """Keeps the index."""
        async with aclosing(self.platform.job_feed.follow()) as feed:
            async for item in feed:
                if isinstance(item, Revision):
                    held = self.index.get(item.record.ref)
                    if held is None or held.sequence < item.sequence:
                        self.index[item.record.ref] = item

    async def take(self, worker: str) -> tuple[JobRecord, int] | None:
        """Takes the job that waits longest."""
        ready = [
            item for ref, item in self.index.items() if item.record.ready and ref not in self._being_taken
        ]
        for found in sorted(ready, key=lambda item: item.sequence)[:1]:
            ref = found.record.ref
            self._being_taken.add(ref)
            try:
                taken = job.take(found.record, found.sequence, worker, self.log.now_ms())
                sequence = await self.write(taken, found.sequence)
                self.index[ref] = Revision(taken, sequence, 0)
                self.heard[ref, taken.epoch] = time.monotonic()
                return taken, taken.epoch
            except (Conflict, Unavailable):
                return None
            finally:
                self._being_taken.discard(ref)
        return None

    async def report(self, ref: JobRef, epoch: int, number: int, move: Move) -> None:
        """One report of a worker; a repeated one changes nothing."""

        def counted(record: JobRecord) -> JobRecord:
            if record.epoch == epoch and number <= record.reported:
                return record
            job.check_epoch(record, epoch)
            return move(record)

        await self.change(ref, counted)

    async def report_blindly(self, held: JobRecord, move: Move) -> JobRecord:
        """The control: writes the worker's own copy over the newest revision."""
        moved = move(held)
        while True:
            newest = await stubbornly(lambda: self.log.read(held.ref))
            try:
                await self.write(moved, newest.sequence)
                return moved
            except (Conflict, Unavailable):
                continue

    async def tick(self) -> None:
        """One round of everything that an api does on its own."""
        for ref, found in list(self.index.items()):
            move = self._due(found.record)
            if move is not None:
                try:
                    await self.write(move(found.record), found.sequence)
                except (Conflict, Unavailable):
                    continue
                except LikenessError:  # the index is behind the log
                    self.index.pop(ref, None)

    def _due(self, record: JobRecord) -> Move | None:
        now_ms = self.log.now_ms()
        if record.is_final:
            return None
        if why := job.overdue(record, now_ms):
            return lambda old: job.time_out(old, why, now_ms)
        if record.worker:
            return self._lease_move(record, now_ms)
        match record.state, record.phase:
            case JobState.QUEUED, Phase.PREPARE:
                return lambda old: job.begin_preparing(old, now_ms)
            case JobState.RUNNING, Phase.PREPARE:
                return lambda old: job.make_ready(old, {}, "m", now_ms)
            case JobState.RUNNING, Phase.FINISH:
                return lambda old: job.finish(old, {"pictures": 1}, "", now_ms)
        return None

    def _lease_move(self, record: JobRecord, now_ms: int) -> Move | None:
        heard = self.heard.setdefault((record.ref, record.epoch), time.monotonic())
        if time.monotonic() - heard < self._plan.lease_s:
            return None
        return lambda old: job.lose_lease(old, record.epoch, now_ms)


class Run:
    """One whole run of a plan."""

    def __init__(self, plan: Plan, replicas: list[Replica], crash: Crash, outcomes: Outcomes) -> None:
        self.plan = plan
        self.replicas = replicas
        self._crash = crash
        self.outcomes = outcomes
        self.chance = random.Random(plan.seed)
        self.refs: list[JobRef] = []

    def _api(self) -> Replica:
        return self.chance.choice(self.replicas)

    async def admit(self) -> None:
        """Admits all jobs, a third of them trainings, some with little time or few attempts."""
        for number in range(self.plan.jobs):
            kind = JobKind.TRAIN if number % 3 == 0 else JobKind.GEN
            ref = JobRef(kind, f"p{number % 5}", f"job-{number}")
            limits = Limits(
                ttl_ms=self.chance.choice([1_500, 60_000, 60_000, 60_000]),
                max_attempts=self.chance.choice([2, 20]),
            )
            admit = job.admit_training if kind is JobKind.TRAIN else job.admit_drawing
            api = self._api()
            record = admit(
                ref, spec={"n": number}, options={}, limits=limits, request="r", now_ms=api.log.now_ms()
            )
            await stubbornly(partial(api.write, record, 0))
            self.refs.append(ref)
            await asyncio.sleep(0.005)

    async def work(self, number: int) -> None:
        """A worker and those that replace it when it dies."""
        for life in count():
            await self._live(f"w{number}-{life}")

    async def _live(self, worker: str) -> None:
        while True:
            taken = await self._api().take(worker)
            if taken is None:
                await asyncio.sleep(0.02)
                continue
            if not await self._run_job(*taken):
                return

    async def _run_job(self, held: JobRecord, epoch: int) -> bool:
        """Runs one job to its end; False when the worker died of it."""
        if self._accident():
            return False
        beating = asyncio.create_task(self._beat(held.ref, epoch))
        try:
            for number, move in enumerate(self._moves(held, epoch), start=1):
                await asyncio.sleep(self.chance.uniform(0.0, 0.08))
                if self._accident():
                    return False
                if self._accident():  # paused past the lease, and goes on as if nothing had been
                    beating.cancel()
                    await asyncio.sleep(self.plan.lease_s * self.chance.uniform(1.0, 2.5))
                held = await self._report(held, epoch, number, move)
            return not self._accident()
        except StaleEpoch:
            return True
        finally:
            beating.cancel()

    def _accident(self) -> bool:
        return self.chance.random() < self.plan.accidents / 2

    async def _report(self, held: JobRecord, epoch: int, number: int, move: Move) -> JobRecord:
        if self.plan.blind_workers:
            return await self._api().report_blindly(held, move)
        await self._api().report(held.ref, epoch, number, move)
        if self.chance.random() < 0.1:  # the answer was lost: the same report again, through any replica
            await self._api().report(held.ref, epoch, number, move)
        return held

    def _moves(self, held: JobRecord, epoch: int) -> list[Move]:
        stage = Stage.DRAWING if held.kind is JobKind.GEN else Stage.TRAINING
        moves: list[Move] = [lambda old: job.report_stage(old, epoch, stage, "began")]
        now_ms = self._api().log.now_ms
        if held.kind is JobKind.TRAIN:
            start = held.checkpoint.step if held.checkpoint else 0
            steps = (start + 10, start + 20)
            moves += [self._checkpoint(epoch, step) for step in steps]
        draw = self.chance.random()
        if draw < 0.06:
            failure = JobFailure("UNAVAILABLE", "an accident")
            moves.append(lambda old: job.report_failed(old, epoch, failure, draw < 0.03, now_ms()))
        elif draw < 0.1:
            moves.append(lambda old: job.report_yielded(old, epoch, "leaving", now_ms()))
        elif held.kind is JobKind.TRAIN:
            moves.append(lambda old: job.report_trained(old, epoch, {"model": epoch}))
        else:
            moves.append(lambda old: job.report_finished(old, epoch, {"pictures": epoch}, now_ms()))
        return moves

    @staticmethod
    def _checkpoint(epoch: int, step: int) -> Move:
        return lambda old: job.report_checkpoint(old, epoch, Checkpoint(f"at-{step}", step))

    async def _beat(self, ref: JobRef, epoch: int) -> None:
        while True:
            for replica in self.replicas:
                replica.heard[ref, epoch] = time.monotonic()
            await asyncio.sleep(self.plan.lease_s / 5)

    async def disturb(self) -> None:
        """Owners: some cancel at any moment, some retry what failed."""
        while True:
            await asyncio.sleep(0.02)
            if self.refs and self.chance.random() < self.plan.cancelled:
                ref = self.chance.choice(self.refs)
                move = self.chance.choice([self._cancel, self._retry])
                await self._api().change(ref, move)

    def _cancel(self, record: JobRecord) -> JobRecord:
        return job.cancel(record, self.replicas[0].log.now_ms())

    def _retry(self, record: JobRecord) -> JobRecord:
        retryable = record.state in RETRYABLE_STATES and record.round < 2
        return job.retry(record, self.replicas[0].log.now_ms()) if retryable else record

    async def kill_server(self) -> None:
        """kill -9 in the midst of it, several times."""
        for _ in range(self.plan.kills):
            await asyncio.sleep(self.chance.uniform(0.5, 1.5))
            await self._crash(self.chance.uniform(0.0, 0.3))

    async def wait_for_ends(self) -> None:
        """Until every job has ended as the first replica sees it, or the patience is over."""
        until = time.monotonic() + self.plan.patience_s
        while time.monotonic() < until:
            seen = self.replicas[0].index
            if all(ref in seen and seen[ref].record.is_final for ref in self.refs):
                return
            await asyncio.sleep(0.05)


async def _crash(server: NatsServer | NatsCluster, connection: Connection, down_s: float) -> None:
    """kill -9 of the server; of a cluster, of the one that leads the job log."""
    if isinstance(server, NatsCluster):
        info = await connection.ask_patiently(subjects.stream_api("INFO", subjects.JOBS))
        server = server.servers[info["cluster"]["leader"]]
    await server.restart_after_kill(down_s)


async def _tick(replica: Replica) -> None:
    while True:
        await replica.tick()
        await asyncio.sleep(0.05)


async def _open(servers: Sequence[str], plan: Plan, number: int) -> JetStreamPlatform:
    connection = await LossyConnection.open(servers)
    connection.chance = random.Random(plan.seed * 10 + number)
    configs = stream_configs(len(servers), jobs_max_bytes=64 * MIB)
    platform = JetStreamPlatform(connection, configs, write_patience_s=20)
    await platform.ensure_streams()
    await connection.read_clock()
    connection.lost_requests, connection.lost_acks = plan.lost_requests, plan.lost_acks
    return platform


@dataclass(frozen=True)
class Report:
    """What a run came to: what is wrong, and some figures that show what it went through."""

    violations: list[str]
    revisions: int
    refused: int
    states: Mapping[JobState, int]
    takings: int


async def simulate(server: NatsServer | NatsCluster, plan: Plan) -> Report:
    """Runs a plan and checks the whole log."""
    urls = [server.url] if isinstance(server, NatsServer) else server.urls
    platforms = [await _open(urls, plan, number) for number in range(2)]
    outcomes, marks = Outcomes(), count(1)
    replicas = [Replica(each, plan, outcomes, marks) for each in platforms]
    run = Run(plan, replicas, partial(_crash, server, platforms[0].connection), outcomes)
    background = [asyncio.create_task(replica.follow()) for replica in run.replicas]
    background += [asyncio.create_task(_tick(replica)) for replica in run.replicas]
    background += [asyncio.create_task(run.work(number)) for number in range(plan.workers)]
    disturbing = asyncio.create_task(run.disturb())
    killing = asyncio.create_task(run.kill_server())
    try:
        await run.admit()
        await killing
        disturbing.cancel()
        await asyncio.gather(disturbing, return_exceptions=True)
        await run.wait_for_ends()
        return await _judge(run, background)
    finally:
        for task in [*background, disturbing, killing]:
            task.cancel()
        await asyncio.gather(*background, disturbing, killing, return_exceptions=True)
        for platform in platforms:
            await platform.close()


async def _judge(run: Run, background: list[asyncio.Task[None]]) -> Report:
    broken = [task.exception() for task in background if task.done() and not task.cancelled()]
    for task in background:
        task.cancel()
    await asyncio.gather(*background, return_exceptions=True)
    await asyncio.sleep(0.1)
    log = run.replicas[0].log
    chains = {ref: await whole_chain(log, ref) for ref in run.refs}
    states = [chain[-1].record.state for chain in chains.values()]
    takings = sum(1 for chain in chains.values() for item in chain if item.record.why.startswith("taken"))
    return Report(
        violations=[f"a part of the platform ended: {error!r}" for error in broken]
        + violations(chains, run.outcomes),
        revisions=sum(len(chain) for chain in chains.values()),
        refused=len(run.outcomes.refused),
        states={state: states.count(state) for state in set(states)},
        takings=takings,
    )
