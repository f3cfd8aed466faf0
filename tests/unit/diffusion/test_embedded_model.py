"""The embedded model's numbers are unlike Stable Diffusion's: nothing here may assume the latter's."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import StableDiffusionPipeline
from likeness.inference.v1 import generation_job_pb2 as pb
from torch import Tensor

from services.diffusion.drawing import Drawing, decode, draw, draw_latents
from services.diffusion.loading import Components, load_components
from services.diffusion.own_schedulers import SigmaScheduler
from services.diffusion.prompts import tokenize
from services.diffusion.samplers import SAMPLERS, Sampler, build_sampler
from services.inference.slot import truncation_warnings

DRAWING = Drawing("a red circle on a blue background", "a cat", num_inference_steps=3, seed=5)
NAMES = {value: pb.Scheduler.Name(value) for value in SAMPLERS}
OF_THE_LIBRARY = [value for value, row in SAMPLERS.items() if not issubclass(row.cls, SigmaScheduler)]
STEPS = 20
SHAPE = (1, 12, 16, 16)


@pytest.fixture(scope="module")
def pocket(pocket_model_dir: Path) -> Components:
    return load_components(pocket_model_dir)


@pytest.fixture(scope="module")
def schedule(pocket_model_dir: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(
        (pocket_model_dir / "scheduler" / "scheduler_config.json").read_text()
    )
    return config


def alpha_bars(schedule: dict[str, Any]) -> Tensor:
    """float64 [1000], from the published numbers alone (Ho et al. 2020, eq. 4)."""
    return (1 - torch.tensor(schedule["trained_betas"], dtype=torch.float64)).cumprod(0)


def rates(schedule: dict[str, Any], timestep: float) -> tuple[float, float]:
    """Signal and noise at a timestep; between two whole ones the noise level is their geometric mean's."""
    bars = alpha_bars(schedule)
    levels = ((1 - bars) / bars).sqrt().log()
    low = int(timestep)
    share = timestep - low
    level = float((levels[low] * (1 - share) + levels[min(low + 1, len(levels) - 1)] * share).exp())
    signal = (1 + level**2) ** -0.5
    return signal, signal * level


def velocity(picture: Tensor, noisy: Tensor, signal: float, noise: float) -> Tensor:
    """What a model that knows one picture and nothing else answers (Salimans and Ho 2022, section 4)."""
    e = (noisy - signal * picture) / noise
    return signal * e - noise * picture


def walk(sampler: Sampler, noise: Tensor, model: Any) -> Tensor:
    latents = sampler.start(noise)
    for index in range(sampler.calls):
        prediction = model(sampler.model_input(latents, index), float(sampler.timesteps[index]))
        latents = sampler.step(prediction, index, latents)
    return latents


def test_its_numbers_come_from_its_configs(pocket: Components) -> None:
    numbers = (pocket.vae_factor, pocket.native_size_px, pocket.model_max_length, pocket.latent_channels)
    assert numbers == (32, 512, 32, 12)
    assert (pocket.prediction_type, pocket.scaling_factor) == ("v_prediction", 1.0)


@pytest.mark.parametrize("scheduler", list(SAMPLERS), ids=NAMES.values())
def test_every_scheduler_follows_the_published_noise_levels_to_the_picture(
    schedule: dict[str, Any], scheduler: int
) -> None:
    generator = torch.Generator().manual_seed(3)
    picture, noise = torch.randn(2, *SHAPE, generator=generator)
    seen: list[float] = []

    def model(noisy: Tensor, timestep: float) -> Tensor:
        signal, rest = rates(schedule, timestep)
        seen.append(float(((noisy - signal * picture) / rest).std()))
        return velocity(picture, noisy, signal, rest)

    sampler = build_sampler(scheduler, schedule, STEPS, generator)
    assert float(sampler.timesteps[0]) == 999, "steps are counted back from the last one, which is noise"
    torch.testing.assert_close(
        sampler.scheduler.alphas_cumprod.double(), alpha_bars(schedule), rtol=1e-5, atol=0
    )
    arrived = walk(sampler, noise, model)
    assert all(0.9 < deviation < 1.1 for deviation in seen), "the model must see the noise it is told of"
    assert float((arrived - picture).square().mean().sqrt()) < 0.05


