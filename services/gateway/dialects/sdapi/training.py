"""Trainings of this dialect: `fine_tune`, its siblings and their status words, as canonical words and back.

A training's id is also the id of its model. The eight status values are told from a job's state and stage; where
several are passed in one step, a webhook is told of each.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from likeness.job.v1 import job_pb2
from likeness.storage.v1 import model_pb2
from likeness.training.v1 import training_job_pb2 as pb

from services.domain.errors import InvalidSpec, Violation
from services.domain.job import JobRecord, JobState, Stage
from services.domain.rules import MAX_SEED, Range
from services.domain.training_spec import LOW_RANK, resolve_training_spec
from services.gateway.dialects.base import FINAL_STATES, File, Submission
from services.gateway.dialects.sdapi.envelope import check_fields, spoken, whole_seconds
from services.gateway.dialects.sdapi.values import Parameter, Reading, read_body

ENDPOINT = "fine_tune"
"""Name of all real trainings in `JobOrigin.endpoint`, whichever path they came in by."""
SANDBOX = "sandbox_fine_tune"
"""The same for trainings of the sandbox, which are short, cheap, and kept apart."""
SANDBOX_MARK = "SBX"
"""How ids of the sandbox begin; no other training's id does."""
MAX_IMAGES = 30
MAX_STEPS = 2000
FEWEST_USABLE = 3
STEPS_PER_IMAGE = 200
FEWEST_STEPS = 400
DEFAULT_SIZE_PX = 512
DEFAULT_CLASS_IMAGES = 100
MAX_MODULE_STEPS = 5000
UNET_STEPS, TEXT_ENCODER_STEPS = 1500, 350
V2_LEARNING_RATE = 1e-6
EXPECTED_MINUTES, EXPECTED_LORA_MINUTES = 25, 30
LOG_JOINT = " /n "
"""Between two entries of a training's log: a slash and the letter n, as clients expect them."""

STATUSES = (
    "deploying_gpu",
    "training_started",
    "training_success",
    "trained_model_compressing",
    "trained_model_uploading",
    "trained_model_uploaded",
    "deploying_model",
    "model_ready",
)
READY = len(STATUSES)
"""Number of the last status; they count from 1."""
ENDED = READY + 1
"""Number of the event that there will be no model."""
FAILED, CANCELLED = "training_failed", "training_cancelled"

_OF_STAGE: Mapping[str, int] = {
    Stage.QUEUED: 1,
    Stage.FETCHING: 1,
    Stage.CLASS_IMAGES: 2,
    Stage.TRAINING: 2,
    Stage.EXPORTING: 4,
    Stage.UPLOADING: 5,
    Stage.DEPLOYING: 7,
    Stage.SAMPLING: 7,
}
_TYPES: Mapping[str, str] = {
    **dict.fromkeys(("men", "man", "male", "boy"), "a man"),
    **dict.fromkeys(("female", "woman", "women", "girl"), "a woman"),
    "couple": "a couple",
}
_SPELLED: Mapping[str, str] = {
    "instance_data": "images",
    "base_model": "base_model_id",
    "max_train_steps": "max_train_steps",
    "learning_rate": "learning_rate_unet",
    "text_encoder_learning_rate": "learning_rate_text_encoder",
    "unet_steps": "steps_unet",
    "text_encoder_steps": "steps_text_encoder",
}
_STEP = re.compile(r"[a-z_]+")

_COMMON = (
    Parameter(
        "instance_prompt",
        "text",
        "How the subject is called, for instance `photo of adhik person`.",
        required=True,
        length=300,
    ),
    Parameter(
        "class_prompt",
        "text",
        "What the subject is one of; absent: derived from `training_type`.",
        length=300,
    ),
    Parameter("images", "links", f"Links to 1 to {MAX_IMAGES} pictures of the subject.", required=True),
    Parameter(
        "seed",
        "integer",
        "Seed of every random decision; absent: drawn.",
        limit=Range("seed", -MAX_SEED, MAX_SEED),
    ),
    Parameter("training_type", "word", "men, female, couple, or null for anything."),
    Parameter("webhook", "link", "Address that is told of every change of status."),
)
_BASE = Parameter(
    "base_model_id", "text", "Catalogue id to start from; absent: the deployment's default.", length=128
)
_STEPS = Parameter(
    "max_train_steps",
    "integer",
    f"Optimizer updates, at most {MAX_STEPS}; absent or 0: {STEPS_PER_IMAGE} for each picture.",
    limit=Range("max_train_steps", 0),
)
_RATE = Range("learning_rate", 0, 1e-3, above=True)

