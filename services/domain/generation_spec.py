"""Defaults and limits of a GenerationSpec: what a request for pictures means once it is admitted.

The seed is left alone: where it is unset, whoever admits the job draws one, since this module has no randomness.
What depends on the model (layers that `clip_skip` may skip, families of add-ons) is checked where the model is known.
"""

from collections.abc import Callable
from typing import Any

from likeness.inference.v1 import generation_job_pb2 as pb

from services.domain.errors import InvalidSpec, Violation
from services.domain.rules import MAX_SEED, Range, check_enum, check_ranges, check_text

MAX_LORAS = 5
MAX_EMBEDDINGS = 16
RANDOM_SEED_LIMIT = 65536
"""Seeds that are drawn at admission lie below it."""

RANGES = (
    Range("num_images", 1, 10),
    Range("num_inference_steps", 1, 500),
    Range("guidance_scale", 0, 50),
    Range("seed", 0, MAX_SEED),
    Range("strength", 0, 1),
    Range("self_attention_scale", 0, 2),
    Range("upscale_factor", 1, 3),
    Range("token_merging_ratio", 0, 0.75),
    Range("guidance_rescale", 0, 1),
    Range("eta", 0, 1),
)
SIZES = (Range("width_px", 64, 2048, multiple=8), Range("height_px", 64, 2048, multiple=8))
TEXTS = (("prompt", 4000), ("negative_prompt", 4000), ("passback", 1000))
ENUMS = ("scheduler", "solver_algorithm", "safety_action", "image_format", "long_prompt_mode")
UNOFFERED: tuple[tuple[str, Callable[[pb.GenerationSpec], Any]], ...] = (
    ("vae", lambda spec: spec.vae),
    ("self_attention_scale", lambda spec: spec.self_attention_scale > 0),
    ("panorama", lambda spec: spec.panorama),
    ("highres_fix", lambda spec: spec.highres_fix),
    ("upscale_factor", lambda spec: spec.upscale_factor > 1),
    ("token_merging_ratio", lambda spec: spec.token_merging_ratio > 0),
    ("safety_action", lambda spec: spec.safety_action),
    ("enhance_prompt", lambda spec: spec.enhance_prompt),
    ("translate_prompt", lambda spec: spec.translate_prompt),
    ("add_trigger_words", lambda spec: spec.add_trigger_words),
    ("long_prompt_mode", lambda spec: spec.long_prompt_mode),
    ("weighted_prompt", lambda spec: spec.weighted_prompt),
    ("circular_padding", lambda spec: spec.circular_padding),
)
"""Wishes that the message can hold and no engine here fulfils: field, and whether a request has that wish."""


def resolve_generation_spec(
    spec: pb.GenerationSpec, native_size_px: int = 0, path: str = ""
) -> pb.GenerationSpec:
    """Fills in every default and checks the result.

    Args:
        spec: what was asked for; it is not changed.
        native_size_px: width and height of pictures that name none; 0: left to the model, which is known later.
        path: what names the spec in violations, for instance ``samples[0].``.

    Returns:
        A new, complete message; resolving it again changes nothing.

    Raises:
        InvalidSpec: with every broken rule.
    """
    resolved = pb.GenerationSpec()
    resolved.CopyFrom(spec)
    fill_defaults(resolved, native_size_px)
    faults = violations_of(resolved, path)
    if faults:
        raise InvalidSpec(faults)
    return resolved


def fill_defaults(spec: pb.GenerationSpec, native_size_px: int = 0) -> None:
    """Sets every default in place; a size of 0 is left to the model."""
    spec.width_px = spec.width_px or native_size_px
    spec.height_px = spec.height_px or native_size_px
    spec.num_images = spec.num_images or 1
    spec.num_inference_steps = spec.num_inference_steps or 50
    spec.upscale_factor = spec.upscale_factor or 1
    spec.scheduler = spec.scheduler or pb.SCHEDULER_DDIM
    spec.image_format = spec.image_format or pb.IMAGE_FORMAT_PNG
    _fill_optional(spec, "guidance_scale", 7.5)
    if spec.init_image_key:
        _fill_optional(spec, "strength", 0.7)
    for lora in spec.loras:
        _fill_optional(lora, "strength", 1.0)


def _fill_optional(message: pb.GenerationSpec | pb.LoraWeight, field: str, value: float) -> None:
    if not message.HasField(field):
        setattr(message, field, value)


def violations_of(spec: pb.GenerationSpec, path: str = "") -> list[Violation]:
    """Every rule that a resolved spec breaks."""
    faults = check_ranges(spec, RANGES, path)
    faults += check_ranges(spec, [size for size in SIZES if getattr(spec, size.field)], path)
    for field, at_most in TEXTS:
        at_least = 1 if field == "prompt" and not spec.init_image_key else 0
        faults += check_text(path + field, getattr(spec, field), at_most, at_least)
    for field in ENUMS:
        faults += check_enum(spec, field, path)
    return faults + _check_pictures(spec, path) + _check_add_ons(spec, path)


def check_offered(spec: pb.GenerationSpec, path: str = "") -> list[Violation]:
    """Every wish that no engine here fulfils, so that it is refused instead of ignored.

    Args:
        spec: what was asked for.
        path: what names the spec in violations, for instance ``samples[0].``.
    """
    wishes = [name for name, is_set in UNOFFERED if is_set(spec)]
    return [Violation(path + name, "is not offered by this installation") for name in wishes]


def _check_pictures(spec: pb.GenerationSpec, path: str) -> list[Violation]:
    faults = []
    if spec.mask_image_key and not spec.init_image_key:
        faults.append(Violation(path + "mask_image_key", "needs init_image_key"))
    if spec.circular_padding and not spec.panorama:
        faults.append(Violation(path + "circular_padding", "needs panorama"))
    if spec.output_names and len(spec.output_names) != spec.num_images:
        faults.append(Violation(path + "output_names", "must name each picture, or none"))
    return faults


def _check_add_ons(spec: pb.GenerationSpec, path: str) -> list[Violation]:
    faults = []
    for field, at_most in (("loras", MAX_LORAS), ("embeddings", MAX_EMBEDDINGS)):
        if len(getattr(spec, field)) > at_most:
            faults.append(Violation(path + field, f"must have at most {at_most} elements"))
        faults += [
            Violation(f"{path}{field}[{index}].model", "is required")
            for index, entry in enumerate(getattr(spec, field))
            if not entry.model
        ]
    for index, lora in enumerate(spec.loras):
        faults += check_ranges(lora, [Range("strength", 0, 2)], f"{path}loras[{index}].")
    return faults
