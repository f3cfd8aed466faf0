"""The whole way of jobs over a real log that is killed: two replicas, workers over gRPC that crash and are paused."""

import asyncio
import random
from collections.abc import Sequence
from contextlib import AsyncExitStack

from likeness.inference.v1.generation_job_pb2 import GenerationResult

from services.adapters.grpc_client import Channel
from services.adapters.jetstream import JetStreamPlatform
from services.domain.errors import LikenessError, StaleEpoch, Unavailable
from services.domain.job import FINAL_STATES, JobRef, JobState, Limits, Stage
from services.domain.ports import Revision
from services.jobs.worker_client import JobHandle, WorkerClient
from tests.integration.jobcore.checker import Outcomes, mark_of, violations, whole_chain
from tests.integration.jobs.harness import Api, eventually, serving
from tests.integration.nats_server import NatsServer
from tests.unit.jobs.harness import drawing

JOBS = 90
WORKERS = 6
LEASE_S = 1.5


class Fleet:
    """Workers that meet accidents and are replaced."""

    def __init__(self, apis: Sequence[Api], seed: int) -> None:
        self.apis = apis
        self.chance = random.Random(seed)
        self.deaths = 0
        self.refused = 0
        self.finished = 0

    async def work(self, number: int) -> None:
        life = 0
        while True:
            life += 1
            api = self.chance.choice(self.apis)
            channel = Channel(api.address)
            client = WorkerClient(channel, f"w{number}-{life}", beat_s=0.1, lease_s=LEASE_S, take_wait_s=1.0)
            await client.__aenter__()
            try:
                await self._serve(client)
            finally:
                await _die(client, channel)

    async def _serve(self, client: WorkerClient) -> None:
        async for job in client.jobs(lambda: 1):
            accident = self.chance.random()
            if accident < 0.1:
                self.deaths += 1
                return
            if accident < 0.2 and client._beating is not None:
                client._beating.cancel()
                await asyncio.sleep(LEASE_S * self.chance.uniform(0.8, 1.6))
            await self._draw(job)
            if accident < 0.2:
                return

    async def _draw(self, job: JobHandle) -> None:
        try:
            await job.stage(Stage.DRAWING, "drawing")
            await asyncio.sleep(self.chance.uniform(0, 0.05))
            draw = self.chance.random()
            if draw < 0.08:
                await job.failed(Unavailable("an accident"))
            elif draw < 0.14:
                await job.yielded("leaving")
            else:
                await job.finished(GenerationResult(effective_prompt=str(job.epoch)))
                self.finished += 1
        except StaleEpoch:
            self.refused += 1


async def _die(client: WorkerClient, channel: Channel) -> None:
    """A dead process says no good-bye."""
    assert client._beating is not None
    client._beating.cancel()
    await asyncio.gather(client._beating, return_exceptions=True)
    await channel.close()


async def cancel_some(api: Api, chance: random.Random) -> None:
    """Owners who change their minds at any moment."""
    while True:
        await asyncio.sleep(0.4)
        try:
            await api.core.admission.cancel(drawing(f"j{chance.randrange(JOBS)}").ref)
        except LikenessError:
            continue


async def all_ended(platform: JetStreamPlatform, refs: Sequence[JobRef]) -> bool:
    try:
        newest = [await platform.job_log.read(ref) for ref in refs]
    except Unavailable:
        return False
    return all(revision is not None and revision.record.state in FINAL_STATES for revision in newest)


async def chains_of(platform: JetStreamPlatform, refs: Sequence[JobRef]) -> dict[JobRef, list[Revision]]:
    return {ref: await whole_chain(platform.job_log, ref) for ref in refs}


async def test_every_job_ends_once_whatever_happens(own_nats_server: NatsServer) -> None:
    refs = [drawing(f"j{number}").ref for number in range(JOBS)]
    async with AsyncExitStack() as stack:
        platforms = [
            await stack.enter_async_context(
                await JetStreamPlatform.open([own_nats_server.url], monitor_url=own_nats_server.monitor_url)
            )
            for _ in range(2)
        ]
        apis = [await stack.enter_async_context(serving(platform, lease_s=LEASE_S)) for platform in platforms]
        fleet = Fleet(apis, seed=3)
        tasks = [asyncio.create_task(fleet.work(number)) for number in range(WORKERS)]
        for number in range(JOBS):
            limits = Limits(max_attempts=3)
            record = drawing(f"j{number}", limits=limits, now_ms=platforms[0].job_log.now_ms())
            await platforms[0].job_log.write(record, 0)
        tasks.append(asyncio.create_task(cancel_some(apis[1], random.Random(4))))
        await asyncio.sleep(0.5)
        await own_nats_server.restart_after_kill(down_s=0.5)
        await eventually(lambda: all_ended(platforms[0], refs), timeout_s=45)
        for task in tasks:
            task.cancel()
        how = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in how), how
        chains = await chains_of(platforms[0], refs)

    everything = [revision.record for chain in chains.values() for revision in chain]
    assert violations(chains, Outcomes(unknown={mark_of(record) for record in everything})) == []
    ends = [chain[-1].record for chain in chains.values()]
    succeeded = [record for record in ends if record.state is JobState.SUCCEEDED]
    assert all(record.result == {"effective_prompt": str(record.epoch)} for record in succeeded)
    assert len(succeeded) >= fleet.finished
    assert len(succeeded) > JOBS / 3
    assert fleet.deaths > 2
    assert fleet.refused > 0
    assert (
        sum(record.epoch > 0 and not record.ready and not record.beaten for record in everything) > JOBS / 2
    )