SANDBOX_FINE_TUNE = (*_COMMON, _STEPS)
FINE_TUNE = (*_COMMON, _BASE, _STEPS)
FINE_TUNE_V2 = (
    *_COMMON,
    _BASE,
    Parameter(
        "learning_rate_unet",
        "number",
        "Learning rate of the UNet, at most 1e-3; absent: the base model's, else 1e-6.",
        limit=_RATE,
    ),
    Parameter(
        "steps_unet",
        "integer",
        "Updates of the UNet.",
        UNET_STEPS,
        limit=Range("steps_unet", 1, MAX_MODULE_STEPS),
    ),
    Parameter(
        "learning_rate_text_encoder",
        "number",
        "Learning rate of the text encoder, at most 1e-3.",
        V2_LEARNING_RATE,
        limit=_RATE,
    ),
    Parameter(
        "steps_text_encoder",
        "integer",
        "Updates of the text encoder, after which it is frozen; 0: it is not trained.",
        TEXT_ENCODER_STEPS,
        limit=Range("steps_text_encoder", 0, MAX_MODULE_STEPS),
    ),
)
LORA_FINE_TUNE = (
    *_COMMON,
    _BASE,
    _STEPS,
    Parameter("base_model_type", "text", "normal or sdxl: what the default base must be.", length=100),
    Parameter(
        "negative_prompt", "text", "What the picture that proves the model does not show.", length=1000
    ),
    Parameter("lora_type", "text", "lora, or lycoris for the 3x3 convolutions too.", "lora", length=100),
)
_METHODS = {"lora": pb.TRAINING_METHOD_LORA, "lycoris": pb.TRAINING_METHOD_LOCON}
_BASE_TYPES = ("normal", "sdxl")

EXAMPLE = {
    "key": "lk-...",
    "instance_prompt": "photo of adhik person",
    "class_prompt": "photo of person",
    "base_model_id": "sd-v1-5",
    "images": ["https://files.example.org/1.png", "https://files.example.org/2.png"],
    "seed": "0",
    "training_type": "men",
    "max_train_steps": "400",
    "webhook": "",
}


@dataclass(frozen=True, slots=True)
class Wish:
    """A request for a training, understood as far as that goes without its base model.

    Attributes:
        base_model: its id; "": the deployment's default.
        webhook: address that is told of every status; "": none.
        values: all other values.
        rows: parameters that it was read by, which say of what kind it is.
    """

    base_model: str
    webhook: str
    values: Mapping[str, Any]
    rows: Sequence[Parameter]


def read_training(given: Mapping[str, Any], rows: Sequence[Parameter] = FINE_TUNE) -> Wish:
    """Reads the body of a start.

    Args:
        given: the body.
        rows: the parameters of its path: :data:`FINE_TUNE`, :data:`FINE_TUNE_V2`, :data:`LORA_FINE_TUNE` or
            :data:`SANDBOX_FINE_TUNE`.

    Raises:
        InvalidSpec: with every fault, in the caller's spelling.
    """
    reading = read_body(given, rows)
    _check_images(reading)
    for name, words in (("lora_type", _METHODS), ("base_model_type", _BASE_TYPES)):
        if reading.values.get(name, "").lower() not in ("", *words):
            reading.fault(name, "must be one of " + ", ".join(words))
    check_fields(reading.missing, reading.faults)
    values = reading.values
    return Wish(values.get("base_model_id", ""), values.get("webhook", ""), values, rows)


def _check_images(reading: Reading) -> None:
    images = reading.values.get("images")
    if images is not None and not 1 <= len(images) <= MAX_IMAGES:
        reading.fault("images", f"must have 1 to {MAX_IMAGES} elements")


