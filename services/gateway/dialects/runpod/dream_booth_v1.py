"""The endpoint `dream-booth-v1`: its parameters, what they mean in canonical words, and its output.

The tables below are the reference: types, ranges and defaults are checked by them and published from them. Rules
that span several fields are the domain's; its faults are told in the caller's spelling.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from likeness.inference.v1 import generation_job_pb2
from likeness.training.v1 import training_job_pb2 as pb

from services.domain.errors import InvalidSpec, Violation
from services.domain.rules import Range
from services.domain.training_spec import MAX_CONCEPTS, MAX_SAMPLES, resolve_training_spec
from services.gateway.dialects.base import File, Submission
from services.gateway.dialects.runpod.parameters import Parameter, Reading, object_schema, read_object

ENDPOINT = "dream-booth-v1"
MAX_DETAILS = 100
"""Faults that one answer lists; a body full of mistakes must not come back larger than it was."""

_SEED_LIMIT = 2**32 - 1
_SCHEDULES = {
    "linear": pb.LEARNING_RATE_SCHEDULE_LINEAR,
    "cosine": pb.LEARNING_RATE_SCHEDULE_COSINE,
    "cosine_with_restarts": pb.LEARNING_RATE_SCHEDULE_COSINE_WITH_RESTARTS,
    "polynomial": pb.LEARNING_RATE_SCHEDULE_POLYNOMIAL,
    "constant": pb.LEARNING_RATE_SCHEDULE_CONSTANT,
    "constant_with_warmup": pb.LEARNING_RATE_SCHEDULE_CONSTANT_WITH_WARMUP,
}
_SCHEDULERS = {
    "DDIM": generation_job_pb2.SCHEDULER_DDIM,
    "K_EULER": generation_job_pb2.SCHEDULER_EULER_DISCRETE,
    "DPMSolverMultistep": generation_job_pb2.SCHEDULER_DPM_SOLVER_MULTISTEP,
    "K_EULER_ANCESTRAL": generation_job_pb2.SCHEDULER_EULER_ANCESTRAL_DISCRETE,
    "PNDM": generation_job_pb2.SCHEDULER_PNDM,
    "KLMS": generation_job_pb2.SCHEDULER_LMS_DISCRETE,
}
_SCHEDULER_NAMES = {value: name for name, value in _SCHEDULERS.items()}


def _integer(name: str, target: str, low: int, high: int, default: int | None, meaning: str) -> Parameter:
    return Parameter(name, "integer", target, meaning, default, Range(target, low, high))


def _number(name: str, target: str, limit: Range, default: float, meaning: str) -> Parameter:
    return Parameter(name, "number", target, meaning, default, limit)


def _switch(name: str, target: str, default: bool | None, meaning: str) -> Parameter:
    return Parameter(name, "boolean", target, meaning, default)


INPUT = (
    _integer(
        "num_train_epochs", "num_train_epochs", 1, 10_000, 1, "Passes over the pictures; used without steps."
    ),
    _integer(
        "max_train_steps", "max_train_steps", 1, 100_000, 2000, "Optimizer updates; null: epochs decide."
    ),
    _integer("train_batch_size", "train_batch_size", 1, 32, 1, "Subject pictures in one forward pass."),
    _integer("sample_batch_size", "sample_batch_size", 1, 32, 2, "Class pictures drawn at once."),
    _integer(
        "gradient_accumulation_steps",
        "gradient_accumulation_steps",
        1,
        64,
        1,
        "Passes averaged into an update.",
    ),
    _switch("gradient_checkpointing", "gradient_checkpointing", False, "Less memory for more time."),
    _number(
        "learning_rate",
        "learning_rate",
        Range("learning_rate", 0, 1, above=True),
        1e-6,
        "Peak learning rate.",
    ),
    _switch("scale_lr", "scale_learning_rate", False, "Multiply the rate by batch size and accumulation."),
    Parameter(
        "lr_scheduler",
        "choice",
        "lr_scheduler",
        "Curve of the learning rate.",
        "constant",
        choices=_SCHEDULES,
    ),
    _integer("lr_warmup_steps", "lr_warmup_steps", 0, 2**31 - 1, 0, "Updates from zero to the peak rate."),
    Parameter(
        "resolution",
        "integer",
        "resolution",
        "Side of the training square in pixels.",
        512,
        Range("resolution", 256, 1024, multiple=64),
    ),
    _switch("center_crop", "center_crop", False, "Crop the middle instead of a random square."),
    _switch("use_8bit_adam", "", None, "Optimizer moments in 8 bits; absent: 8 on a GPU, 32 on a CPU."),
    _switch("with_prior_preservation", "with_prior_preservation", True, "Add the class term to the loss."),
    _number("prior_loss_weight", "prior_loss_weight", Range("", 0, 10), 1.0, "Weight of the class term."),
    _switch("train_text_encoder", "train_text_encoder", True, "Train the text encoder too."),
    _number("adam_beta1", "adam_beta1", Range("", 0, 1, below=True), 0.9, "AdamW beta 1."),
    _number("adam_beta2", "adam_beta2", Range("", 0, 1, below=True), 0.999, "AdamW beta 2."),
    _number("adam_weight_decay", "adam_weight_decay", Range("", 0, 1), 1e-2, "AdamW weight decay."),
    _number("adam_epsilon", "adam_epsilon", Range("", 0, 1, above=True), 1e-8, "AdamW epsilon."),
    _number(
        "max_grad_norm", "max_grad_norm", Range("", 0, 1000), 1.0, "Limit of the gradients' norm; 0: none."
    ),
    _switch("pad_tokens", "pad_tokens", False, "Pad every prompt to the text encoder's full window."),
    _integer(
        "seed", "", -1, _SEED_LIMIT, None, "Seed of the training; -1 draws one. Absent: the first concept's."
    ),
)
CONCEPT = (
    Parameter("instance_data", "url", "", "Zip archive of pictures of the subject.", required=True),
    Parameter("class_data", "url", "", "Zip archive of pictures of its class."),
    Parameter(
        "instance_prompt",
        "text",
        "instance_prompt",
        "What the subject's pictures show, with a rare word for it.",
        length=(1, 1000),
        required=True,
    ),
    Parameter(
        "class_prompt",
        "text",
        "class_prompt",
        "What the class's pictures show.",
        length=(1, 1000),
        required=True,
    ),
    _integer("num_class_images", "num_class_images", 0, 1000, 50, "Class pictures; missing ones are drawn."),
    _integer("seed", "", -1, _SEED_LIMIT, 1337, "Seed of this concept; the first one rules the training."),
)
SAMPLE = (
    Parameter(
        "prompt",
        "text",
        "prompt",
        "What the picture shows.",
        length=(1, 1000),
        required=True,
        aliases=("save_sample_prompt",),
    ),
    Parameter("negative_prompt", "text", "negative_prompt", "What it does not show.", length=(0, 1000)),
    _number("guidance_scale", "guidance_scale", Range("", 0, 50), 7.5, "Weight of the prompt."),
    Parameter("scheduler", "choice", "scheduler", "Noise scheduler.", "DDIM", choices=_SCHEDULERS),
    Parameter(
        "infer_steps",
        "integer",
        "num_inference_steps",
        "Denoising steps.",
        50,
        Range("", 1, 500),
        aliases=("num_inference_steps", "inference_steps"),
    ),
    _integer("num_outputs", "num_images", 1, 10, 1, "Pictures; each has the next seed."),
    _integer("seed", "seed", 0, _SEED_LIMIT, None, "Seed of the first picture; absent: drawn, 0 to 65535."),
)
_SPELLED = {row.target: row.name for row in (*INPUT, *CONCEPT, *SAMPLE) if row.target}
_ELEMENT = re.compile(r"(concepts|samples)\[(\d+)\]\.(\w+)")

EXAMPLE = {
    "concepts": [
        {
            "instance_data": "https://files.example.org/rex.zip",
            "instance_prompt": "photo of zkw dog",
            "class_prompt": "photo of a dog",
        }
    ],
    "samples": [{"prompt": "zkw dog on the moon", "num_outputs": 2, "seed": 11}],
    "max_train_steps": 800,
}


def read_input(given: Mapping[str, Any], draw_seed: Callable[[], int]) -> Submission:
    """Translates an input; see :class:`services.gateway.dialects.base.TrainingEndpoint`.

    Raises:
        InvalidSpec: with every fault, in the caller's spelling.
    """
    _refuse_later_form(given)
    spec = pb.TrainingSpec(recipe=pb.RECIPE_DREAMBOOTH)
    top = read_object(given, INPUT, known=("concepts", "samples"))
    _place(spec, top.values, INPUT)
    _place_run(spec, given, top.values, draw_seed)
    concepts = _read_list(given, "concepts", CONCEPT, MAX_CONCEPTS)
    samples = _read_list(given, "samples", SAMPLE, MAX_SAMPLES)
    for index, reading in enumerate(concepts.readings):
        _place_concept(spec.concepts.add(), reading.values, f"concepts[{index}].", draw_seed)
    for reading in samples.readings:
        _place(spec.samples.add(), reading.values, SAMPLE)
    faults = top.faults + concepts.faults + samples.faults
    resolved, later = _resolve(spec, faults, samples.readings)
    if faults + later:
        raise InvalidSpec((faults + later)[:MAX_DETAILS])
    return Submission(resolved, tuple(top.unknown + concepts.unknown + samples.unknown))


def _refuse_later_form(given: Mapping[str, Any]) -> None:
    """Later versions of the endpoint took `train` and `inference`; those parameters mean other things."""
    found = [key for key in ("train", "inference") if key in given]
    if found and "concepts" not in given:
        expected = ", ".join(["concepts", "samples", *(row.name for row in INPUT)])
        rule = f"is a key of a later form of this endpoint, which is not served; expected keys are {expected}"
        raise InvalidSpec([Violation(key, rule) for key in found])


def _place(message: Any, values: Mapping[str, Any], rows: Sequence[Parameter]) -> None:
    for row in rows:
        if row.target and row.name in values:
            value = values[row.name]
            setattr(message, row.target, row.choices[value] if row.choices else value)


def _place_run(
    spec: pb.TrainingSpec, given: Mapping[str, Any], values: Mapping[str, Any], draw_seed: Callable[[], int]
) -> None:
    if "max_train_steps" in given and given["max_train_steps"] is None:
        spec.num_train_epochs = values.get("num_train_epochs", 1)
    if "use_8bit_adam" in values:
        eight = values["use_8bit_adam"]
        spec.optimizer_precision = (
            pb.OPTIMIZER_PRECISION_EIGHT_BIT if eight else pb.OPTIMIZER_PRECISION_THIRTY_TWO_BIT
        )
    if "seed" in values:
        spec.seed = draw_seed() if values["seed"] == -1 else values["seed"]


def _place_concept(
    concept: pb.Concept, values: Mapping[str, Any], path: str, draw_seed: Callable[[], int]
) -> None:
    _place(concept, values, CONCEPT)
    for name in ("instance_data", "class_data"):
        if name in values:
            source = getattr(concept, name)
            source.archive_url, source.field = values[name], path + name
    if "seed" in values:
        concept.seed = draw_seed() if values["seed"] == -1 else values["seed"]


class _List:
    """A list of objects, read element by element; `readings` keeps the caller's positions."""

    def __init__(self) -> None:
        self.readings: list[Reading] = []
        self.faults: list[Violation] = []
        self.unknown: list[str] = []


