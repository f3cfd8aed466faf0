"""The endpoint `dream-booth-v1`: its parameters, what they mean in canonical words, and its output.

The tables below are the reference: types, ranges and defaults are checked by them and published from them. Rules
that span several fields are the domain's; its faults are told in the caller's spelling.
"""

from collections.abc import Callable, Mapping
from typing import Any

from likeness.inference.v1 import generation_job_pb2
from likeness.training.v1 import training_job_pb2 as pb

from services.domain.errors import InvalidSpec, Violation
from services.domain.rules import Range
from services.domain.training_spec import MAX_CONCEPTS, MAX_SAMPLES
from services.gateway.dialects.base import File, Submission
from services.gateway.dialects.runpod.parameters import (
    SEED_LIMIT,
    Parameter,
    integer,
    number,
    object_schema,
    seed,
    switch,
)
from services.gateway.dialects.runpod.pictures import picture_files
from services.gateway.dialects.runpod.translation import EIGHT_BIT_ADAM, Place, Translation

ENDPOINT = "dream-booth-v1"

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


INPUT = (
    integer(
        "num_train_epochs", "num_train_epochs", 1, 10_000, 1, "Passes over the pictures; used without steps."
    ),
    integer(
        "max_train_steps", "max_train_steps", 1, 100_000, 2000, "Optimizer updates; null: epochs decide."
    ),
    integer("train_batch_size", "train_batch_size", 1, 32, 1, "Subject pictures in one forward pass."),
    integer("sample_batch_size", "sample_batch_size", 1, 32, 2, "Class pictures drawn at once."),
    integer(
        "gradient_accumulation_steps",
        "gradient_accumulation_steps",
        1,
        64,
        1,
        "Passes averaged into an update.",
    ),
    switch("gradient_checkpointing", "gradient_checkpointing", False, "Less memory for more time."),
    number(
        "learning_rate",
        "learning_rate",
        Range("learning_rate", 0, 1, above=True),
        1e-6,
        "Peak learning rate.",
    ),
    switch("scale_lr", "scale_learning_rate", False, "Multiply the rate by batch size and accumulation."),
    Parameter(
        "lr_scheduler",
        "choice",
        "lr_scheduler",
        "Curve of the learning rate.",
        "constant",
        choices=_SCHEDULES,
    ),
    integer("lr_warmup_steps", "lr_warmup_steps", 0, 2**31 - 1, 0, "Updates from zero to the peak rate."),
    Parameter(
        "resolution",
        "integer",
        "resolution",
        "Side of the training square in pixels.",
        512,
        Range("resolution", 256, 1024, multiple=64),
    ),
    switch("center_crop", "center_crop", False, "Crop the middle instead of a random square."),
    switch(
        "use_8bit_adam",
        "optimizer_precision",
        None,
        "Optimizer moments in 8 bits; absent: 8 on a GPU, 32 on a CPU.",
        EIGHT_BIT_ADAM,
    ),
    switch("with_prior_preservation", "with_prior_preservation", True, "Add the class term to the loss."),
    number("prior_loss_weight", "prior_loss_weight", Range("", 0, 10), 1.0, "Weight of the class term."),
    switch("train_text_encoder", "train_text_encoder", True, "Train the text encoder too."),
    number("adam_beta1", "adam_beta1", Range("", 0, 1, below=True), 0.9, "AdamW beta 1."),
    number("adam_beta2", "adam_beta2", Range("", 0, 1, below=True), 0.999, "AdamW beta 2."),
    number("adam_weight_decay", "adam_weight_decay", Range("", 0, 1), 1e-2, "AdamW weight decay."),
    number("adam_epsilon", "adam_epsilon", Range("", 0, 1, above=True), 1e-8, "AdamW epsilon."),
    number(
        "max_grad_norm", "max_grad_norm", Range("", 0, 1000), 1.0, "Limit of the gradients' norm; 0: none."
    ),
    switch("pad_tokens", "pad_tokens", False, "Pad every prompt to the text encoder's full window."),
    seed("seed", None, "Seed of the training; -1 draws one. Absent: the first concept's."),
)
CONCEPT = (
    Parameter(
        "instance_data", "url", "instance_data", "Zip archive of pictures of the subject.", required=True
    ),
    Parameter("class_data", "url", "class_data", "Zip archive of pictures of its class."),
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
    integer("num_class_images", "num_class_images", 0, 1000, 50, "Class pictures; missing ones are drawn."),
    seed("seed", 1337, "Seed of this concept; the first one rules the training."),
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
    number("guidance_scale", "guidance_scale", Range("", 0, 50), 7.5, "Weight of the prompt."),
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
    integer("num_outputs", "num_images", 1, 10, 1, "Pictures; each has the next seed."),
    integer("seed", "seed", 0, SEED_LIMIT, None, "Seed of the first picture; absent: drawn, 0 to 65535."),
)

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
    translation = Translation(spec, draw_seed)
    translation.read(given, INPUT, Place(spec), known=("concepts", "samples"))
    if "max_train_steps" in given and given["max_train_steps"] is None:
        spec.num_train_epochs = spec.num_train_epochs or 1
    translation.read_list(given.get("concepts"), CONCEPT, "concepts", "concepts", (1, MAX_CONCEPTS))
    translation.read_list(given.get("samples"), SAMPLE, "samples", "samples", (1, MAX_SAMPLES))
    return translation.submission()


def _refuse_later_form(given: Mapping[str, Any]) -> None:
    """Later versions of the endpoint took `train` and `inference`; those parameters mean other things."""
    found = [key for key in ("train", "inference") if key in given]
    if found and "concepts" not in given:
        expected = ", ".join(["concepts", "samples", *(row.name for row in INPUT)])
        rule = f"is a key of a later form of this endpoint, which is not served; expected keys are {expected}"
        raise InvalidSpec([Violation(key, rule) for key in found])


def files_of(job: pb.TrainingJob) -> list[File]:
    """The sample pictures."""
    return picture_files(job)


def render_pictures(job: pb.TrainingJob, urls: Mapping[str, str]) -> list[dict[str, Any]]:
    """One object a picture."""
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


def render_output(job: pb.TrainingJob, urls: Mapping[str, str]) -> list[dict[str, Any]]:
    """A bare list of the pictures."""
    return render_pictures(job, urls)


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
