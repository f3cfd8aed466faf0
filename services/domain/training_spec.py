"""Defaults and limits of a TrainingSpec: what a training means once it is admitted.

Defaults are resolved here and nowhere else, so that a stored job means the same after an upgrade. In fields without
presence zero stands for the default. Left alone: the base model's id, which the deployment fills in; the seeds of the
samples, which whoever admits the job draws; the learning rate of the text encoder, which follows the UNet's.
"""

import math
from typing import Any

from likeness.training.v1 import training_job_pb2 as pb

from services.domain import generation_spec
from services.domain.artifacts import HUB_REPOSITORY
from services.domain.errors import InvalidSpec, Violation
from services.domain.rules import MAX_SEED, Range, check_enum, check_ranges, check_text, check_url

MAX_CONCEPTS = 8
MAX_SAMPLES = 32
MAX_PREVIEWS = 16
MAX_PROMPT_CHARS = 1000
MAX_SOURCES = 1000
POLYNOMIAL_END = 1e-7
"""Learning rate at which a polynomial schedule ends."""

DREAMBOOTH_RESOLUTIONS = tuple(range(256, 1025, 64))
EVERYDREAM_RESOLUTIONS: tuple[int, ...] = (
    256,
    384,
    448,
    512,
    576,
    640,
    704,
    768,
    832,
    896,
    960,
    1024,
    1088,
    1152,
)

_COMMON: dict[str, Any] = {
    "method": pb.TRAINING_METHOD_FULL,
    "resolution": 512,
    "gradient_accumulation_steps": 1,
    "lr_scheduler": pb.LEARNING_RATE_SCHEDULE_CONSTANT,
    "lr_num_cycles": 1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 0.01,
    "adam_epsilon": 1e-8,
    "prior_loss_weight": 1.0,
    "sample_batch_size": 2,
    "train_unet": True,
    "train_text_encoder": True,
    "rated_dataset_final_percent": 50.0,
    "preview_steps": 250,
}
_DREAMBOOTH: dict[str, Any] = {
    "train_batch_size": 1,
    "learning_rate": 1e-6,
    "lr_warmup_steps": 0,
    "max_grad_norm": 1.0,
    "with_prior_preservation": True,
    "caption_dropout": 0.0,
    "save_full_precision": True,
}
_EVERYDREAM: dict[str, Any] = {
    "num_train_epochs": 300,
    "train_batch_size": 2,
    "learning_rate": 2e-6,
    "max_grad_norm": 0.0,
    "with_prior_preservation": False,
    "caption_dropout": 0.04,
    "save_full_precision": False,
    "aspect_ratio_bucketing": True,
    "clip_models_separately": True,
}
LORA_LEARNING_RATE = 1e-4
LORA_RANK = 4
DREAMBOOTH_STEPS = 2000
NUM_CLASS_IMAGES = 50
SEEDS = {pb.RECIPE_DREAMBOOTH: 1337, pb.RECIPE_EVERYDREAM: 555}

RANGES = (
    Range("seed", 0, MAX_SEED),
    Range("flip_probability", 0, 1),
    Range("num_train_epochs", 0, 10_000),
    Range("max_train_steps", 0, 100_000),
    Range("train_batch_size", 1, 32),
    Range("gradient_accumulation_steps", 1, 64),
    Range("learning_rate", 0, 1, above=True),
    Range("text_encoder_learning_rate", 0, 1, above=True),
    Range("lr_num_cycles", 1, 100),
    Range("adam_beta1", 0, 1, below=True),
    Range("adam_beta2", 0, 1, below=True),
    Range("adam_weight_decay", 0, 1),
    Range("adam_epsilon", 0, 1, above=True),
    Range("max_grad_norm", 0, 1000),
    Range("prior_loss_weight", 0, 10),
    Range("sample_batch_size", 1, 32),
    Range("clip_skip", 0, 4),
    Range("caption_dropout", 0, 1),
    Range("tag_dropout", 0, 1),
    Range("rated_dataset_final_percent", 0, 100),
    Range("min_snr_gamma", 0),
    Range("offset_noise", 0, 1),
    Range("ema_decay", 0, 1, below=True),
    Range("publish_every_minutes", 0),
    Range("crop_jitter", 0, 0.02),
)
LORA_RANGES = (
    Range("rank", 1, 1024),
    Range("alpha", 0, above=True),
    Range("dropout", 0, 1),
    Range("conv_rank", 0, 1024),
    Range("conv_alpha", 0),
)
ENUMS = ("recipe", "method", "mixed_precision", "lr_scheduler", "optimizer_precision", "subject_crop")
LOW_RANK = (pb.TRAINING_METHOD_LORA, pb.TRAINING_METHOD_LOCON)
"""Methods that train adapters and leave the base as it is."""


