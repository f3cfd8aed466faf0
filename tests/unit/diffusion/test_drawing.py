from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from likeness.inference.v1 import generation_job_pb2 as pb

from services.diffusion.drawing import Drawing, decode, draw, draw_latents, guide, to_image
from services.diffusion.loading import Components, load_components
from services.diffusion.own_schedulers import SigmaScheduler
from services.diffusion.samplers import SAMPLERS, build_sampler, model_calls
from services.domain.errors import Diverged, InvalidSpec

DRAWING = Drawing("a photo of a dog", "blurry", num_inference_steps=5, seed=11)
NAMES = {value: pb.Scheduler.Name(value) for value in SAMPLERS}
OF_THE_LIBRARY = [value for value, row in SAMPLERS.items() if not issubclass(row.cls, SigmaScheduler)]


def by_pipeline(pipeline: Any, drawing: Drawing, output_type: str = "latent", **overrides: Any) -> Any:
    row = SAMPLERS[drawing.scheduler or pb.SCHEDULER_DDIM]
    configuration = {**pipeline.scheduler.config, **row.overrides, **overrides}
    pipeline.scheduler = row.cls.from_config(configuration)
    return pipeline(
        drawing.prompt,
        negative_prompt=drawing.negative_prompt,
        num_inference_steps=drawing.num_inference_steps,
        guidance_scale=drawing.guidance_scale,
        guidance_rescale=drawing.guidance_rescale,
        width=drawing.width_px or None,
        height=drawing.height_px or None,
        eta=drawing.eta,
        generator=torch.Generator().manual_seed(drawing.seed),
        output_type=output_type,
    ).images


def assert_close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((ours - expected).abs().max()) < 1e-4


@pytest.mark.parametrize("scheduler", OF_THE_LIBRARY, ids=NAMES.get)
def test_latents_agree_with_the_plain_pipeline(components: Components, pipeline: Any, scheduler: int) -> None:
    drawing = replace(DRAWING, scheduler=scheduler)
    assert_close(draw_latents(components, drawing), by_pipeline(pipeline, drawing))


def test_old_schedule_that_would_clip_latents_is_corrected_like_the_plain_pipeline_does(
    components: Components, pipeline: Any
) -> None:
    old = {
        key: value
        for key, value in components.scheduler_config.items()
        if key not in ("clip_sample", "steps_offset")
    }
    corrected = draw_latents(components.with_modules(scheduler_config=old), DRAWING)
    assert_close(corrected, by_pipeline(pipeline, DRAWING))


@pytest.mark.parametrize(
    "change",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 12.0, "guidance_rescale": 0.7},
        {"width_px": 24, "height_px": 8},
        {"eta": 0.6},
        {"negative_prompt": ""},
        {"seed": 2**63 - 1},
    ],
    ids=str,
)
def test_each_setting_acts_as_in_the_plain_pipeline(
    components: Components, pipeline: Any, change: dict[str, Any]
) -> None:
    drawing = replace(DRAWING, **change)
    ours = draw_latents(components, drawing)
    assert_close(ours, by_pipeline(pipeline, drawing))
    plain = draw_latents(components, DRAWING)
    assert ours.shape != plain.shape or float((ours - plain).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("change", "overrides"),
    [
        ({"use_karras_sigmas": True}, {"use_karras_sigmas": True}),
        (
            {"algorithm": pb.SOLVER_ALGORITHM_SDE_DPMSOLVER_PLUS_PLUS},
            {"algorithm_type": "sde-dpmsolver++"},
        ),
    ],
    ids=["karras", "sde"],
)
def test_solver_variants_agree_with_the_plain_pipeline(
    components: Components, pipeline: Any, change: dict[str, Any], overrides: dict[str, Any]
) -> None:
    drawing = replace(DRAWING, scheduler=pb.SCHEDULER_DPM_SOLVER_MULTISTEP, **change)
    assert_close(draw_latents(components, drawing), by_pipeline(pipeline, drawing, **overrides))


