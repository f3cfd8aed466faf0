from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from likeness.inference.v1 import generation_job_pb2 as pb
from PIL import Image
from torch import Tensor

from services.diffusion.drawing import Drawing, draw, draw_latents
from services.diffusion.init_images import InitImage, prepare_init_image
from services.diffusion.loading import Components
from services.diffusion.samplers import SAMPLERS, Original, Sampler, build_sampler, walked_steps
from services.domain.errors import Diverged

DRAWING = Drawing("a photo of a dog", "blurry", num_inference_steps=8, seed=11, strength=0.5)
NAMES = {value: pb.Scheduler.Name(value) for value in SAMPLERS}
ALIKE = [
    pb.SCHEDULER_DDIM,
    pb.SCHEDULER_DDPM,
    pb.SCHEDULER_EULER_ANCESTRAL_DISCRETE,
    pb.SCHEDULER_HEUN_DISCRETE,
    pb.SCHEDULER_KDPM2_DISCRETE,
    pb.SCHEDULER_DPM_SOLVER_MULTISTEP,
    pb.SCHEDULER_DPM_SOLVER_SINGLESTEP,
    pb.SCHEDULER_UNIPC_MULTISTEP,
    pb.SCHEDULER_LCM,
]


def picture(width_px: int = 16, height_px: int = 16, seed: int = 0) -> Image.Image:
    levels = numpy.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3), dtype=numpy.uint8)
    return Image.fromarray(levels, "RGB")


