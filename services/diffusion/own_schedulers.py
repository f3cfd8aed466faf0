"""Schedulers that the library lacks for models of discrete noise levels, with its objects' methods.

All three walk in the coordinates of Karras et al. (2022): latents are divided by the root of the schedule's
cumulated alpha, so that they are a picture plus noise of standard deviation sigma. Sigma in the comments is that of
the model's own schedule; levels between two of its timesteps are told to the model as fractions.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

import diffusers
import numpy
import torch
from torch import Tensor

SMALLEST_ALPHA: Final = 2.0**-24
"""Stands for the nought that schedules with no signal at their end have, as in the library."""
ADAMS_BASHFORTH: Final = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Weights of this prediction and those before it, by how many of them there are."""


class SigmaScheduler(ABC):
    """What the three have in common: noise levels, and what the model is told and says at each call.

    Calls of :meth:`step` must follow each other; the other methods may be called any number of times before each.

    Attributes:
        order: calls of the model that one denoising step takes; the last step takes one.
        timesteps: what the model is told at each call.
    """

    order = 1
    timesteps: Tensor

    def __init__(self, configuration: Mapping[str, Any]) -> None:
        """Takes the model's schedule, as :class:`diffusers.DDIMScheduler` knows it."""
        self._schedule = diffusers.DDIMScheduler.from_config(dict(configuration))
        kept = self._schedule.alphas_cumprod.double().clamp(min=SMALLEST_ALPHA)
        self._table = ((1 - kept) / kept).sqrt().numpy()
        self._told: Sequence[float] = ()
        self._call = 0

    @classmethod
    def from_config(cls, configuration: Mapping[str, Any]) -> Self:
        """As the library's classes are made."""
        return cls(configuration)

    def set_timesteps(self, steps: int, device: str = "cpu") -> None:
        """Plan a walk of so many denoising steps.

        Raises:
            ValueError: the schedule has fewer.
        """
        self._schedule.set_timesteps(steps, device=device)
        self._plan(steps)

    @abstractmethod
    def _plan(self, steps: int) -> None:
        """Sets :attr:`timesteps`, and in `_told` the noise level of the latents at each call."""

    def set_begin_index(self, call: int) -> None:
        """Let the walk begin at a later call."""
        self._call = call

    @property
    def config(self) -> Any:
        """The model's configuration, read as the library's objects have theirs read."""
        return self._schedule.config

    @property
    def alphas_cumprod(self) -> Tensor:
        """The model's schedule: the share of the picture in the variance at each timestep."""
        alphas: Tensor = self._schedule.alphas_cumprod
        return alphas

    @property
    def init_noise_sigma(self) -> float:
        """What unit noise is multiplied by at the start, so that the model sees unit noise there."""
        return math.hypot(self._told[0], 1)

    def scale_model_input(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """The latents in the scale of the model's own schedule."""
        return latents / math.hypot(self._told[self._call], 1)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """A picture's latents at the noise level of the next call."""
        return latents + self._told[self._call] * noise

    def _noise_in(self, prediction: Tensor, latents: Tensor) -> Tensor:
        """The unit noise that the model sees in the latents, whatever it predicts; also their slope along sigma."""
        sigma, kind = self._told[self._call], self._schedule.config.prediction_type
        if kind == "sample":
            return (latents - prediction) / sigma
        if kind == "v_prediction":  # Salimans and Ho 2022, appendix D
            return prediction / math.hypot(sigma, 1) + latents * sigma / (sigma**2 + 1)
        return prediction

    def _sigma_of(self, timestep: int) -> float:
        return float(self._table[timestep])

    def _timesteps_of(self, sigmas: Sequence[float]) -> Tensor:
        places = numpy.interp(numpy.log(sigmas), numpy.log(self._table), numpy.arange(len(self._table)))
        return torch.from_numpy(places).float()

    def _range(self) -> tuple[float, float]:
        """Largest and smallest sigma of the plain walk."""
        timesteps = self._schedule.timesteps
        return self._sigma_of(int(timesteps[0])), self._sigma_of(int(timesteps[-1]))


class IPNDMScheduler(SigmaScheduler):
    """Improved pseudo linear multistep method, iPNDM (Zhang and Chen 2022), of fourth order.

    The fourth-order step of Liu et al. 2022 is DDIM's (their equation 9) with the noise
    (55 e[n] - 59 e[n-1] + 37 e[n-2] - 9 e[n-3]) / 24. The improved method begins with the formulas of first, second
    and third order instead of with Runge-Kutta steps, so that each step takes one call.
    """

    def _plan(self, steps: int) -> None:
        self.timesteps = self._schedule.timesteps
        final = self._schedule.final_alpha_cumprod.double()
        self._told = [self._sigma_of(int(timestep)) for timestep in self.timesteps]
        self._final = float(((1 - final) / final).sqrt())
        self._past: list[Tensor] = []

    def step(
        self, prediction: Tensor, timestep: Tensor, latents: Tensor, *, return_dict: bool = False
    ) -> tuple[Tensor]:
        """One denoising step."""
        sigma = self._told[self._call]
        self._past = [self._noise_in(prediction, latents), *self._past[:3]]
        self._call += 1
        following = self._told[self._call] if self._call < len(self._told) else self._final
        weights = ADAMS_BASHFORTH[len(self._past) - 1]
        slope = sum(weight * noise for weight, noise in zip(weights, self._past, strict=True))
        return (latents + (following - sigma) * slope,)


class KarrasVeScheduler(SigmaScheduler):
    """Stochastic second-order sampler (Karras et al. 2022, Algorithm 2), levels by its equation 5.

    The noise of a step is added at the end of the one before it, so that latents between two calls have the level
    that is told. The first level has no room above it.
    """

    order = 2
    RHO: Final = 7.0
    CHURN: Final = 40.0
    CHURNED: Final = (0.05, 50.0)
    NOISE: Final = 1.003
    """The paper's values for ImageNet, its table 5."""
    _start: Tensor
    _first_slope: Tensor

    def _plan(self, steps: int) -> None:
        largest, smallest = (sigma ** (1 / self.RHO) for sigma in self._range())
        share = numpy.linspace(0, 1, steps)
        levels = [float(level) for level in (largest + share * (smallest - largest)) ** self.RHO]
        gain = 1 + min(self.CHURN / steps, math.sqrt(2) - 1)
        low, high = self.CHURNED
        raised = [min(level * gain, levels[0]) if low <= level <= high else level for level in levels]
        told = [sigma for step, level in enumerate(levels) for sigma in (level, raised[step])]
        self._told, self._levels = told[1:], [*levels, 0.0]
        self.timesteps = self._timesteps_of(self._told)

    def step(
        self,
        prediction: Tensor,
        timestep: Tensor,
        latents: Tensor,
        *,
        generator: torch.Generator,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Half a denoising step: lines 7 and 8 of the algorithm, or 10 and 11 and then 4 to 6 of the next step."""
        slope = self._noise_in(prediction, latents)
        step, is_second = divmod(self._call, 2)
        self._call += 1
        following = self._levels[step + 1]
        removed = following - self._told[2 * step]
        if not is_second:
            self._start, self._first_slope = latents, slope
            return (latents + removed * slope,)
        moved = self._start + removed * (self._first_slope + slope) / 2
        added = math.sqrt(self._told[self._call] ** 2 - following**2)
        return (moved + added * self.NOISE * _noise_like(moved, generator),)


class ScoreSdeVeScheduler(SigmaScheduler):
    """Predictor-corrector sampling of the variance-exploding SDE (Song et al. 2021, Algorithm 2).

    Levels are a geometric sequence (appendix C). The predictor is the paper's other one, ancestral sampling
    (equation 47): the reverse diffusion of Algorithm 2 has the same limit, yet its latents have a fifth too much
    noise at 30 steps of Stable Diffusion's schedule, where this one's have what the model is told. The corrector is
    annealed Langevin dynamics with the step size of Algorithm 4. The last step goes to nought without noise
    (appendix G).
    """

    order = 2
    SIGNAL_TO_NOISE: Final = 0.16

    def _plan(self, steps: int) -> None:
        levels = [float(level) for level in numpy.geomspace(*self._range(), steps)]
        self._told = [levels[0], *(level for level in levels[1:] for _ in range(2))]
        self._levels = [*levels, 0.0]
        self.timesteps = self._timesteps_of(self._told)

    def step(
        self,
        prediction: Tensor,
        timestep: Tensor,
        latents: Tensor,
        *,
        generator: torch.Generator,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """The predictor (in place of lines 3 to 5 of the algorithm) or the corrector (lines 7 and 8)."""
        score = -self._noise_in(prediction, latents) / self._told[self._call]
        step, is_corrector = divmod(self._call, 2)
        self._call += 1
        if is_corrector:
            return (self._corrected(latents, score, generator),)
        level, following = self._levels[step : step + 2]
        moved = latents + (level**2 - following**2) * score
        if following == 0:
            return (moved,)
        added = following * math.sqrt(1 - (following / level) ** 2)
        return (moved + added * _noise_like(latents, generator),)

    def _corrected(self, latents: Tensor, score: Tensor, generator: torch.Generator) -> Tensor:
        noise = _noise_like(latents, generator)
        size = 2 * (self.SIGNAL_TO_NOISE * noise.norm() / score.norm()) ** 2
        return latents + size * score + (2 * size).sqrt() * noise


def _noise_like(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Unit noise from a generator on the CPU, so that a seed means the same on every device."""
    return torch.randn(latents.shape, generator=generator, dtype=latents.dtype).to(latents.device)
