import asyncio
from typing import Any

import pytest
from likeness.inference.v1.generation_job_pb2 import GeneratedImage, GenerationResult
from likeness.job.v1.job_pb2 import Progress
from likeness.training.v1.training_job_pb2 import PreviewImage, TrainingResult
from likeness.worker.v1 import worker_service_pb2 as pb
from likeness.worker.v1.worker_service_pb2_grpc import WorkerServiceStub

from services.adapters.grpc_client import Channel
from services.adapters.memory import MemoryPlatform
from services.domain import life_cycle as life
from services.domain.errors import BadInput, Conflict, InvalidSpec, QueueFull, StaleEpoch, Unavailable
from services.domain.job import Checkpoint, JobFailure, JobKind, JobRecord, JobState, Limits, Phase, Stage
from services.jobs.worker_client import WorkerClient
from tests.integration.jobs.harness import LEASE_S, eventually, serving, worker
from tests.unit.jobs.harness import MemoryDocuments, drawing, training


@pytest.fixture
def platform() -> MemoryPlatform:
    return MemoryPlatform()


def now(platform: MemoryPlatform) -> int:
    return platform.job_log.now_ms()


async def put_drawing(platform: MemoryPlatform, job_id: str = "a", **fields: Any) -> JobRecord:
    record = drawing(job_id, now_ms=now(platform), **fields)
    await platform.job_log.write(record, 0)
    return record


async def put_training(platform: MemoryPlatform) -> JobRecord:
    prepared = {"base_manifest_key": "key", "datasets": [{"instance_key": "data", "instance_images": 5}]}
    queued = training("t", limits=Limits(ttl_ms=10**12))
    ready = life.make_ready(life.begin_preparing(queued, now(platform)), prepared, "m", now(platform))
    await platform.job_log.write(ready, 0)
    return ready


async def newest(platform: MemoryPlatform, record: JobRecord) -> JobRecord:
    revision = await platform.job_log.read(record.ref)
    assert revision is not None
    return revision.record


def report_of(assignment: pb.Assignment, number: int, **report: Any) -> pb.ReportRequest:
    report = report or {"finished": pb.FinishedReport(result=GenerationResult(effective_prompt="mine"))}
    return pb.ReportRequest(
        job_id=assignment.job_id,
        project_id=assignment.project_id,
        epoch=assignment.epoch,
        number=number,
        worker_id="w1",
        **report,
    )


async def test_a_training_goes_through_its_whole_phase(platform: MemoryPlatform) -> None:
    record = await put_training(platform)
    async with serving(platform, JobKind.TRAIN) as api, worker(api) as client:
        [job] = await client.take(1)
        assert job.assignment.training.base_model == "pocket"
        assert job.assignment.prepared.datasets[0].instance_images == 5
        assert job.checkpoint_ref is None
        assert 0 < job.time_left_s <= record.limits.execution_timeout_ms / 1000
        await job.stage(Stage.TRAINING, "training")
        job.progress(Progress(stage="JOB_STAGE_TRAINING", step=50, total_steps=100, loss=0.25))
        await eventually(lambda: platform.progress.last_progress("p", "t"))
        await job.checkpoint("manifest", 50)
        await job.trained(TrainingResult(model="t", steps=100))
        assert job.has_ended
        assert client.held == ()
    ended = await newest(platform, record)
    assert (ended.phase, ended.worker, ended.reported) == (Phase.FINISH, "", 3)
    assert ended.trained == {"model": "t", "steps": "100"}
    entry = await platform.progress.last_progress("p", "t")
    assert entry is not None
    assert entry.body["fraction"] == pytest.approx(0.15 + 0.70 / 2)
    assert entry.body["loss"] == 0.25


async def test_previews_are_news_with_their_names_and_pictures(platform: MemoryPlatform) -> None:
    record = await put_training(platform)
    pictures = [
        PreviewImage(step=250, name=f"preview-000250-{n}.png", image=GeneratedImage(key=f"k{n}"))
        for n in (1, 2)
    ]
    async with serving(platform, JobKind.TRAIN) as api, worker(api) as client:
        [job] = await client.take(1)
        await job.stage(Stage.TRAINING, "training")
        await job.previews(pictures)
        for refused in ([], [PreviewImage(name="nameless.png")], pictures * 40):
            with pytest.raises(InvalidSpec, match="must be 1 to 64 pictures, each with its key and name"):
                await job.previews(refused)
    told = await newest(platform, record)
    assert (told.stage, told.event, told.reported) == (Stage.TRAINING, True, 2)
    assert told.why == "drawn while training: preview-000250-1.png, preview-000250-2.png"
    entries = [entry.body for entry in await platform.progress.progress_after("p", "t", 0)]
    assert [(body["image_key"], body["message"]) for body in entries if "image_key" in body] == [
        ("k1", "preview-000250-1.png"),
        ("k2", "preview-000250-2.png"),
    ]


