"""What the ports in memory have beyond the conformance suite: clocks that tests move, and being away."""

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from services.adapters.clock import RealClock
from services.adapters.memory import ManualClock, MemoryPlatform
from services.domain import life_cycle as job
from services.domain.errors import QueueFull, Unavailable
from services.domain.job import JobKind, JobRecord, JobRef, Limits
from services.domain.ports import Beat, Revision


def drawing(name: str = "one") -> JobRecord:
    ref = JobRef(JobKind.GEN, "project", name)
    return job.admit_drawing(ref, spec={"n": "x" * 1000}, options={}, limits=Limits(), request="r", now_ms=1)


async def test_a_manual_clock_wakes_sleepers_in_the_order_of_their_moments() -> None:
    clock, woken = ManualClock(now_ms=1_000), []

    async def sleeper(name: str, seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append((name, clock.now_ms()))

    async with asyncio.TaskGroup() as group:
        for name, seconds in (("late", 3.0), ("early", 1.0), ("never", 9.0)):
            group.create_task(sleeper(name, seconds))
        await clock.advance(2.0)
        assert woken == [("early", 2_000)]
        await clock.advance(2.0)
        assert woken == [("early", 2_000), ("late", 4_000)]
        assert clock.monotonic() == 4.0
        await clock.advance(10.0)

    assert woken[-1] == ("never", 10_000)


async def test_a_manual_clock_wakes_a_loop_as_often_as_real_time_would() -> None:
    clock, ticks = ManualClock(), []

    async def tick() -> None:
        while True:
            await clock.sleep(1.0)
            ticks.append(clock.monotonic())

    ticking = asyncio.create_task(tick())
    await clock.advance(5.5)
    ticking.cancel()
    await asyncio.gather(ticking, return_exceptions=True)

    assert ticks == [1.0, 2.0, 3.0, 4.0, 5.0]


async def test_a_cancelled_sleeper_does_not_stop_the_clock() -> None:
    clock = ManualClock()
    sleeping = asyncio.create_task(clock.sleep(1.0))
    await asyncio.sleep(0)
    sleeping.cancel()

    await clock.advance(2.0)

    assert clock.monotonic() == 2.0


async def test_the_real_clock_goes_on() -> None:
    clock = RealClock()
    before, moment = clock.now_ms(), clock.monotonic()

    await clock.sleep(0.02)

    assert clock.now_ms() - before >= 15
    assert clock.monotonic() - moment >= 0.015


async def test_revisions_are_stamped_with_the_platforms_clock() -> None:
    clock = ManualClock(now_ms=5_000)
    platform = MemoryPlatform(clock)
    await clock.advance(1.0)
    await platform.job_log.write(drawing(), 0)

    found = await platform.job_log.read(drawing().ref)

    assert found is not None
    assert found.time_ms == platform.job_log.now_ms() == 6_000


async def test_while_it_is_down_everything_is_unavailable_and_nothing_is_stored() -> None:
    platform = MemoryPlatform()
    platform.down = True

    with pytest.raises(Unavailable):
        await platform.job_log.write(drawing(), 0)
    with pytest.raises(Unavailable):
        await platform.small.create_idempotency("project", "key", {})
    await platform.beats.publish_beat(Beat(JobKind.GEN, "worker"))
    await platform.progress.publish_progress("project", "one", {"step": 1})
    platform.down = False

    assert await platform.job_log.read(drawing().ref) is None
    assert await platform.small.read_idempotency("project", "key") is None
    assert await platform.progress.last_progress("project", "one") is None


async def test_a_full_log_refuses_new_jobs_while_others_go_on() -> None:
    platform = MemoryPlatform(max_bytes=12_000)
    sequence = await platform.job_log.write(drawing("running"), 0)
    with pytest.raises(QueueFull):
        for number in range(20):
            await platform.job_log.write(drawing(f"{number}"), 0)

    assert await platform.job_log.write(job.cancel(drawing("running"), 2), sequence) > sequence


async def test_what_a_reader_changes_does_not_change_the_log() -> None:
    platform = MemoryPlatform()
    spec = {"prompt": "a"}
    record = replace(drawing(), spec=spec)
    await platform.job_log.write(record, 0)
    spec["prompt"] = "b"

    found = await platform.job_log.read(record.ref)

    assert found is not None
    assert found.record.spec == {"prompt": "a"}


async def test_a_feed_that_is_closed_is_forgotten() -> None:
    platform = MemoryPlatform()
    async with aclosing(platform.job_feed.follow()) as feed:
        await anext(feed)
        await platform.job_log.write(drawing(), 0)
        found = await anext(feed)

    assert isinstance(found, Revision)
    assert not platform.job_log._listeners
