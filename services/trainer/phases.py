"""The two phases of a training that the api leads: `prepare` before a trainer has it, `finish` after.

``prepare`` fetches the data and has missing class pictures drawn, ``finish`` proves the model with a test picture
and draws the samples. Every step is idempotent: imports and class pictures are create-only, drawings have fixed ids,
and the job log's compare-and-set lets one outcome win. So two replicas may lead the same job, and one that dies is
replaced by whoever starts again from the record. Pictures are drawn by the inference service, as jobs of their own.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from google.protobuf import json_format
from likeness.inference.v1 import generation_job_pb2, inference_service_pb2_grpc
from likeness.job.v1 import job_pb2
from likeness.storage.v1 import artifact_pb2, model_pb2
from likeness.training.v1 import training_job_pb2

from services.adapters.storage_client import StorageClient
from services.domain import life_cycle as life
from services.domain.errors import (
    INTERNAL_TEXT,
    OUTAGES,
    AlreadyExists,
    BadInput,
    Conflict,
    DeadlineExceeded,
    Internal,
    InvalidSpec,
    LikenessError,
    NotFound,
    row_of,
)
from services.domain.job import (
    JobFailure,
    JobRecord,
    JobRef,
    JobState,
    Phase,
    Stage,
    bounded_remarks,
    whole_fraction,
)
from services.domain.ports import JobLog, ProgressLog, Revision
from services.trainer.drawing_jobs import DrawingJobs, Led, led_of
from services.trainer.drawings import (
    IMAGES_PER_DRAWING,
    ClassImages,
    has_prior,
    proof_drawing,
    runs_of,
    sample_drawing,
)
from services.trainer.preview_uploads import from_document

logger = logging.getLogger(__name__)

T = TypeVar("T")

ATTEMPTS: Final = 5
"""How often a phase is tried after faults that may pass, in all 31 s of waiting. After that a sibling that does not
answer leaves the job where it is, for the next tick to begin again; anything else ends it."""

IMPORT_TIMEOUT_S: Final = 1800.0
"""Longest time for one archive: download, checks, decoding, storing."""

DRAWN_FOLDER: Final = "/drawn"
"""Where a data set has its drawn pictures; an uploaded one never has an absolute name."""

CLASS_DATA_IGNORED: Final = "the class pictures given are not used: prior preservation is off"

ReadSpec = Callable[[JobRecord], Awaitable[training_job_pb2.TrainingSpec]]


@dataclass(frozen=True, slots=True)
class Siblings:
    """The services that the leader asks."""

    storage: StorageClient
    inference: inference_service_pb2_grpc.InferenceServiceStub


class TrainingLeader:
    """Leads trainings through `prepare` and `finish`.

    Args:
        job_log: where the records are.
        progress: where moving numbers go.
        siblings: storage and inference.
        read_spec: the specification of a record, wherever it is kept.
        pause: how to wait some seconds between two tries.
    """

    def __init__(
        self,
        job_log: JobLog,
        progress: ProgressLog,
        siblings: Siblings,
        read_spec: ReadSpec,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._log = job_log
        self._progress = progress
        self._siblings = siblings
        self._read_spec = read_spec
        self._pause = pause
        self._drawing_jobs = DrawingJobs(siblings.inference, pause)
        self._stopping: set[asyncio.Task[None]] = set()

    async def lead(self, revision: Revision) -> None:
        """Does all that is left of the phase the job is in; returns when the job has moved on.

        Faults that may pass are tried again; others end the job FAILED. Drawings that are under way when it ends, or
        is cancelled, are ended if the job has ended too; else whoever leads the job next waits for them.
        """
        led = led_of(revision.record)
        try:
            await self._lead_persistently(led)
        finally:
            if self._drawing_jobs.under_way(led):
                task = asyncio.create_task(self._stop_unneeded(led))
                self._stopping.add(task)
                task.add_done_callback(self._stopping.discard)
                await asyncio.shield(task)

    async def _stop_unneeded(self, led: Led) -> None:
        try:
            needed = await self._present(led) is not None
        except LikenessError as error:
            logger.warning("drawings were left", extra={"job_id": led[0].id, "error": str(error)})
            needed = True
        if needed:
            self._drawing_jobs.leave(led)
        else:
            await self._drawing_jobs.stop(led)

    async def _lead_persistently(self, led: Led) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self._lead_once(led)
            except Conflict:
                continue
            except Exception as error:
                known = error if isinstance(error, LikenessError) else Internal(INTERNAL_TEXT)
                if _is_final(known, attempt):
                    _log_end(led[0], known)
                    return await self._fail(led, known)
                logger.warning(
                    "phase met a fault that may pass", extra={"job_id": led[0].id, "error": str(error)}
                )
                await self._pause(2 ** (attempt - 1))

    async def _lead_once(self, led: Led) -> None:
        revision = await self._present(led)
        if revision is None:
            return
        if revision.record.phase is Phase.PREPARE:
            await self._prepare(revision)
        elif revision.record.phase is Phase.FINISH:
            await self._finish(revision)

    async def _present(self, led: Led) -> Revision | None:
        """The newest revision; None when the job has ended, or is in another phase or run by now."""
        revision = await self._log.read(led[0])
        if revision is None or led_of(revision.record) != led:
            return None
        lives = revision.record.state in (JobState.QUEUED, JobState.RUNNING)
        return revision if lives else None

    async def _fail(self, led: Led, error: LikenessError) -> None:
        """Ends the job; one that another leader has brought further meanwhile is left alone."""
        revision = await self._present(led)
        if revision is None:
            return
        violations = error.violations if isinstance(error, InvalidSpec) else ()
        failure = JobFailure(row_of(error).reason, str(error), violations[0].field if violations else "")
        await self._log.write(life.fail(revision.record, failure, self._log.now_ms()), revision.sequence)

    # -- prepare ---------------------------------------------------------------------------------------------

    async def _prepare(self, revision: Revision) -> None:
        if revision.record.state is JobState.QUEUED:
            revision = await self._write(revision, life.begin_preparing(revision.record, self._log.now_ms()))
        spec = await self._read_spec(revision.record)
        base, start = await self._start(revision.record.project, spec)
        plans = await _all_of(
            [self._plan(revision.record.project, spec, concept, base) for concept in spec.concepts]
        )
        missing = sum(len(plan.missing) for plan in plans)
        if missing:
            why = f"drawing {missing} class pictures"
            revision = await self._write(revision, life.enter_stage(revision.record, Stage.CLASS_IMAGES, why))
            await self._draw_missing(revision, plans, missing, spec.sample_batch_size)
        prepared = training_job_pb2.PreparedInputs(
            base_manifest_key=base.manifest_key,
            datasets=[
                await self._dataset_ref(revision.record.project, n, plan) for n, plan in enumerate(plans)
            ],
            warnings=bounded_remarks(warning for plan in plans for warning in plan.warnings),
            start_checkpoint=start,
        )
        ready = life.make_ready(revision.record, _to_json(prepared), base.manifest_digest, self._log.now_ms())
        await self._write(revision, ready)

    async def _start(
        self, project: str, spec: training_job_pb2.TrainingSpec
    ) -> tuple[model_pb2.Model, training_job_pb2.CheckpointRef | None]:
        """The model that the training begins with, and the state that it goes on from, if it is given one."""
        if not spec.resume_checkpoint_url:
            return await self._base_model(project, spec.base_model), None
        try:
            imported = await self._siblings.storage.import_model(
                project,
                spec.resume_checkpoint_url,
                base_model=spec.base_model,
                revision=spec.revision,
                subfolder=spec.hub_subfolder,
                timeout_s=IMPORT_TIMEOUT_S,
            )
        except NotFound as error:
            raise BadInput(f"there is no model '{spec.base_model}'", "base_model") from error
        except DeadlineExceeded as error:
            raise BadInput("the model did not come in time", "resume_checkpoint_url") from error
        return imported.model, imported.checkpoint if imported.HasField("checkpoint") else None

    async def _base_model(self, project: str, name: str) -> model_pb2.Model:
        try:
            return await self._siblings.storage.get_model(project, name)
        except NotFound as error:
            raise BadInput(f"there is no model '{name}'", "base_model") from error

    async def _plan(
        self,
        project: str,
        spec: training_job_pb2.TrainingSpec,
        concept: training_job_pb2.Concept,
        base: model_pb2.Model,
    ) -> "_ConceptPlan":
        """Imports what the concept brings, and looks which class pictures were drawn before."""
        captions = concept.use_captions or spec.recipe == training_job_pb2.RECIPE_EVERYDREAM
        instance = await self._import(project, concept.instance_data, captions, spec.min_usable_images)
        recipe = ClassImages(
            base_digest=base.manifest_digest,
            model=base.model,
            prompt=concept.class_prompt,
            size_px=spec.resolution,
            seed=concept.seed if concept.HasField("seed") else spec.seed,
        )
        if not has_prior(spec, concept):
            ignored = [CLASS_DATA_IGNORED] if concept.HasField("class_data") else []
            return _ConceptPlan(instance, recipe, warnings=(*ignored, *instance.warnings))
        given = artifact_pb2.Dataset()
        if concept.HasField("class_data"):
            given = await self._import(project, concept.class_data, False, 0)
        wanted = concept.num_class_images or len(given.images)
        warnings = (*instance.warnings, *given.warnings)
        plan = _ConceptPlan(instance, recipe, tuple(given.images[:wanted]), wanted, warnings=warnings)
        for index in plan.missing:
            key = await self._drawn_before(project, recipe, index)
            if key:
                plan.drawn[index] = key
        return plan

    async def _import(
        self, project: str, source: training_job_pb2.ImageSource, captions: bool, at_least: int
    ) -> artifact_pb2.Dataset:
        try:
            return await self._siblings.storage.import_dataset(
                project,
                source,
                read_captions=captions,
                min_usable_images=at_least,
                timeout_s=IMPORT_TIMEOUT_S,
            )
        except DeadlineExceeded as error:
            raise BadInput("the pictures did not come in time", source.field) from error

    async def _draw_missing(
        self, revision: Revision, plans: Sequence["_ConceptPlan"], total: int, in_flight: int
    ) -> None:
        record = revision.record
        counter = _Counter(total, report=lambda done, total: self._report(revision, done, total))
        await counter.add(0)
        for concept, plan in enumerate(plans):
            for first, length in runs_of(plan.missing, min(in_flight, IMAGES_PER_DRAWING)):
                name = f"class/{concept}/{first}/{length}"
                drawn = await self._drawing_jobs.draw(record, name, plan.class_images.drawing(first, length))
                for index, image in enumerate(drawn.images, start=first):
                    plan.drawn[index] = await self._keep(record.project, plan.class_images, index, image.key)
                await counter.add(length)

    async def _drawn_before(self, project: str, recipe: ClassImages, index: int) -> str:
        document = await self._siblings.storage.get_ref(project, "class_images", recipe.name(index))
        return str(document["key"]) if document else ""

    async def _keep(self, project: str, recipe: ClassImages, index: int, key: str) -> str:
        document = {"key": key, "prompt": recipe.prompt, "seed": recipe.seed_of(index)}
        try:
            await self._siblings.storage.put_ref(project, "class_images", recipe.name(index), document)
        except AlreadyExists:  # another job drew it meanwhile: once stored, it is the input of all
            return await self._drawn_before(project, recipe, index)
        return key

    async def _dataset_ref(
        self, project: str, index: int, plan: "_ConceptPlan"
    ) -> training_job_pb2.DatasetRef:
        pictures = [
            *plan.given,
            *(
                artifact_pb2.DatasetImage(id=f"{DRAWN_FOLDER}/{number:04d}.png", key=key)
                for number, key in sorted(plan.drawn.items())
            ),
        ]
        class_key = ""
        if pictures:
            class_key = (await self._siblings.storage.create_dataset(project, pictures)).key
        return training_job_pb2.DatasetRef(
            concept_index=index,
            instance_key=plan.instance.key,
            class_key=class_key,
            instance_images=len(plan.instance.images),
            class_images=len(pictures),
        )

    # -- finish ----------------------------------------------------------------------------------------------

    async def _finish(self, revision: Revision) -> None:
        record = revision.record
        spec = await self._read_spec(record)
        result = json_format.ParseDict(dict(record.trained or {}), training_job_pb2.TrainingResult())
        test = proof_drawing(spec, result, record)
        proof = await self._drawing_jobs.draw(record, "test", test)
        [image] = proof.images
        result.test_image.CopyFrom(training_job_pb2.SampleImage(spec=test, image=image))
        if spec.samples and record.stage is not Stage.SAMPLING:
            why = f"drawing {sum(max(1, sample.num_images) for sample in spec.samples)} sample pictures"
            revision = await self._write(revision, life.enter_stage(record, Stage.SAMPLING, why))
        await self._add_samples(revision, spec, result)
        if result.previews_key:
            previews = await self._siblings.storage.read_document(result.previews_key)
            result.previews.extend(from_document(previews))
        document = await self._siblings.storage.upload_document(record.project, _to_json(result))
        done = life.finish(revision.record, None, document.key, self._log.now_ms())
        await self._write(revision, done)

    async def _add_samples(
        self, revision: Revision, spec: training_job_pb2.TrainingSpec, result: training_job_pb2.TrainingResult
    ) -> None:
        """Draws the samples; puts them and what was remarked upon in drawing them into the result."""
        record = revision.record
        wanted = [sample_drawing(sample, index, result, record) for index, sample in enumerate(spec.samples)]
        drawn = _Counter(
            total=sum(drawing.num_images for drawing in wanted),
            report=lambda done, total: self._report(revision, done, total),
        )

        async def draw(
            index: int, drawing: generation_job_pb2.GenerationSpec
        ) -> generation_job_pb2.GenerationResult:
            group = await self._drawing_jobs.draw(record, f"sample/{index}", drawing)
            await drawn.add(len(group.images))
            for image in group.images:
                await self._progress.publish_progress(record.project, record.id, {"image_key": image.key})
            return group

        groups = await _all_of([draw(index, drawing) for index, drawing in enumerate(wanted)])
        for index, (drawing, group) in enumerate(zip(wanted, groups, strict=True)):
            for image in group.images:
                result.samples.add(sample_index=index, spec=drawing, image=image)
            result.warnings.extend(f"sample {index + 1}: {warning}" for warning in group.warnings)

    # -- small things ----------------------------------------------------------------------------------------

    async def _write(self, revision: Revision, record: JobRecord) -> Revision:
        sequence = await self._log.write(record, revision.sequence)
        return Revision(record, sequence, self._log.now_ms())

    async def _report(self, revision: Revision, done: int, total: int) -> None:
        record = revision.record
        progress = job_pb2.Progress(
            stage=f"JOB_STAGE_{record.stage.value}",
            step=done,
            total_steps=total,
            fraction=whole_fraction(record.stage, done, total),
        )
        progress.report_time.FromMilliseconds(self._log.now_ms())
        await self._progress.publish_progress(record.project, record.id, _to_json(progress))


@dataclass(frozen=True, slots=True)
class _ConceptPlan:
    """One concept: what it brought, and which class pictures it needs.

    Attributes:
        class_images: how class pictures are drawn.
        given: class pictures that the caller gave.
        wanted: class pictures in all.
        drawn: number of a drawn picture -> its key.
    """

    instance: artifact_pb2.Dataset
    class_images: ClassImages
    given: tuple[artifact_pb2.DatasetImage, ...] = ()
    wanted: int = 0
    drawn: dict[int, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def missing(self) -> list[int]:
        """Numbers of the pictures that are still to be drawn."""
        return [n for n in range(self.wanted - len(self.given)) if n not in self.drawn]


@dataclass(slots=True)
class _Counter:
    """Counts pictures over several drawings and reports each change."""

    total: int
    report: Callable[[int, int], Awaitable[None]]
    done: int = 0

    async def add(self, count: int) -> None:
        self.done += count
        await self.report(self.done, self.total)


async def _all_of(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Does several things at once; when one fails the others are stopped before its error goes on."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _log_end(ref: JobRef, error: LikenessError) -> None:
    """A fault of the caller's is the job's news; one of ours is an error with its trace."""
    fields = {"job_id": ref.id, "reason": row_of(error).reason}
    if row_of(error).fails_job:
        logger.info("phase ended the job", extra=fields)
    else:
        logger.error("phase failed", extra=fields, exc_info=True)


def _is_final(error: LikenessError, attempt: int) -> bool:
    """Whether an error ends the job: its own fault at once, an unforeseen one after some tries, an outage never."""
    if isinstance(error, OUTAGES):
        return False
    return row_of(error).fails_job or attempt == ATTEMPTS


def _to_json(message: Any) -> dict[str, Any]:
    return json_format.MessageToDict(message, preserving_proto_field_name=True)
