"""One picture from a prompt, and the few tensor functions that every denoising loop here is made of.

Shapes: b pictures, c latent channels, h and w latent cells, H and W pixels, n token positions, d text width.
Latents are float32 whatever the weights' precision; the picture's noise comes from a CPU generator of its own, so
that one seed means one picture on every device and beside every neighbour.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from likeness.inference.v1 import generation_job_pb2 as pb
from PIL import Image
from torch import Tensor

from services.diffusion.embeddings import Embedding
from services.diffusion.init_images import InitImage, in_float32
from services.diffusion.loading import Components
from services.diffusion.prompts import encode, tokenize
from services.diffusion.samplers import Sampler, build_sampler
from services.domain.errors import Diverged


@dataclass(frozen=True, slots=True)
class Drawing:
    """What one picture shall be.

    Attributes:
        width_px: 0 means the model's native size, like `height_px`.
        guidance_scale: weight of classifier-free guidance; at 1 and below the negative prompt is not used.
        guidance_rescale: weight of the rescaled guidance, 0..1.
        scheduler: canonical value; unspecified is DDIM.
        clip_skip: layer of the text encoder counted from the end, 1 the last.
        seed: 0..2^63-1.
        strength: how far to move away from the picture that is started from, 0..1; None: there is none.
    """

    prompt: str
    negative_prompt: str = ""
    width_px: int = 0
    height_px: int = 0
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    scheduler: int = pb.SCHEDULER_UNSPECIFIED
    use_karras_sigmas: bool = False
    algorithm: int = pb.SOLVER_ALGORITHM_UNSPECIFIED
    eta: float = 0.0
    clip_skip: int = 1
    seed: int = 0
    strength: float | None = None

    @property
    def is_guided(self) -> bool:
        """Whether a second, unconditional branch is needed."""
        return self.guidance_scale > 1


def draw(
    components: Components,
    drawing: Drawing,
    on_step: Callable[[int, int], None] | None = None,
    init_image: InitImage | None = None,
) -> Image.Image:
    """Draw one picture.

    Args:
        components: the model; its modules are put into no other mode than they have.
        drawing: what to draw.
        on_step: told the number of finished UNet calls and their total.
        init_image: what to start from when the drawing has a strength.

    Raises:
        InvalidSpec: the model or scheduler cannot do what is asked.
        Diverged: the model's output is not finite.
    """
    width_px, height_px = size_px(components, drawing)
    pixels = decode(components, draw_latents(components, drawing, on_step, init_image))
    cut = pixels[0, :, :height_px, :width_px]
    return to_image(cut if init_image is None else init_image.pasted(cut))


@torch.no_grad()
def draw_latents(
    components: Components,
    drawing: Drawing,
    on_step: Callable[[int, int], None] | None = None,
    init_image: InitImage | None = None,
) -> Tensor:
    """Denoise one picture, without decoding; arguments and errors as :func:`draw`.

    Returns:
        Latents, float32 [1, c, h, w], in the UNet's scale.
    """
    sampler, latents = begin(components, drawing, init_image)
    context = encode_context(components, drawing)
    for index in range(sampler.calls):
        prediction = predict(components, [Row(sampler, latents, index)], context)
        latents = sampler.step(
            guide(prediction, drawing.guidance_scale, drawing.guidance_rescale), index, latents
        )
        if on_step is not None:
            on_step(index + 1, sampler.calls)
    return latents


def begin(
    components: Components, drawing: Drawing, init_image: InitImage | None = None
) -> tuple[Sampler, Tensor]:
    """The picture's sampler, and the latents [1, c, h, w] that it starts from; errors as :func:`draw`."""
    sampler = sampler_of(components, drawing)
    # The library's pipelines draw in this order too: the picture's latents, then the noise over them.
    original = None if init_image is None else init_image.original(sampler.generator)
    noise = initial_noise(components, drawing, sampler.generator)
    return sampler, sampler.start(noise, original)


@dataclass(frozen=True, slots=True)
class Row:
    """Where one picture stands: before UNet call number `index` with `latents` [1, c, h, w]."""

    sampler: Sampler
    latents: Tensor
    index: int


def predict(components: Components, rows: list[Row], context: Tensor) -> Tensor:
    """Call the UNet once for several pictures.

    Args:
        components: the model.
        rows: the b pictures, of equal latent size.
        context: [b, n, d] for pictures without guidance, [2b, n, d] with: all unconditional rows come first.

    Returns:
        Float32 output [b or 2b, c, h, w] in the order of `context`.
    """
    branches = context.shape[0] // len(rows)
    inputs = torch.cat([row.sampler.model_input(row.latents, row.index) for row in rows] * branches)
    # One precision for all rows, as some schedulers count their timesteps in fractions.
    timesteps = torch.stack([row.sampler.timesteps[row.index].float() for row in rows] * branches)
    output = components.unet(
        inputs.to(components.dtype),
        timesteps.to(components.device),
        encoder_hidden_states=context,
        return_dict=False,
    )[0]
    return output.float()