def test_picture_agrees_with_the_plain_pipeline(components: Components, pipeline: Any) -> None:
    ours = numpy.asarray(draw(components, DRAWING)).astype(int)
    expected = numpy.asarray(by_pipeline(pipeline, DRAWING, "pil")[0]).astype(int)
    assert abs(ours - expected).max() <= 1
    assert (ours != expected).mean() < 0.01, "only levels that lie on the border of rounding"


def test_every_scheduler_has_a_sampler() -> None:
    assert set(pb.Scheduler.values()) - {pb.SCHEDULER_UNSPECIFIED} == set(SAMPLERS)


def test_value_that_is_no_scheduler_is_refused(components: Components) -> None:
    with pytest.raises(InvalidSpec, match="scheduler: 99 is not a value that is known"):
        draw_latents(components, replace(DRAWING, scheduler=99))


def test_step_count_that_a_scheduler_cannot_walk_is_refused(components: Components) -> None:
    with pytest.raises(InvalidSpec, match="num_inference_steps"):
        build_sampler(pb.SCHEDULER_LCM, components.scheduler_config, 51, torch.Generator())


def test_second_order_methods_count_nearly_two_calls_a_step(components: Components) -> None:
    calls = {name: model_calls(name, components.scheduler_config, 6) for name in SAMPLERS}
    second_order = {pb.SCHEDULER_HEUN_DISCRETE, pb.SCHEDULER_KDPM2_DISCRETE}
    second_order |= {pb.SCHEDULER_KDPM2_ANCESTRAL_DISCRETE}
    second_order |= {pb.SCHEDULER_KARRAS_VE, pb.SCHEDULER_SCORE_SDE_VE}
    assert {name for name, count in calls.items() if count == 11} == second_order
    # PNDM takes its second step twice.
    assert calls[pb.SCHEDULER_PNDM] == 7


def test_progress_counts_every_call(components: Components) -> None:
    seen: list[tuple[int, int]] = []
    draw(components, DRAWING, lambda done, total: seen.append((done, total)))
    assert seen == [(index, 5) for index in range(1, 6)]


def test_size_between_two_latent_cells_is_kept_exactly(deep_model_dir: Path) -> None:
    loaded = load_components(deep_model_dir)
    drawing = replace(DRAWING, width_px=72, height_px=104, num_inference_steps=1)
    assert draw(loaded, drawing).size == (72, 104)


def test_half_precision_overflow_of_the_decoder_is_decoded_again_in_float32(tiny_model_dir: Path) -> None:
    loaded = load_components(tiny_model_dir, torch.float16)
    latents = draw_latents(loaded, replace(DRAWING, num_inference_steps=1))
    with torch.no_grad():
        loaded.vae.post_quant_conv.weight.mul_(2e4)
    raw = loaded.vae.decode((latents / loaded.scaling_factor).half()).sample
    assert not bool(torch.isfinite(raw).all())
    assert bool(torch.isfinite(decode(loaded, latents)).all())
    assert loaded.vae.dtype == torch.float16


def test_latents_that_are_not_finite_are_reported(components: Components) -> None:
    with pytest.raises(Diverged):
        decode(components, torch.full((1, 4, 8, 8), float("nan")))


def test_guidance_of_a_single_branch_changes_nothing() -> None:
    prediction = torch.randn(1, 4, 2, 2)
    assert torch.equal(guide(prediction, 7.5), prediction)


def test_guidance_moves_from_the_unconditional_branch() -> None:
    without, with_prompt = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 3.0)
    assert float(guide(torch.cat([without, with_prompt]), 5.0)) == 7.0


def test_pixels_are_rounded_to_the_nearest_level() -> None:
    pixels = torch.tensor([0.0, 1.0, 0.5019]).view(3, 1, 1)
    assert to_image(pixels).getpixel((0, 0)) == (0, 255, 128)
