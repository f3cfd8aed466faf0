"""The autoencoder: 512 px to 16 x 16 cells of 12 numbers, trained without norms, published as a plain AutoencoderKL.

Group normalisation deletes what flat drawings are made of: a picture's mean colour. So the network is trained with
every GroupNorm replaced by the identity, and published with three more channels at each level that make GroupNorm *be*
(nearly) the identity: they hold -s, +B and -B, where s is the sum of the trained channels. All channels together then
have mean 0 and, as B is large, a variance close to 2 B^2 / c, which a constant weight undoes. The sum is linear in
what precedes a norm, so that -s is one row of weights, and the offsets are biases.

-s and B lie in channels of their own on purpose. Two channels with +B - s/2 and -B - s/2 would do in exact arithmetic,
but PyTorch's GroupNorm on a CPU adds up the pixels of a channels-last tensor one by one in float32, and there the
small s drowns in B: at 512 px the result was wrong by 2 to 16 %. A constant power of two is added up exactly.
"""

import math
from collections.abc import Callable, Iterable

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

LATENT_CHANNELS = 12
CHANNELS = (6, 14, 30, 62, 126, 126)
"""As trained, from the finest level to the coarsest."""
STEADYING = 3
"""Channels that publishing adds to each level."""
_DOMINANCE = 64.0
"""B is at least this many times sqrt(c) times the root mean square of what it steadies: a picture twice as strong as
any in the calibration then moves the norm by less than a thousandth."""
_LARGEST_OFFSET = 2.0**14
"""Keeps B within half precision."""
_STREAM_STARTS = ("conv_in", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
"""Convolutions whose output begins a residual stream; blocks only add to it until the next one."""


def build(*, with_norms: bool) -> AutoencoderKL:
    """The network in its published shape, or in the shape that is trained: fewer channels, no norms."""
    channels = tuple(channel + STEADYING for channel in CHANNELS) if with_norms else CHANNELS
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
        # The posterior starts narrow, so that the decoder has something to learn from.
        model.quant_conv.bias[LATENT_CHANNELS:] = -5.0
        model.quant_conv.weight[LATENT_CHANNELS:] *= 0.1


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

    Every weight is exact in half precision, in which the model ships: the trained weights are rounded first, and what
    steadies the norms is made from the rounded ones.

    Args:
        trained: without norms, float32.
        pictures: batches [b, 3, h, w] in -1..1 on which the norms are set; strong colours should be among them.

    Returns:
        The model in evaluation mode, float32. Its encoder and decoder differ from the trained ones by about what the
        rounding costs; a test holds both.
    """
    batches = list(pictures)
    offsets = _offsets(trained, batches)
    published = build(with_norms=True).eval()
    for name, module in published.named_modules():
        if isinstance(module, nn.Conv2d):
            _extend(module, trained.get_submodule(name), offsets.get(name, 0.0))
    _calibrate(published, batches)
    return published


def _offsets(trained: AutoencoderKL, batches: list[Tensor]) -> dict[str, float]:
    """B for each convolution that begins what a norm sees: a power of two far above the activations."""
    offsets = {}
    for name, strength in _strengths(trained, batches).items():
        width = trained.get_submodule(name).weight.shape[0] + STEADYING
        least = max(1.0, _DOMINANCE * strength * width**0.5)
        offsets[name] = min(_LARGEST_OFFSET, 2.0 ** math.ceil(math.log2(least)))
    return offsets


def _strengths(trained: AutoencoderKL, batches: list[Tensor]) -> dict[str, float]:
    """Name of a convolution -> largest root mean square, over the pictures, in the stream that it begins."""
    strengths: dict[str, float] = {}
    stream = ""

    def note(name: str, output: Tensor) -> None:
        strongest = float(output.square().mean(dim=(1, 2, 3)).max().sqrt())
        strengths[name] = max(strengths.get(name, 0.0), strongest)

    def begin(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            nonlocal stream
            if not name.endswith("conv1"):  # which is seen by the norm behind it only
                stream = name
            note(name, output)

        return hook

    def add(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        note(stream, output)

    handles = [
        module.register_forward_hook(add if isinstance(module, ResnetBlock2D) else begin(name))
        for name, module in trained.named_modules()
        if isinstance(module, ResnetBlock2D) or name.endswith((*_STREAM_STARTS, "conv1"))
    ]
    _run(trained, batches)
    for handle in handles:
        handle.remove()
    return strengths


def _extend(target: nn.Conv2d, source: nn.Conv2d, offset: float) -> None:
    """Copies a convolution into its wider place, with the rows that steady the next norm."""
    rows, columns = source.weight.shape[:2]
    assert target.bias is not None
    assert source.bias is not None
    target.weight.zero_()
    target.bias.zero_()
    target.weight[:rows, :columns] = _halved(source.weight)
    target.bias[:rows] = _halved(source.bias)
    if target.weight.shape[0] > rows:
        target.weight[rows] = _halved(-target.weight[:rows].sum(0))
        target.bias[rows] = _halved(-target.bias[:rows].sum())
        target.bias[rows + 1], target.bias[rows + 2] = offset, -offset


def _calibrate(model: AutoencoderKL, batches: list[Tensor]) -> None:
    """Sets each norm's weight to the deviation it divides by, measured; the steadying channels end there."""
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    variances: dict[nn.Module, list[Tensor]] = {norm: [] for norm in norms}

    def hook(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.GroupNorm)
        variances[norm].append(inputs[0].double().flatten(1).var(1, unbiased=False).mean())
        norm.weight[:-STEADYING] = _halved((torch.stack(variances[norm]).mean() + norm.eps).sqrt())

    for norm in norms:
        norm.weight.zero_()
        norm.bias.zero_()
    # A norm is set before anything behind it runs, from all batches so far.
    handles = [norm.register_forward_pre_hook(hook) for norm in norms]
    _run(model, batches)
    for handle in handles:
        handle.remove()


def _run(model: AutoencoderKL, batches: list[Tensor]) -> None:
    for batch in batches:
        model.decode(model.encode(batch).latent_dist.mean)


def _halved(values: Tensor) -> Tensor:
    """The nearest values that half precision holds, in the tensor's own type."""
    return values.half().to(values.dtype)
