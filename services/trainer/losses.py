"""The training objective as pure tensor functions.

The loss of an update is sum_i(s_i * L_i) over all its samples, L_i the mean squared error of one sample and s_i its
share: its own weight over the number of samples of its kind (see `update_shares`). However an update is cut into
batches, the parts add up to the same loss.

Shapes: b samples, c latent channels, h x w latent pixels. Noise prediction follows Ho et al. 2020 (eq. 14), velocity
prediction Salimans and Ho 2022 (section 4), prior preservation Ruiz et al. 2023 (DreamBooth, eq. 2).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler

from services.domain.errors import BadInput, InvalidSpec

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

    def with_zero_terminal_snr(self) -> "NoiseSchedule":
        """Returns the schedule stretched to end without signal (Lin et al. 2024, algorithm 1).

        sqrt(abar) is shifted so that its last value is 0 and scaled so that its first stays.

        Raises:
            InvalidSpec: the model predicts noise, which the last timestep would then show it in full.
        """
        if self.prediction_type != "v_prediction":
            raise InvalidSpec("needs a base model with v-prediction", "zero_terminal_snr")
        root = self.alphas_cumprod.double().sqrt()
        stretched = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        return NoiseSchedule(stretched.square().float(), self.prediction_type)


def noise_schedule_of(config: Mapping[str, Any], *, zero_terminal_snr: bool = False) -> NoiseSchedule:
    """Returns the forward process that a model's scheduler configuration describes, on the CPU.

    Args:
        config: as in `scheduler_config.json`.
        zero_terminal_snr: stretch it to end without signal.

    Raises:
        BadInput: the model predicts neither noise nor velocities.
        InvalidSpec: it shall be stretched, and the model predicts noise.
    """
    library = DDPMScheduler.from_config(dict(config))
    schedule = NoiseSchedule(library.alphas_cumprod.float(), str(library.config.prediction_type))
    return schedule.with_zero_terminal_snr() if zero_terminal_snr else schedule


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


def min_snr_weights(schedule: NoiseSchedule, t: torch.Tensor, gamma: float) -> torch.Tensor:
    """Returns each sample's min-SNR weight (Hang et al. 2023, eq. 9 and its form for velocities): float32, [b].

    min(snr, gamma) / snr for noise prediction, min(snr, gamma) / (snr + 1) for velocities; snr = abar / (1 - abar).

    Args:
        schedule: the forward process.
        t: timesteps, int64, [b].
        gamma: above 0; 0 switches the weighting off, all weights are 1.
    """
    if not gamma:
        return torch.ones(t.shape[0], device=t.device)
    alpha = schedule.alphas_cumprod[t].double()
    snr = alpha / (1 - alpha)
    over = snr if schedule.prediction_type == "epsilon" else snr + 1
    return (snr.clamp(max=gamma) / over).float()


def update_shares(
    weights: torch.Tensor,
    *,
    num_instance: int,
    instance_total: int,
    class_total: int,
    prior_loss_weight: float,
) -> torch.Tensor:
    """Returns what each sample of one forward pass contributes to the update's loss (DreamBooth eq. 2): [b].

    Both means run over the whole update: mean(instance errors) + prior_loss_weight * mean(class errors).

    Args:
        weights: the samples' own loss weights, instance samples first, class samples after them, [b].
        num_instance: how many of them are instance samples.
        instance_total: instance samples of the whole update, at least 1.
        class_total: class samples of the whole update, 0 without prior preservation.
        prior_loss_weight: lambda.
    """
    shares = weights.clone()
    shares[:num_instance] /= instance_total
    if class_total:
        shares[num_instance:] *= prior_loss_weight / class_total
    return shares


def shared_loss(errors: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Returns one forward pass's part of the update's loss, a scalar.

    Args:
        errors: per-sample errors, [b].
        shares: from :func:`update_shares`, [b].
    """
    return (errors * shares).sum()


def _rates(schedule: NoiseSchedule, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # [T] -> [b, 1, 1, 1]
    alpha = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    return alpha.sqrt(), (1 - alpha).sqrt()
