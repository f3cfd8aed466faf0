import asyncio
from dataclasses import replace

import pytest

from services.adapters.memory import ManualClock, MemoryPlatform
from services.domain import life_cycle as life
from services.domain.errors import NotFound, Unavailable
from services.domain.job import JobFailure, JobKind, JobRecord, JobState, Limits, Phase
from services.domain.ports import Revision
from services.jobs.removal import HOOK_PATIENCE_MS, TOMBSTONE_MS
from tests.unit.jobs.harness import LEASE_S, beat_of, drawing, make_core, running, settle, take_one, training


async def newest(platform: MemoryPlatform, record: JobRecord) -> JobRecord:
    revision = await platform.job_log.read(record.ref)
    assert revision is not None
    return revision.record


# Leases


async def test_a_dead_workers_job_waits_again_after_the_lease(
    platform: MemoryPlatform, clock: ManualClock
) -> None:
    await platform.job_log.write(drawing("a"), 0)
    core = make_core(platform)
    async with running(core):
        taken = await take_one(core)
        await core.dispatcher.beat(beat_of("w1", taken), {})
        await clock.advance(LEASE_S - 1)
        assert not (await newest(platform, taken.record)).ready
        await clock.advance(4)
        record = await newest(platform, taken.record)
        assert record.ready
        assert (record.attempt, record.fruitless) == (1, 1)


@pytest.mark.parametrize("lease_s", [0.5, 3.0, 300.0])
async def test_a_lease_of_any_length_ends(
    platform: MemoryPlatform, clock: ManualClock, lease_s: float
) -> None:
    await platform.job_log.write(drawing("a"), 0)
    core = make_core(platform, lease_s=lease_s)
    async with running(core):
        taken = await take_one(core)
        await core.dispatcher.beat(beat_of("w1", taken), {})
        await clock.advance(lease_s * 1.3 + 2)
        assert (await newest(platform, taken.record)).ready


async def test_a_beating_job_keeps_its_worker(platform: MemoryPlatform, clock: ManualClock) -> None:
    await platform.job_log.write(drawing("a"), 0)
    core = make_core(platform)
    async with running(core):
        taken = await take_one(core)
        for _ in range(20):
            await core.dispatcher.beat(beat_of("w1", taken), {})
            await clock.advance(5)
        assert (await newest(platform, taken.record)).worker == "w1"


async def test_beats_sent_to_another_replica_count_everywhere(
    platform: MemoryPlatform, clock: ManualClock
) -> None:
    await platform.job_log.write(drawing("a"), 0)
    one, two = make_core(platform), make_core(platform)
    async with running(one, two):
        taken = await take_one(one)
        for _ in range(20):
            await two.dispatcher.beat(beat_of("w1", taken), {})
            await clock.advance(5)
        assert (await newest(platform, taken.record)).worker == "w1"


async def test_a_taking_never_followed_by_a_beat_is_no_attempt(
    platform: MemoryPlatform, clock: ManualClock
) -> None:
    await platform.job_log.write(drawing("a"), 0)
    core = make_core(platform)
    async with running(core):
        for _ in range(4):
            await take_one(core)
            await clock.advance(LEASE_S + 3)
        record = await newest(platform, drawing("a"))
        assert (record.state, record.attempt, record.fruitless) == (JobState.QUEUED, 0, 0)


async def test_a_job_that_keeps_losing_its_workers_fails(
    platform: MemoryPlatform, clock: ManualClock
) -> None:
    await platform.job_log.write(drawing("a", limits=Limits(max_attempts=2)), 0)
    core = make_core(platform)
    async with running(core):
        for _ in range(2):
            taken = await take_one(core)
            await core.dispatcher.beat(beat_of("w1", taken), {})
            await clock.advance(LEASE_S + 3)
        record = await newest(platform, drawing("a"))
        assert record.state is JobState.FAILED
        assert record.error == JobFailure("WORKER_LOST", "the worker was lost and no attempt is left")


async def test_an_outage_of_the_log_ends_no_lease(platform: MemoryPlatform, clock: ManualClock) -> None:
    await platform.job_log.write(drawing("a"), 0)
    core = make_core(platform)
    async with running(core):
        taken = await take_one(core)
        await core.dispatcher.beat(beat_of("w1", taken), {})
        await clock.advance(40 - LEASE_S)
        platform.down = True
        await clock.advance(60)
        platform.down = False
        await clock.advance(LEASE_S - 5)  # connected again, but not for a whole lease
        assert (await newest(platform, taken.record)).worker == "w1"
        await core.dispatcher.beat(beat_of("w1", taken), {})
        await clock.advance(LEASE_S - 5)
        assert (await newest(platform, taken.record)).worker == "w1"
        await clock.advance(10)
        assert (await newest(platform, taken.record)).ready