def resolve_training_spec(spec: pb.TrainingSpec) -> pb.TrainingSpec:
    """Fills in every default and checks the result.

    Args:
        spec: what was asked for; it is not changed.

    Returns:
        A new, complete message; resolving it again changes nothing.

    Raises:
        InvalidSpec: with every broken rule.
    """
    resolved = pb.TrainingSpec()
    resolved.CopyFrom(spec)
    _fill(resolved)
    faults = violations_of(resolved)
    if faults:
        raise InvalidSpec(faults)
    return resolved


def _fill(spec: pb.TrainingSpec) -> None:
    spec.recipe = spec.recipe or pb.RECIPE_DREAMBOOTH
    everydream = spec.recipe == pb.RECIPE_EVERYDREAM
    if spec.method in LOW_RANK:
        spec.learning_rate = spec.learning_rate or LORA_LEARNING_RATE
        _fill_lora(spec)
    _fill_length(spec, everydream)
    for field, value in (_COMMON | (_EVERYDREAM if everydream else _DREAMBOOTH)).items():
        _fill_field(spec, field, value)
    for concept in spec.concepts:
        _fill_field(concept, "num_class_images", NUM_CLASS_IMAGES)
    _fill_field(spec, "seed", _seed(spec))
    for sample in spec.samples:
        generation_spec.fill_defaults(sample)


def _fill_length(spec: pb.TrainingSpec, everydream: bool) -> None:
    """Steps beat epochs; without either a DreamBooth training takes its default number of steps."""
    if not everydream and not spec.max_train_steps and not spec.num_train_epochs:
        spec.max_train_steps = DREAMBOOTH_STEPS
    spec.num_train_epochs = spec.num_train_epochs or (300 if everydream else 1)


def _fill_field(message: Any, field: str, value: Any) -> None:
    presence = message.DESCRIPTOR.fields_by_name[field].has_presence
    given = message.HasField(field) if presence else bool(getattr(message, field))
    if not given:
        setattr(message, field, value)


def _fill_lora(spec: pb.TrainingSpec) -> None:
    lora = spec.lora
    lora.rank = lora.rank or LORA_RANK
    lora.alpha = lora.alpha or float(lora.rank)
    if spec.method == pb.TRAINING_METHOD_LOCON:
        lora.conv_rank = lora.conv_rank or lora.rank
        lora.conv_alpha = lora.conv_alpha or float(lora.conv_rank)


def _seed(spec: pb.TrainingSpec) -> int:
    own = [concept.seed for concept in spec.concepts if concept.HasField("seed")]
    return own[0] if own else SEEDS.get(spec.recipe, SEEDS[pb.RECIPE_DREAMBOOTH])


def violations_of(spec: pb.TrainingSpec) -> list[Violation]:
    """Every rule that a resolved spec breaks."""
    faults = check_ranges(spec, RANGES)
    for field in ENUMS:
        faults += check_enum(spec, field)
    faults += _check_resolution(spec) + _check_concepts(spec) + _check_modules(spec) + _check_lora(spec)
    faults += _check_schedule(spec) + _check_texts(spec) + _check_sources(spec)
    if len(spec.samples) > MAX_SAMPLES:
        faults.append(Violation("samples", f"must have at most {MAX_SAMPLES} elements"))
    for index, sample in enumerate(spec.samples):
        faults += _check_sample(sample, f"samples[{index}].")
    return faults


def _check_resolution(spec: pb.TrainingSpec) -> list[Violation]:
    if spec.recipe == pb.RECIPE_EVERYDREAM:
        allowed, rule = (
            EVERYDREAM_RESOLUTIONS,
            "must be one of " + ", ".join(map(str, EVERYDREAM_RESOLUTIONS)),
        )
    else:
        allowed, rule = DREAMBOOTH_RESOLUTIONS, "must be between 256 and 1024 and a multiple of 64"
    return [] if spec.resolution in allowed else [Violation("resolution", rule)]


def _check_concepts(spec: pb.TrainingSpec) -> list[Violation]:
    faults: list[Violation] = []
    everydream = spec.recipe == pb.RECIPE_EVERYDREAM
    most = 1 if everydream else MAX_CONCEPTS
    if not spec.concepts:
        faults.append(Violation("concepts", "is required"))
    elif len(spec.concepts) > most:
        faults.append(
            Violation("concepts", f"must have 1 to {most} elements" if most > 1 else "must have 1 element")
        )
    for index, concept in enumerate(spec.concepts):
        faults += _check_concept(spec, concept, f"concepts[{index}].", everydream)
    return faults


def _check_concept(
    spec: pb.TrainingSpec, concept: pb.Concept, path: str, everydream: bool
) -> list[Violation]:
    faults = check_ranges(concept, [Range("num_class_images", 0, 1000), Range("seed", 0, MAX_SEED)], path)
    faults += _check_source(concept.instance_data, path + "instance_data", required=True)
    if everydream:
        return faults
    prior = spec.with_prior_preservation
    if concept.HasField("with_prior_preservation"):
        prior = concept.with_prior_preservation
    faults += _check_source(concept.class_data, path + "class_data", required=False)
    needed = 0 if concept.use_captions else 1
    faults += check_text(path + "instance_prompt", concept.instance_prompt, MAX_PROMPT_CHARS, needed)
    faults += check_text(path + "class_prompt", concept.class_prompt, MAX_PROMPT_CHARS, int(prior))
    if prior and not concept.num_class_images:
        rule = "must be at least 1 with prior preservation and without class_data"
        if not concept.class_data.WhichOneof("source"):
            faults.append(Violation(path + "num_class_images", rule))
    return faults


