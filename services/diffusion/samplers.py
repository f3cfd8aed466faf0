"""Noise schedulers: the one table from canonical names to classes, and one picture's walk along its timesteps.

Most are the library's, three are our own with the same methods. Their objects carry state from step to step. Every
picture therefore gets an object and a random generator of its own, which lets pictures with different schedulers and
step counts share one call of the UNet.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from likeness.inference.v1 import generation_job_pb2 as pb
from torch import Tensor

from services.diffusion.own_schedulers import (
    IPNDMScheduler,
    KarrasVeScheduler,
    ScoreSdeVeScheduler,
    SigmaScheduler,
)
from services.domain.errors import InvalidSpec

_NOTHING: Mapping[str, Any] = MappingProxyType({})
# Old configurations lack or contradict these; latents are never clipped, and the plain pipeline corrects both too.
_LATENT_MODELS: Mapping[str, Any] = MappingProxyType({"clip_sample": False, "steps_offset": 1})


@dataclass(frozen=True, slots=True)
class SamplerRow:
    """What one canonical scheduler is.

    Attributes:
        cls: the class.
        overrides: settings that replace those of the model's own schedule.
        karras: it knows the noise levels of Karras et al. (2022).
        algorithm: it takes a variant of the DPM-Solver family.
        generator: its step draws noise, and takes the generator to draw it from.
        eta: its step takes DDIM's eta.
        repeats_second: the second of its timesteps is visited twice, wherever the walk begins.
        order: most calls that a step looks back on, where its object has to be told that they are fewer; else 0.
    """

    cls: Any
    overrides: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    karras: bool = False
    algorithm: bool = False
    generator: bool = False
    eta: bool = False
    repeats_second: bool = False
    order: int = 0


SAMPLERS: Mapping[int, SamplerRow] = MappingProxyType(
    {
        pb.SCHEDULER_DDIM: SamplerRow(diffusers.DDIMScheduler, generator=True, eta=True),
        pb.SCHEDULER_DDPM: SamplerRow(diffusers.DDPMScheduler, generator=True),
        pb.SCHEDULER_PNDM: SamplerRow(diffusers.PNDMScheduler, {"skip_prk_steps": True}, repeats_second=True),
        pb.SCHEDULER_LMS_DISCRETE: SamplerRow(diffusers.LMSDiscreteScheduler, karras=True, order=4),
        pb.SCHEDULER_EULER_DISCRETE: SamplerRow(
            diffusers.EulerDiscreteScheduler, karras=True, generator=True
        ),
        pb.SCHEDULER_EULER_ANCESTRAL_DISCRETE: SamplerRow(
            diffusers.EulerAncestralDiscreteScheduler, generator=True
        ),
        pb.SCHEDULER_DPM_SOLVER_MULTISTEP: SamplerRow(
            diffusers.DPMSolverMultistepScheduler, karras=True, algorithm=True, generator=True
        ),
        pb.SCHEDULER_DPM_SOLVER_SINGLESTEP: SamplerRow(
            diffusers.DPMSolverSinglestepScheduler, karras=True, algorithm=True, generator=True
        ),
        pb.SCHEDULER_HEUN_DISCRETE: SamplerRow(diffusers.HeunDiscreteScheduler, karras=True),
        pb.SCHEDULER_KDPM2_DISCRETE: SamplerRow(diffusers.KDPM2DiscreteScheduler, karras=True),
        pb.SCHEDULER_KDPM2_ANCESTRAL_DISCRETE: SamplerRow(
            diffusers.KDPM2AncestralDiscreteScheduler, karras=True, generator=True
        ),
        pb.SCHEDULER_UNIPC_MULTISTEP: SamplerRow(diffusers.UniPCMultistepScheduler, karras=True),
        pb.SCHEDULER_DEIS_MULTISTEP: SamplerRow(diffusers.DEISMultistepScheduler, karras=True),
        pb.SCHEDULER_LCM: SamplerRow(diffusers.LCMScheduler, generator=True),
        pb.SCHEDULER_IPNDM: SamplerRow(IPNDMScheduler),
        pb.SCHEDULER_KARRAS_VE: SamplerRow(KarrasVeScheduler, generator=True),
        pb.SCHEDULER_SCORE_SDE_VE: SamplerRow(ScoreSdeVeScheduler, generator=True),
    }
)

_ALGORITHMS: Mapping[int, str] = MappingProxyType(
    {
        pb.SOLVER_ALGORITHM_DPMSOLVER_PLUS_PLUS: "dpmsolver++",
        pb.SOLVER_ALGORITHM_SDE_DPMSOLVER_PLUS_PLUS: "sde-dpmsolver++",
    }
)


@dataclass(frozen=True, slots=True)
class Original:
    """The latents of a picture that a walk starts from.

    Attributes:
        latents: float32 [1, c, h, w] without noise, in the UNet's scale.
        mask: float32 [1, 1, h, w], 1 where it is repainted and 0 where it is kept; None: nothing is kept.
    """

    latents: Tensor
    mask: Tensor | None = None


@dataclass(slots=True)
class Sampler:
    """One picture's way from noise, or from a picture with noise, to latents.

    Attributes:
        scheduler: the library's object, used by this picture only.
        timesteps: what the UNet is told at each call, on the CPU; second-order methods have nearly two a step.
        generator: source of the noise that stochastic methods add.
        step_arguments: what the object's step takes besides prediction, timestep and latents.
        starts_from_noise: the walk is a whole one, so nothing of an original shows through its first noise.
        order: of the table's row.
    """

    scheduler: Any
    timesteps: Tensor
    generator: torch.Generator
    step_arguments: Mapping[str, Any]
    starts_from_noise: bool = True
    order: int = 0
    _kept: tuple[Original, Tensor] | None = None

    @property
    def calls(self) -> int:
        """UNet calls that the whole walk takes."""
        return len(self.timesteps)

    def start(self, noise: Tensor, original: Original | None = None) -> Tensor:
        """Where the walk begins: noise scaled to its first level, added to what there is to start from.

        Args:
            noise: unit Gaussian, [1, c, h, w].
            original: a picture to start from, whose kept part the walk then keeps.
        """
        if original is not None and original.mask is not None:
            self._kept = (original, noise)
        if original is None or self.starts_from_noise:
            return noise * float(self.scheduler.init_noise_sigma)
        return self._with_noise(original.latents, noise, 0)

    def model_input(self, latents: Tensor, index: int) -> Tensor:
        """What the UNet sees of `latents` at call number `index`, from 0."""
        return self.scheduler.scale_model_input(latents, self.timesteps[index])

    def step(self, prediction: Tensor, index: int, latents: Tensor) -> Tensor:
        """Move on by one UNet call.

        Args:
            prediction: the guided output of the UNet, [1, c, h, w].
            index: number of the call, from 0; calls must follow each other.
            latents: where the walk stands, [1, c, h, w].

        Returns:
            The new latents.
        """
        arguments = dict(self.step_arguments)
        if (
            self.order
        ):  # A walk that begins late has no past; the library's pipelines weigh one in all the same.
            arguments["order"] = min(index + 1, self.order)
        moved = self.scheduler.step(
            prediction, self.timesteps[index], latents, **arguments, return_dict=False
        )
        return self._with_kept_part(moved[0], index + 1)

    def _with_kept_part(self, latents: Tensor, index: int) -> Tensor:
        """Puts the original, with the noise of the next call, back where it is kept (Lugmayr et al. 2022, eq. 8)."""
        if self._kept is None:
            return latents
        original, noise = self._kept
        known = original.latents
        if index < self.calls:
            known = self._with_noise(known, noise, index)
        mask: Any = original.mask
        return (1 - mask) * known + mask * latents

    def _with_noise(self, latents: Tensor, noise: Tensor, index: int) -> Tensor:
        noised: Tensor = self.scheduler.add_noise(latents, noise, self.timesteps[index : index + 1])
        return noised


def build_sampler(
    scheduler: int,
    schedule: Mapping[str, Any],
    steps: int,
    generator: torch.Generator,
    *,
    use_karras_sigmas: bool = False,
    algorithm: int = pb.SOLVER_ALGORITHM_UNSPECIFIED,
    eta: float = 0.0,
    strength: float | None = None,
) -> Sampler:
    """Make one picture's sampler.

    Args:
        scheduler: canonical value; unspecified is DDIM.
        schedule: the model's own scheduler configuration: betas, prediction type, spacing.
        steps: denoising steps, 1 or more.
        generator: the picture's own.
        use_karras_sigmas: used by the schedulers that know it.
        algorithm: canonical variant of the DPM-Solver family; used by that family.
        eta: DDIM's, 0..1; used by DDIM.
        strength: of a walk that starts from a picture, 0..1: this share of the steps is walked, rounded up, at least
            one. None: there is no picture.

    Raises:
        InvalidSpec: there is no such scheduler, or it cannot walk in this many steps.
    """
    row = sampler_row(scheduler)
    library_object = row.cls.from_config(_configuration(row, schedule, use_karras_sigmas, algorithm))
    try:
        library_object.set_timesteps(steps, device="cpu")
    except ValueError as error:
        raise InvalidSpec(f"cannot be {steps} with this scheduler", "num_inference_steps") from error
    arguments: dict[str, Any] = {"generator": generator} if row.generator else {}
    if row.eta:
        arguments["eta"] = eta
    timesteps = library_object.timesteps
    if strength is not None:
        timesteps = _last_part(row, library_object, steps - walked_steps(steps, strength))
    return Sampler(library_object, timesteps, generator, arguments, strength in (None, 1), row.order)


def walked_steps(steps: int, strength: float) -> int:
    """Denoising steps that are walked from a picture, at least 1; strength is 0..1."""
    # Rounded first, as for instance 50 * 0.14 is a little more than 7.
    return max(1, math.ceil(round(steps * strength, 6)))


def _last_part(row: SamplerRow, library_object: Any, skipped: int) -> Tensor:
    """The timesteps of a walk without its first steps; the object is told where it begins."""
    timesteps: Tensor = library_object.timesteps
    if row.repeats_second:
        # The library's pipelines cut the list with the repetition in it, after which the method is a step astray.
        rest = torch.cat([timesteps[:1], timesteps[2:]])[skipped:]
        return torch.cat([rest[:2], rest[1:]])
    begin = skipped * library_object.order
    if hasattr(library_object, "set_begin_index"):
        library_object.set_begin_index(begin)
    return timesteps[begin:]


def sampler_row(scheduler: int) -> SamplerRow:
    """The table's row for a canonical value; unspecified is DDIM.

    Raises:
        InvalidSpec: there is no such value.
    """
    row = SAMPLERS.get(scheduler or pb.SCHEDULER_DDIM)
    if row is None:
        raise InvalidSpec(f"{scheduler} is not a value that is known", "scheduler")
    return row


def model_calls(scheduler: int, schedule: Mapping[str, Any], steps: int) -> int:
    """UNet calls that `steps` denoising steps take; raises as :func:`build_sampler`."""
    return build_sampler(scheduler, schedule, steps, torch.Generator()).calls


def _configuration(
    row: SamplerRow, schedule: Mapping[str, Any], use_karras_sigmas: bool, algorithm: int
) -> dict[str, Any]:
    configured = diffusers.DDIMScheduler if issubclass(row.cls, SigmaScheduler) else row.cls
    known = set(configured._get_init_keys(configured))
    settings = {**schedule, **_LATENT_MODELS, **row.overrides}
    configuration = {key: value for key, value in settings.items() if key in known}
    if row.karras:
        configuration["use_karras_sigmas"] = use_karras_sigmas
    if row.algorithm:
        # A model's own configuration may name a variant; only a request or the class's default decides here.
        configuration.pop("algorithm_type", None)
        if algorithm in _ALGORITHMS:
            configuration["algorithm_type"] = _ALGORITHMS[algorithm]
    return configuration