async def test_a_new_replica_gives_every_job_a_full_lease(
    platform: MemoryPlatform, clock: ManualClock
) -> None:
    await platform.job_log.write(drawing("a"), 0)
    first = make_core(platform)
    async with running(first):
        taken = await take_one(first)
    await clock.advance(500)
    second = make_core(platform)
    async with running(second):
        await clock.advance(LEASE_S - 2)
        assert (await newest(platform, taken.record)).worker == "w1"
        await clock.advance(5)
        assert (await newest(platform, taken.record)).ready


async def test_a_paused_replica_gives_every_job_a_full_lease(
    platform: MemoryPlatform, clock: ManualClock
) -> None:
    await platform.job_log.write(drawing("a"), 0)
    core = make_core(platform)
    async with running(core):
        taken = await take_one(core)
        await core.dispatcher.beat(beat_of("w1", taken), {})
        await clock.advance(35 - LEASE_S)
        clock._elapsed_s += 300  # nobody ran meanwhile
        await clock.advance(2)
        assert (await newest(platform, taken.record)).worker == "w1"
        await clock.advance(LEASE_S + 3)
        assert (await newest(platform, taken.record)).ready


# Deadlines


async def test_a_job_that_waits_beyond_its_ttl_times_out(
    platform: MemoryPlatform, clock: ManualClock
) -> None:
    await platform.job_log.write(drawing("a", limits=Limits(ttl_ms=10_000)), 0)
    core = make_core(platform)
    async with running(core):
        await clock.advance(9)
        assert (await newest(platform, drawing("a"))).state is JobState.QUEUED
        await clock.advance(3)
        record = await newest(platform, drawing("a"))
        assert record.state is JobState.TIMED_OUT
        assert record.error is not None
        assert "before a worker was free" in record.error.message


async def test_a_job_that_runs_too_long_times_out_and_its_worker_is_stopped(
    platform: MemoryPlatform, clock: ManualClock
) -> None:
    await platform.job_log.write(drawing("a", limits=Limits(execution_timeout_ms=5_000)), 0)
    core = make_core(platform)
    async with running(core):
        await clock.advance(60)  # waiting does not count
        taken = await take_one(core)
        await clock.advance(4)
        assert await core.dispatcher.beat(beat_of("w1", taken), {}) == []
        await clock.advance(3)
        assert (await newest(platform, taken.record)).state is JobState.TIMED_OUT
        assert len(await core.dispatcher.beat(beat_of("w1", taken), {})) == 1


# Retention


async def test_an_ended_job_is_removed_after_its_retention(
    platform: MemoryPlatform, clock: ManualClock
) -> None:
    removed: list[Revision] = []

    async def remove(revision: Revision) -> None:
        removed.append(revision)

    await platform.job_log.write(drawing("a", limits=Limits(retention_ms=60_000)), 0)
    core = make_core(platform, remove_objects=remove)
    async with running(core):
        await core.admission.cancel(drawing("a").ref)
        await clock.advance(59)
        assert (await newest(platform, drawing("a"))).state is JobState.CANCELLED
        await clock.advance(3)
        tombstone = await newest(platform, drawing("a"))
        assert (tombstone.state, tombstone.spec) == (JobState.DELETED, {})
        assert [revision.record.spec for revision in removed] == [{"prompt": "a robot"}]
        only = await platform.job_log.next_revision(tombstone.ref, 0)
        assert only is not None
        assert only.record.state is JobState.DELETED
        await clock.advance(TOMBSTONE_MS / 1000 + 2)
        assert await platform.job_log.read(tombstone.ref) is None
        assert core.index.line(tombstone.ref) is None


async def ended_with_a_webhook(platform: MemoryPlatform) -> tuple[JobRecord, int]:
    options = {"webhook": {"url": "https://h.example.org/x"}}
    record = drawing("a", limits=Limits(retention_ms=60_000), options=options)
    now_ms = platform.clock.now_ms()
    sequence = await platform.job_log.write(record, 0)
    failed = life.fail(record, JobFailure("X", "x"), now_ms)
    return record, await platform.job_log.write(failed, sequence)


async def test_an_ended_job_stays_until_its_webhook_was_told(
    platform: MemoryPlatform, clock: ManualClock
) -> None:
    record, sequence = await ended_with_a_webhook(platform)
    core = make_core(platform)
    async with running(core):
        # A shorter retention is a revision of its own, of which nobody is told.
        await core.admission.shorten_retention(record.ref, clock.now_ms() + 30_000)
        claimed = await platform.small.write_hook("p", "a", {"next": sequence, "tries": 2}, 0)
        await clock.advance(300)
        assert (await newest(platform, record)).state is JobState.FAILED
        await platform.small.write_hook("p", "a", {"next": sequence + 1, "tries": 0}, claimed)
        await clock.advance(40)
        assert (await newest(platform, record)).state is JobState.DELETED