async def test_a_version_of_a_model_is_news_with_its_name(platform: MemoryPlatform) -> None:
    record = await put_training(platform)
    async with serving(platform, JobKind.TRAIN) as api, worker(api) as client:
        [job] = await client.take(1)
        for model, step in (("t-step-000250", 0), ("../t", 250), ("", 250)):
            with pytest.raises(InvalidSpec, match="must name a model and its updates"):
                await job.version(model, step)
        await job.version("t-step-000250", 250)
    told = await newest(platform, record)
    assert (told.event, told.reported) == (True, 1)
    assert told.why == "published after 250 updates as t-step-000250"


async def test_the_record_names_the_memory_of_the_device_that_has_the_job(platform: MemoryPlatform) -> None:
    record = await put_training(platform)
    async with (
        serving(platform, JobKind.TRAIN) as api,
        worker(api, device_memory_bytes=24 * 2**30) as client,
    ):
        [job] = await client.take(1)
        assert (await newest(platform, record)).device_memory == 24 * 2**30
        await job.failed(JobFailure("DIVERGED", "the loss is not finite"))
    ended = await newest(platform, record)
    assert (ended.state, ended.device_memory) == (JobState.FAILED, 24 * 2**30)
    assert life.retry(ended, now(platform)).device_memory == 0


async def test_a_drawing_succeeds_with_its_pictures(platform: MemoryPlatform) -> None:
    record = await put_drawing(platform)
    async with serving(platform) as api, worker(api) as client:
        async for job in client.jobs(lambda: 1):
            await job.stage(Stage.DRAWING)
            await job.finished(GenerationResult(images=[GeneratedImage(key="k", seed=3)]))
            client.leave()
    ended = await newest(platform, record)
    assert ended.state is JobState.SUCCEEDED
    assert ended.result == {"images": [{"key": "k", "seed": "3"}]}


async def test_a_long_result_is_kept_as_a_document(platform: MemoryPlatform) -> None:
    record, documents = await put_drawing(platform), MemoryDocuments()
    async with serving(platform, documents=documents) as api, worker(api) as client:
        [job] = await client.take()
        await job.finished(GenerationResult(effective_prompt="x" * 9000))
    ended = await newest(platform, record)
    assert ended.result is None
    assert b"x" * 9000 in documents.held[ended.result_key]


async def test_a_given_back_job_is_resumed_elsewhere_from_its_checkpoint(platform: MemoryPlatform) -> None:
    await put_training(platform)
    async with serving(platform, JobKind.TRAIN) as api, worker(api) as one, worker(api, "w2") as two:
        [job] = await one.take()
        await job.checkpoint("manifest", 30)
        await job.yielded("leaving")
        [again] = await two.take()
        assert again.checkpoint_ref is not None
        assert again.checkpoint_ref.step == 30
        assert again.attempt == 1
        assert again.epoch > job.epoch


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        pytest.param(
            BadInput("no pictures", "zip"), JobFailure("BAD_INPUT", "no pictures", "zip"), id="final"
        ),
        pytest.param(ValueError("a secret"), JobFailure("INTERNAL", "internal error"), id="a bug"),
        pytest.param(JobFailure("DIVERGED", "NaN"), JobFailure("DIVERGED", "NaN"), id="named"),
    ],
)
async def test_a_failure_says_why_and_no_more(
    platform: MemoryPlatform, error: BaseException | JobFailure, expected: JobFailure
) -> None:
    record = await put_drawing(platform, limits=Limits(max_attempts=1))
    async with serving(platform) as api, worker(api) as client:
        [job] = await client.take()
        await job.failed(error)
    ended = await newest(platform, record)
    assert ended.state is JobState.FAILED
    assert ended.error is not None
    assert ended.error.reason == expected.reason
    assert expected.message in ended.error.message
    assert "secret" not in ended.error.message
    assert ended.error.field == expected.field