def submission_of(
    wish: Wish, base: model_pb2.Model, drawn_seed: int, sandbox_steps: int = MAX_STEPS
) -> Submission:
    """The training that is wished for.

    Args:
        wish: what was asked for.
        base: the model it starts from, whose catalogue entry says what suits trainings of it.
        drawn_seed: seed of a request that names none, or a negative one.
        sandbox_steps: most updates of a training of the sandbox.

    Raises:
        InvalidSpec: with every fault, in the caller's spelling.
    """
    values, defaults = wish.values, base.manifest.training_defaults
    seed = values.get("seed", -1)
    spec = pb.TrainingSpec(
        recipe=pb.RECIPE_DREAMBOOTH,
        method=pb.TRAINING_METHOD_FULL,
        base_model=base.model,
        seed=seed if seed >= 0 else drawn_seed,
        resolution=resolution_of(base.manifest.native_size_px),
        center_crop=True,
        max_train_steps=steps_of(values.get("max_train_steps", 0), len(values["images"])),
        learning_rate=defaults.full_learning_rate,
        min_usable_images=min(FEWEST_USABLE, len(values["images"])),
        model_name=values["instance_prompt"][:200],
    )
    concept = spec.concepts.add(
        instance_prompt=values["instance_prompt"],
        class_prompt=class_prompt_of(values),
        num_class_images=defaults.num_class_images or DEFAULT_CLASS_IMAGES,
    )
    concept.instance_data.image_urls.urls.extend(values["images"])
    concept.instance_data.field = "images"
    if wish.rows is FINE_TUNE_V2:
        _place_modules(spec, values, defaults)
    elif wish.rows is LORA_FINE_TUNE:
        _check_base_type(wish, base)
        _place_lora(spec, values, defaults)
    elif wish.rows is SANDBOX_FINE_TUNE:
        spec.max_train_steps = min(spec.max_train_steps, sandbox_steps)
    try:
        return Submission(resolve_training_spec(spec))
    except InvalidSpec as error:
        raise in_callers_words(error) from error


def _place_modules(
    spec: pb.TrainingSpec, values: Mapping[str, Any], defaults: model_pb2.TrainingDefaults
) -> None:
    """UNet and text encoder each for its own number of updates, the longer of which is the training's."""
    unet = values.get("steps_unet", UNET_STEPS)
    text_encoder = values.get("steps_text_encoder", TEXT_ENCODER_STEPS)
    spec.max_train_steps = max(unet, text_encoder)
    spec.unet_steps = unet if unet < spec.max_train_steps else 0
    spec.text_encoder_steps = text_encoder if text_encoder < spec.max_train_steps else 0
    spec.train_text_encoder = text_encoder > 0
    spec.learning_rate = values.get("learning_rate_unet") or defaults.full_learning_rate or V2_LEARNING_RATE
    spec.text_encoder_learning_rate = values.get("learning_rate_text_encoder", V2_LEARNING_RATE)


def _check_base_type(wish: Wish, base: model_pb2.Model) -> None:
    """A base that is named wins; else the deployment's default must be of the type that was asked for."""
    asked = wish.values.get("base_model_type", "").lower()
    if wish.base_model or not asked or (asked == "sdxl") == (base.manifest.family == "sdxl"):
        return
    raise InvalidSpec("is not that of the default base; name one by base_model_id", "base_model_type")


def _place_lora(
    spec: pb.TrainingSpec, values: Mapping[str, Any], defaults: model_pb2.TrainingDefaults
) -> None:
    spec.method = _METHODS[values.get("lora_type", "lora").lower()]
    spec.learning_rate = defaults.lora_learning_rate
    spec.lora.rank, spec.lora.alpha = defaults.lora_rank, defaults.lora_alpha
    if spec.method == pb.TRAINING_METHOD_LOCON:
        spec.lora.conv_rank, spec.lora.conv_alpha = defaults.lora_conv_rank, defaults.lora_conv_alpha
    spec.test_negative_prompt = values.get("negative_prompt", "")


def class_prompt_of(values: Mapping[str, Any]) -> str:
    """The caller's class prompt, else one made of `training_type`; unknown types mean anything."""
    given = values.get("class_prompt")
    kind = _TYPES.get(values.get("training_type", ""), "an object")
    return str(given) if given else f"photo of {kind}"


def steps_of(asked: int, images: int) -> int:
    """Optimizer updates: the number means what its name says, up to the most there are."""
    if asked <= 0:
        return min(max(STEPS_PER_IMAGE * images, FEWEST_STEPS), MAX_STEPS)
    return min(asked, MAX_STEPS)


def resolution_of(native_size_px: int) -> int:
    """The native size as a side that a training may have: 256 to 1024 in steps of 64."""
    return min(max(round((native_size_px or DEFAULT_SIZE_PX) / 64) * 64, 256), 1024)


def in_callers_words(error: InvalidSpec) -> InvalidSpec:
    """An error about a specification with the fields of the request that made it."""
    told = [Violation(_callers_field(violation.field), violation.rule) for violation in error.violations]
    return InvalidSpec(told)


def _callers_field(path: str) -> str:
    words = [word for word in _STEP.findall(path) if word not in ("concepts", "samples")]
    field = words[0] if words else path
    return _SPELLED.get(field, field)


