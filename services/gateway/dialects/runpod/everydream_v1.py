"""The endpoint `everydream-v1`: captioned pictures in, a model and pictures drawn with it out.

The tables below are the reference, as those of `dream_booth_v1`. What they name and the trainer does not carry out is
refused by the trainer, and told in the caller's spelling.
"""

from collections.abc import Callable, Mapping
from typing import Any

from likeness.inference.v1 import generation_job_pb2
from likeness.training.v1 import training_job_pb2 as pb

from services.domain.errors import Violation
from services.domain.rules import Range
from services.domain.training_spec import (
    EVERYDREAM_RESOLUTIONS,
    MAX_PREVIEWS,
    MAX_PROMPT_CHARS,
    MAX_SAMPLES,
)
from services.gateway.dialects.base import File, Submission
from services.gateway.dialects.runpod.parameters import (
    SEED_LIMIT,
    Parameter,
    integer,
    number,
    object_schema,
    printable,
    seed,
    switch,
)
from services.gateway.dialects.runpod.pictures import picture_files
from services.gateway.dialects.runpod.translation import EIGHT_BIT_ADAM, Place, Translation

ENDPOINT = "everydream-v1"
BUILT_IN_MODEL = "sd_v1-5_vae.ckpt"
"""How the endpoint's page calls the model that is there already: the deployment's."""

MAX_LISTED = 500
"""Pictures drawn while training that an output names, the newest; each takes a link, and clients wait for 3 s."""

VERSION_MINUTES = 20
"""What the absence of `ckpt_every_n_minutes` means here; elsewhere a training that does not ask has no versions."""

_MOST_STEPS = 2**31 - 1
_SHARE = Range("", 0, 1)
_MIXED_PRECISION = {True: pb.MIXED_PRECISION_UNSPECIFIED, False: pb.MIXED_PRECISION_NO}
_UNLESS = {True: False, False: True}
"""A switch that turns something off."""
_SCHEDULES = {
    "constant": pb.LEARNING_RATE_SCHEDULE_CONSTANT,
    "linear": pb.LEARNING_RATE_SCHEDULE_LINEAR,
    "cosine": pb.LEARNING_RATE_SCHEDULE_COSINE,
    "polynomial": pb.LEARNING_RATE_SCHEDULE_POLYNOMIAL,
}
_SCHEDULERS = {
    "DDIM": generation_job_pb2.SCHEDULER_DDIM,
    "DDPM": generation_job_pb2.SCHEDULER_DDPM,
    "DPM-M": generation_job_pb2.SCHEDULER_DPM_SOLVER_MULTISTEP,
    "DPM-S": generation_job_pb2.SCHEDULER_DPM_SOLVER_SINGLESTEP,
    "EULER-A": generation_job_pb2.SCHEDULER_EULER_ANCESTRAL_DISCRETE,
    "EULER-D": generation_job_pb2.SCHEDULER_EULER_DISCRETE,
    "HEUN": generation_job_pb2.SCHEDULER_HEUN_DISCRETE,
    "IPNDM": generation_job_pb2.SCHEDULER_IPNDM,
    "KDPM2-A": generation_job_pb2.SCHEDULER_KDPM2_ANCESTRAL_DISCRETE,
    "KDPM2-D": generation_job_pb2.SCHEDULER_KDPM2_DISCRETE,
    "PNDM": generation_job_pb2.SCHEDULER_PNDM,
    "K-LMS": generation_job_pb2.SCHEDULER_LMS_DISCRETE,
}
_SCHEDULER_NAMES = {value: name for name, value in _SCHEDULERS.items()}
_SIZES = (128, 256, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960, 1024)


def _one_of(name: str, target: str, allowed: tuple[int, ...], meaning: str) -> Parameter:
    choices = {value: value for value in allowed}
    return Parameter(name, "integer", target, meaning, 512, choices=choices)


