import asyncio
from dataclasses import replace

import pytest
from likeness.job.v1.job_pb2 import JobEvent, JobStage, Progress
from likeness.job.v1.job_pb2 import JobState as WireState
from likeness.training.v1.training_job_pb2 import TrainingResult

from services.adapters.memory import ManualClock, MemoryPlatform
from services.domain import life_cycle as life
from services.domain.errors import InvalidSpec, NotFound
from services.domain.job import Checkpoint, JobFailure, JobKind, JobState, Stage
from services.domain.ports import Revision
from services.jobs.admission import as_json
from services.jobs.views import progress_of, queue_status, states_of
from tests.unit.jobs.harness import beat_of, drawing, make_core, running, settle, take_one, training

NOW = 1_700_000_000_000


async def test_a_training_shows_everything_its_record_holds(platform: MemoryPlatform) -> None:
    ready = life.make_ready(
        life.begin_preparing(training("t"), NOW + 1000), {"warnings": ["small"]}, "m", NOW + 2000
    )
    taken = life.take(ready, 3, "w", NOW + 5000)
    with_checkpoint = life.report_checkpoint(taken, 3, Checkpoint("key", 30))
    core = make_core(platform, JobKind.TRAIN)
    job = await core.views.training_job(Revision(with_checkpoint, 9, NOW), NOW + 6000)
    assert (job.job_id, job.project_id, job.sequence, job.attempt) == ("t", "p", 9, 1)
    assert job.state == WireState.JOB_STATE_RUNNING
    assert job.stage == JobStage.JOB_STAGE_TRAINING
    assert job.spec.base_model == "pocket"
    assert job.worker_id == "w"
    assert list(job.prepared.warnings) == ["small"]
    assert (job.checkpoint.manifest_key, job.checkpoint.step) == ("key", 30)
    assert job.times.waiting_duration.ToMilliseconds() == 1000 + 3000
    assert job.times.start_time.ToMilliseconds() == NOW + 1000
    assert not job.times.HasField("end_time")
    assert not job.HasField("result")
    assert not job.HasField("error")


async def test_a_failed_job_shows_why(platform: MemoryPlatform) -> None:
    failed = life.fail(training("t"), JobFailure("BAD_INPUT", "no pictures", "instance_data"), NOW + 10)
    job = await make_core(platform, JobKind.TRAIN).views.training_job(Revision(failed, 1, NOW), NOW)
    assert (job.error.reason, job.error.message, job.error.field) == (
        "BAD_INPUT",
        "no pictures",
        "instance_data",
    )
    assert job.times.end_time.ToMilliseconds() == NOW + 10


async def test_a_result_kept_as_a_document_is_shown(platform: MemoryPlatform) -> None:
    core = make_core(platform, JobKind.TRAIN)
    result = TrainingResult(model="t", warnings=["one"])
    taken = life.take(life.make_ready(life.begin_preparing(training("t"), NOW), {}, "m", NOW), 3, "w", NOW)
    trained = life.report_trained(taken, 3, as_json(TrainingResult(model="t")))
    shown = await core.views.training_job(Revision(trained, 4, NOW), NOW)
    assert shown.result == TrainingResult(model="t")
    key = await core.views._documents.put("p", b'{"model":"t","warnings":["one"]}')
    done = life.finish(trained, None, key, NOW)
    shown = await core.views.training_job(Revision(done, 5, NOW), NOW)
    assert shown.result == result
    assert shown.progress.fraction == 1.0


def test_progress_of_an_earlier_stage_gives_way_to_the_records_stage() -> None:
    record = replace(training("t"), state=JobState.RUNNING, stage=Stage.EXPORTING)
    latest = Progress(stage="JOB_STAGE_TRAINING", step=10, total_steps=10, fraction=0.85)
    shown = progress_of(record, latest)
    assert shown is not None
    assert shown.stage == JobStage.JOB_STAGE_EXPORTING
    assert shown.fraction == pytest.approx(0.85)
    assert shown.step == 0


async def test_a_picture_in_the_progress_log_hides_no_numbers(platform: MemoryPlatform) -> None:
    core = make_core(platform)
    record = life.take(drawing("a"), 1, "w", NOW)
    await platform.progress.publish_progress(
        "p", "a", {"stage": "JOB_STAGE_LOADING", "step": 3, "fraction": 0.01}
    )
    await platform.progress.publish_progress("p", "a", {"image_key": "k"})
    job = await core.views.generation_job(Revision(record, 2, NOW), NOW)
    assert job.progress.step == 3