async def test_a_fault_that_may_pass_gives_the_job_another_attempt(platform: MemoryPlatform) -> None:
    record = await put_drawing(platform)
    async with serving(platform) as api, worker(api) as client:
        [job] = await client.take()
        await job.failed(Unavailable("storage is away"))
        assert (await newest(platform, record)).state is JobState.QUEUED
        [again] = await client.take()
        assert again.attempt == 2


async def test_a_repeated_report_is_answered_through_any_replica(platform: MemoryPlatform) -> None:
    record = await put_drawing(platform)
    async with serving(platform) as one, serving(platform) as two, worker(one) as client:
        [job] = await client.take()
        async with Channel(two.address) as channel:
            stub: Any = WorkerServiceStub(channel)
            stage = pb.StageReport(stage="JOB_STAGE_DRAWING")
            for _ in range(3):
                await stub.Report(report_of(job.assignment, 1, stage=stage))
            await asyncio.gather(
                *(replica.Report(report_of(job.assignment, 2)) for replica in (stub, client.stub) * 3)
            )
    assert ((await newest(platform, record)).reported, platform.job_log.last_sequence) == (2, 4)


async def test_reports_out_of_order_or_without_sense_are_refused(platform: MemoryPlatform) -> None:
    await put_drawing(platform)
    async with serving(platform) as api, worker(api) as client:
        [job] = await client.take()
        for wrong in (
            report_of(job.assignment, 2),
            report_of(job.assignment, 0),
            report_of(job.assignment, 1, stage=pb.StageReport()),
            report_of(job.assignment, 1, stage=pb.StageReport(stage="JOB_STAGE_SAMPLING")),
            report_of(job.assignment, 1, checkpoint=pb.CheckpointReport()),
            pb.ReportRequest(job_id="a", project_id="p", epoch=job.epoch, number=1, worker_id="w1"),
        ):
            with pytest.raises(InvalidSpec):
                await client.stub.Report(wrong)
        await job.finished(GenerationResult())


async def test_a_refused_report_uses_up_no_number(platform: MemoryPlatform) -> None:
    record = await put_drawing(platform)
    async with serving(platform) as api, worker(api) as client:
        [job] = await client.take()
        with pytest.raises(InvalidSpec):
            await job.checkpoint("", 1)
        await job.stage(Stage.DRAWING)
        await job.finished(GenerationResult())
    assert (await newest(platform, record)).reported == 2


async def test_a_worker_that_was_paused_past_its_lease_can_never_be_seen(platform: MemoryPlatform) -> None:
    record = await put_drawing(platform)
    async with serving(platform) as api, worker(api, "w1") as paused, worker(api, "w2") as other:
        [job] = await paused.take()
        assert job.is_surely_ours
        assert paused._beating is not None
        paused._beating.cancel()  # as if its process were stopped: no beat leaves any more
        await eventually(lambda: not job.is_surely_ours)
        [again] = await other.take()
        assert again.epoch > job.epoch
        with pytest.raises(StaleEpoch):
            await job.finished(GenerationResult(effective_prompt="the paused one's"))
        assert job.stopped.is_set()
        await again.finished(GenerationResult(effective_prompt="the other's"))
        with pytest.raises(StaleEpoch):
            await job.finished(GenerationResult(effective_prompt="the paused one's"))
    assert (await newest(platform, record)).result == {"effective_prompt": "the other's"}


@pytest.mark.parametrize("stage", ["taken", "begun", "drawing"])
async def test_a_cancelled_jobs_worker_is_stopped_by_its_next_beat(
    platform: MemoryPlatform, stage: str
) -> None:
    record = await put_drawing(platform)
    async with serving(platform) as api, worker(api) as client:
        [job] = await client.take()
        if stage != "taken":
            await eventually(lambda: _is_begun(platform, record))
        if stage == "drawing":
            await job.stage(Stage.DRAWING)
        await api.core.admission.cancel(record.ref)
        await asyncio.wait_for(job.stopped.wait(), 5)
        assert client.held == ()
        with pytest.raises(StaleEpoch):
            await job.finished(GenerationResult())
    assert (await newest(platform, record)).state is JobState.CANCELLED


