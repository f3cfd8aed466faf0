import asyncio

import pytest
from likeness.job.v1.job_pb2 import Progress

from services.adapters.memory import ManualClock, MemoryPlatform
from services.domain import life_cycle as life
from services.domain.errors import InvalidSpec, StaleEpoch
from services.domain.job import Checkpoint, JobFailure, JobKind, JobRecord, JobState, Limits, Stage
from services.domain.ports import Revision
from services.jobs.core import JobCore
from services.jobs.records import Move
from tests.unit.jobs.harness import beat_of, drawing, make_core, running, settle, take_one, training


def stage_move(epoch: int, stage: Stage = Stage.DRAWING) -> Move:
    return lambda record: life.report_stage(record, epoch, stage, "drawing")


def finish_move(epoch: int, name: str = "x") -> Move:
    return lambda record: life.report_finished(record, epoch, {"effective_prompt": name}, 0)


def fail_move(epoch: int, failure: JobFailure) -> Move:
    return lambda record: life.report_failed(record, epoch, failure, True, 0)


async def report(core: JobCore, taken: Revision, number: int, move: Move, worker: str = "") -> Revision:
    record = taken.record
    return await core.dispatcher.report(record.ref, record.epoch, number, worker or record.worker, move)


async def newest(platform: MemoryPlatform, record: JobRecord) -> JobRecord:
    revision = await platform.job_log.read(record.ref)
    assert revision is not None
    return revision.record


# Takings


async def test_a_taken_job_is_the_workers_under_the_sequence_that_was_ready(platform: MemoryPlatform) -> None:
    sequence = await platform.job_log.write(drawing("a"), 0)
    core = make_core(platform)
    async with running(core):
        taken = await take_one(core)
        assert (taken.record.epoch, taken.record.worker, taken.record.state) == (
            sequence,
            "w1",
            JobState.RUNNING,
        )
        assert await core.dispatcher.take("w2", (), 1, 0) == []


async def test_a_waiting_worker_gets_the_next_job_at_once(
    platform: MemoryPlatform, clock: ManualClock
) -> None:
    core = make_core(platform)
    async with running(core):
        waiting = asyncio.create_task(core.dispatcher.take("w1", (), 1, 20))
        await settle()
        assert not waiting.done()
        await platform.job_log.write(drawing("a"), 0)
        [taken] = await waiting
        assert taken.record.id == "a"
        assert clock.monotonic() == 0


async def test_a_wait_without_work_ends_after_its_time(platform: MemoryPlatform, clock: ManualClock) -> None:
    core = make_core(platform)
    async with running(core):
        waiting = asyncio.create_task(core.dispatcher.take("w1", (), 1, 20))
        await clock.advance(19.9)
        assert not waiting.done()
        await clock.advance(0.2)
        assert await waiting == []


async def test_a_cold_worker_gets_the_job_when_its_patience_is_over(
    platform: MemoryPlatform, clock: ManualClock
) -> None:
    core = make_core(platform)
    async with running(core):
        await core.dispatcher.beat(beat_of("warm", warm_models=("m",)), {})
        cold = asyncio.create_task(core.dispatcher.take("cold", (), 1, 20))
        await platform.job_log.write(drawing("a", model="m", now_ms=clock.now_ms()), 0)
        await clock.advance(1.9)
        assert not cold.done()
        await clock.advance(0.2)
        assert [taken.record.worker for taken in await cold] == ["cold"]


async def test_a_worker_with_free_slots_gets_that_many_jobs(platform: MemoryPlatform) -> None:
    for number in range(5):
        await platform.job_log.write(drawing(f"j{number}"), 0)
    core = make_core(platform)
    async with running(core):
        assert len(await core.dispatcher.take("w1", (), 3, 0)) == 3
        assert len(await core.dispatcher.take("w2", (), 3, 0)) == 2


async def test_no_job_is_given_twice_by_three_replicas_to_a_hundred_takers(platform: MemoryPlatform) -> None:
    cores = [make_core(platform) for _ in range(3)]
    async with running(*cores):
        takers = [
            asyncio.create_task(cores[number % 3].dispatcher.take(f"w{number}", (), 2, 20))
            for number in range(100)
        ]
        await settle()
        for number in range(180):
            await platform.job_log.write(drawing(f"j{number}", project=f"p{number % 7}"), 0)
        for _ in range(400):
            await asyncio.sleep(0)
        first = [revision for taker in takers if taker.done() for revision in taker.result()]
        rest = [await cores[0].dispatcher.take(f"late{number}", (), 64, 0) for number in range(4)]
        for taker in takers:
            taker.cancel()
        await asyncio.gather(*takers, return_exceptions=True)
    ids = [revision.record.id for revision in first] + [r.record.id for revisions in rest for r in revisions]
    assert sorted(ids) == sorted(f"j{number}" for number in range(180))
    assert len({revision.record.worker for revision in first}) > 50


