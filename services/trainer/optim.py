"""Optimizers, gradient clipping and learning-rate schedules.

Owns the arithmetic of one update after the gradients are there; the recipe owns when an update happens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from services.domain.errors import InvalidSpec
from services.domain.training_spec import POLYNOMIAL_END


@dataclass(frozen=True, slots=True)
class LearningRateSchedule:
    """A learning rate as a closed form of the update index.

    Attributes:
        name: constant, constant_with_warmup, linear, cosine, cosine_with_restarts or polynomial.
        peak: learning rate after warm-up, > 0.
        warmup_steps: W, updates from 0 to the peak; `constant` ignores it.
        decay_steps: D, update at which the decay is over.
        num_cycles: cosine waves between W and D (cosine_with_restarts only), at least 1.
    """

    name: str
    peak: float
    warmup_steps: int
    decay_steps: int
    num_cycles: int = 1

    def __post_init__(self) -> None:
        if self.name not in _DECAYS:
            raise InvalidSpec(f"must be one of {', '.join(_DECAYS)}", "lr_scheduler")
        if self.name == "polynomial" and self.peak <= POLYNOMIAL_END:
            raise InvalidSpec(f"must be above {POLYNOMIAL_END} with polynomial decay", "learning_rate")

    def factor(self, update: int) -> float:
        """Returns the share of the peak at an update (counted from 0), 0..1."""
        if self.name != "constant" and update < self.warmup_steps:
            return update / self.warmup_steps
        return _DECAYS[self.name](self, self._progress(update))

    def learning_rate(self, update: int) -> float:
        """Returns the learning rate of an update, counted from 0."""
        return self.peak * self.factor(update)

    def _progress(self, update: int) -> float:
        """Returns how much of the decay is over, 0..1; it stays 1 after D."""
        if update >= self.decay_steps:
            return 1.0
        return (update - self.warmup_steps) / (self.decay_steps - self.warmup_steps)


def _constant(schedule: LearningRateSchedule, progress: float) -> float:
    return 1.0


def _linear(schedule: LearningRateSchedule, progress: float) -> float:
    return 1.0 - progress


def _cosine(schedule: LearningRateSchedule, progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _cosine_with_restarts(schedule: LearningRateSchedule, progress: float) -> float:
    if progress >= 1.0:
        return 0.0
    return 0.5 * (1.0 + math.cos(math.pi * ((schedule.num_cycles * progress) % 1.0)))


def _polynomial(schedule: LearningRateSchedule, progress: float) -> float:
    end = POLYNOMIAL_END / schedule.peak
    return (1.0 - end) * (1.0 - progress) + end


_DECAYS = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
}


def peak_learning_rate(
    learning_rate: float,
    *,
    scale_lr: bool,
    train_batch_size: int,
    gradient_accumulation_steps: int,
    processes: int = 1,
    exponent: float = 1.0,
) -> float:
    """Returns the peak rate; with scale_lr it grows with a power of the (instance) samples of one update."""
    if not scale_lr:
        return learning_rate
    samples = train_batch_size * gradient_accumulation_steps * processes
    return float(learning_rate * samples**exponent)


def build_adamw(
    groups: Sequence[Sequence[torch.nn.Parameter]],
    *,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    eight_bit: bool,
) -> torch.optim.Optimizer:
    """Builds AdamW (Loshchilov and Hutter 2019, algorithm 2) with 32-bit or block-wise 8-bit moments.

    The 8-bit form (Dettmers et al. 2022) keeps 32-bit moments for tensors of fewer than 4096 elements.

    Args:
        groups: float32 master weights; each group has a learning rate of its own, set anew for each update.
        betas: decay of the two moments, 0 <= b < 1.
        epsilon: added to the root of the bias-corrected second moment.
        weight_decay: decoupled, times the scheduled rate.
        eight_bit: keep moments in 8 bits. Nothing falls back: without bitsandbytes this is an ImportError.
    """
    trained = [{"params": list(group)} for group in groups]
    if eight_bit:
        from bitsandbytes.optim.adamw import AdamW8bit

        eight_bit_adamw: Callable[..., torch.optim.Optimizer] = AdamW8bit
        return eight_bit_adamw(trained, lr=0.0, betas=betas, eps=epsilon, weight_decay=weight_decay)
    return torch.optim.AdamW(trained, lr=0.0, betas=betas, eps=epsilon, weight_decay=weight_decay, fused=True)


def set_learning_rates(optimizer: torch.optim.Optimizer, learning_rates: Sequence[float]) -> None:
    """Sets the rate of the next update, one a group."""
    for group, learning_rate in zip(optimizer.param_groups, learning_rates, strict=True):
        group["lr"] = learning_rate


def clip_jointly(parameters: Sequence[torch.nn.Parameter], max_grad_norm: float) -> torch.Tensor:
    """Scales all gradients by one factor so that their joint L2 norm is at most `max_grad_norm`; 0 only measures.

    Returns:
        The joint norm before clipping, a scalar.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_grad_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    return norm


def clip_separately(groups: Sequence[Sequence[torch.nn.Parameter]], max_grad_norm: float) -> torch.Tensor:
    """Clips each group as :func:`clip_jointly`, by its own norm.

    Returns:
        The joint norm of all groups before clipping, a scalar.
    """
    norms = [clip_jointly(group, max_grad_norm) for group in groups]
    return torch.linalg.vector_norm(torch.stack(norms))