async def _is_begun(platform: MemoryPlatform, record: JobRecord) -> bool:
    return (await newest(platform, record)).beaten


async def test_an_ended_job_does_not_count_as_stopped(platform: MemoryPlatform) -> None:
    await put_drawing(platform)
    async with serving(platform) as api, worker(api, beat_s=0.02) as client:
        [job] = await client.take()
        await job.finished(GenerationResult())
        await asyncio.sleep(0.1)
        assert not job.stopped.is_set()


class LosesAnswers:
    """Does what the servicer does, and loses every other answer to a report."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.calls = 0
        self.Take, self.Beat = inner.Take, inner.Beat

    async def Report(self, request: pb.ReportRequest, context: Any) -> pb.ReportResponse:
        response: pb.ReportResponse = await self.inner.Report(request, context)
        self.calls += 1
        if self.calls % 2:
            raise Unavailable("the answer was lost")
        return response


async def test_reports_whose_answers_are_lost_are_accepted_once(platform: MemoryPlatform) -> None:
    record = await put_training(platform)
    async with serving(platform, JobKind.TRAIN, wrap=LosesAnswers) as api, worker(api) as client:
        [job] = await client.take()
        await asyncio.gather(*(job.checkpoint("manifest", step) for step in (10, 20, 30)))
        await job.trained(TrainingResult(model="t"))
    ended = await newest(platform, record)
    assert ended.reported == 4
    assert ended.checkpoint == Checkpoint("manifest", 30)


class Refuses:
    """Answers the first reports with errors, and the later ones as the servicer does."""

    def __init__(self, inner: Any, *errors: Exception) -> None:
        self.inner, self.errors = inner, list(errors)
        self.Take, self.Beat = inner.Take, inner.Beat

    async def Report(self, request: pb.ReportRequest, context: Any) -> pb.ReportResponse:
        if self.errors:
            raise self.errors.pop(0)
        response: pb.ReportResponse = await self.inner.Report(request, context)
        return response


async def test_a_report_waits_until_a_full_or_busy_log_takes_it(platform: MemoryPlatform) -> None:
    record = await put_drawing(platform)

    def busy(inner: Any) -> Refuses:
        return Refuses(inner, QueueFull("the job log is full"), Conflict("being changed without end"))

    async with serving(platform, wrap=busy) as api, worker(api) as client:
        [job] = await client.take()
        await job.finished(GenerationResult())
    assert (await newest(platform, record)).state is JobState.SUCCEEDED


@pytest.mark.parametrize("report", ["failed", "yielded"])
async def test_a_job_whose_end_cannot_be_told_is_left_to_its_lease(
    platform: MemoryPlatform, report: str
) -> None:
    record = await put_drawing(platform)

    def refusing(inner: Any) -> Refuses:
        return Refuses(inner, InvalidSpec("the record is too large"))

    async with serving(platform, wrap=refusing) as api, worker(api) as client:
        [job] = await client.take()
        with pytest.raises(InvalidSpec):
            await (job.failed(BadInput("x")) if report == "failed" else job.yielded("x"))
        assert client.held == ()
        await eventually(lambda: _is_ready(platform, record))


async def _is_ready(platform: MemoryPlatform, record: JobRecord) -> bool:
    return (await newest(platform, record)).ready


async def test_of_a_result_that_is_refused_the_failure_can_be_told(platform: MemoryPlatform) -> None:
    record = await put_drawing(platform)

    def refusing(inner: Any) -> Refuses:
        return Refuses(inner, InvalidSpec("the record is too large"))

    async with serving(platform, wrap=refusing) as api, worker(api) as client:
        [job] = await client.take()
        with pytest.raises(InvalidSpec) as refusal:
            await job.finished(GenerationResult())
        await job.failed(refusal.value)
    assert (await newest(platform, record)).state is JobState.FAILED


async def test_a_report_outlives_a_restart_of_the_api(platform: MemoryPlatform) -> None:
    record = await put_drawing(platform)
    async with serving(platform) as api:
        address = api.address
        channel = Channel(address)
        client = WorkerClient(channel, "w1", beat_s=0.1, take_wait_s=2.0)
        await client.__aenter__()
        [job] = await client.take()
    finishing = asyncio.create_task(job.finished(GenerationResult(effective_prompt="kept")))
    await asyncio.sleep(0.3)
    assert not finishing.done()
    async with serving(platform, address=address):
        await asyncio.wait_for(finishing, 10)
        await client.__aexit__(None, None, None)
        await channel.close()
    assert (await newest(platform, record)).result == {"effective_prompt": "kept"}


async def test_a_report_goes_out_even_when_its_caller_is_cancelled(platform: MemoryPlatform) -> None:
    record = await put_drawing(platform)
    async with serving(platform) as api, worker(api) as client:
        [job] = await client.take()
        caller = asyncio.create_task(job.stage(Stage.DRAWING))
        await asyncio.sleep(0)
        caller.cancel()
        await job.finished(GenerationResult())
    assert ((await newest(platform, record)).reported, job.has_ended) == (2, True)


async def test_a_worker_that_leaves_while_it_waits_loses_no_job(platform: MemoryPlatform) -> None:
    async with serving(platform) as api, worker(api, "leaver") as one, worker(api, "stayer") as two:
        waiting = asyncio.create_task(one.take())
        await asyncio.sleep(0.1)
        one.leave()
        assert await asyncio.wait_for(waiting, 1) == []
        record = await put_drawing(platform)
        [job] = await two.take()
        await job.finished(GenerationResult())
    assert (await newest(platform, record)).last_worker == "stayer"


async def test_a_drained_worker_ends_its_loop(platform: MemoryPlatform) -> None:
    async with serving(platform) as api, worker(api) as client:
        api.core.dispatcher.drain("w1")
        assert [job async for job in client.jobs(lambda: 1)] == []
        assert client.draining.is_set()


async def test_free_slots_are_filled_as_jobs_end(platform: MemoryPlatform) -> None:
    for number in range(6):
        await put_drawing(platform, f"j{number}")
    most, done = 0, 0
    async with serving(platform) as api, worker(api) as client, asyncio.TaskGroup() as group:

        async def draw(job: Any) -> None:
            nonlocal done
            await asyncio.sleep(0.05)
            await job.finished(GenerationResult())
            done += 1
            if done == 6:
                client.leave()

        async for job in client.jobs(lambda: 2 - len(client.held)):
            most = max(most, len(client.held))
            group.create_task(draw(job))
    assert (done, most) == (6, 2)


async def test_a_dead_workers_job_runs_elsewhere_soon_after_the_lease(platform: MemoryPlatform) -> None:
    record = await put_drawing(platform)
    async with serving(platform) as api:
        async with Channel(api.address) as channel:
            stub: Any = WorkerServiceStub(channel)
            await stub.Take(pb.TakeRequest(worker_id="dead", free_slots=1))
        began = asyncio.get_running_loop().time()
        async with worker(api, "alive", take_wait_s=10.0) as client:
            [job] = await client.take()
            assert asyncio.get_running_loop().time() - began < 2 * LEASE_S
            await job.finished(GenerationResult())
    assert (await newest(platform, record)).state is JobState.SUCCEEDED


async def test_three_replicas_give_a_hundred_takers_each_job_once(platform: MemoryPlatform) -> None:
    jobs = 120
    # The takers send no beats, so on a busy machine a lease of a second would give their jobs away again.
    lease_s = 120.0
    async with (
        serving(platform, lease_s=lease_s) as one,
        serving(platform, lease_s=lease_s) as two,
        serving(platform, lease_s=lease_s) as three,
    ):
        channels = [Channel(api.address) for api in (one, two, three)]
        stubs: list[Any] = [WorkerServiceStub(channel) for channel in channels]

        async def taker(number: int) -> list[str]:
            taken: list[str] = []
            while True:
                request = pb.TakeRequest(worker_id=f"w{number}", free_slots=1)
                request.wait.FromMilliseconds(700)
                response = await stubs[number % 3].Take(request, timeout=20)
                if not response.assignments:
                    return taken
                taken += [assignment.job_id for assignment in response.assignments]

        takers = [asyncio.create_task(taker(number)) for number in range(100)]
        for number in range(jobs):
            await put_drawing(platform, f"j{number}", project=f"p{number % 5}")
        taken = [job for jobs_of_one in await asyncio.gather(*takers) for job in jobs_of_one]
        for channel in channels:
            await channel.close()
    assert sorted(taken) == sorted(f"j{number}" for number in range(jobs))
