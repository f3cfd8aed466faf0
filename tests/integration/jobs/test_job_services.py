from collections.abc import AsyncIterator
from typing import Any

import pytest
from likeness.inference.v1 import inference_service_pb2 as drawings
from likeness.inference.v1.generation_job_pb2 import (
    GeneratedImage,
    GenerationResult,
    GenerationSpec,
    LoraWeight,
)
from likeness.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from likeness.job.v1.job_pb2 import JobOptions, JobOrigin, JobState
from likeness.training.v1 import training_service_pb2 as trainings
from likeness.training.v1.training_job_pb2 import Concept, ImageSource, TrainingSpec
from likeness.training.v1.training_service_pb2_grpc import TrainingServiceStub

from services.adapters.grpc_client import Channel
from services.adapters.memory import MemoryPlatform
from services.domain.errors import AlreadyExists, InvalidSpec, NotFound, WrongState
from services.domain.job import JobKind
from tests.integration.jobs.harness import Api, digest_of, serving, worker


@pytest.fixture
async def inference() -> AsyncIterator[Api]:
    async with serving(MemoryPlatform()) as api:
        yield api


@pytest.fixture
async def trainer() -> AsyncIterator[Api]:
    async with serving(MemoryPlatform(), JobKind.TRAIN) as api:
        yield api


@pytest.fixture
async def drawing(inference: Api) -> AsyncIterator[Any]:
    async with Channel(inference.address) as channel:
        yield InferenceServiceStub(channel)


@pytest.fixture
async def training(trainer: Api) -> AsyncIterator[Any]:
    async with Channel(trainer.address) as channel:
        yield TrainingServiceStub(channel)


def draw(job_id: str = "", **spec: Any) -> drawings.CreateGenerationJobRequest:
    return drawings.CreateGenerationJobRequest(
        project_id="p",
        job_id=job_id,
        spec=GenerationSpec(**({"model": "pocket", "prompt": "a robot"} | spec)),
    )


def train(job_id: str = "", **spec: Any) -> trainings.CreateTrainingJobRequest:
    concept = Concept(
        instance_data=ImageSource(archive_url="https://example.com/a.zip"),
        instance_prompt="photo of sks robot",
        class_prompt="photo of a robot",
    )
    return trainings.CreateTrainingJobRequest(
        project_id="p", job_id=job_id, spec=TrainingSpec(**({"concepts": [concept]} | spec))
    )


async def test_a_drawing_is_admitted_complete(drawing: Any) -> None:
    job = (await drawing.CreateGenerationJob(draw("a"))).job
    assert job.state == JobState.JOB_STATE_QUEUED
    assert job.spec.model_digest == digest_of("pocket")
    assert job.spec.width_px == job.spec.height_px == 512
    assert job.spec.num_inference_steps == 50
    assert job.spec.HasField("seed")
    assert 0 <= job.spec.seed < 65536
    read = await drawing.GetGenerationJob(drawings.GetGenerationJobRequest(project_id="p", job_id="a"))
    assert (read.job.spec, read.job.sequence) == (job.spec, job.sequence)


async def test_a_repeated_drawing_keeps_its_seed_and_another_is_refused(drawing: Any) -> None:
    first = (await drawing.CreateGenerationJob(draw("a"))).job
    assert (await drawing.CreateGenerationJob(draw("a"))).job.spec == first.spec
    with pytest.raises(AlreadyExists):
        await drawing.CreateGenerationJob(draw("a", prompt="a cat"))


async def test_a_drawing_with_an_unknown_model_is_refused_by_name(drawing: Any) -> None:
    with pytest.raises(NotFound, match="no model 'dreamer'"):
        await drawing.CreateGenerationJob(draw(model="dreamer"))


async def test_loras_of_a_drawing_are_settled_at_admission(drawing: Any) -> None:
    job = (await drawing.CreateGenerationJob(draw(loras=[LoraWeight(model="rex")]))).job
    (lora,) = job.spec.loras
    assert (lora.strength, len(lora.model_digest)) == (1.0, 64)