@pytest.mark.parametrize("scheduler", OF_THE_LIBRARY, ids=NAMES.get)
def test_every_scheduler_walks_as_the_librarys_own_from_this_configuration(
    schedule: dict[str, Any], scheduler: int
) -> None:
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))

    def model(noisy: Tensor, timestep: float) -> Tensor:
        return torch.tanh(noisy.roll(1, -1)) * (0.5 + timestep / 2000)

    row = SAMPLERS[scheduler]
    plain = row.cls.from_config({**schedule, **row.overrides})
    plain.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(9)
    expected = noise * plain.init_noise_sigma
    for timestep in plain.timesteps:
        prediction = model(plain.scale_model_input(expected, timestep), float(timestep))
        extra = {"generator": generator} if row.generator else {}
        expected = plain.step(prediction, timestep, expected, **extra).prev_sample
    ours = walk(build_sampler(scheduler, schedule, STEPS, torch.Generator().manual_seed(9)), noise, model)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(256, 256), (384, 256), (288, 320), (768, 256)], ids=str)
def test_latents_agree_with_the_plain_pipeline_at_any_size(
    pocket: Components, pocket_model_dir: Path, size: tuple[int, int]
) -> None:
    drawing = replace(DRAWING, width_px=size[0], height_px=size[1])
    plain = StableDiffusionPipeline.from_pretrained(str(pocket_model_dir), local_files_only=True)
    plain.set_progress_bar_config(disable=True)
    expected = plain(
        drawing.prompt,
        negative_prompt=drawing.negative_prompt,
        num_inference_steps=drawing.num_inference_steps,
        guidance_scale=drawing.guidance_scale,
        width=size[0],
        height=size[1],
        generator=torch.Generator().manual_seed(drawing.seed),
        output_type="latent",
    ).images
    ours = draw_latents(pocket, drawing)
    assert ours.shape == (1, 12, size[1] // 32, size[0] // 32)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheduler", [pb.SCHEDULER_KARRAS_VE, pb.SCHEDULER_SCORE_SDE_VE], ids=NAMES.get)
def test_stochastic_ones_of_our_own_draw_sharp_pictures_that_follow_the_prompt(
    pocket: Components, scheduler: int
) -> None:
    wish = Drawing("a red circle on a blue background", num_inference_steps=20, seed=5, scheduler=scheduler)
    levels = numpy.asarray(draw(pocket, wish)).astype(int)
    (red, _, blue), (red_outside, _, blue_outside) = levels[256, 256], levels[20, 20]
    assert red > 180 > 90 > blue
    assert blue_outside > 150 > 90 > red_outside
    across = levels[256, :, 0]
    assert abs(across[8:] - across[:-8]).max() > 90, "DDIM's edge rises by 150 levels in 8 pixels"
    assert levels[8:48, 8:48].std(axis=(0, 1)).max() < 5, "no noise is left"


def test_a_picture_is_512_pixels_wide_unless_asked_otherwise(pocket: Components) -> None:
    assert draw(pocket, replace(DRAWING, num_inference_steps=1)).size == (512, 512)


def test_a_size_between_two_cells_is_drawn_and_cut(pocket: Components) -> None:
    drawing = replace(DRAWING, num_inference_steps=1, width_px=264, height_px=296)
    assert draw(pocket, drawing).size == (264, 296)


def test_a_prompt_beyond_32_positions_is_cut_with_a_remark(pocket: Components) -> None:
    prompt = " ".join(["red"] * 30 + ["circle"] * 2)
    tokens = tokenize(pocket.tokenizer, [prompt], pocket.model_max_length)
    assert tokens.input_ids.shape == (1, 32)
    warnings = truncation_warnings(pocket, replace(DRAWING, prompt=prompt))
    assert len(warnings) == 1
    assert warnings[0].split(": ")[1].split() == ["circle", "circle"]
    drawn = replace(DRAWING, num_inference_steps=1, width_px=256, height_px=256)
    ours = draw_latents(pocket, replace(drawn, prompt=prompt))
    assert torch.equal(ours, draw_latents(pocket, replace(drawn, prompt=prompt + " at night")))


def test_the_decoder_stands_half_precision(pocket: Components, pocket_model_dir: Path) -> None:
    latents = torch.randn(1, 12, 8, 8, generator=torch.Generator().manual_seed(1))
    half = load_components(pocket_model_dir, torch.float16)
    difference = (decode(half, latents) - decode(pocket, latents)).abs()
    assert float(difference.mean()) < 1 / 255
