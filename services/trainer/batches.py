"""One forward pass of a recipe: what its samples look like once everything random about them is drawn.

Every draw is named by the sample's use (see `randomness`), so a sample is the same in whatever batch it falls.
Shapes: b samples, c latent channels, h x w latent pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic

import torch

from services.trainer.buckets import Size
from services.trainer.captions import CaptionedPicture, UseRules, drawn_caption
from services.trainer.data import LatentSource, Use, UseT
from services.trainer.losses import NoiseSchedule, min_snr_weights
from services.trainer.randomness import Purpose, normal, uniform_integer


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass.

    Attributes:
        z0: clean latents, float32, [b, c, h, w].
        e: noise, like z0.
        t: timesteps, int64, [b].
        weights: the samples' own loss weights, float32, [b].
        prompts: what each sample is said to show.
        sample_ids: which picture each sample is.
        num_instance: how many samples, the first ones, are of the instance; the others are of its class.
    """

    z0: torch.Tensor
    e: torch.Tensor
    t: torch.Tensor
    weights: torch.Tensor
    prompts: tuple[str, ...]
    sample_ids: tuple[str, ...]
    num_instance: int

    @property
    def num_class(self) -> int:
        """Class samples."""
        return len(self.prompts) - self.num_instance


class BatchSource(Generic[UseT]):
    """Makes batches of uses; a picture that cannot be encoded is left out.

    Args:
        latents: clean latents of a use.
        schedule: the forward process, on `device`.
        seed: the job's.
        device: where the tensors go.
        caption: what a use is said to show.
        weight: of a use's loss.
        offset_noise: amplitude of the part of the noise that is one value a channel; 0 is off.
        min_snr_gamma: weighting of the samples by their timestep; 0 is off.
    """

    def __init__(
        self,
        latents: LatentSource[UseT],
        schedule: NoiseSchedule,
        *,
        seed: int,
        device: torch.device,
        caption: Callable[[UseT], str],
        weight: Callable[[UseT], float] = lambda use: 1.0,
        offset_noise: float = 0.0,
        min_snr_gamma: float = 0.0,
    ) -> None:
        self._latents = latents
        self._schedule = schedule
        self._seed = seed
        self._device = device
        self._caption = caption
        self._weight = weight
        self._offset_noise = offset_noise
        self._min_snr_gamma = min_snr_gamma

    def batch(self, instance: Sequence[UseT], classes: Sequence[UseT] = ()) -> Batch:
        """Returns the forward pass of these uses, all of one size in pixels."""
        usable = self._encoded(instance)
        num_instance = len(usable)
        usable += self._encoded(classes)
        uses = [use for use, _ in usable]
        t = torch.tensor([self._timestep(use) for use in uses], dtype=torch.int64, device=self._device)
        own = torch.tensor([self._weight(use) for use in uses], device=self._device)
        return Batch(
            z0=self._stacked([z0 for _, z0 in usable]),
            e=self._stacked([self._noise(use, tuple(z0.shape)) for use, z0 in usable]),
            t=t,
            weights=min_snr_weights(self._schedule, t, self._min_snr_gamma) * own,
            prompts=tuple(self._caption(use) for use in uses),
            sample_ids=tuple(use.picture.sample_id for use in uses),
            num_instance=num_instance,
        )

    def _encoded(self, uses: Sequence[UseT]) -> list[tuple[UseT, torch.Tensor]]:
        drawn = [(use, self._latents.latents(use)) for use in uses]
        return [(use, z0) for use, z0 in drawn if z0 is not None]

    def _timestep(self, use: Use) -> int:
        return uniform_integer(self._schedule.num_timesteps, self._seed, Purpose.TIMESTEP, *use.coordinates)

    def _noise(self, use: Use, shape: tuple[int, ...]) -> torch.Tensor:
        """Returns e + a n: e is N(0, 1) everywhere, n one such value a channel; [c, h, w]."""
        e = normal(shape, self._seed, Purpose.NOISE, *use.coordinates)
        if self._offset_noise:
            n = normal((shape[0], 1, 1), self._seed, Purpose.NOISE, *use.coordinates, "offset")
            e += self._offset_noise * n
        return e

    def _stacked(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack(list(tensors)).to(self._device) if tensors else torch.empty(0)


def prompt_caption(use: Use, rules: UseRules) -> str:
    """Returns what one use of a picture with a prompt is said to show: the prompt as the rules leave it."""
    picture = use.picture
    captioned = CaptionedPicture(
        sample_id=picture.sample_id,
        path=picture.path,
        prompt=picture.prompt,
        concept=picture.concept,
        seed=picture.seed,
        name=picture.sample_id,
        size=Size(0, 0),
        text=picture.prompt,
    )
    return drawn_caption(captioned, rules, picture.seed, use.coordinates)