async def test_loras_that_cannot_be_worn_are_refused_together_by_name(drawing: Any) -> None:
    names = ("nobody", "rex", "stranger", "pocket")
    with pytest.raises(InvalidSpec) as refusal:
        await drawing.CreateGenerationJob(draw(loras=[LoraWeight(model=name) for name in names]))
    assert {violation.field: violation.rule for violation in refusal.value.violations} == {
        "loras[0].model": "'nobody' does not exist",
        "loras[2].model": "'stranger' is a LoRA for models of the family sdxl, not flat",
        "loras[3].model": "'pocket' is not a LoRA",
    }


async def test_pictures_of_a_drawing_are_decoded_at_admission(drawing: Any) -> None:
    wish = draw(init_image_key="picture", mask_image_key="picture of a mask")
    spec = (await drawing.CreateGenerationJob(wish)).job.spec
    assert (spec.init_image_key, spec.strength) == ("p's PNG of picture", 0.7)
    assert spec.mask_image_key == "p's PNG of picture of a mask"


@pytest.mark.parametrize(
    ("wish", "fault"),
    [
        ({"mask_image_key": "picture"}, "mask_image_key: needs init_image_key"),
        ({"init_image_key": "picture", "strength": 1.5}, "strength: must be between 0 and 1"),
        ({"init_image_key": "song"}, "init_image_key: is not a picture that can be used"),
        ({"init_image_key": "picture", "mask_image_key": "song"}, "mask_image_key: is not a picture"),
    ],
)
async def test_pictures_that_cannot_be_started_from_are_refused(
    drawing: Any, wish: dict[str, Any], fault: str
) -> None:
    with pytest.raises(InvalidSpec, match=fault):
        await drawing.CreateGenerationJob(draw(**wish))


async def test_all_faults_of_a_drawing_come_at_once(drawing: Any) -> None:
    with pytest.raises(InvalidSpec) as refusal:
        await drawing.CreateGenerationJob(draw(num_images=11, guidance_scale=99))
    assert {violation.field for violation in refusal.value.violations} == {"num_images", "guidance_scale"}


async def test_a_drawing_that_no_engine_fulfils_is_refused_before_it_is_a_job(drawing: Any) -> None:
    with pytest.raises(InvalidSpec, match="panorama: is not offered by this installation"):
        await drawing.CreateGenerationJob(draw("a", panorama=True))
    with pytest.raises(NotFound):
        await drawing.GetGenerationJob(drawings.GetGenerationJobRequest(project_id="p", job_id="a"))


async def test_another_projects_drawing_is_not_found(drawing: Any) -> None:
    await drawing.CreateGenerationJob(draw("a"))
    for method, request in (
        ("GetGenerationJob", drawings.GetGenerationJobRequest),
        ("CancelGenerationJob", drawings.CancelGenerationJobRequest),
        ("DeleteGenerationJob", drawings.DeleteGenerationJobRequest),
    ):
        with pytest.raises(NotFound):
            await getattr(drawing, method)(request(project_id="q", job_id="a"))


async def test_drawings_are_listed_counted_cancelled_and_deleted(drawing: Any) -> None:
    for number in range(3):
        request = draw(f"j{number}")
        request.options.CopyFrom(JobOptions(origin=JobOrigin(endpoint=f"e{number % 2}")))
        await drawing.CreateGenerationJob(request)
    await drawing.CancelGenerationJob(drawings.CancelGenerationJobRequest(project_id="p", job_id="j0"))

    page = await drawing.ListGenerationJobs(drawings.ListGenerationJobsRequest(project_id="p", page_size=2))
    rest = await drawing.ListGenerationJobs(
        drawings.ListGenerationJobsRequest(project_id="p", page_size=2, page_token=page.next_page_token)
    )
    assert {job.job_id for job in [*page.jobs, *rest.jobs]} == {"j0", "j1", "j2"}
    ended = await drawing.ListGenerationJobs(
        drawings.ListGenerationJobsRequest(
            project_id="p", states=[JobState.JOB_STATE_CANCELLED], endpoint="e0"
        )
    )
    assert [job.job_id for job in ended.jobs] == ["j0"]

    figures = drawings.GetGenerationQueueStatusRequest(project_id="p", endpoint="e0")
    status = (await drawing.GetGenerationQueueStatus(figures)).status
    assert (status.queued_jobs, status.cancelled_jobs, status.ready_jobs) == (1, 1, 1)

    await drawing.DeleteGenerationJob(drawings.DeleteGenerationJobRequest(project_id="p", job_id="j1"))
    with pytest.raises(NotFound):
        await drawing.GetGenerationJob(drawings.GetGenerationJobRequest(project_id="p", job_id="j1"))