TRAIN = (
    Parameter("data_url", "url", "", "Zip archive of pictures with captions.", required=True),
    switch(
        "amp",
        "mixed_precision",
        True,
        "Mixed precision on a GPU; false: 32 bits throughout.",
        _MIXED_PRECISION,
    ),
    integer("batch_size", "train_batch_size", 1, 32, 2, "Pictures in one forward pass."),
    integer(
        "ckpt_every_n_minutes",
        "publish_every_minutes",
        0,
        _MOST_STEPS,
        VERSION_MINUTES,
        "Minutes of training between two models of its present weights; 0: the finished model only.",
    ),
    number(
        "clip_grad_norm",
        "max_grad_norm",
        Range("", 0, 1000),
        None,
        "Limit of the gradients' norm, of UNet and text encoder each; absent or 0: none.",
    ),
    integer("clip_skip", "clip_skip", 0, 4, 0, "Skipped layers of the text encoder; 0 and 1: none."),
    number("cond_dropout", "caption_dropout", _SHARE, 0.04, "Probability of an empty caption at each use."),
    switch(
        "disable_textenc_training", "train_text_encoder", False, "Leave the text encoder as it is.", _UNLESS
    ),
    switch("disable_unet_training", "train_unet", False, "Leave the UNet as it is.", _UNLESS),
    switch("disable_xformers", "disable_fused_attention", False, "Attention without fused kernels."),
    number("flip_p", "flip_probability", _SHARE, 0.0, "Probability of mirroring a picture at each use."),
    switch("gradient_checkpointing", "gradient_checkpointing", False, "Less memory for more time."),
    integer(
        "grad_accum", "gradient_accumulation_steps", 1, 64, 1, "Forward passes averaged into one update."
    ),
    Parameter(
        "hf_repo_subfolder",
        "text",
        "hub_subfolder",
        "Folder within what `resume_ckpt_url` leads to that holds the model.",
        length=(1, 1000),
    ),
    number("lr", "learning_rate", Range("", 0, 1, above=True), 2e-6, "Peak learning rate."),
    integer(
        "lr_decay_steps",
        "lr_decay_steps",
        0,
        _MOST_STEPS,
        None,
        "Updates to the end of the curve; absent or 0: 1.5 times all updates.",
    ),
    Parameter(
        "lr_scheduler",
        "choice",
        "lr_scheduler",
        "Curve of the learning rate.",
        "constant",
        choices=_SCHEDULES,
    ),
    integer(
        "lr_warmup_steps",
        "lr_warmup_steps",
        0,
        _MOST_STEPS,
        None,
        "Updates from zero to the peak rate, not with constant; absent: a fiftieth of `lr_decay_steps`.",
    ),
    integer("max_epochs", "num_train_epochs", 1, 10_000, 300, "Passes over the pictures."),
    _one_of(
        "resolution",
        "resolution",
        EVERYDREAM_RESOLUTIONS,
        "Root of the area that pictures are trained at, in pixels; they keep their shape.",
    ),
    Parameter(
        "resume_ckpt_url",
        "url",
        "resume_checkpoint_url",
        "Address of the model to start from; the default stands for the installation's own.",
        BUILT_IN_MODEL,
        absence=BUILT_IN_MODEL,
    ),
    Parameter(
        "sample_prompts",
        "texts",
        "preview_prompts",
        f"Prompts drawn while training and at its end; the newest {MAX_LISTED} pictures are named.",
        length=(1, MAX_PROMPT_CHARS),
        most=MAX_PREVIEWS,
    ),
    integer("sample_steps", "preview_steps", 1, _MOST_STEPS, 250, "Updates between two rounds of them."),
    switch("save_full_precision", "save_full_precision", False, "Keep the model in 32 bits instead of 16."),
    switch("save_optimizer", "save_optimizer", False, "Keep the optimizer's state with the model."),
    switch("scale_lr", "scale_learning_rate", False, "Multiply the rate by (batch x accumulation)^0.55."),
    seed("seed", 555, "Seed of the training; -1 draws one."),
    switch("shuffle_tags", "shuffle_tags", False, "Shuffle what follows a caption's first comma."),
    switch(
        "useadam8bit",
        "optimizer_precision",
        None,
        "Optimizer moments in 8 bits; absent: 8 on a GPU, 32 on a CPU.",
        EIGHT_BIT_ADAM,
    ),
    switch("rated_dataset", "rated_dataset", False, "Later epochs leave out pictures of low rating."),
    integer(
        "rated_dataset_target_dropout_percent",
        "rated_dataset_final_percent",
        0,
        100,
        50,
        "Share of the pictures that the last epoch of a rated dataset keeps.",
    ),
)
INFERENCE = (
    Parameter(
        "prompt", "text", "prompt", "What the picture shows.", length=(1, MAX_PROMPT_CHARS), required=True
    ),
    Parameter("negative_prompt", "text", "negative_prompt", "What it does not show.", length=(0, 1000)),
    _one_of("width", "width_px", _SIZES, "Width in pixels."),
    _one_of("height", "height_px", _SIZES, "Height in pixels."),
    integer("num_outputs", "num_images", 1, 10, 1, "Pictures; each has the next seed."),
    integer("num_inference_steps", "num_inference_steps", 1, 500, 50, "Denoising steps."),
    number("guidance_scale", "guidance_scale", Range("", 0, 20), 7.5, "Weight of the prompt."),
    Parameter("scheduler", "choice", "scheduler", "Noise scheduler.", "K-LMS", choices=_SCHEDULERS),
    integer("seed", "seed", 0, SEED_LIMIT, None, "Seed of the first picture; absent: drawn, 0 to 65535."),
    Parameter("passback", "text", "passback", "Comes back with each picture.", length=(0, 1000)),
)
_DRAWN_AS = {row.name: row.default for row in INFERENCE if row.default is not None}
"""Size and scheduler differ from those of other requests for pictures, so each request says its own."""