def test_states_of_the_wire_are_checked() -> None:
    assert states_of([1, 6]) == {JobState.QUEUED, JobState.TIMED_OUT}
    for wrong in (0, 99):
        with pytest.raises(InvalidSpec):
            states_of([wrong])


async def test_queue_figures_count_jobs_and_workers(platform: MemoryPlatform, clock: ManualClock) -> None:
    core = make_core(platform)
    for name in ("a", "b", "c"):
        await platform.job_log.write(drawing(name), 0)
    async with running(core):
        await core.admission.cancel(drawing("c").ref)
        taken = await take_one(core, "busy")
        await core.dispatcher.beat(beat_of("busy", taken), {})
        await core.dispatcher.beat(beat_of("idle"), {})
        await core.dispatcher.beat(beat_of("gone", leaving=True), {})
        await clock.advance(7)
        status = queue_status(core.index, core.dispatcher.book, "p", "", clock.now_ms())
        assert (status.queued_jobs, status.running_jobs, status.cancelled_jobs, status.ready_jobs) == (
            1,
            1,
            1,
            1,
        )
        assert (status.idle_workers, status.busy_workers) == (1, 1)
        assert status.oldest_wait.ToMilliseconds() == 7000
        await clock.advance(16)
        status = queue_status(core.index, core.dispatcher.book, "q", "", clock.now_ms())
        assert (status.idle_workers, status.busy_workers, status.queued_jobs) == (0, 0, 0)
        assert status.oldest_wait.ToMilliseconds() == 0


async def test_watching_tells_every_event_and_the_progress_until_the_end(
    platform: MemoryPlatform, clock: ManualClock
) -> None:
    core = make_core(platform)
    await platform.job_log.write(drawing("a"), 0)
    events: list[JobEvent] = []

    async def watch() -> None:
        async for event in core.reading.watch(drawing("a").ref, 0):
            events.append(event)

    async with running(core):
        watching = asyncio.create_task(watch())
        taken = await take_one(core)
        epoch = taken.record.epoch
        staged = await core.records.write(
            life.report_stage(taken.record, epoch, Stage.DRAWING, "drawing"), taken.sequence
        )
        numbers = {"stage": "JOB_STAGE_DRAWING", "step": 4, "total_steps": 8}
        await platform.progress.publish_progress("p", "a", numbers)
        await settle()
        await clock.advance(1.5)
        await platform.progress.publish_progress("p", "a", {"image_key": "k"})
        await clock.advance(1.5)
        await core.records.write(
            life.report_finished(staged.record, epoch, {}, clock.now_ms()), staged.sequence
        )
        await watching
    words = [event.message or event.image_key or event.progress.step for event in events]
    assert words == ["admitted", "drawing", 4, "k", "done"]
    assert events[-1].state == WireState.JOB_STATE_SUCCEEDED


async def test_watching_goes_on_after_a_position(platform: MemoryPlatform) -> None:
    core = make_core(platform)
    sequence = await platform.job_log.write(drawing("a"), 0)
    async with running(core):
        await core.admission.cancel(drawing("a").ref)
        events = [event async for event in core.reading.watch(drawing("a").ref, sequence)]
    assert [event.message for event in events] == ["cancelled"]


async def test_watching_an_unknown_job_is_refused(platform: MemoryPlatform) -> None:
    with pytest.raises(NotFound):
        async for _ in make_core(platform).reading.watch(drawing("a").ref, 0):
            raise AssertionError("there is nothing to see")


async def test_pages_show_jobs_newest_first(platform: MemoryPlatform) -> None:
    core = make_core(platform)
    for number in range(3):
        await platform.job_log.write(drawing(f"j{number}", now_ms=NOW + number), 0)
    async with running(core):
        first, token = await core.reading.page("p", 2, "", (), "")
        second, end = await core.reading.page("p", 2, token, (), "")
        assert [r.record.id for r in first + second] == ["j2", "j1", "j0"]
        assert end == ""
        with pytest.raises(InvalidSpec):
            await core.reading.page("p", 201, "", (), "")
