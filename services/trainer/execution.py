"""How a specification is carried out on one device."""

from dataclasses import dataclass

import torch
from likeness.training.v1 import training_job_pb2 as pb


@dataclass(frozen=True, slots=True)
class Execution:
    """What a device makes of a specification's open choices.

    Attributes:
        compute_dtype: of the forward pass; trained weights are float32 always.
        eight_bit: block-wise 8-bit moments.
        fused_attention: scaled-dot-product attention in one kernel.
        deterministic: only kernels that give equal bits each time.
    """

    compute_dtype: torch.dtype
    eight_bit: bool
    fused_attention: bool
    deterministic: bool

    @property
    def vae_dtype(self) -> torch.dtype:
        """Precision in which pictures are encoded: never float16, which the encoder's activations can exceed."""
        return torch.float32 if self.compute_dtype is torch.float16 else self.compute_dtype

    @property
    def summary(self) -> str:
        """One line for people."""
        precision = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[self.compute_dtype]
        attention = "sdpa" if self.fused_attention else "plain attention"
        kernels = "deterministic" if self.deterministic else "not deterministic"
        return f"{precision}, {attention}, AdamW {8 if self.eight_bit else 32}-bit, {kernels}"


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
        explicit.get(spec.mixed_precision, automatic),
        eight_bit,
        not spec.disable_fused_attention,
        torch.are_deterministic_algorithms_enabled(),
    )


def schedule_name(spec: pb.TrainingSpec) -> str:
    """Returns the learning-rate schedule's name in the spelling of `optim.LearningRateSchedule`."""
    name = pb.LearningRateSchedule.Name(spec.lr_scheduler).removeprefix("LEARNING_RATE_SCHEDULE_").lower()
    return "constant" if name == "unspecified" else name


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Returns the context in which a forward pass computes with `dtype`; float32 is left alone."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)
