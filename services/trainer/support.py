"""Which fields of a specification the recipes honour. Without torch, so that the api refuses the rest at admission.

A field is either honoured (it changes the training and a test proves it), somebody else's (data, drawing, registry),
or refused by name: nothing is ignored silently.
"""

from collections.abc import Mapping
from typing import Any

from likeness.training.v1 import training_job_pb2 as pb

from services.domain.errors import InvalidSpec, Violation
from services.domain.generation_spec import check_offered
from services.domain.training_spec import LOW_RANK

_COMMON = frozenset(
    {
        "recipe",
        "method",
        "concepts",
        "seed",
        "resolution",
        "center_crop",
        "flip_probability",
        "num_train_epochs",
        "max_train_steps",
        "train_batch_size",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "mixed_precision",
        "disable_fused_attention",
        "learning_rate",
        "text_encoder_learning_rate",
        "scale_learning_rate",
        "lr_scheduler",
        "lr_warmup_steps",
        "lr_decay_steps",
        "lr_num_cycles",
        "optimizer_precision",
        "adam_beta1",
        "adam_beta2",
        "adam_weight_decay",
        "adam_epsilon",
        "max_grad_norm",
        "clip_models_separately",
        "train_unet",
        "train_text_encoder",
        "unet_steps",
        "text_encoder_steps",
        "pad_tokens",
        "clip_skip",
        "caption_dropout",
        "shuffle_tags",
        "tag_dropout",
        "min_snr_gamma",
        "offset_noise",
        "ema_decay",
        "zero_terminal_snr",
        "lora",
        "save_full_precision",
        "save_optimizer",
        "export_formats",
        "preview_prompts",
        "preview_steps",
        "publish_every_minutes",
    }
)
_OWN: Mapping[int, frozenset[str]] = {
    pb.RECIPE_DREAMBOOTH: frozenset({"with_prior_preservation", "prior_loss_weight", "balance_concepts"}),
    pb.RECIPE_EVERYDREAM: frozenset(
        {"aspect_ratio_bucketing", "crop_jitter", "rated_dataset", "rated_dataset_final_percent"}
    ),
}
_NAMES: Mapping[int, str] = {pb.RECIPE_DREAMBOOTH: "DreamBooth", pb.RECIPE_EVERYDREAM: "EveryDream"}
RECIPES = tuple(_OWN)
WHOLE_FORMATS = (pb.EXPORT_FORMAT_SINGLE_FILE, pb.EXPORT_FORMAT_CKPT)
LORA_FORMATS = (pb.EXPORT_FORMAT_LORA_DIFFUSERS, pb.EXPORT_FORMAT_LORA_KOHYA)

OF_OTHERS: Mapping[str, str] = {
    "base_model": "admission puts in the deployment's default; phase `prepare` looks the model up",
    "resume_checkpoint_url": "phase `prepare` has storage fetch it; the recipe goes on from a checkpoint",
    "revision": "phase `prepare`, for a hub repository in `resume_checkpoint_url`",
    "hub_subfolder": "phase `prepare`, for a hub repository or a zip in `resume_checkpoint_url`",
    "sample_batch_size": "phase `prepare`, for the class pictures that it has drawn",
    "samples": "phase `finish` has them drawn by the inference service",
    "min_usable_images": "storage, when it imports a concept's instance pictures",
    "test_negative_prompt": "phase `finish`, for the picture that proves the model",
    "model_name": "the worker registers the model under it",
}
"""Fields that act before or after the recipe, or only beside one that is refused; and who acts on them."""

_WITHOUT_EFFECT: Mapping[int, frozenset[str]] = {
    pb.RECIPE_DREAMBOOTH: frozenset({"rated_dataset_final_percent"}),
    pb.RECIPE_EVERYDREAM: frozenset({"prior_loss_weight"}),
}
"""Fields that have a default and act only beside one that the recipe refuses."""

_MAY_STAY_UNSET = frozenset({"seed", "text_encoder_learning_rate", "lr_warmup_steps"})
_AT_LEAST_ONE = (
    "resolution",
    "train_batch_size",
    "gradient_accumulation_steps",
    "lr_num_cycles",
    "preview_steps",
)


def honoured(recipe: int) -> frozenset[str]:
    """Returns the fields that a recipe acts upon; unspecified is DreamBooth."""
    return _COMMON | _OWN.get(recipe or pb.RECIPE_DREAMBOOTH, frozenset())


def check_supported(spec: pb.TrainingSpec) -> None:
    """Refuses what recipe and samples cannot be, and a specification whose defaults are not resolved.

    Raises:
        InvalidSpec: with every fault.
    """
    recipe = spec.recipe or pb.RECIPE_DREAMBOOTH
    if recipe not in RECIPES:
        raise InvalidSpec(f"must be {' or '.join(_NAMES.values())}", "recipe")
    acceptable = honoured(recipe) | OF_OTHERS.keys() | _WITHOUT_EFFECT[recipe]
    faults = [
        Violation(field.name, f"is not supported by the {_NAMES[recipe]} recipe")
        for field, value in spec.ListFields()
        if field.name not in acceptable and not _is_zero(value)
    ]
    if recipe == pb.RECIPE_EVERYDREAM and not spec.aspect_ratio_bucketing:
        faults.append(Violation("aspect_ratio_bucketing", "must be set with the EveryDream recipe"))
    faults += _check_formats(spec)
    if not (spec.train_unet or spec.train_text_encoder):
        faults.append(Violation("train_unet", "must be set unless the text encoder is trained"))
    faults += [Violation(name, "must be at least 1") for name in _AT_LEAST_ONE if getattr(spec, name) < 1]
    faults += [Violation(name, "must be resolved") for name in _unresolved(spec)]
    for index, sample in enumerate(spec.samples):
        faults += check_offered(sample, f"samples[{index}].")
    if faults:
        raise InvalidSpec(faults)


def _check_formats(spec: pb.TrainingSpec) -> list[Violation]:
    """A LoRA has both layouts of its own in any case; other models have none."""
    faults = []
    for index, value in enumerate(spec.export_formats):
        if value not in WHOLE_FORMATS + LORA_FORMATS:
            faults.append(Violation(f"export_formats[{index}]", "must be a known format"))
        elif value in LORA_FORMATS and spec.method not in LOW_RANK:
            faults.append(Violation(f"export_formats[{index}]", "needs method LORA or LOCON"))
    return faults


def _is_zero(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) and not value


def _unresolved(spec: pb.TrainingSpec) -> list[str]:
    optional = [
        field.name for field in spec.DESCRIPTOR.fields if field.has_presence and field.message_type is None
    ]
    return [
        name
        for name in optional
        if name in honoured(spec.recipe) - _MAY_STAY_UNSET and not spec.HasField(name)
    ]