async def test_a_watched_drawing_is_followed_to_its_pictures(drawing: Any, inference: Api) -> None:
    await drawing.CreateGenerationJob(draw("a"))
    watching = drawing.WatchGenerationJob(drawings.WatchGenerationJobRequest(project_id="p", job_id="a"))
    messages = [(await anext(watching)).event.message]
    async with worker(inference) as client:
        [job] = await client.take()
        assert job.assignment.generation.prompt == "a robot"
        await job.finished(GenerationResult(images=[GeneratedImage(key="k")]))
        messages += [response.event.message async for response in watching]
    assert messages == ["admitted", "done"]
    done = (await drawing.GetGenerationJob(drawings.GetGenerationJobRequest(project_id="p", job_id="a"))).job
    assert done.state == JobState.JOB_STATE_SUCCEEDED
    assert [image.key for image in done.result.images] == ["k"]
    assert done.progress.fraction == 1.0


async def test_a_training_is_admitted_complete_and_steered(training: Any) -> None:
    job = (await training.CreateTrainingJob(train("t"))).job
    assert job.state == JobState.JOB_STATE_QUEUED
    assert job.spec.base_model == "pocket"
    assert job.spec.max_train_steps == 2000
    again = (await training.CreateTrainingJob(train("t"))).job
    assert (again.spec, again.sequence) == (job.spec, job.sequence)
    with pytest.raises(WrongState):
        await training.RetryTrainingJob(trainings.RetryTrainingJobRequest(project_id="p", job_id="t"))
    cancelled = await training.CancelTrainingJob(
        trainings.CancelTrainingJobRequest(project_id="p", job_id="t")
    )
    assert cancelled.job.state == JobState.JOB_STATE_CANCELLED
    watched = training.WatchTrainingJob(trainings.WatchTrainingJobRequest(project_id="p", job_id="t"))
    assert [response.event.message async for response in watched] == ["admitted", "cancelled"]
    status = await training.GetTrainingQueueStatus(trainings.GetTrainingQueueStatusRequest())
    assert status.status.cancelled_jobs == 1
    listed = await training.ListTrainingJobs(trainings.ListTrainingJobsRequest(project_id="p"))
    assert [item.job_id for item in listed.jobs] == ["t"]
    await training.DeleteTrainingJob(trainings.DeleteTrainingJobRequest(project_id="p", job_id="t"))
    with pytest.raises(NotFound):
        await training.GetTrainingJob(trainings.GetTrainingJobRequest(project_id="p", job_id="t"))


async def test_a_training_without_data_is_refused_with_its_faults(training: Any) -> None:
    with pytest.raises(InvalidSpec) as refusal:
        await training.CreateTrainingJob(train(concepts=[], resolution=100))
    assert {"concepts", "resolution"} <= {violation.field for violation in refusal.value.violations}


async def test_a_training_that_no_recipe_can_do_is_refused_before_it_is_a_job(training: Any) -> None:
    wishes = {"sandbox": True, "crop_jitter": 0.02}
    asked = train("a", samples=[GenerationSpec(prompt="a robot", panorama=True)], **wishes)
    with pytest.raises(InvalidSpec) as refusal:
        await training.CreateTrainingJob(asked)
    fields = {violation.field for violation in refusal.value.violations}
    assert fields == {"sandbox", "crop_jitter", "samples[0].panorama"}
    with pytest.raises(NotFound):
        await training.GetTrainingJob(trainings.GetTrainingJobRequest(project_id="p", job_id="a"))