def _read_list(given: Mapping[str, Any], key: str, rows: Sequence[Parameter], most: int) -> _List:
    found = _List()
    elements = given.get(key)
    if elements is None:
        found.faults.append(Violation(key, "is required"))
    elif not isinstance(elements, list):
        found.faults.append(Violation(key, "must be a list of objects"))
    elif not 1 <= len(elements) <= most:
        found.faults.append(Violation(key, f"must have 1 to {most} elements"))
    for index, element in enumerate(elements[:most] if isinstance(elements, list) else []):
        reading = _read_element(element, rows, f"{key}[{index}]")
        found.readings.append(reading)
        found.faults += reading.faults
        found.unknown += reading.unknown
    return found


def _read_element(element: Any, rows: Sequence[Parameter], path: str) -> Reading:
    if isinstance(element, dict):
        return read_object(element, rows, path + ".")
    return Reading(faults=[Violation(path, "must be an object")])


def _resolve(
    spec: pb.TrainingSpec, faults: Sequence[Violation], samples: Sequence[Reading]
) -> tuple[pb.TrainingSpec, list[Violation]]:
    """Applies the domain's rules; a field that is faulty already, or lies in such a part, is not mentioned twice."""
    named = [fault.field for fault in faults]
    try:
        return resolve_training_spec(spec), []
    except InvalidSpec as error:
        told = [Violation(_caller_path(fault.field, samples), fault.rule) for fault in error.violations]
    return spec, [fault for fault in told if not any(_covers(name, fault.field) for name in named)]