EXAMPLE = {
    "train": {"data_url": "https://files.example.org/bikes.zip", "max_epochs": 100, "shuffle_tags": True},
    "inference": [{"prompt": "a red bike in snow", "num_outputs": 2, "seed": 11, "passback": "bike-1"}],
}


def read_input(given: Mapping[str, Any], draw_seed: Callable[[], int]) -> Submission:
    """Translates an input; see :class:`services.gateway.dialects.base.TrainingEndpoint`.

    Raises:
        InvalidSpec: with every fault, in the caller's spelling.
    """
    translation = Translation(pb.TrainingSpec(recipe=pb.RECIPE_EVERYDREAM), draw_seed)
    translation.ignored += [printable(key) for key in given if key not in ("train", "inference")]
    _read_train(translation, given.get("train"))
    _read_inference(translation, given.get("inference"))
    return translation.submission()


def _read_train(translation: Translation, given: Any) -> None:
    spec = translation.spec
    source = spec.concepts.add().instance_data
    translation.spelled["concepts[0].instance_data"] = source.field = "train.data_url"
    if given is None:
        translation.faults.append(Violation("train", "is required"))
        return
    values = translation.read(given, TRAIN, Place(spec, path="train."), strict=True).values
    source.archive_url = values.get("data_url", "")
    spec.publish_every_minutes = values.get("ckpt_every_n_minutes", VERSION_MINUTES)
    if values.get("disable_textenc_training") and values.get("disable_unet_training"):
        rule = "must be false when disable_unet_training is true"
        translation.faults.append(Violation("train.disable_textenc_training", rule))
    if "hf_repo_subfolder" in values and "resume_ckpt_url" not in values:
        rule = "needs resume_ckpt_url with the address of what holds it"
        translation.faults.append(Violation("train.hf_repo_subfolder", rule))


def _read_inference(translation: Translation, given: Any) -> None:
    """The endpoint's page sends a single request where its table has a list of them; both are taken."""
    if isinstance(given, dict):
        place = Place(translation.spec.samples.add(), "samples[0].", "inference.")
        translation.read(_complete(given), INFERENCE, place, strict=True)
        return
    elements = [_complete(element) for element in given] if isinstance(given, list) else given
    translation.read_list(elements, INFERENCE, "inference", "samples", (0, MAX_SAMPLES), strict=True)


def _complete(request: Any) -> Any:
    if not isinstance(request, dict):
        return request
    return _DRAWN_AS | {key: value for key, value in request.items() if value is not None}


def files_of(job: pb.TrainingJob) -> list[File]:
    """The pictures drawn while it trained, and those that were asked for."""
    return [File(preview.image.key, preview.name) for preview in _listed(job)] + picture_files(job)


def _listed(job: pb.TrainingJob) -> list[pb.PreviewImage]:
    return list(job.result.previews)[-MAX_LISTED:]


def render_pictures(job: pb.TrainingJob, urls: Mapping[str, str]) -> list[dict[str, Any]]:
    """One object a picture."""
    return [
        {
            "image": urls.get(sample.image.key, ""),
            "prompt": sample.spec.prompt,
            "negative_prompt": sample.spec.negative_prompt or None,
            "width": sample.spec.width_px,
            "height": sample.spec.height_px,
            "num_inference_steps": sample.spec.num_inference_steps,
            "guidance_scale": sample.spec.guidance_scale,
            "scheduler": _SCHEDULER_NAMES.get(sample.spec.scheduler, ""),
            "seed": sample.image.seed,
            "passback": sample.spec.passback or None,
        }
        for sample in job.result.samples
    ]


def render_output(job: pb.TrainingJob, urls: Mapping[str, str]) -> dict[str, Any]:
    """What came of the training, and the pictures of all requests."""
    previews = [urls.get(preview.image.key, "") for preview in _listed(job)]
    return {"train": {"samples": previews} if previews else {}, "inference": render_pictures(job, urls)}


def input_schema() -> dict[str, Any]:
    """JSON schema of the input."""
    request = object_schema(INFERENCE) | {"additionalProperties": False}
    several = {"type": "array", "maxItems": MAX_SAMPLES, "items": request}
    properties = {
        "train": object_schema(TRAIN) | {"additionalProperties": False},
        "inference": {
            "anyOf": [several, request],
            "description": "Pictures drawn with the finished model: requests, or a single one.",
        },
    }
    return {"type": "object", "properties": properties, "required": ["train"], "examples": [EXAMPLE]}
