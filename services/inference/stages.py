"""Around denoising: pictures to start from before it, latents to pixels and pixels to a file after it.

Files carry no text: neither prompt nor seed leaves inside a picture.
"""

import hashlib
import io
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from likeness.inference.v1 import generation_job_pb2 as pb
from PIL import Image

from services.diffusion.drawing import Drawing, decode, size_px, to_image
from services.diffusion.init_images import InitImage, prepare_init_image
from services.diffusion.loading import Components
from services.domain.errors import BadInput
from services.inference.slot import Slot

_JPEG_QUALITY = 95
# Noise-like pictures do not shrink further above this level; it only costs time.
_PNG_COMPRESSION = 4


@dataclass(frozen=True, slots=True)
class Drawn:
    """A finished picture's file.

    Attributes:
        digest: SHA-256 of the file, lower-case hexadecimal.
        is_black: every pixel is.
    """

    path: Path
    media_type: str
    digest: str
    size_bytes: int
    width_px: int
    height_px: int
    is_black: bool


def init_image_of(components: Components, drawing: Drawing, pictures: Mapping[str, str]) -> InitImage | None:
    """What a request's drawings start from; None: noise.

    Args:
        components: the model.
        drawing: one of the request's.
        pictures: PNG files by the names of the specification's fields, `init_image_key` and `mask_image_key`.

    Raises:
        BadInput: a file is not there or cannot be read.
        Diverged: the model's latents of the picture are not finite.
    """
    if drawing.strength is None:
        return None
    image = _opened(pictures, "init_image_key")
    mask = _opened(pictures, "mask_image_key") if "mask_image_key" in pictures else None
    return prepare_init_image(components, size_px(components, drawing), image, mask)


def _opened(pictures: Mapping[str, str], field: str) -> Image.Image:
    # Storage has made PNGs of what users sent, so that no other decoder runs in the process that holds the device.
    try:
        with Image.open(pictures[field], formats=["PNG"]) as image:
            image.load()
            return image
    except (KeyError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput("is not a readable PNG", field) from error


def finish(slot: Slot, path: Path, image_format: int = pb.IMAGE_FORMAT_PNG) -> Drawn:
    """Decode a finished slot and write its picture.

    Args:
        slot: its latents are complete; its device time grows by that of the decoding.
        path: file to write.
        image_format: canonical value; unspecified is PNG.

    Raises:
        Diverged: latents or pixels are not finite.
    """
    started = time.perf_counter()
    width_px, height_px = slot.size_px
    pixels = decode(slot.components, slot.latents)[0, :, :height_px, :width_px]
    image = to_image(pixels if slot.init_image is None else slot.init_image.pasted(pixels))
    slot.device_s += time.perf_counter() - started
    content, media_type = encode_image(image, image_format)
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    return Drawn(
        path, media_type, digest, len(content), width_px, height_px, is_black=image.getbbox() is None
    )


def encode_image(image: Image.Image, image_format: int = pb.IMAGE_FORMAT_PNG) -> tuple[bytes, str]:
    """A picture as a file's bytes without metadata, and its media type."""
    buffer = io.BytesIO()
    if image_format == pb.IMAGE_FORMAT_JPEG:
        image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
        return buffer.getvalue(), "image/jpeg"
    image.save(buffer, "PNG", compress_level=_PNG_COMPRESSION)
    return buffer.getvalue(), "image/png"