def guide(prediction: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, equation 6), optionally rescaled (Lin et al. 2024, 3.4).

    Args:
        prediction: one picture's UNet output: [1, c, h, w] as it is, or [2, c, h, w], unconditional first.
        scale: weight, above 1.
        rescale: how far the result's deviation is brought back to that of the conditional branch, 0..1.

    Returns:
        [1, c, h, w].
    """
    if prediction.shape[0] == 1:
        return prediction
    without, with_prompt = prediction.chunk(2)
    guided = without + scale * (with_prompt - without)
    if rescale <= 0:
        return guided
    dimensions = [1, 2, 3]
    ratio = with_prompt.std(dim=dimensions, keepdim=True) / guided.std(dim=dimensions, keepdim=True)
    return rescale * guided * ratio + (1 - rescale) * guided


def encode_context(components: Components, drawing: Drawing, embeddings: Sequence[Embedding] = ()) -> Tensor:
    """What the UNet attends to: [1, n, d], or with guidance [2, n, d], the negative prompt first.

    Args:
        components: the model.
        drawing: has the prompts.
        embeddings: words that the prompts may use beside the model's own.
    """
    prompts = [drawing.negative_prompt, drawing.prompt] if drawing.is_guided else [drawing.prompt]
    tokens = tokenize(components.tokenizer, prompts, components.model_max_length, embeddings=embeddings)
    return encode(components.text_encoder, tokens, drawing.clip_skip).to(components.dtype)


def sampler_of(components: Components, drawing: Drawing) -> Sampler:
    """The picture's sampler, with a generator seeded for it."""
    return build_sampler(
        drawing.scheduler,
        components.scheduler_config,
        drawing.num_inference_steps,
        torch.Generator("cpu").manual_seed(drawing.seed),
        use_karras_sigmas=drawing.use_karras_sigmas,
        algorithm=drawing.algorithm,
        eta=drawing.eta,
        strength=drawing.strength,
    )


def size_px(components: Components, drawing: Drawing) -> tuple[int, int]:
    """Width and height of the finished picture."""
    native = components.native_size_px
    return drawing.width_px or native, drawing.height_px or native


def latent_shape(components: Components, drawing: Drawing) -> tuple[int, int, int]:
    """Channels, rows and columns of the picture's latents; sizes between two cells are drawn larger, then cut."""
    width_px, height_px = size_px(components, drawing)
    factor = components.vae_factor
    return components.latent_channels, math.ceil(height_px / factor), math.ceil(width_px / factor)


def initial_noise(components: Components, drawing: Drawing, generator: torch.Generator) -> Tensor:
    """Unit Gaussian latents [1, c, h, w] on the model's device, drawn on the CPU."""
    shape = (1, *latent_shape(components, drawing))
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(components.device)


@torch.no_grad()
def decode(components: Components, latents: Tensor) -> Tensor:
    """Turn latents into pixels, once more in float32 when half precision overflows.

    Args:
        components: the model.
        latents: [b, c, h, w], in the UNet's scale.

    Returns:
        Float32 [b, 3, H, W] in 0..1, on the latents' device.

    Raises:
        Diverged: the latents, or the pixels even in float32, are not finite.
    """
    if not _is_finite(latents):
        raise Diverged("the model's output is not finite")
    scaled = latents / components.scaling_factor
    pixels = _decoded(components, scaled)
    if not _is_finite(pixels):
        pixels = _decoded_in_float32(components, scaled)
    return pixels.div_(2).add_(0.5).clamp_(0, 1)


def to_image(pixels: Tensor) -> Image.Image:
    """An 8-bit RGB picture from float pixels [3, H, W] in 0..1."""
    levels = (pixels * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy(), "RGB")


def _decoded(components: Components, scaled: Tensor) -> Tensor:
    return components.vae.decode(scaled.to(components.vae.dtype), return_dict=False)[0].float()


def _decoded_in_float32(components: Components, scaled: Tensor) -> Tensor:
    with in_float32(components.vae):
        pixels = _decoded(components, scaled)
    if not _is_finite(pixels):
        raise Diverged("the decoded picture is not finite")
    return pixels


def _is_finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())
