"""How a specification is carried out on one device, and which of its fields a recipe does not know.

A field is either honoured (it changes the training and a test proves it), somebody else's (data, drawing, registry),
or refused by name: nothing is ignored silently.
"""

from dataclasses import dataclass
from typing import Any

import torch
from likeness.training.v1 import training_job_pb2 as pb

from services.domain.errors import InvalidSpec, Violation

HONOURED = frozenset(
    {
        "recipe",
        "method",
        "concepts",
        "seed",
        "resolution",
        "center_crop",
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
        "with_prior_preservation",
        "prior_loss_weight",
        "train_unet",
        "train_text_encoder",
        "pad_tokens",
        "save_full_precision",
    }
)
"""Fields that the DreamBooth recipe acts upon."""

OF_OTHERS = frozenset(
    {
        "base_model",
        "revision",
        "resume_checkpoint_url",
        "hub_subfolder",
        "sample_batch_size",
        "samples",
        "preview_steps",
        "rated_dataset_final_percent",
        "bucket_upload",
        "subject_crop",
        "min_usable_images",
        "test_negative_prompt",
        "model_name",
        "sandbox",
    }
)
"""Fields that act before or after the recipe, or only beside one that is refused."""

_MAY_STAY_UNSET = frozenset({"seed", "text_encoder_learning_rate"})
_AT_LEAST_ONE = ("resolution", "train_batch_size", "gradient_accumulation_steps", "lr_num_cycles")


def check_supported(spec: pb.TrainingSpec) -> None:
    """Refuses what the DreamBooth recipe cannot do, and a specification whose defaults are not resolved.

    Raises:
        InvalidSpec: with every fault.
    """
    faults = [
        Violation(field.name, "is not supported by the DreamBooth recipe")
        for field, value in spec.ListFields()
        if field.name not in HONOURED | OF_OTHERS and not _is_zero(value)
    ]
    if spec.recipe not in (pb.RECIPE_UNSPECIFIED, pb.RECIPE_DREAMBOOTH):
        faults.append(Violation("recipe", "must be DreamBooth"))
    if spec.method not in (pb.TRAINING_METHOD_UNSPECIFIED, pb.TRAINING_METHOD_FULL):
        faults.append(Violation("method", "must be full"))
    if not (spec.train_unet or spec.train_text_encoder):
        faults.append(Violation("train_unet", "must be set unless the text encoder is trained"))
    faults += [Violation(name, "must be at least 1") for name in _AT_LEAST_ONE if getattr(spec, name) < 1]
    faults += [Violation(name, "must be resolved") for name in _unresolved(spec)]
    if faults:
        raise InvalidSpec(faults)


def _is_zero(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) and not value


def _unresolved(spec: pb.TrainingSpec) -> list[str]:
    optional = [
        field.name for field in spec.DESCRIPTOR.fields if field.has_presence and field.message_type is None
    ]
    return [name for name in optional if name in HONOURED - _MAY_STAY_UNSET and not spec.HasField(name)]


@dataclass(frozen=True, slots=True)
class Execution:
    """What a device makes of a specification's open choices.

    Attributes:
        compute_dtype: of the forward pass; trained weights are float32 always.
        eight_bit: block-wise 8-bit moments.
        fused_attention: scaled-dot-product attention in one kernel.
    """

    compute_dtype: torch.dtype
    eight_bit: bool
    fused_attention: bool

    @property
    def summary(self) -> str:
        """One line for people."""
        precision = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[self.compute_dtype]
        attention = "sdpa" if self.fused_attention else "plain attention"
        return f"{precision}, {attention}, AdamW {8 if self.eight_bit else 32}-bit"


def resolve_execution(spec: pb.TrainingSpec, device: torch.device) -> Execution:
    """Decides precision, optimizer and attention: what is explicit is obeyed, AUTO follows the device."""
    on_gpu = device.type == "cuda"
    bits = spec.optimizer_precision
    eight_bit = (
        on_gpu if bits == pb.OPTIMIZER_PRECISION_UNSPECIFIED else bits == pb.OPTIMIZER_PRECISION_EIGHT_BIT
    )
    explicit = {
        pb.MIXED_PRECISION_NO: torch.float32,
        pb.MIXED_PRECISION_FP16: torch.float16,
        pb.MIXED_PRECISION_BF16: torch.bfloat16,
    }
    automatic = torch.float32
    if on_gpu:
        automatic = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return Execution(
        explicit.get(spec.mixed_precision, automatic), eight_bit, not spec.disable_fused_attention
    )


def schedule_name(spec: pb.TrainingSpec) -> str:
    """Returns the learning-rate schedule's name in the spelling of `optim.LearningRateSchedule`."""
    name = pb.LearningRateSchedule.Name(spec.lr_scheduler).removeprefix("LEARNING_RATE_SCHEDULE_").lower()
    return "constant" if name == "unspecified" else name
