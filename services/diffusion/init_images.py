"""Pictures that drawings start from: fitted to the asked size, turned into latents, and put back where they are kept.

What a walk does with their latents is :mod:`services.diffusion.samplers`'s. Shapes: c latent channels, h and w latent
cells, H and W pixels of the canvas, which is the asked size or, where that ends between two cells, a little more.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from services.diffusion.loading import Components
from services.diffusion.samplers import Original
from services.domain.errors import Diverged

_REPAINTED_FROM = 0.5
"""Mask levels from here on are repainted."""


@dataclass(frozen=True, slots=True)
class InitImage:
    """A picture, and perhaps a mask over it, ready to be started from.

    Attributes:
        pixels: float32 [1, 3, H, W] in 0..1, on the CPU.
        mask: bool [1, 1, H, W], true where the picture is repainted; None: everywhere.
        mean: of its latents, float32 [1, c, h, w] on the model's device, in the VAE's scale.
        deviation: of the same, likewise.
        scaling_factor: from the VAE's scale to the UNet's.
    """

    pixels: Tensor
    mask: Tensor | None
    mean: Tensor
    deviation: Tensor
    scaling_factor: float

    def original(self, generator: torch.Generator) -> Original:
        """The picture's latents, drawn from their distribution.

        Args:
            generator: of the picture that is drawn, on the CPU; moved on by one draw.
        """
        noise = torch.randn(self.mean.shape, generator=generator, dtype=torch.float32)
        latents = self.scaling_factor * (self.mean + self.deviation * noise.to(self.mean.device))
        return Original(latents, self._latent_mask())

    def _latent_mask(self) -> Tensor | None:
        """[1, 1, h, w]: a cell is what its first pixel is, as in the library's pipeline."""
        if self.mask is None:
            return None
        cells = functional.interpolate(self.mask.float(), size=self.mean.shape[-2:])
        return cells.to(self.mean.device)

    def pasted(self, pixels: Tensor) -> Tensor:
        """A drawn picture with this one's own pixels where it is kept.

        Args:
            pixels: [3, H', W'] in 0..1, a canvas or its upper left part.
        """
        if self.mask is None:
            return pixels
        height_px, width_px = pixels.shape[-2:]
        mask = self.mask[0, :, :height_px, :width_px].to(pixels.device)
        return torch.where(mask, pixels, self.pixels[0, :, :height_px, :width_px].to(pixels.device))


@torch.no_grad()
def prepare_init_image(
    components: Components, size_px: tuple[int, int], image: Image.Image, mask: Image.Image | None = None
) -> InitImage:
    """Fit a picture and its mask to a size, and encode it once for all drawings that start from it.

    Args:
        components: the model.
        size_px: width and height of the drawing.
        image: RGB, any size; it covers the drawing, and what stands out is cut off evenly on both sides.
        mask: any mode and size, fitted in the same way; half white and lighter is repainted.

    Raises:
        Diverged: the model's latents of the picture are not finite.
    """
    pixels = _canvas(_levels(_fitted(image.convert("RGB"), size_px)), components.vae_factor)
    repainted = None
    if mask is not None:
        levels = _levels(_fitted(mask.convert("L"), size_px))
        repainted = _canvas(levels, components.vae_factor) >= _REPAINTED_FROM
    mean, deviation = _moments(components, pixels * 2 - 1)
    return InitImage(pixels, repainted, mean, deviation, components.scaling_factor)


@contextlib.contextmanager
def in_float32(vae: AutoencoderKL) -> Iterator[None]:
    """Has a VAE compute in float32 until the end of the block, for pictures that half precision overflows at."""
    precision = vae.dtype
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(precision)


def _fitted(image: Image.Image, size_px: tuple[int, int]) -> Image.Image:
    return ImageOps.fit(image, size_px, Image.Resampling.LANCZOS)


def _levels(image: Image.Image) -> Tensor:
    """Float32 [1, channels, height, width] in 0..1."""
    levels = torch.from_numpy(numpy.array(image, dtype=numpy.float32) / 255)
    return levels.reshape(1, image.height, image.width, -1).permute(0, 3, 1, 2)


def _canvas(levels: Tensor, factor: int) -> Tensor:
    """Continues the last row and column up to whole cells."""
    height_px, width_px = levels.shape[-2:]
    missing = [math.ceil(side / factor) * factor - side for side in (width_px, height_px)]
    return functional.pad(levels, (0, missing[0], 0, missing[1]), mode="replicate")


def _moments(components: Components, values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latents of pixels in -1..1."""
    moments = _encoded(components, values)
    if not _are_finite(moments):
        with in_float32(components.vae):
            moments = _encoded(components, values)
    if not _are_finite(moments):
        raise Diverged("the model's latents of the picture are not finite")
    return moments


def _encoded(components: Components, values: Tensor) -> tuple[Tensor, Tensor]:
    vae = components.vae
    distribution = vae.encode(values.to(components.device, vae.dtype)).latent_dist
    return distribution.mean.float(), distribution.std.float()


def _are_finite(tensors: tuple[Tensor, ...]) -> bool:
    return all(bool(torch.isfinite(values).all()) for values in tensors)