def _covers(named: str, path: str) -> bool:
    return path == named or path.startswith((named + ".", named + "["))


def _caller_path(path: str, samples: Sequence[Reading]) -> str:
    element = _ELEMENT.fullmatch(path)
    if element is None:
        return _SPELLED.get(path, path)
    name = _SPELLED.get(element[3], element[3])
    if element[1] == "samples":
        name = samples[int(element[2])].spelled.get(name, name)
    return f"{element[1]}[{element[2]}].{name}"


def files_of(job: pb.TrainingJob) -> list[File]:
    """The sample pictures, named by the position of their request and their own among its pictures."""
    seen: dict[int, int] = {}
    files = []
    for sample in job.result.samples:
        position = seen.get(sample.sample_index, 0)
        seen[sample.sample_index] = position + 1
        ending = "jpg" if sample.image.media_type == "image/jpeg" else "png"
        files.append(File(sample.image.key, f"{sample.sample_index}-{position}.{ending}"))
    return files


def render_output(job: pb.TrainingJob, urls: Mapping[str, str]) -> list[dict[str, Any]]:
    """A bare list, one element a picture."""
    return [
        {
            "image": urls.get(sample.image.key, ""),
            "seed": sample.image.seed,
            "prompt": sample.spec.prompt,
            "negative_prompt": sample.spec.negative_prompt or None,
            "guidance_scale": sample.spec.guidance_scale,
            "inference_steps": sample.spec.num_inference_steps,
            "scheduler": _SCHEDULER_NAMES.get(sample.spec.scheduler, "DDIM"),
        }
        for sample in job.result.samples
    ]


def input_schema() -> dict[str, Any]:
    """JSON schema of the input."""
    schema = object_schema(INPUT)
    schema["properties"]["max_train_steps"]["type"] = ["integer", "null"]
    lists = {
        "concepts": {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_CONCEPTS,
            "items": object_schema(CONCEPT),
        },
        "samples": {"type": "array", "minItems": 1, "maxItems": MAX_SAMPLES, "items": object_schema(SAMPLE)},
    }
    schema["properties"] = lists | schema["properties"]
    return schema | {"required": ["concepts", "samples"], "examples": [EXAMPLE]}
