"""The samplers that the library lacks, against float64 loops written from the papers, and in worlds that are known.

In a world whose pictures are Gaussian, the best possible model and what a sampler must bring forth are formulas.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from likeness.inference.v1 import generation_job_pb2 as pb
from torch import Tensor

from services.diffusion.drawing import Drawing, draw_latents
from services.diffusion.loading import Components
from services.diffusion.samplers import build_sampler

SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
IPNDM, KARRAS, SONG = pb.SCHEDULER_IPNDM, pb.SCHEDULER_KARRAS_VE, pb.SCHEDULER_SCORE_SDE_VE
OWN = (IPNDM, KARRAS, SONG)
MEAN, VARIANCE = 0.7, 0.64
SHAPE = (1, 4, 32, 32)


def table() -> Any:
    """Sigma of each timestep, float64 [1000]."""
    bars = numpy.cumprod(1 - numpy.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    return numpy.sqrt((1 - bars) / bars)


def slope(x: Any, sigma: float) -> Any:
    """The noise that the best model finds in x, a picture plus sigma times unit noise: (x - D(x)) / sigma."""
    return (x - (VARIANCE * x + sigma**2 * MEAN) / (VARIANCE + sigma**2)) / sigma


def walked(scheduler: int, steps: int, kind: str = "epsilon", side: int = 32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sampler = build_sampler(scheduler, SCHEDULE | {"prediction_type": kind}, steps, generator)
    latents = sampler.start(torch.randn(1, 4, side, side, generator=generator))
    sigmas = table()
    for index in range(sampler.calls):
        sigma = float(
            numpy.exp(numpy.interp(float(sampler.timesteps[index]), range(1000), numpy.log(sigmas)))
        )
        scale = math.hypot(sigma, 1)
        x = sampler.model_input(latents, index).double() * scale
        noise = slope(x, sigma)
        clean = x - sigma * noise
        said = {"epsilon": noise, "sample": clean, "v_prediction": (noise - sigma * clean) / scale}
        latents = sampler.step(said[kind].float(), index, latents)
    return latents


def unit_noise(seed: int) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(SHAPE, generator=generator).double().numpy()


def by_ipndm(draw_noise: Callable[[], Any], steps: int) -> Any:
    sigmas = [table()[step * (1000 // steps) + 1] for step in reversed(range(steps))] + [table()[0]]
    x = draw_noise() * math.hypot(sigmas[0], 1)
    past: list[Any] = []
    for here, there in itertools.pairwise(sigmas):
        past.append(slope(x, here))
        weights = [[1], [3, -1], [23, -16, 5], [55, -59, 37, -9]][min(len(past), 4) - 1]
        mixed = sum(w * e for w, e in zip(weights, reversed(past), strict=False)) / sum(weights)
        x = x + (there - here) * mixed
    return x


def by_algorithm_2_of_karras(draw_noise: Callable[[], Any], steps: int) -> Any:
    high, low = table()[(steps - 1) * (1000 // steps) + 1] ** (1 / 7), table()[1] ** (1 / 7)
    t = [(high + i / (steps - 1) * (low - high)) ** 7 for i in range(steps)] + [0.0]
    x = draw_noise() * math.hypot(t[0], 1)
    for i in range(steps):
        gamma = min(40 / steps, math.sqrt(2) - 1) if 0.05 <= t[i] <= 50 else 0.0
        raised = min(t[i] * (1 + gamma), t[0])
        if i > 0:
            x = x + math.sqrt(raised**2 - t[i] ** 2) * 1.003 * draw_noise()
        first = slope(x, raised)
        moved = x + (t[i + 1] - raised) * first
        if t[i + 1] > 0:
            moved = x + (t[i + 1] - raised) * (first + slope(moved, t[i + 1])) / 2
        x = moved
    return x


def by_predictor_and_corrector_of_song(draw_noise: Callable[[], Any], steps: int) -> Any:
    high, low = table()[(steps - 1) * (1000 // steps) + 1], table()[1]
    sigmas = [high * (low / high) ** (i / (steps - 1)) for i in range(steps)] + [0.0]
    x = draw_noise() * math.hypot(sigmas[0], 1)
    for here, there in itertools.pairwise(sigmas):
        x = x - (here**2 - there**2) * slope(x, here) / here
        if there > 0:
            x = x + math.sqrt(there**2 * (here**2 - there**2) / here**2) * draw_noise()
            score, z = -slope(x, there) / there, draw_noise()
            size = 2 * (0.16 * numpy.linalg.norm(z) / numpy.linalg.norm(score)) ** 2
            x = x + size * score + math.sqrt(2 * size) * z
    return x


@pytest.mark.parametrize(
    ("scheduler", "reference"),
    [
        (IPNDM, by_ipndm),
        (KARRAS, by_algorithm_2_of_karras),
        (SONG, by_predictor_and_corrector_of_song),
    ],
    ids=["ipndm", "karras", "song"],
)
def test_walk_is_that_of_the_paper_in_double_precision(scheduler: int, reference: Any) -> None:
    expected = reference(unit_noise(1), 8)
    assert numpy.abs(walked(scheduler, 8).double().numpy() - expected).max() < 1e-4


@pytest.mark.parametrize("scheduler", OWN, ids=pb.Scheduler.Name)
def test_pictures_are_distributed_as_those_of_the_world(scheduler: int) -> None:
    drawn = walked(scheduler, 30, side=64)
    assert float(drawn.mean()) == pytest.approx(MEAN, abs=0.07)
    assert float(drawn.std()) == pytest.approx(VARIANCE**0.5, abs=0.04)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("scheduler", OWN, ids=pb.Scheduler.Name)
def test_every_kind_of_prediction_means_the_same_walk(scheduler: int, kind: str) -> None:
    assert float((walked(scheduler, 6, kind) - walked(scheduler, 6)).abs().max()) < 1e-3


def test_deterministic_one_approaches_the_picture_of_ddim_from_the_same_noise(components: Components) -> None:
    def latents(scheduler: int, steps: int) -> Tensor:
        wish = Drawing(
            "a red circle", num_inference_steps=steps, scheduler=scheduler, guidance_scale=1, seed=2
        )
        return draw_latents(components, wish)

    limit = latents(pb.SCHEDULER_DDIM, 250)
    few, more = (
        float((latents(IPNDM, steps) - limit).abs().max() / limit.abs().max()) for steps in (10, 100)
    )
    ddim = float((latents(pb.SCHEDULER_DDIM, 10) - limit).abs().max() / limit.abs().max())
    assert more < few / 3
    assert few < ddim
    assert more < 0.05, "walks of fewer steps begin a little nearer to the picture"