def half_mask(side_px: int = 16) -> Image.Image:
    """White, so repainted, on the right."""
    mask = Image.new("L", (side_px, side_px))
    mask.paste(255, (side_px // 2, 0, side_px, side_px))
    return mask


def prepared(
    components: Components, image: Image.Image | None = None, mask: Image.Image | None = None
) -> InitImage:
    return prepare_init_image(components, (16, 16), image or picture(), mask)


def by_pipeline(kind: Any, pipeline: Any, drawing: Drawing, **pictures: Image.Image) -> Any:
    row = SAMPLERS[drawing.scheduler]
    parts = pipeline.components | {
        "scheduler": row.cls.from_config({**pipeline.scheduler.config, **row.overrides})
    }
    library = kind(**parts, requires_safety_checker=False)
    library.set_progress_bar_config(disable=True)
    return library(
        drawing.prompt,
        negative_prompt=drawing.negative_prompt,
        num_inference_steps=drawing.num_inference_steps,
        guidance_scale=drawing.guidance_scale,
        strength=drawing.strength,
        generator=torch.Generator().manual_seed(drawing.seed),
        output_type="latent",
        **pictures,
    ).images


def apart(ours: Tensor, other: Tensor) -> float:
    return float((ours - other).abs().max())


@pytest.mark.parametrize("scheduler", ALIKE, ids=pb.Scheduler.Name)
def test_image_to_image_agrees_with_the_librarys_pipeline(
    components: Components, pipeline: Any, scheduler: int
) -> None:
    drawing = replace(DRAWING, scheduler=scheduler)
    ours = draw_latents(components, drawing, init_image=prepared(components))
    expected = by_pipeline(StableDiffusionImg2ImgPipeline, pipeline, drawing, image=picture())
    assert apart(ours, expected) < 1e-3


@pytest.mark.parametrize(
    ("scheduler", "strength"),
    [
        (pb.SCHEDULER_DDIM, 0.5),
        (pb.SCHEDULER_EULER_DISCRETE, 0.75),
        (pb.SCHEDULER_HEUN_DISCRETE, 0.5),
        (pb.SCHEDULER_UNIPC_MULTISTEP, 0.5),
        (pb.SCHEDULER_DPM_SOLVER_MULTISTEP, 1.0),
        (pb.SCHEDULER_PNDM, 1.0),
    ],
)
def test_inpainting_agrees_with_the_librarys_pipeline(
    components: Components, pipeline: Any, scheduler: int, strength: float
) -> None:
    drawing = replace(DRAWING, scheduler=scheduler, strength=strength)
    ours = draw_latents(components, drawing, init_image=prepared(components, mask=half_mask()))
    expected = by_pipeline(
        StableDiffusionInpaintPipeline, pipeline, drawing, image=picture(), mask_image=half_mask()
    )
    assert apart(ours, expected) < 1e-3


def true_noise(sampler: Sampler, latents: Tensor, index: int, clean: Tensor, schedule: Any) -> Tensor:
    """What a perfect model predicts when there is only one picture in the world."""
    betas = torch.linspace(schedule["beta_start"] ** 0.5, schedule["beta_end"] ** 0.5, 1000).double() ** 2
    share = numpy.interp(float(sampler.timesteps[index]), range(1000), torch.cumprod(1 - betas, 0).log())
    kept = torch.tensor(share).exp()
    seen = sampler.model_input(latents, index).double()
    return ((seen - kept.sqrt() * clean) / (1 - kept).sqrt()).float()


@pytest.mark.parametrize("scheduler", list(SAMPLERS), ids=NAMES.values())
@pytest.mark.parametrize("strength", [0.15, 0.6])
def test_every_sampler_finds_back_to_the_only_picture_there_is(
    components: Components, scheduler: int, strength: float
) -> None:
    schedule = components.scheduler_config
    generator = torch.Generator().manual_seed(3)
    sampler = build_sampler(scheduler, schedule, 20, generator, strength=strength)
    clean = torch.randn(1, 4, 8, 8, generator=generator)
    latents = sampler.start(torch.randn(1, 4, 8, 8, generator=generator), Original(clean))
    begun = apart(latents, clean)
    for index in range(sampler.calls):
        latents = sampler.step(true_noise(sampler, latents, index, clean, schedule), index, latents)
    assert begun > max(0.1, apart(latents, clean))
    assert apart(latents, clean) < 0.15


@pytest.mark.parametrize(
    ("steps", "strength", "walked"), [(30, 0.7, 21), (50, 0.14, 7), (10, 0.31, 4), (30, 0, 1), (5, 1, 5)]
)
def test_share_of_the_steps_is_walked_rounded_up(steps: int, strength: float, walked: int) -> None:
    assert walked_steps(steps, strength) == walked
    sampler = build_sampler(pb.SCHEDULER_DDIM, {}, steps, torch.Generator(), strength=strength)
    assert sampler.calls == walked


def test_full_strength_forgets_the_picture(components: Components) -> None:
    drawing = replace(DRAWING, strength=1.0, num_inference_steps=2)
    first, second = (
        draw_latents(components, drawing, init_image=prepared(components, picture(seed=seed)))
        for seed in range(2)
    )
    assert torch.equal(first, second)


def test_weaker_strength_stays_nearer_to_the_picture(components: Components) -> None:
    image = prepared(components)
    clean = image.original(torch.Generator().manual_seed(DRAWING.seed)).latents
    far = [
        apart(draw_latents(components, replace(DRAWING, strength=strength), init_image=image), clean)
        for strength in (0.0, 0.5, 1.0)
    ]
    assert far == sorted(far)


def test_kept_pixels_are_those_of_the_picture(components: Components) -> None:
    drawn = numpy.asarray(draw(components, DRAWING, init_image=prepared(components, mask=half_mask())))
    given = numpy.asarray(picture())
    assert numpy.array_equal(drawn[:, :8], given[:, :8])
    assert not numpy.array_equal(drawn[:, 8:], given[:, 8:])


def test_picture_covers_the_drawing_and_loses_what_stands_out(components: Components) -> None:
    wide = Image.new("RGB", (64, 16), "red")
    wide.paste("lime", (24, 0, 40, 16))
    fitted = prepared(components, wide, Image.new("L", (64, 16)))
    pixels = torch.zeros(3, 16, 16)
    assert torch.equal(fitted.pasted(pixels), torch.tensor([0.0, 1, 0]).reshape(3, 1, 1).expand(3, 16, 16))


@pytest.mark.parametrize(("level", "repainted"), [(127, False), (128, True), (255, True)])
def test_mask_is_cut_at_one_half(components: Components, level: int, repainted: bool) -> None:
    mask = prepared(components, mask=Image.new("L", (16, 16), level)).mask
    assert mask is not None
    assert bool(mask.all()) == bool(mask.any()) == repainted


def test_size_between_two_cells_is_continued_and_pasted_whole(components: Components) -> None:
    drawing = replace(DRAWING, width_px=15, height_px=9)
    image = prepare_init_image(components, (15, 9), picture(15, 9), Image.new("L", (15, 9)))
    assert image.pixels.shape == (1, 3, 10, 16)
    drawn = draw(components, drawing, init_image=image)
    assert numpy.array_equal(numpy.asarray(drawn), numpy.asarray(picture(15, 9)))


def test_encoding_that_overflows_is_made_in_float32_and_given_up_there(
    components: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    precisions: list[torch.dtype] = []
    encode = components.vae.encode

    def overflowing(values: Tensor) -> Any:
        precisions.append(values.dtype)
        return encode(values * float("nan"))

    monkeypatch.setattr(components.vae, "encode", overflowing)
    with pytest.raises(Diverged, match="of the picture"):
        prepared(components)
    assert precisions == [torch.float32, torch.float32]
