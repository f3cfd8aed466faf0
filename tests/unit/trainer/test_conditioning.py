"""Posterior moments against the library's own, and text vectors kept against vectors computed each time."""

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from transformers import CLIPTextModel

from services.diffusion.loading import Components, load_components
from services.trainer.conditioning import TEXT_CACHE_BYTES, TextConditioner, posterior_encoder
from tests.unit.trainer.harness import Bench, spying

CPU = torch.device("cpu")
PROMPTS = ("a red circle", "a photo of a dog on the beach")


@pytest.fixture
def model(bench: Bench) -> Components:
    return load_components(bench.model_folder)


def a_picture() -> torch.Tensor:
    return torch.rand((3, 16, 16), generator=torch.Generator().manual_seed(2)) * 2 - 1


def test_moments_are_those_the_library_draws_latents_from(model: Components) -> None:
    picture, noise = a_picture(), torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(3))
    mean, deviation = posterior_encoder(model.vae, CPU, torch.float32)(picture)
    with torch.no_grad():
        posterior = model.vae.encode(picture[None]).latent_dist
        drawn = posterior.sample(generator=torch.Generator().manual_seed(3))
    assert float(deviation.min()) > 0
    torch.testing.assert_close((mean + deviation * noise[0]), drawn[0])


def test_what_overflows_below_float32_is_computed_again_in_it(
    model: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, precisions = AutoencoderKL.encode, []

    def overflowing(vae: AutoencoderKL, values: torch.Tensor) -> object:
        answer = real(vae, values)
        moments: torch.Tensor = answer.latent_dist.parameters
        precisions.append(moments.dtype)
        if moments.dtype is not torch.float32:
            answer.latent_dist = DiagonalGaussianDistribution(moments * torch.inf)
        return answer

    expected = posterior_encoder(model.vae, CPU, torch.float32)(a_picture())
    monkeypatch.setattr(AutoencoderKL, "encode", overflowing)
    moments = posterior_encoder(model.vae, CPU, torch.bfloat16)(a_picture())
    assert precisions == [torch.bfloat16, torch.float32]
    assert all(torch.equal(one, other) for one, other in zip(moments, expected, strict=True))


@pytest.mark.parametrize("pad_tokens", [False, True])
def test_kept_text_vectors_are_those_of_a_frozen_encoder_each_time(
    pad_tokens: bool, model: Components
) -> None:
    def conditioner(*, trained: bool, cache: bool) -> TextConditioner:
        return TextConditioner(
            model.tokenizer,
            model.text_encoder,
            max_length=model.model_max_length,
            pad_tokens=pad_tokens,
            trained=trained,
            cache_bytes=TEXT_CACHE_BYTES if cache else 0,
        )

    kept, uncached = conditioner(trained=False, cache=True), conditioner(trained=False, cache=False)
    whole_batch = conditioner(trained=True, cache=True)
    for prompts in (PROMPTS, PROMPTS[:1], PROMPTS):
        assert torch.equal(kept.vectors(prompts), uncached.vectors(prompts))
        # Cut to the batch's length: later positions do not reach earlier ones in a causal model.
        torch.testing.assert_close(kept.vectors(prompts), whole_batch.vectors(prompts), atol=1e-5, rtol=0)


def test_a_frozen_encoder_is_asked_once_for_a_prompt_and_a_full_cache_changes_nothing(
    model: Components,
) -> None:
    calls: list[int] = []

    def conditioner_of(*, trained: bool, cache_bytes: int = TEXT_CACHE_BYTES) -> TextConditioner:
        return TextConditioner(
            model.tokenizer,
            model.text_encoder,
            max_length=model.model_max_length,
            pad_tokens=True,
            trained=trained,
            cache_bytes=cache_bytes,
        )

    conditioner = conditioner_of(trained=True)
    with spying(CLIPTextModel, "forward", lambda *a, **k: calls.append(1)):
        for _ in range(2):
            conditioner.vectors(PROMPTS)
        while_training = len(calls)
        conditioner.freeze()
        for _ in range(3):
            frozen = conditioner.vectors(PROMPTS)
    assert (while_training, len(calls)) == (2, 2 + len(PROMPTS))
    small = conditioner_of(trained=False, cache_bytes=frozen[:1].nbytes)
    assert torch.equal(small.vectors(PROMPTS), frozen)
    assert torch.equal(small.vectors(PROMPTS), frozen)
