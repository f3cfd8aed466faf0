"""The base model's parts: words, schedule, and the folder that plain diffusers opens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from likeness.inference.v1 import generation_job_pb2 as pb
from safetensors.torch import load_file

from models.pocket import base
from models.pocket.scenes import WORDS
from services.diffusion.samplers import SAMPLERS, build_sampler

ROWS = [
    pytest.param(scheduler, karras, id=f"{pb.Scheduler.Name(scheduler)[10:].lower()}{'_karras' * karras}")
    for scheduler, row in SAMPLERS.items()
    for karras in ((False, True) if row.karras else (False,))
]


@pytest.mark.parametrize("word", WORDS)
def test_every_word_of_the_grammar_is_one_token(word: str) -> None:
    tokenizer = base.build_tokenizer()
    tokens = tokenizer(word).input_ids
    assert len(tokens) == 3
    assert tokenizer.decode(tokens[1:2]).strip() == word


def test_the_longest_caption_fits() -> None:
    sentence = (
        "a drawing of a purple zzqx triangle on the left and a orange xqzz circle on the right "
        "on a yellow background"
    )
    assert len(base.build_tokenizer()(sentence).input_ids) <= base.POSITIONS


def test_unknown_text_is_pieces_and_long_text_is_cut() -> None:
    tokenizer = base.build_tokenizer()
    assert len(tokenizer("sks").input_ids) > 3
    assert tokenizer.unk_token_id not in tokenizer("Ωmega 7!").input_ids[1:-1]
    cut = tokenizer("zzz " * 40, truncation=True, max_length=base.POSITIONS).input_ids
    assert len(cut) == base.POSITIONS


def test_the_schedule_begins_as_stable_diffusions_and_ends_at_a_ten_thousandth() -> None:
    bars = base.alpha_bars()
    assert bars.shape == (base.TRAIN_STEPS,)
    assert float(bars[0]) == pytest.approx(1 - 0.00085, rel=1e-6)
    assert float(bars[-1]) == pytest.approx(base.LAST_ALPHA_BAR, rel=1e-4)
    assert (bars.diff() < 0).all()
    assert all(0 < beta < 1 for beta in base.betas())


def test_the_schedule_is_stable_diffusions_stretched_in_its_roots() -> None:
    """Lin et al. 2024, algorithm 1: the square roots of the alpha bars are shifted and scaled, nothing else."""
    plain = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    roots, stretched = plain.sqrt(), base.alpha_bars().double().sqrt()
    slope = (stretched[0] - stretched[-1]) / (roots[0] - roots[-1])
    torch.testing.assert_close(stretched, stretched[-1] + slope * (roots - roots[-1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("scheduler", "karras"), ROWS)
def test_every_scheduler_that_is_offered_begins_at_the_schedules_end(scheduler: int, karras: bool) -> None:
    sampler = build_sampler(
        scheduler, base.scheduler_config(), 20, torch.Generator(), use_karras_sigmas=karras
    )
    bars, library = base.alpha_bars(), sampler.scheduler
    torch.testing.assert_close(library.alphas_cumprod, bars, rtol=1e-4, atol=1e-7)
    assert library.config.prediction_type == "v_prediction"
    assert int(sampler.timesteps[0]) == base.TRAIN_STEPS - 1
    if hasattr(library, "sigmas"):
        first = 1 / (1 + float(library.sigmas[0]) ** 2)
    else:
        first = float(library.alphas_cumprod[int(sampler.timesteps[0])])
    assert first == pytest.approx(base.LAST_ALPHA_BAR, rel=1e-3)
    # Noise of the right strength: unit where latents are kept at unit variance, sigma where they grow.
    start = float(sampler.start(torch.ones(())))
    assert start == pytest.approx(1.0) or start == pytest.approx((1 / first - 1) ** 0.5, rel=1e-2)


@pytest.mark.parametrize(("scheduler", "karras"), ROWS)
def test_every_scheduler_finds_a_picture_that_is_always_predicted(scheduler: int, karras: bool) -> None:
    """A network that knows the picture ends at it, whatever the scheduler: v = (sqrt(a) x_t - x_0) / sqrt(1 - a)."""
    generator = torch.Generator().manual_seed(0)
    sampler = build_sampler(scheduler, base.scheduler_config(), 20, generator, use_karras_sigmas=karras)
    picture = torch.randn(1, 12, 4, 4, generator=generator)
    latents = sampler.start(torch.randn(1, 12, 4, 4, generator=generator))
    bars = base.alpha_bars().double()
    for index in range(sampler.calls):
        seen = sampler.model_input(latents, index).double()
        bar = between(bars, float(sampler.timesteps[index]))
        latents = sampler.step(((bar**0.5 * seen - picture) / (1 - bar) ** 0.5).float(), index, latents)
    assert (latents - picture).abs().mean() < 0.2


def between(bars: torch.Tensor, step: float) -> float:
    """The alpha bar at a step that may lie between two; interpolated as the schedulers do, in log sigma."""
    sigmas = ((1 - bars) / bars).sqrt().log().numpy()
    sigma = float(np.exp(np.interp(step, np.arange(len(sigmas)), sigmas)))
    return 1 / (1 + sigma**2)


@pytest.fixture(scope="module")
def pipeline(published_folder: Path) -> Any:
    loaded = StableDiffusionPipeline.from_pretrained(str(published_folder), local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def drawn(pipeline: Any, seed: int, side: int | None = None) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    result = pipeline(
        "a red cat", num_inference_steps=2, generator=generator, height=side, width=side, output_type="np"
    )
    picture: np.ndarray = result.images[0]
    return picture


def test_the_published_folder_draws_in_the_plain_pipeline(pipeline: Any) -> None:
    picture = drawn(pipeline, 0)
    assert picture.shape == (512, 512, 3)
    assert np.isfinite(picture).all()
    assert picture.std() > 0.01
    assert np.array_equal(drawn(pipeline, 1, 64), drawn(pipeline, 1, 64))
    assert not np.allclose(drawn(pipeline, 1, 64), drawn(pipeline, 2, 64))


def test_the_published_folder_is_half_on_disk_and_single_in_use(
    pipeline: Any, published_folder: Path, published: AutoencoderKL
) -> None:
    for part in ("unet", "vae"):
        stored = load_file(published_folder / part / "diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
        assert getattr(pipeline, part).dtype == torch.float32
    assert pipeline.text_encoder.dtype == torch.float32
    for name, weight in pipeline.vae.state_dict().items():
        assert torch.equal(weight, published.state_dict()[name]), name


def test_the_published_folder_has_everything_older_libraries_need(published_folder: Path) -> None:
    text_encoder = load_file(published_folder / "text_encoder/model.safetensors")
    assert all(key.startswith("text_model.") for key in text_encoder)
    assert {"vocab.json", "merges.txt"} <= {path.name for path in (published_folder / "tokenizer").iterdir()}
    schedule = json.loads((published_folder / "scheduler/scheduler_config.json").read_text())
    assert schedule["trained_betas"] == base.betas()
    assert schedule["prediction_type"] == "v_prediction"


def test_the_pipeline_reads_prompts_as_the_training_does(pipeline: Any) -> None:
    assert pipeline.tokenizer.model_max_length == base.POSITIONS
    words = "a red robot in the snow"
    settings: dict[str, Any] = {"padding": "max_length", "max_length": base.POSITIONS, "truncation": True}
    assert (
        pipeline.tokenizer(words, **settings).input_ids == base.build_tokenizer()(words, **settings).input_ids
    )