async def test_a_taking_whose_caller_hung_up_is_given_back(platform: MemoryPlatform) -> None:
    await platform.job_log.write(drawing("a"), 0)
    core = make_core(platform)
    async with running(core):
        taking = asyncio.create_task(core.dispatcher.take("gone", (), 1, 20))
        for _ in range(3):  # far enough to have begun the write
            await asyncio.sleep(0)
        taking.cancel()
        await settle()
        record = await newest(platform, drawing("a"))
        assert record.ready
        assert record.attempt == 0
        assert (await take_one(core, "next")).record.attempt == 1


async def test_a_draining_worker_gets_nothing(platform: MemoryPlatform) -> None:
    await platform.job_log.write(drawing("a"), 0)
    core = make_core(platform)
    async with running(core):
        core.dispatcher.drain("w1")
        assert await core.dispatcher.take("w1", (), 1, 20) == []
        assert len(await core.dispatcher.take("w2", (), 1, 0)) == 1


async def test_waiting_workers_are_let_go_when_the_api_stops(platform: MemoryPlatform) -> None:
    core = make_core(platform)
    async with running(core):
        waiting = asyncio.create_task(core.dispatcher.take("w1", (), 1, 20))
        await settle()
    assert await waiting == []


@pytest.mark.parametrize("worker", ["", "a b", "api-1"])
async def test_workers_need_proper_names(platform: MemoryPlatform, worker: str) -> None:
    with pytest.raises(InvalidSpec):
        await make_core(platform).dispatcher.take(worker, (), 1, 0)


# Beats


async def test_the_first_beat_marks_the_job_as_begun(platform: MemoryPlatform) -> None:
    await platform.job_log.write(drawing("a"), 0)
    core = make_core(platform)
    async with running(core):
        taken = await take_one(core)
        assert await core.dispatcher.beat(beat_of("w1", taken), {}) == []
        assert (await newest(platform, taken.record)).beaten
        sequence = platform.job_log.last_sequence
        await core.dispatcher.beat(beat_of("w1", taken), {})
        assert platform.job_log.last_sequence == sequence


@pytest.mark.parametrize("ending", ["cancelled", "deleted", "taken by another", "unknown"])
async def test_a_beat_for_a_job_that_moved_on_is_told_to_stop(platform: MemoryPlatform, ending: str) -> None:
    await platform.job_log.write(drawing("a"), 0)
    core = make_core(platform)
    async with running(core):
        taken = await take_one(core)
        beat = beat_of("w1", taken)
        if ending == "cancelled":
            await core.admission.cancel(taken.record.ref)
        elif ending == "deleted":
            await core.admission.delete(taken.record.ref)
        elif ending == "taken by another":
            await report(
                core, taken, 1, lambda record: life.report_yielded(record, taken.record.epoch, "", 0)
            )
            await take_one(core, "w2")
        else:
            beat = beat_of("w1", Revision(drawing("never"), 1, 0))
        assert await core.dispatcher.beat(beat, {}) == list(beat.jobs)


async def test_a_replica_that_has_not_heard_of_the_taking_stops_nobody(platform: MemoryPlatform) -> None:
    await platform.job_log.write(drawing("a"), 0)
    one, behind, empty = (make_core(platform) for _ in range(3))
    behind.index.apply(Revision(drawing("a"), 1, 0))
    async with running(one):
        taken = await take_one(one)
        assert await behind.dispatcher.beat(beat_of("w1", taken), {}) == []
        assert await empty.dispatcher.beat(beat_of("w1", taken), {}) == []


async def test_progress_is_published_as_the_share_of_the_whole(
    platform: MemoryPlatform, clock: ManualClock
) -> None:
    await platform.job_log.write(drawing("a"), 0)
    core = make_core(platform)
    async with running(core):
        taken = await take_one(core)
        beat = beat_of("w1", taken)
        numbers = Progress(stage="JOB_STAGE_DRAWING", step=10, total_steps=20, seconds_left=3.5)
        await core.dispatcher.beat(beat, {beat.jobs[0]: numbers})
        entry = await platform.progress.last_progress("p", "a")
        assert entry is not None
        assert entry.body["fraction"] == pytest.approx(0.05 + 0.95 / 2)
        assert entry.body["seconds_left"] == 3.5


# Reports


async def test_a_repeated_report_is_answered_and_changes_nothing(platform: MemoryPlatform) -> None:
    await platform.job_log.write(drawing("a"), 0)
    one, two = make_core(platform), make_core(platform)
    async with running(one, two):
        taken = await take_one(one)
        await report(one, taken, 1, stage_move(taken.record.epoch))
        await report(one, taken, 2, finish_move(taken.record.epoch, "first"))
        sequence = platform.job_log.last_sequence
        for core in (one, two):
            again = await report(core, taken, 2, finish_move(taken.record.epoch, "second"))
            assert again.record.state is JobState.SUCCEEDED
        assert platform.job_log.last_sequence == sequence
        assert (await newest(platform, taken.record)).result == {"effective_prompt": "first"}