async def test_an_ended_job_does_not_wait_for_ever_for_somebody_to_tell_its_webhook(
    platform: MemoryPlatform, clock: ManualClock
) -> None:
    record, _ = await ended_with_a_webhook(platform)
    async with running(make_core(platform)):
        await clock.advance(60 + HOOK_PATIENCE_MS / 1000 + 60)
        assert (await newest(platform, record)).state is JobState.DELETED


async def test_a_removal_goes_on_when_storage_comes_back(
    platform: MemoryPlatform, clock: ManualClock
) -> None:
    faults = [Unavailable("storage is away")]

    async def remove(revision: Revision) -> None:
        if faults:
            raise faults.pop()

    await platform.job_log.write(drawing("a", limits=Limits(retention_ms=5_000)), 0)
    core = make_core(platform, remove_objects=remove)
    async with running(core):
        await core.admission.cancel(drawing("a").ref)
        await clock.advance(120)
        assert faults == []
        first = await platform.job_log.next_revision(drawing("a").ref, 0)
        assert first is not None
        assert first.record.state is JobState.DELETED


async def test_another_replica_ends_a_removal_that_was_left_half_done(
    platform: MemoryPlatform, clock: ManualClock
) -> None:
    removed: list[str] = []

    async def remove(revision: Revision) -> None:
        removed.append(revision.record.state.value)

    ended = life.cancel(drawing("a"), clock.now_ms())
    sequence = await platform.job_log.write(ended, 0)
    await platform.job_log.write(life.delete(ended), sequence)
    core = make_core(platform, remove_objects=remove)
    async with running(core):
        await clock.advance(63)
        assert removed == ["CANCELLED"]
        first = await platform.job_log.next_revision(ended.ref, 0)
        assert first is not None
        assert first.record.state is JobState.DELETED


async def test_a_deleted_job_is_gone_at_once(platform: MemoryPlatform) -> None:
    await platform.job_log.write(drawing("a"), 0)
    core = make_core(platform)
    async with running(core):
        await take_one(core)
        await core.admission.delete(drawing("a").ref)
        with pytest.raises(NotFound):
            await core.reading.get(drawing("a").ref)
        with pytest.raises(NotFound):
            await core.admission.delete(drawing("a").ref)


# Leading


class Leader:
    """Counts who is led and lets the test end each leading."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, Phase]] = []
        self.ended: list[str] = []
        self.faults: list[Exception] = []

    async def lead(self, revision: Revision) -> None:
        self.begun.append((revision.record.id, revision.record.phase))
        if self.faults:
            raise self.faults.pop()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self.ended.append(revision.record.id)


async def test_a_job_led_by_the_api_is_led_once_and_left_when_it_moves_on(
    platform: MemoryPlatform, clock: ManualClock
) -> None:
    leader, core = Leader(), make_core(platform, JobKind.TRAIN)
    core.lead_with(leader.lead, {})
    async with running(core):
        sequence = await platform.job_log.write(training("t"), 0)
        await settle()
        preparing = life.begin_preparing(training("t"), clock.now_ms())
        sequence = await platform.job_log.write(preparing, sequence)
        await clock.advance(5)
        assert leader.begun == [("t", Phase.PREPARE)]
        ready = life.make_ready(preparing, {}, "m", clock.now_ms())
        await platform.job_log.write(ready, sequence)
        await settle()
        assert leader.ended == ["t"]
        taken = await take_one(core)
        await core.records.write(life.report_trained(taken.record, taken.record.epoch, {}), taken.sequence)
        await settle()
        assert leader.begun[1:] == [("t", Phase.FINISH)]
        await core.admission.cancel(training("t").ref)
        await settle()
        assert leader.ended == ["t", "t"]


async def test_a_leader_that_gave_up_is_asked_again_later(
    platform: MemoryPlatform, clock: ManualClock
) -> None:
    leader, core = Leader(), make_core(platform, JobKind.TRAIN)
    leader.faults = [Unavailable("away"), ValueError("a bug")]
    core.lead_with(leader.lead, {})
    await platform.job_log.write(training("t"), 0)
    async with running(core):
        await clock.advance(0.5)
        assert len(leader.begun) == 1
        await clock.advance(10)
        assert len(leader.begun) == 3


async def test_no_more_jobs_are_prepared_at_once_than_there_are_slots(
    platform: MemoryPlatform, clock: ManualClock
) -> None:
    leader, core = Leader(), make_core(platform, JobKind.TRAIN)
    core.lead_with(leader.lead, {Phase.PREPARE: 2})
    for number in range(4):
        await platform.job_log.write(replace(training(f"t{number}")), 0)
    async with running(core):
        await clock.advance(1)
        assert [name for name, _ in leader.begun] == ["t0", "t1"]
        await core.admission.cancel(training("t0").ref)
        await clock.advance(3)
        assert [name for name, _ in leader.begun] == ["t0", "t1", "t2"]
