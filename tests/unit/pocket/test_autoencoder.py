"""The autoencoder: trained without norms, published with norms that change nothing."""

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from models.pocket import autoencoder
from models.pocket.autoencoder import LATENT_CHANNELS, build, publish, scale_latents

ROUNDING = 0.01
"""What rounding the weights to half precision may change, as a share of the latents' deviation and of the picture's
range. Wrong norms change several times as much."""
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def flat(*colour: float) -> Tensor:
    return torch.tensor(colour).reshape(1, 3, 1, 1).expand(1, 3, 256, 256).clone()


CASES: dict[str, Callable[[Callable[..., Tensor]], Tensor]] = {
    "small_scenes": lambda pictures: pictures("small", 96, 2),
    "larger_scene": lambda pictures: pictures("larger", 320, 1),
    "white": lambda _: flat(1.0, 1.0, 1.0),
    "blue": lambda _: flat(-0.7, -0.3, 0.6),
    "texture": lambda pictures: pictures("texture", 128, 0, 1),
    "noise": lambda _: torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1,
    "not_square": lambda pictures: pictures("wide", 192, 1)[:, :, 64:128],
}


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_published_and_trained_agree_both_ways(
    briefly_trained: AutoencoderKL,
    published: AutoencoderKL,
    some_pictures: Callable[..., Tensor],
    case: str,
    memory: str,
) -> None:
    picture = CASES[case](some_pictures).contiguous(memory_format=FORMATS[memory])
    expected, encoded = briefly_trained.encode(picture).latent_dist, published.encode(picture).latent_dist
    scale = expected.mean.std()
    assert (encoded.mean - expected.mean).abs().max() < ROUNDING * scale
    assert (encoded.logvar - expected.logvar).abs().max() < 2 * ROUNDING
    decoded, sought = (model.decode(expected.mean).sample for model in (published, briefly_trained))
    assert (decoded - sought).abs().max() < ROUNDING * sought.abs().max()


@torch.no_grad()
def test_norms_that_are_left_plain_would_be_noticed(
    briefly_trained: AutoencoderKL, published: AutoencoderKL, some_pictures: Callable[..., Tensor]
) -> None:
    picture = some_pictures("noticed", 128, 1)
    expected = briefly_trained.encode(picture).latent_dist.mean
    without_sum = copy.deepcopy(published)
    without_sum.encoder.conv_in.weight[autoencoder.CHANNELS[0]] = 0.0
    plain = copy.deepcopy(published)
    plain.encoder.conv_norm_out.weight[: -autoencoder.STEADYING] = 1.0
    for broken in (without_sum, plain):
        error = (broken.encode(picture).latent_dist.mean - expected).abs().max()
        assert error > 3 * ROUNDING * expected.std()


def test_every_published_weight_is_exact_in_half_precision(published: AutoencoderKL) -> None:
    for name, weight in published.named_parameters():
        assert weight.dtype == torch.float32
        assert torch.equal(weight.half().float(), weight), name


def test_published_is_a_plain_autoencoder_with_working_norms(published: AutoencoderKL) -> None:
    plain = AutoencoderKL.from_config(published.config)
    plain.load_state_dict(published.state_dict())
    norms = [module for module in plain.modules() if isinstance(module, nn.GroupNorm)]
    assert norms
    for norm in norms:
        assert norm.num_groups == 1
        assert (norm.weight[: -autoencoder.STEADYING] > 0.5).all()
        assert (norm.weight[-autoencoder.STEADYING :] == 0).all()


@torch.no_grad()
def test_the_offsets_outweigh_what_they_steady(
    published: AutoencoderKL, some_pictures: Callable[..., Tensor]
) -> None:
    shares = []

    def watch(_norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        energy = inputs[0].square().mean(dim=(0, 2, 3))
        shares.append(float(energy[-2:].sum() / energy.sum()))

    for module in published.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(watch)
    try:
        published.decode(published.encode(some_pictures("energy", 128, 2)).latent_dist.mean)
    finally:
        for module in published.modules():
            module._forward_pre_hooks.clear()
    assert min(shares) > 0.998


def test_publishing_leaves_the_trained_network_as_it_was(
    briefly_trained: AutoencoderKL, some_pictures: Callable[..., Tensor]
) -> None:
    before = copy.deepcopy(briefly_trained.state_dict())
    publish(briefly_trained, [some_pictures("calibration", 64, 1)])
    after = briefly_trained.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module._forward_hooks for module in briefly_trained.modules())


@torch.no_grad()
def test_scaling_the_latents_makes_them_unit_and_changes_no_picture(
    briefly_trained: AutoencoderKL, some_pictures: Callable[..., Tensor]
) -> None:
    batch = some_pictures("scaling", 128, 6)
    before = briefly_trained.encode(batch).latent_dist
    mean, deviation = before.mean.mean(dim=(0, 2, 3)), before.mean.std(dim=(0, 2, 3))
    scaled = copy.deepcopy(briefly_trained)
    scale_latents(scaled, mean, deviation)
    after = scaled.encode(batch).latent_dist
    assert after.mean.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    assert (after.mean.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-3
    # The posterior is narrower or wider by the same factor.
    assert torch.allclose(after.std * deviation[:, None, None], before.std, rtol=1e-3)
    back = scaled.decode(after.mean).sample
    assert torch.allclose(back, briefly_trained.decode(before.mean).sample, atol=1e-3)


@torch.no_grad()
def test_the_signal_survives_an_untrained_network_without_norms() -> None:
    torch.manual_seed(0)
    model = build(with_norms=False)
    assert not any(isinstance(module, nn.GroupNorm) for module in model.modules())
    posterior = model.encode(torch.rand(4, 3, 64, 64) * 2 - 1).latent_dist
    assert 0.05 < float(posterior.mean.std()) < 5
    assert -6 < float(posterior.logvar.mean()) < -4
    assert 0.05 < float(model.decode(torch.randn(4, LATENT_CHANNELS, 2, 2)).sample.std()) < 5


def test_both_shapes_have_the_same_latents() -> None:
    for with_norms in (False, True):
        model = build(with_norms=with_norms)
        assert model.config.latent_channels == LATENT_CHANNELS
        assert model.config.scaling_factor == 1.0
        assert 2 ** (len(model.config.block_out_channels) - 1) == 32