async def test_the_same_report_through_two_replicas_at_once_is_accepted_once(
    platform: MemoryPlatform,
) -> None:
    await platform.job_log.write(drawing("a"), 0)
    cores = [make_core(platform) for _ in range(2)]
    async with running(*cores):
        taken = await take_one(cores[0])
        await settle()
        await asyncio.gather(*(report(core, taken, 1, stage_move(taken.record.epoch)) for core in cores * 3))
        record = await newest(platform, taken.record)
        assert (record.reported, record.stage) == (1, Stage.DRAWING)
        revisions = 0
        revision = await platform.job_log.next_revision(record.ref, 0)
        while revision is not None:
            revisions += 1
            revision = await platform.job_log.next_revision(record.ref, revision.sequence)
        assert revisions == 3


async def test_a_report_out_of_order_is_refused(platform: MemoryPlatform) -> None:
    await platform.job_log.write(drawing("a"), 0)
    core = make_core(platform)
    async with running(core):
        taken = await take_one(core)
        with pytest.raises(InvalidSpec, match="must be 1"):
            await report(core, taken, 2, stage_move(taken.record.epoch))


@pytest.mark.parametrize("ending", ["cancelled", "yielded", "retaken", "lost"])
async def test_an_old_epoch_can_never_be_seen_again(platform: MemoryPlatform, ending: str) -> None:
    await platform.job_log.write(drawing("a"), 0)
    core = make_core(platform)
    async with running(core):
        taken = await take_one(core)
        epoch = taken.record.epoch
        if ending == "cancelled":
            await core.admission.cancel(taken.record.ref)
        elif ending == "lost":
            await core.dispatcher.return_untouched(taken)
        else:
            await core.records.change(taken.record.ref, lambda r: life.lose_lease(r, epoch, 0))
        if ending == "retaken":
            await take_one(core, "w2")
        with pytest.raises(StaleEpoch):
            await report(core, taken, 1, finish_move(epoch))
        assert (await newest(platform, taken.record)).result is None


async def test_a_report_by_another_worker_is_refused(platform: MemoryPlatform) -> None:
    await platform.job_log.write(drawing("a"), 0)
    core = make_core(platform)
    async with running(core):
        taken = await take_one(core)
        with pytest.raises(StaleEpoch):
            await report(core, taken, 1, finish_move(taken.record.epoch), worker="thief")


async def test_a_report_on_a_removed_job_is_refused(platform: MemoryPlatform) -> None:
    await platform.job_log.write(drawing("a"), 0)
    core = make_core(platform)
    async with running(core):
        taken = await take_one(core)
        await core.admission.delete(taken.record.ref)
        with pytest.raises(StaleEpoch):
            await report(core, taken, 1, finish_move(taken.record.epoch))


@pytest.mark.parametrize("first", ["cancel", "finish"])
async def test_cancel_against_finish_leaves_one_winner(platform: MemoryPlatform, first: str) -> None:
    await platform.job_log.write(drawing("a"), 0)
    core = make_core(platform)
    async with running(core):
        taken = await take_one(core)
        finishing = report(core, taken, 1, finish_move(taken.record.epoch))
        cancelling = core.admission.cancel(taken.record.ref)
        order = [cancelling, finishing] if first == "cancel" else [finishing, cancelling]
        results = await asyncio.gather(*order, return_exceptions=True)
        record = await newest(platform, taken.record)
        if isinstance(results[order.index(finishing)], StaleEpoch):
            assert (record.state, record.result) == (JobState.CANCELLED, None)
        else:
            assert record.state is JobState.SUCCEEDED


async def test_a_failure_is_tried_again_until_the_attempts_are_used_up(platform: MemoryPlatform) -> None:
    await platform.job_log.write(drawing("a", limits=Limits(max_attempts=2)), 0)
    core = make_core(platform)
    failure = JobFailure("UNAVAILABLE", "storage is away")
    async with running(core):
        for state in (JobState.QUEUED, JobState.FAILED):
            taken = await take_one(core)
            epoch = taken.record.epoch
            ended = await report(core, taken, 1, fail_move(epoch, failure))
            assert ended.record.state is state


async def test_a_training_given_back_resumes_from_its_checkpoint(platform: MemoryPlatform) -> None:
    ready = life.make_ready(life.begin_preparing(training("t"), 0), {}, "m", 0)
    await platform.job_log.write(ready, 0)
    core = make_core(platform, JobKind.TRAIN)
    async with running(core):
        taken = await take_one(core)
        epoch = taken.record.epoch
        checkpoint = Checkpoint("projects/p/blobs/sha256/" + "0" * 64, 30)
        await report(core, taken, 1, lambda record: life.report_checkpoint(record, epoch, checkpoint))
        await report(core, taken, 2, lambda record: life.report_yielded(record, epoch, "leaving", 0))
        again = await take_one(core, "w2")
        assert again.record.checkpoint == checkpoint
        assert again.record.attempt == 1
        assert again.record.epoch > epoch
