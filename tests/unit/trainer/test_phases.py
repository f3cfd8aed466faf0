"""The phases that the api leads, over a job log in memory and siblings that only remember what they were asked."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf import json_format
from likeness.inference.v1 import generation_job_pb2, inference_service_pb2
from likeness.job.v1 import job_pb2
from likeness.storage.v1 import artifact_pb2, model_pb2
from likeness.storage.v1.storage_service_pb2 import ImportModelResponse
from likeness.training.v1 import training_job_pb2

from services.adapters.memory import MemoryPlatform
from services.domain import life_cycle as life
from services.domain.errors import (
    AlreadyExists,
    BadInput,
    Cancelled,
    DeadlineExceeded,
    NotFound,
    Unavailable,
)
from services.domain.job import JobFailure, JobKind, JobRecord, JobRef, JobState, Limits, Phase, Stage
from services.domain.ports import Revision
from services.jobs.views import latest_progress
from services.trainer.drawing_jobs import DRAWING_TRIES
from services.trainer.drawings import ClassImages, child_id, runs_of
from services.trainer.phases import ATTEMPTS, CLASS_DATA_IGNORED, Siblings, TrainingLeader
from services.trainer.preview_uploads import as_document

REF = JobRef(JobKind.TRAIN, "dev", "job-1")
BASE = model_pb2.Model(model="pocket", manifest_key="shared/base", manifest_digest="d" * 64)


class FakeStorage:
    """What the leader needs of storage, in dictionaries."""

    def __init__(self) -> None:
        self.refs: dict[str, Any] = {}
        self.datasets: dict[str, list[artifact_pb2.DatasetImage]] = {}
        self.documents: dict[str, Any] = {}
        self.imports: list[str] = []
        self.models: list[tuple[str, str, str, str]] = []
        self.captions_read: list[bool] = []
        self.faults: list[Exception] = []

    async def get_model(self, project: str, model: str) -> model_pb2.Model:
        if model not in ("", "pocket"):
            raise NotFound(model)
        return BASE

    async def import_model(self, project: str, address: str, **kwargs: Any) -> ImportModelResponse:
        if self.faults:
            raise self.faults.pop()
        self.models.append((address, kwargs["base_model"], kwargs["revision"], kwargs["subfolder"]))
        imported = model_pb2.Model(model="imported-1", manifest_key="dev/one", manifest_digest="e" * 64)
        if not address.endswith("checkpoint.zip"):
            return ImportModelResponse(model=imported)
        state = training_job_pb2.CheckpointRef(manifest_key="state", step=7)
        return ImportModelResponse(model=BASE, checkpoint=state)

    async def import_dataset(
        self, project: str, source: training_job_pb2.ImageSource, **kwargs: Any
    ) -> artifact_pb2.Dataset:
        if self.faults:
            raise self.faults.pop()
        self.imports.append(source.archive_url)
        self.captions_read.append(kwargs["read_captions"])
        count = int(source.archive_url.rsplit("/", 1)[-1])
        images = [artifact_pb2.DatasetImage(id=f"{i}.png", key=f"given-{i}") for i in range(count)]
        return artifact_pb2.Dataset(key=f"dataset:{source.archive_url}", images=images)

    async def create_dataset(
        self, project: str, images: list[artifact_pb2.DatasetImage]
    ) -> artifact_pb2.Dataset:
        key = "made:" + hashlib.sha256("".join(image.key for image in images).encode()).hexdigest()[:8]
        self.datasets[key] = list(images)
        return artifact_pb2.Dataset(key=key, images=images)

    async def get_ref(self, project: str, kind: str, name: str) -> Any:
        return self.refs.get(f"{project}/{kind}/{name}")

    async def put_ref(self, project: str, kind: str, name: str, document: Any) -> None:
        if f"{project}/{kind}/{name}" in self.refs:
            raise AlreadyExists(name)
        self.refs[f"{project}/{kind}/{name}"] = document

    async def read_document(self, key: str) -> Any:
        return self.documents[key]

    async def upload_document(self, project: str, document: Any) -> artifact_pb2.Blob:
        self.documents["result"] = document
        return artifact_pb2.Blob(key="result")


class FakeInference:
    """Draws at once; an id that was asked for before is answered again."""

    def __init__(self) -> None:
        self.jobs: dict[str, generation_job_pb2.GenerationJob] = {}
        self.order: list[str] = []
        self.cancelled: list[str] = []
        self.never_ends = False
        self.faults: list[Exception] = []
        self.create_when = asyncio.Event()
        self.create_when.set()
        self.failing: set[str] = set()
        self.lost: list[str] = []
        self.slow: set[str] = set()
        self.away_for: set[str] = set()
        self.state = job_pb2.JOB_STATE_SUCCEEDED

    async def CreateGenerationJob(self, request: inference_service_pb2.CreateGenerationJobRequest) -> Any:
        if self.faults:
            raise self.faults.pop()
        if request.spec.prompt in self.away_for:
            raise Unavailable("inference")
        if request.job_id not in self.order:
            self.order.append(request.job_id)
        await self.create_when.wait()
        if request.job_id in self.jobs:
            return
        seeds = [request.spec.seed + i for i in range(request.spec.num_images)]
        images = [
            generation_job_pb2.GeneratedImage(key=f"{request.spec.prompt}#{seed}", seed=seed)
            for seed in seeds
        ]
        self.jobs[request.job_id] = generation_job_pb2.GenerationJob(
            job_id=request.job_id,
            spec=request.spec,
            state=job_pb2.JOB_STATE_FAILED if request.spec.prompt in self.failing else self.state,
            result=generation_job_pb2.GenerationResult(
                images=images, warnings=["all of it is sea"] if "at sea" in request.spec.prompt else []
            ),
            parent_job_id=request.parent_job_id,
        )
        if self.lost:
            self.jobs[request.job_id].state = job_pb2.JOB_STATE_FAILED
            self.jobs[request.job_id].error.reason = self.lost.pop()

    async def WatchGenerationJob(self, request: Any) -> AsyncIterator[Any]:
        if self.never_ends or self.jobs[request.job_id].spec.prompt in self.slow:
            await asyncio.Event().wait()
        yield inference_service_pb2.WatchGenerationJobResponse()

    async def GetGenerationJob(self, request: Any) -> Any:
        return inference_service_pb2.GetGenerationJobResponse(job=self.jobs[request.job_id])

    async def CancelGenerationJob(self, request: Any) -> None:
        if request.job_id not in self.jobs:
            raise NotFound(request.job_id)
        self.jobs[request.job_id].state = job_pb2.JOB_STATE_CANCELLED
        self.cancelled.append(request.job_id)

    @property
    def specs(self) -> list[generation_job_pb2.GenerationSpec]:
        return [self.jobs[job_id].spec for job_id in self.order]


class House:
    """A leader with all it stands on."""

    def __init__(self, spec: training_job_pb2.TrainingSpec) -> None:
        self.platform = MemoryPlatform()
        self.storage, self.inference, self.spec = FakeStorage(), FakeInference(), spec
        self.pauses: list[float] = []

        async def read_spec(_: JobRecord) -> training_job_pb2.TrainingSpec:
            return spec

        async def pause(seconds: float) -> None:
            self.pauses.append(seconds)

        siblings: Any = Siblings(self.storage, self.inference)  # type: ignore[arg-type]
        self.leader = TrainingLeader(
            self.platform.job_log, self.platform.progress, siblings, read_spec, pause=pause
        )

    async def admit(self) -> Revision:
        log = self.platform.job_log
        record = life.admit_training(
            REF, spec={}, options={}, limits=Limits(), request="", now_ms=log.now_ms()
        )
        return Revision(record, await log.write(record, 0), 0)

    async def read(self) -> Revision:
        revision = await self.platform.job_log.read(REF)
        assert revision is not None
        return revision

    async def train(self, previews_key: str = "") -> None:
        """Plays the trainer: takes the ready job and reports a model."""
        revision = await self.read()
        log = self.platform.job_log
        taken = life.take(revision.record, revision.sequence, "w", log.now_ms())
        sequence = await log.write(taken, revision.sequence)
        trained = training_job_pb2.TrainingResult(model=REF.id, steps=3, previews_key=previews_key)
        document = json_format.MessageToDict(trained, preserving_proto_field_name=True)
        await log.write(life.report_trained(taken, taken.epoch, document), sequence)


def a_spec(**changes: Any) -> training_job_pb2.TrainingSpec:
    concept = training_job_pb2.Concept(
        instance_data=training_job_pb2.ImageSource(
            archive_url="http://x/5", field="concepts[0].instance_data"
        ),
        instance_prompt="photo of sks dog",
        class_prompt="photo of a dog",
        num_class_images=5,
    )
    spec = training_job_pb2.TrainingSpec(
        base_model="pocket", concepts=[concept], resolution=256, seed=100, sample_batch_size=2,
        with_prior_preservation=True,
    )  # fmt: skip
    spec.MergeFrom(training_job_pb2.TrainingSpec(**changes))
    return spec


async def test_prepare_imports_draws_what_is_missing_and_makes_the_job_ready() -> None:
    house = House(a_spec())
    await house.leader.lead(await house.admit())
    record = (await house.read()).record
    assert (record.state, record.phase, record.ready) == (JobState.RUNNING, Phase.TRAIN, True)
    assert record.model == BASE.manifest_digest
    prepared = json_format.ParseDict(dict(record.prepared or {}), training_job_pb2.PreparedInputs())
    assert prepared.base_manifest_key == BASE.manifest_key
    [dataset] = prepared.datasets
    assert (dataset.instance_images, dataset.class_images) == (5, 5)
    drawn = house.storage.datasets[dataset.class_key]
    assert [image.key for image in drawn] == [f"photo of a dog#{100 + i}" for i in range(5)]
    assert [spec.num_images for spec in house.inference.specs] == [2, 2, 1]
    assert {(spec.width_px, spec.num_inference_steps) for spec in house.inference.specs} == {(256, 50)}


async def test_a_model_from_an_address_takes_the_place_of_the_base_model() -> None:
    spec = a_spec(resume_checkpoint_url="somebody/model", revision="v1", hub_subfolder="pipeline")
    house = House(spec)
    await house.leader.lead(await house.admit())
    record = (await house.read()).record
    assert house.storage.models == [("somebody/model", "pocket", "v1", "pipeline")]
    assert record.model == "e" * 64
    prepared = json_format.ParseDict(dict(record.prepared or {}), training_job_pb2.PreparedInputs())
    assert prepared.base_manifest_key == "dev/one"
    assert not prepared.HasField("start_checkpoint")
    assert {spec.model for spec in house.inference.specs} == {"imported-1"}


async def test_a_published_state_from_an_address_is_passed_on_to_the_trainer() -> None:
    house = House(a_spec(resume_checkpoint_url="https://models.example.org/checkpoint.zip"))
    await house.leader.lead(await house.admit())
    record = (await house.read()).record
    prepared = json_format.ParseDict(dict(record.prepared or {}), training_job_pb2.PreparedInputs())
    assert (prepared.base_manifest_key, prepared.start_checkpoint.step) == (BASE.manifest_key, 7)
    assert prepared.start_checkpoint.manifest_key == "state"


@pytest.mark.parametrize(
    ("fault", "field", "said"),
    [
        (BadInput("it is a program", "resume_checkpoint_url"), "resume_checkpoint_url", "it is a program"),
        (DeadlineExceeded("late"), "resume_checkpoint_url", "did not come in time"),
        (NotFound("pocket"), "base_model", "there is no model 'pocket'"),
    ],
)
async def test_a_model_that_cannot_be_imported_ends_the_job(fault: Exception, field: str, said: str) -> None:
    house = House(a_spec(resume_checkpoint_url="https://models.example.org/a.ckpt"))
    house.storage.faults.append(fault)
    await house.leader.lead(await house.admit())
    record = (await house.read()).record
    assert record.state is JobState.FAILED
    assert record.error is not None
    assert record.error.field == field
    assert said in record.error.message


@pytest.mark.parametrize(
    ("recipe", "use_captions", "expected"),
    [
        (training_job_pb2.RECIPE_DREAMBOOTH, False, False),
        (training_job_pb2.RECIPE_DREAMBOOTH, True, True),
        (training_job_pb2.RECIPE_EVERYDREAM, False, True),
    ],
    ids=["dreambooth", "with captions", "everydream"],
)
async def test_files_beside_pictures_are_read_where_they_matter(
    recipe: training_job_pb2.Recipe, use_captions: bool, expected: bool
) -> None:
    spec = a_spec(recipe=recipe, with_prior_preservation=False)
    spec.concepts[0].use_captions = use_captions
    house = House(spec)
    await house.leader.lead(await house.admit())
    assert house.storage.captions_read == [expected]


async def test_given_class_pictures_are_used_and_only_the_rest_is_drawn() -> None:
    spec = a_spec()
    spec.concepts[0].class_data.archive_url = "http://x/3"
    house = House(spec)
    await house.leader.lead(await house.admit())
    [images] = house.storage.datasets.values()
    assert [image.key for image in images[:3]] == ["given-0", "given-1", "given-2"]
    assert len(images) == 5


async def test_more_class_pictures_than_wanted_are_cut_to_the_first() -> None:
    spec = a_spec()
    spec.concepts[0].class_data.archive_url = "http://x/9"
    house = House(spec)
    await house.leader.lead(await house.admit())
    [images] = house.storage.datasets.values()
    assert [image.key for image in images] == [f"given-{i}" for i in range(5)]
    assert house.inference.order == []


async def test_without_prior_preservation_no_class_picture_is_read_or_drawn() -> None:
    spec = a_spec(with_prior_preservation=False)
    spec.concepts[0].class_data.archive_url = "http://x/3"
    house = House(spec)
    await house.leader.lead(await house.admit())
    assert house.storage.imports == ["http://x/5"]
    assert house.inference.order == []
    record = (await house.read()).record
    assert record.ready
    assert CLASS_DATA_IGNORED in (record.prepared or {})["warnings"]


async def test_a_class_term_of_weight_zero_asks_for_no_class_picture() -> None:
    house = House(a_spec(prior_loss_weight=0.0))
    await house.leader.lead(await house.admit())
    assert house.inference.order == []
    assert (await house.read()).record.ready


async def test_an_uploaded_picture_cannot_take_the_name_of_a_drawn_one() -> None:
    spec = a_spec()
    spec.concepts[0].class_data.archive_url = "http://x/3"
    house = House(spec)
    await house.leader.lead(await house.admit())
    [images] = house.storage.datasets.values()
    assert [image.id for image in images if image.id.startswith("/")] == [
        "/drawn/0000.png",
        "/drawn/0001.png",
    ]


async def test_pictures_drawn_before_are_found_again() -> None:
    house = House(a_spec())
    await house.leader.lead(await house.admit())
    again = House(a_spec())
    again.storage.refs = house.storage.refs
    await again.leader.lead(await again.admit())
    assert again.inference.order == []
    assert again.storage.datasets == house.storage.datasets


async def test_finish_draws_proof_and_samples_and_ends_the_job() -> None:
    samples = [generation_job_pb2.GenerationSpec(prompt="sks dog on the moon", num_images=2, seed=11),
               generation_job_pb2.GenerationSpec(prompt="sks dog at sea")]  # fmt: skip
    house = House(a_spec(samples=samples, with_prior_preservation=False))
    await house.leader.lead(await house.admit())
    await house.train()
    await house.leader.lead(await house.read())
    record = (await house.read()).record
    assert (record.state, record.result_key) == (JobState.SUCCEEDED, "result")
    result = json_format.ParseDict(house.storage.documents["result"], training_job_pb2.TrainingResult())
    assert [sample.image.seed for sample in result.samples][:2] == [11, 12]
    assert 0 <= result.samples[2].image.seed <= 65535
    assert result.test_image.image.key == "photo of sks dog#100"
    assert list(result.warnings) == ["sample 2: all of it is sea"]
    assert {spec.model for spec in house.inference.specs} == {REF.id}
    stages = [Stage.DEPLOYING, Stage.SAMPLING]
    assert record.stage == stages[-1]


async def test_finish_lists_what_was_drawn_while_training() -> None:
    house = House(a_spec(with_prior_preservation=False))
    preview = training_job_pb2.PreviewImage(step=250, prompt_index=1, name="preview-000250-2.png")
    preview.image.key = "drawn"
    house.storage.documents["drawn while training"] = {"previews": as_document([preview])}
    await house.leader.lead(await house.admit())
    await house.train(previews_key="drawn while training")
    await house.leader.lead(await house.read())
    result = json_format.ParseDict(house.storage.documents["result"], training_job_pb2.TrainingResult())
    assert list(result.previews) == [preview]


async def test_numbers_of_a_phase_are_not_taken_for_those_of_the_next_run() -> None:
    house = House(a_spec_with_samples())
    await house.leader.lead(await trained(house))
    record = (await house.read()).record
    again = replace(record, times=replace(record.times, queued=house.platform.job_log.now_ms() + 1))
    shown = await latest_progress(house.platform.progress, record)
    assert shown is not None
    assert (shown.step, shown.total_steps) == (2, 2)
    assert await latest_progress(house.platform.progress, again) is None


async def test_a_second_leader_asks_for_the_same_drawings() -> None:
    spec = a_spec(samples=[generation_job_pb2.GenerationSpec(prompt="x")], with_prior_preservation=False)
    house, other = House(spec), House(spec)
    for each in (house, other):
        await each.leader.lead(await each.admit())
        await each.train()
        await each.leader.lead(await each.read())
    assert house.inference.order == other.inference.order
    assert [item.SerializeToString() for item in house.inference.specs] == [
        item.SerializeToString() for item in other.inference.specs
    ]


async def test_unusable_data_fails_the_job_with_its_field() -> None:
    house = House(a_spec())
    house.storage.faults = [BadInput("the archive holds no readable image", "concepts[0].instance_data")]
    await house.leader.lead(await house.admit())
    record = (await house.read()).record
    assert record.state is JobState.FAILED
    assert record.error == JobFailure(
        "BAD_INPUT",
        "concepts[0].instance_data: the archive holds no readable image",
        "concepts[0].instance_data",
    )
    assert house.pauses == []


async def test_an_unknown_base_model_fails_the_job() -> None:
    house = House(a_spec(base_model="nobody"))
    house.spec.base_model = "nobody"
    await house.leader.lead(await house.admit())
    error = (await house.read()).record.error
    assert error is not None
    assert (error.field, error.message) == ("base_model", "base_model: there is no model 'nobody'")


async def test_a_sibling_that_is_away_is_asked_again() -> None:
    house = House(a_spec())
    house.storage.faults = [Unavailable("storage"), Unavailable("storage")]
    await house.leader.lead(await house.admit())
    assert (await house.read()).record.ready
    assert house.pauses == [1, 2]


async def test_a_sibling_that_stays_away_leaves_the_job_for_the_next_tick() -> None:
    house = House(a_spec())
    house.storage.faults = [Unavailable("storage")] * ATTEMPTS
    await house.leader.lead(await house.admit())
    assert (await house.read()).record.state is JobState.RUNNING
    await house.leader.lead(await house.read())
    assert (await house.read()).record.ready


async def test_a_bug_ends_the_job_with_the_fixed_text() -> None:
    house = House(a_spec())
    house.storage.faults = [KeyError("secret detail") for _ in range(ATTEMPTS)]
    await house.leader.lead(await house.admit())
    error = (await house.read()).record.error
    assert error is not None
    assert (error.reason, error.message) == ("INTERNAL", "internal error")


async def test_a_drawing_that_fails_fails_the_job() -> None:
    house = House(a_spec())
    house.inference.state = job_pb2.JOB_STATE_FAILED
    await house.leader.lead(await house.admit())
    record = (await house.read()).record
    assert record.state is JobState.FAILED
    assert record.error is not None
    assert "could not be drawn" in record.error.message


async def test_a_drawing_that_workers_were_lost_with_is_asked_for_again() -> None:
    house = House(a_spec())
    house.inference.lost = ["WORKER_LOST", "INTERNAL"]
    await house.leader.lead(await house.admit())
    assert (await house.read()).record.ready
    assert len(house.inference.order) == 5


async def test_a_drawing_that_is_lost_every_time_fails_the_job() -> None:
    house = House(a_spec())
    house.inference.lost = ["WORKER_LOST"] * DRAWING_TRIES
    await house.leader.lead(await house.admit())
    assert (await house.read()).record.state is JobState.FAILED
    assert len(house.inference.order) == DRAWING_TRIES


async def begun(house: House) -> "asyncio.Task[None]":
    """A leader that waits for a drawing."""
    leading = asyncio.create_task(house.leader.lead(await house.admit()))
    while not house.inference.order:
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    return leading


async def cancel_job(house: House) -> None:
    revision = await house.read()
    await house.platform.job_log.write(life.cancel(revision.record, 0), revision.sequence)


async def ended(leading: "asyncio.Task[None]") -> None:
    leading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leading


async def test_a_cancelled_job_takes_its_drawings_with_it() -> None:
    house = House(a_spec())
    house.inference.never_ends = True
    leading = await begun(house)
    await cancel_job(house)
    await ended(leading)
    assert house.inference.cancelled == house.inference.order


async def test_a_drawing_that_was_just_being_asked_for_ends_with_its_cancelled_job() -> None:
    house = House(a_spec())
    house.inference.create_when.clear()
    leading = await begun(house)
    await cancel_job(house)
    leading.cancel()
    await asyncio.sleep(0.01)
    house.inference.create_when.set()
    with pytest.raises(asyncio.CancelledError):
        await leading
    assert house.inference.cancelled == house.inference.order == list(house.inference.jobs)


async def test_a_leader_that_leaves_leaves_its_drawings_to_the_next() -> None:
    house = House(a_spec())
    house.inference.never_ends = True
    await ended(await begun(house))
    assert house.inference.cancelled == []
    house.inference.never_ends = False
    await house.leader.lead(await house.read())
    assert (await house.read()).record.ready


def a_spec_with_samples() -> training_job_pb2.TrainingSpec:
    samples = [generation_job_pb2.GenerationSpec(prompt=prompt) for prompt in ("on the moon", "at sea")]
    return a_spec(samples=samples, with_prior_preservation=False)


async def trained(house: House) -> Revision:
    await house.leader.lead(await house.admit())
    await house.train()
    return await house.read()


async def test_an_outage_at_one_sample_does_not_end_the_others() -> None:
    house = House(a_spec_with_samples())
    revision = await trained(house)
    house.inference.away_for, house.inference.slow = {"on the moon"}, {"at sea"}
    await house.leader.lead(revision)
    assert len(house.pauses) == ATTEMPTS
    assert house.inference.cancelled == []
    house.inference.away_for, house.inference.slow = set(), set()
    await house.leader.lead(await house.read())
    assert (await house.read()).record.state is JobState.SUCCEEDED


async def test_the_other_samples_of_a_job_that_fails_are_ended() -> None:
    house = House(a_spec_with_samples())
    revision = await trained(house)
    house.inference.failing, house.inference.slow = {"on the moon"}, {"at sea"}
    await house.leader.lead(revision)
    assert (await house.read()).record.state is JobState.FAILED
    assert child_id(revision.record, "sample/1") in house.inference.cancelled


async def test_a_frozen_sibling_is_no_fault_of_the_job() -> None:
    house = House(a_spec())
    house.inference.faults = [DeadlineExceeded("inference"), Cancelled("inference")]
    await house.leader.lead(await house.admit())
    assert (await house.read()).record.ready


async def test_data_that_does_not_come_in_time_fails_the_job_with_its_field() -> None:
    house = House(a_spec())
    house.storage.faults = [DeadlineExceeded("storage")]
    await house.leader.lead(await house.admit())
    error = (await house.read()).record.error
    assert error is not None
    assert (error.reason, error.field) == ("BAD_INPUT", "concepts[0].instance_data")


async def test_a_leader_does_not_fail_a_job_that_another_has_brought_further() -> None:
    house = House(a_spec(with_prior_preservation=False))
    revision = await house.admit()
    import_dataset = house.storage.import_dataset

    async def brought_further(*args: Any, **kwargs: Any) -> artifact_pb2.Dataset:
        house.storage.import_dataset = import_dataset  # type: ignore[method-assign]
        await house.leader.lead(revision)
        raise BadInput("the server answered 503 to this one", "concepts[0].instance_data")

    house.storage.import_dataset = brought_further  # type: ignore[method-assign]
    await house.leader.lead(revision)
    record = (await house.read()).record
    assert (record.state, record.ready) == (JobState.RUNNING, True)


async def test_a_job_that_has_ended_is_left_alone() -> None:
    house = House(a_spec())
    revision = await house.admit()
    await house.platform.job_log.write(life.cancel(revision.record, 0), revision.sequence)
    await house.leader.lead(revision)
    assert (await house.read()).record.state is JobState.CANCELLED
    assert house.storage.imports == []


def test_ids_of_drawings_differ_between_names_and_runs_only() -> None:
    record = life.admit_training(REF, spec={}, options={}, limits=Limits(), request="", now_ms=0)
    failed = life.fail(record, JobFailure("X", "x"), 1)
    again = life.retry(failed, 2)
    names = {child_id(record, "a"), child_id(record, "b"), child_id(again, "a")}
    assert len(names) == 3
    assert child_id(record, "a") in names


@pytest.mark.parametrize(
    ("indices", "longest", "runs"),
    [
        ([], 3, []),
        ([0, 1, 2, 3], 3, [(0, 3), (3, 1)]),
        ([1, 2, 5], 10, [(1, 2), (5, 1)]),
        ([4, 5], 0, [(4, 1), (5, 1)]),
    ],
    ids=["none", "cut", "gap", "one by one"],
)
def test_missing_pictures_are_asked_for_in_runs(
    indices: list[int], longest: int, runs: list[tuple[int, int]]
) -> None:
    assert runs_of(indices, longest) == runs


def test_a_class_picture_is_named_by_everything_its_pixels_depend_on() -> None:
    recipe = ClassImages("digest", "pocket", "a dog", 512, 7)
    others = [
        ClassImages("other", "pocket", "a dog", 512, 7),
        ClassImages("digest", "pocket", "a cat", 512, 7),
        ClassImages("digest", "pocket", "a dog", 256, 7),
        ClassImages("digest", "pocket", "a dog", 512, 8),
    ]
    names = {recipe.name(0), recipe.name(1), *(other.name(0) for other in others)}
    assert len(names) == 6
    assert ClassImages("digest", "renamed", "a dog", 512, 7).name(0) == recipe.name(0)
