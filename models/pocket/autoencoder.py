"""The autoencoder: 512 px to 16 x 16 cells of 12 numbers, trained without norms, published as a plain AutoencoderKL.

Group normalisation deletes what flat drawings are made of: a picture's mean colour. So the network is trained with
every GroupNorm replaced by the identity, and published with two more channels at each level that make GroupNorm *be*
(nearly) the identity: they hold `+B - s/2` and `-B - s/2`, where s is the sum of the real channels. All channels
together then have mean 0 and a variance close to 2 B^2 / c, which a constant weight undoes. Every map into a norm is
linear, so the two channels are rows of weights.
"""

from collections.abc import Iterable

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

LATENT_CHANNELS = 12
CHANNELS = (8, 16, 32, 64, 128, 128)
"""As published: two of each level's channels only steady the norm."""
EXTRA = 2
_OFFSET = 8.0
"""B of the module's text, in units of the activations' root mean square times sqrt(channels). Larger is nearer to the
identity until float32 summation error grows: 1000 ruins whole pictures."""
_STREAM_STARTS = ("conv_in", "conv_shortcut", "conv1", "downsamplers.0.conv", "upsamplers.0.conv")


def build(*, with_norms: bool) -> AutoencoderKL:
    """The network in its published shape, or in the shape that is trained: fewer channels, no norms."""
    channels = CHANNELS if with_norms else tuple(channel - EXTRA for channel in CHANNELS)
    model = AutoencoderKL(
        sample_size=512,
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )
    if not with_norms:
        _remove_norms(model)
        _initialise(model)
    return model


def _remove_norms(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())


def _initialise(model: AutoencoderKL) -> None:
    """Unit gain along the main path, residual branches quiet: the signal survives thirty layers without norms."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        fan_in = module.weight[0].numel()
        gain = 1.7 if name.endswith("conv1") else 0.3 if name.endswith("conv2") else 1.0
        nn.init.normal_(module.weight, std=gain / fan_in**0.5)
        assert module.bias is not None
        nn.init.zeros_(module.bias)
    with torch.no_grad():
        quant = model.quant_conv
        quant.bias[
            LATENT_CHANNELS:
        ] = -5.0  # the posterior starts narrow, so that the decoder has something to learn from
        quant.weight[LATENT_CHANNELS:] *= 0.1


@torch.no_grad()
def scale_latents(model: AutoencoderKL, mean: Tensor, deviation: Tensor) -> None:
    """Folds mean and deviation into the 1 x 1 convolutions around the latents: they become unit scale.

    Args:
        model: with or without norms; changed in place.
        mean, deviation: [LATENT_CHANNELS], of the posterior's mean over many pictures.
    """
    quant, post = model.quant_conv, model.post_quant_conv
    means, log_variances = slice(0, LATENT_CHANNELS), slice(LATENT_CHANNELS, None)
    post.bias += (post.weight[:, :, 0, 0] @ mean.to(post.weight)).to(post.bias)
    post.weight *= deviation[None, :, None, None].to(post.weight)
    quant.bias[means] = (quant.bias[means] - mean) / deviation
    quant.weight[means] /= deviation[:, None, None, None]
    quant.bias[log_variances] -= 2 * deviation.log()


@torch.no_grad()
def publish(trained: AutoencoderKL, pictures: Iterable[Tensor]) -> AutoencoderKL:
    """The trained network as a plain AutoencoderKL with working GroupNorms.

    Args:
        trained: without norms, float32.
        pictures: some tens of batches' worth of [b, 3, h, w] in -1..1 on which the norms are set.

    Returns:
        The model in evaluation mode. Its encoder and decoder differ from the trained ones by less than an 8-bit step
        on pictures like those given; a test holds both.
    """
    batches = list(pictures)
    spread = _activation_scales(trained, batches[:4])
    published = build(with_norms=True).eval()
    for name, module in published.named_modules():
        if isinstance(module, nn.Conv2d):
            source = trained.get_submodule(name)
            assert isinstance(source, nn.Conv2d)
            _extend(module, source, name, spread.get(name, 1.0))
    _calibrate(published, batches)
    return published


def _activation_scales(model: AutoencoderKL, batches: list[Tensor]) -> dict[str, float]:
    """Root mean square of what follows each convolution that starts a stream; the stream's norms see no more."""
    scales: dict[str, float] = {}
    handles = []

    def watch(name: str) -> None:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            scales[name] = max(scales.get(name, 0.0), float(output.float().square().mean().sqrt()))

        handles.append(model.get_submodule(name).register_forward_hook(hook))

    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    for name in names:
        if name.endswith(_STREAM_STARTS):
            watch(name)
    for batch in batches:
        model.decode(model.encode(batch).latent_dist.mean)
    for handle in handles:
        handle.remove()
    return scales


def _extend(target: nn.Conv2d, source: nn.Conv2d, name: str, scale: float) -> None:
    """Copies a convolution into its wider place, with the two rows that steady the next norm."""
    rows, columns = source.weight.shape[:2]
    assert target.bias is not None
    assert source.bias is not None
    target.weight.zero_()
    target.bias.zero_()
    target.weight[:rows, :columns] = source.weight
    target.bias[:rows] = source.bias
    if target.weight.shape[0] == rows:
        return
    offset = _OFFSET * scale * target.weight.shape[0] ** 0.5 if name.endswith(_STREAM_STARTS) else 0.0
    for row, sign in ((rows, 1.0), (rows + 1, -1.0)):
        target.weight[row, :columns] = -0.5 * source.weight.sum(0)
        target.bias[row] = sign * offset - 0.5 * source.bias.sum()


def _calibrate(model: AutoencoderKL, batches: list[Tensor]) -> None:
    """Sets each norm's weight to the deviation it divides by, measured; the steadying channels end there."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.GroupNorm)}
    for norm in norms.values():
        norm.weight.fill_(1.0)
        norm.bias.zero_()
        norm.weight[-EXTRA:] = 0.0

    def hook(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.GroupNorm)
        variance = inputs[0].double().flatten(1).var(1, unbiased=False).mean()
        norm.weight[:-EXTRA] = float((variance + norm.eps).sqrt())

    # Front to back on one batch after the other: a norm is set before anything behind it runs.
    handles = [norm.register_forward_pre_hook(hook) for norm in norms.values()]
    for batch in batches:
        model.decode(model.encode(batch).latent_dist.mean)
    for handle in handles:
        handle.remove()