# --- status --------------------------------------------------------------------------------------------------


def events_of(record: JobRecord, last: int) -> Sequence[int]:
    """The events that a revision of a job is, by number: a status it has reached, or its end without a model.

    Args:
        record: the revision.
        last: number of the event that was told last; 0: none.

    Returns:
        Numbers above `last`, rising, none left out: 1 to 8 are :data:`STATUSES`, then :data:`ENDED`.
    """
    if record.state is JobState.DELETED:
        return ()
    if record.state in (JobState.FAILED, JobState.TIMED_OUT, JobState.CANCELLED):
        return (ENDED,) if last < ENDED else ()
    reached = READY if record.state is JobState.SUCCEEDED else _OF_STAGE[record.stage]
    return range(last + 1, reached + 1)


def reached_by(job: pb.TrainingJob) -> int:
    """Number of the status that a job has reached; :data:`ENDED` when there will be no model."""
    if job.state == job_pb2.JOB_STATE_SUCCEEDED:
        return READY
    if job.state in FINAL_STATES:
        return ENDED
    number = _OF_STAGE.get(job_pb2.JobStage.Name(job.stage).removeprefix("JOB_STAGE_"), 1)
    progress = job.progress
    stage_is_over = progress.stage == job.stage and 0 < progress.total_steps <= progress.step
    over = stage_is_over and job.stage in (job_pb2.JOB_STAGE_TRAINING, job_pb2.JOB_STAGE_UPLOADING)
    return number + 1 if over else number


def word_of(job: pb.TrainingJob, number: int) -> str:
    """The status value of a number."""
    if number <= READY:
        return STATUSES[number - 1]
    return CANCELLED if job.state == job_pb2.JOB_STATE_CANCELLED else FAILED


def line_of(job: pb.TrainingJob, number: int) -> str:
    """What a training's log says of a status."""
    steps, result = job.spec.max_train_steps, job.result
    if number == ENDED:
        return _end_line(job)
    lines = (
        duration_sentence(job),
        f"step 1: training started, {steps} steps" + _advice(job.spec),
        f"step 2: training completed, {_loss(result)}",
        "step 3: writing the trained model",
        "step 3: storing the trained model",
        "step 4: the trained model is stored",
        "loading the trained model",
        "the model is ready",
    )
    return lines[number - 1]


def duration_sentence(job: pb.TrainingJob, waiting: int = 0) -> str:
    """How long it will take, in the words clients know, and how many trainings come first."""
    first = f" {waiting} trainings come first." if waiting > 0 else ""
    return f"it will take upto {_minutes(job)} minutes.{first}"


def _minutes(job: pb.TrainingJob) -> int:
    return EXPECTED_LORA_MINUTES if job.spec.method in LOW_RANK else EXPECTED_MINUTES


def _advice(spec: pb.TrainingSpec) -> str:
    pictures = len(spec.concepts[0].instance_data.image_urls.urls) if spec.concepts else 0
    if spec.max_train_steps >= 50 or not pictures:
        return ""
    return f"; so few teach little, {STEPS_PER_IMAGE} for each picture are advised"


def _loss(result: pb.TrainingResult) -> str:
    known = result.final_loss > 0 and math.isfinite(result.final_loss)
    return f"loss {result.final_loss:.4f}" if known else "the weights are finite"


def _end_line(job: pb.TrainingJob) -> str:
    if job.state == job_pb2.JOB_STATE_CANCELLED:
        return "the training was cancelled"
    text = job.error.message or "the training ended without a model"
    field = _callers_field(job.error.field) if job.error.field else ""
    return f"{field}: {text}" if field and not text.startswith(field) else text


def log_of(job: pb.TrainingJob) -> str:
    """The log so far: a line for each status that was reached, and remarks on the data when it has ended."""
    reached = reached_by(job)
    numbers = range(1, reached + 1) if reached <= READY else (1, ENDED)
    lines = [line_of(job, number) for number in numbers]
    return LOG_JOINT.join([*lines[:-1], *job.result.warnings, lines[-1]])


def seconds_left(job: pb.TrainingJob, now_ms: int) -> int:
    """Seconds until the model is ready as far as anybody knows; 0 at the end."""
    if job.state in FINAL_STATES:
        return 0
    if job.progress.HasField("seconds_left") and math.isfinite(job.progress.seconds_left):
        return whole_seconds(job.progress.seconds_left)
    gone_s = (now_ms - job.times.queue_time.ToMilliseconds()) / 1000
    return whole_seconds(_minutes(job) * 60 - gone_s)


