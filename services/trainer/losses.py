"""The training objective as pure tensor functions.

Shapes: b samples, c latent channels, h x w latent pixels. Noise prediction follows Ho et al. 2020 (eq. 14), velocity
prediction Salimans and Ho 2022 (section 4), prior preservation Ruiz et al. 2023 (DreamBooth, eq. 2).
"""

from dataclasses import dataclass

import torch

from services.domain.errors import BadInput

PREDICTION_TYPES = ("epsilon", "v_prediction")


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """The forward process of the base model: what its scheduler's configuration says.

    Attributes:
        alphas_cumprod: abar_t of Ho et al. 2020, float32, [T].
        prediction_type: one of PREDICTION_TYPES.
    """

    alphas_cumprod: torch.Tensor
    prediction_type: str

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            known = ", ".join(PREDICTION_TYPES)
            raise BadInput(f"the model's prediction type {self.prediction_type!r} is none of {known}")

    @property
    def num_timesteps(self) -> int:
        """T, the number of noise levels."""
        return int(self.alphas_cumprod.shape[0])

    def to(self, device: torch.device) -> "NoiseSchedule":
        """Returns the same schedule on a device."""
        return NoiseSchedule(self.alphas_cumprod.to(device), self.prediction_type)


def add_noise(schedule: NoiseSchedule, z0: torch.Tensor, e: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Returns zt = sqrt(abar_t) z0 + sqrt(1 - abar_t) e (Ho et al. 2020, eq. 4).

    Args:
        schedule: the forward process.
        z0: clean scaled latents, [b, c, h, w].
        e: noise, like z0.
        t: timesteps, int64, [b], 0..T-1.
    """
    signal, noise = _rates(schedule, t)
    return signal * z0 + noise * e


def training_target(
    schedule: NoiseSchedule, z0: torch.Tensor, e: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """Returns what the model should answer for zt: the noise, or the velocity sqrt(abar) e - sqrt(1 - abar) z0."""
    if schedule.prediction_type == "epsilon":
        return e
    signal, noise = _rates(schedule, t)
    return signal * e - noise * z0


def per_sample_mse(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Returns the mean squared error of each sample over channels and pixels, computed in float32: [b]."""
    # [b, c, h, w] -> [b]
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def micro_step_loss(
    errors: torch.Tensor,
    *,
    num_instance: int,
    instance_total: int,
    class_total: int,
    prior_loss_weight: float,
) -> torch.Tensor:
    """Returns one micro-step's part of the update's loss (DreamBooth eq. 2).

    The two means are taken over the whole update: the parts of all its micro-steps add up to
    mean(instance errors) + prior_loss_weight * mean(class errors), however the update was cut into batches.

    Args:
        errors: per-sample errors, instance samples first, class samples after them, [b].
        num_instance: how many of `errors` belong to instance samples.
        instance_total: instance samples of the whole update, at least 1.
        class_total: class samples of the whole update, 0 without prior preservation.
        prior_loss_weight: lambda.
    """
    loss = errors[:num_instance].sum() / instance_total
    if class_total:
        loss = loss + prior_loss_weight * (errors[num_instance:].sum() / class_total)
    return loss


def _rates(schedule: NoiseSchedule, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # [T] -> [b, 1, 1, 1]
    alpha = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    return alpha.sqrt(), (1 - alpha).sqrt()