def _check_source(source: pb.ImageSource, path: str, required: bool) -> list[Violation]:
    kind = source.WhichOneof("source")
    if kind == "archive_url":
        return check_url(path, source.archive_url)
    if kind == "image_urls":
        urls = list(source.image_urls.urls)
        faults = [fault for index, url in enumerate(urls) for fault in check_url(f"{path}[{index}]", url)]
        return faults + _check_count(path, len(urls))
    if kind == "artifacts":
        return _check_count(path, len(source.artifacts.keys))
    if kind is None and required:
        return [Violation(path, "is required")]
    return []


def _check_count(path: str, count: int) -> list[Violation]:
    return [] if 1 <= count <= MAX_SOURCES else [Violation(path, f"must have 1 to {MAX_SOURCES} elements")]


def _check_modules(spec: pb.TrainingSpec) -> list[Violation]:
    if spec.train_unet or spec.train_text_encoder:
        return []
    return [Violation("train_text_encoder", "must be true when the UNet is not trained")]


def _check_lora(spec: pb.TrainingSpec) -> list[Violation]:
    if spec.method in LOW_RANK:
        return check_ranges(spec.lora, LORA_RANGES, "lora.")
    return [Violation("lora", "needs method LORA or LOCON")] if spec.HasField("lora") else []


def _check_schedule(spec: pb.TrainingSpec) -> list[Violation]:
    """A polynomial curve ends at 1e-7 and divides by the updates left after the warm-up."""
    if spec.lr_scheduler != pb.LEARNING_RATE_SCHEDULE_POLYNOMIAL:
        return []
    faults = []
    rule = f"must be above {POLYNOMIAL_END:g} with lr_scheduler polynomial"
    for field in ("learning_rate", "text_encoder_learning_rate"):
        given = field == "learning_rate" or spec.HasField("text_encoder_learning_rate")
        if given and 0 < getattr(spec, field) * _rate_factor(spec) <= POLYNOMIAL_END:
            faults.append(Violation(field, rule))
    if spec.lr_warmup_steps and spec.lr_warmup_steps == _decay_steps(spec):
        faults.append(
            Violation("lr_warmup_steps", "must differ from the number of steps with lr_scheduler polynomial")
        )
    return faults


def _rate_factor(spec: pb.TrainingSpec) -> float:
    samples = max(1, spec.train_batch_size * spec.gradient_accumulation_steps)
    if not spec.scale_learning_rate:
        return 1.0
    return samples**0.55 if spec.recipe == pb.RECIPE_EVERYDREAM else float(samples)


def _decay_steps(spec: pb.TrainingSpec) -> int:
    """Length of the curve in updates as far as it is known before the data is; 0: not known."""
    if spec.lr_decay_steps:
        return spec.lr_decay_steps
    everydream = spec.recipe == pb.RECIPE_EVERYDREAM
    return math.ceil(1.5 * spec.max_train_steps) if everydream else spec.max_train_steps


def _check_texts(spec: pb.TrainingSpec) -> list[Violation]:
    faults = check_text("test_negative_prompt", spec.test_negative_prompt, MAX_PROMPT_CHARS)
    faults += check_text("model_name", spec.model_name, 200)
    if len(spec.preview_prompts) > MAX_PREVIEWS:
        faults.append(Violation("preview_prompts", f"must have at most {MAX_PREVIEWS} elements"))
    for index, prompt in enumerate(spec.preview_prompts):
        faults += check_text(f"preview_prompts[{index}]", prompt, MAX_PROMPT_CHARS, 1)
    return faults


def _check_sources(spec: pb.TrainingSpec) -> list[Violation]:
    address = spec.resume_checkpoint_url
    faults = (
        check_url("resume_checkpoint_url", address)
        if address and not HUB_REPOSITORY.fullmatch(address)
        else []
    )
    parts = spec.hub_subfolder.replace("\\", "/").split("/")
    if spec.hub_subfolder and (".." in parts or not parts[0] or ":" in parts[0]):
        faults.append(Violation("hub_subfolder", "must be a relative path without '..'"))
    if spec.hub_subfolder and not spec.resume_checkpoint_url:
        faults.append(Violation("hub_subfolder", "needs resume_checkpoint_url"))
    if spec.revision and not address:
        faults.append(Violation("revision", "needs resume_checkpoint_url"))
    return faults


def _check_sample(sample: Any, path: str) -> list[Violation]:
    faults = generation_spec.violations_of(sample, path)
    if sample.model:
        faults.append(Violation(path + "model", "must be empty: samples are drawn with the trained model"))
    return faults