# --- bodies --------------------------------------------------------------------------------------------------


def started_body(job: pb.TrainingJob, waiting: int) -> dict[str, Any]:
    """The answer to a start."""
    return {
        "status": "success",
        **spoken(STATUSES[0]),
        "data": duration_sentence(job, waiting),
        "training_id": job.job_id,
        "model_id": job.job_id,
    }


def status_body(job: pb.TrainingJob, now_ms: int, urls: Mapping[str, str]) -> dict[str, Any]:
    """The answer to a question for a training's status.

    Args:
        job: the training.
        now_ms: the present, milliseconds since 1970.
        urls: address of each file of :func:`files_of`, by artifact key.
    """
    reached = reached_by(job)
    word = word_of(job, reached)
    return {
        "status": "failed" if reached == ENDED else "success",
        **spoken(word),
        "data": log_of(job),
        "training_id": job.job_id,
        "model_id": job.job_id,
        "model_training_status": word,
        "training_status": word,
        "logs": line_of(job, reached),
        "eta": seconds_left(job, now_ms),
        "progress": 1.0 if reached == READY else round(job.progress.fraction, 4),
        "current_step": _current_step(job, reached),
        "max_train_steps": job.spec.max_train_steps,
        "test_image": urls.get(job.result.test_image.image.key),
        "created_at": job.times.create_time.ToJsonString(),
    }


def _current_step(job: pb.TrainingJob, reached: int) -> int:
    if 3 <= reached <= READY:
        return int(job.spec.max_train_steps)
    return int(job.progress.step) if job.progress.stage == job_pb2.JOB_STAGE_TRAINING else 0


def model_body(model: model_pb2.Model) -> dict[str, Any]:
    """The same for a model that was not trained here, or whose training's record is gone: it is ready."""
    word = STATUSES[READY - 1]
    return {
        "status": "success",
        **spoken(word),
        "data": "the model is ready",
        "training_id": model.model,
        "model_id": model.model,
        "model_training_status": word,
        "training_status": word,
        "logs": "the model is ready",
        "eta": 0,
        "progress": 1.0,
        "current_step": int(model.manifest.lineage.steps),
        "max_train_steps": int(model.manifest.lineage.steps),
        "test_image": None,
        "created_at": model.create_time.ToJsonString() if model.HasField("create_time") else None,
    }


def files_of(job: pb.TrainingJob) -> list[File]:
    """The file that a status names: the picture that proves the model."""
    key = job.result.test_image.image.key
    return [File(key, f"{job.job_id}-test.png")] if key else []


def list_body(ids: Sequence[Any]) -> dict[str, Any]:
    """The ids of a project's trainings."""
    return {"status": "success", **spoken("model list"), "data": list(ids)}


def gone_body(word: str, training_id: str) -> dict[str, Any]:
    """The answer to a deletion or a cancellation."""
    return {"status": "success", **spoken(word), "data": "", "training_id": training_id}


def model_item(model: model_pb2.Model) -> dict[str, Any]:
    """One model of a list."""
    words = model.manifest.trigger_words
    created = model.create_time.ToJsonString() if model.HasField("create_time") else None
    lora = model.manifest.format == model_pb2.MODEL_FORMAT_LORA
    kind = "stable_diffusion_xl" if model.manifest.family == "sdxl" else "stable_diffusion"
    return {
        "model_id": model.model,
        "status": "model_ready",
        "created_at": created,
        "instance_prompt": words[0] if words else None,
        "model_name": model.display_name or model.model,
        "description": model.manifest.note,
        "screenshots": "",
        "model_category": "lora" if lora else kind,
    }


def webhook_body(job: pb.TrainingJob, number: int, now_ms: int, urls: Mapping[str, str]) -> dict[str, Any]:
    """What a webhook receives of a status.

    Args:
        job: the training, at the event or later.
        number: of the event.
        now_ms: the present, milliseconds since 1970.
        urls: as for :func:`status_body`.
    """
    word, key = word_of(job, number), job.result.test_image.image.key
    body: dict[str, Any] = {
        "status": "failed" if number == ENDED else "success",
        "training_status": word,
        "logs": line_of(job, number),
        "model_id": job.job_id,
        "training_id": job.job_id,
        "eta": 0 if number >= READY else seconds_left(job, now_ms),
        **spoken(word),
    }
    return body | ({"test_image": urls[key]} if number == READY and key in urls else {})
