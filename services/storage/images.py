"""Users' pictures made uniform: one upright, opaque, 8-bit sRGB picture out of whatever a camera or editor wrote.

Owns which types are read, the order of corrections, and what is refused. Knows nothing of archives, processes or
stores. Decoding is done completely here: a truncated picture opens well and would fail only in the training.
Called in a confined process (:mod:`services.storage.decode_child`), as decoders are the usual prey of crafted files.
"""

import io
import re
import warnings as python_warnings
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from PIL import Image, ImageChops, ImageCms, ImageOps

MAX_PIXELS: Final = 100_000_000
MIN_SIDE_PX: Final = 64
PNG_COMPRESSION: Final = 4
"""zlib level: half the time of the usual 6 for photographs, and 4 to 9 % larger (measured on 8 pictures)."""

Colour = tuple[int, int, int]
WHITE: Final[Colour] = (255, 255, 255)

_READ_TYPES: Final = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_SIGNATURES: Final = (
    (re.compile(rb"\xff\xd8\xff"), "JPEG"),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "PNG"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "WEBP"),
    (re.compile(rb"BM.{12}", re.DOTALL), "BMP"),
    (re.compile(rb"GIF8[79]a"), "GIF"),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), "TIFF"),
    (re.compile(rb"....ftyp(?:hei|hev|mif1|msf1)", re.DOTALL), "HEIC"),
    (re.compile(rb"....ftypavi", re.DOTALL), "AVIF"),
    (re.compile(rb"\0\0\0\x0cJXL |\xff\x0a"), "JPEG XL"),
    (re.compile(rb"\0\0\0\x0cjP|\xff\x4f\xff\x51"), "JPEG 2000"),
    (re.compile(rb"8BPS"), "Photoshop"),
)
_PICTURE_SUFFIXES: Final = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"}
    | {".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".svg"}
)
_SIXTEEN_TO_EIGHT: Final = [(value * 255 + 32767) // 65535 for value in range(65536)]
_SRGB: Final = ImageCms.createProfile("sRGB")


class RefusalKind(StrEnum):
    """Why a file did not become a training picture."""

    OTHER = "other"
    """Not a picture, and not named like one."""
    UNREADABLE = "unreadable"
    """Meant as a picture: damaged, too large, or of a type that is not read."""
    TOO_SMALL = "too_small"
    """Readable, yet under the smallest side that can be trained on."""


class ImageRefused(Exception):
    """A file that cannot be used; the text is a sentence part: ``the file is truncated``."""

    def __init__(self, kind: RefusalKind, why: str) -> None:
        super().__init__(why)
        self.kind = kind
        self.why = why


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded picture.

    Attributes:
        image: mode RGB, upright, without metadata.
        type_name: type it was read from, for instance ``JPEG``.
        warnings: what was changed beyond the ordinary, for people.
    """

    image: Image.Image
    type_name: str
    warnings: tuple[str, ...] = ()


def type_of(head: bytes) -> str | None:
    """Names the picture type by the first bytes of a file; None when they belong to no known type.

    Args:
        head: at least 16 bytes, if the file has them.
    """
    return next((name for pattern, name in _SIGNATURES if pattern.match(head)), None)


def is_named_like_a_picture(name: str) -> bool:
    """Whether a file's ending announces a picture, readable or not."""
    return Path(name).suffix.lower() in _PICTURE_SUFFIXES


def decode_image(
    data: bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    min_side_px: int = MIN_SIDE_PX,
    background: Colour = WHITE,
) -> Picture:
    """Decodes one picture completely: orientation, bit depth, transparency and colour space, in this order.

    Animations give their first frame, multi-page files their first page.

    Args:
        data: the file's bytes; the type is told from them, never from a name.
        max_pixels: pictures with more pixels are refused before they are decoded.
        min_side_px: pictures with a shorter side are refused.
        background: what shows through transparent parts, 8-bit sRGB.

    Returns:
        The picture as 8-bit sRGB.

    Raises:
        ImageRefused: the file is not a picture, is damaged, too large or too small.
    """
    type_name = type_of(data[:32])
    if type_name is None:
        raise ImageRefused(RefusalKind.OTHER, "is not a picture")
    if type_name not in _READ_TYPES:
        raise ImageRefused(RefusalKind.UNREADABLE, f"{type_name} pictures are not supported")
    try:
        with python_warnings.catch_warnings():
            python_warnings.simplefilter("ignore")
            return _decode(data, type_name, max_pixels, min_side_px, background)
    except ImageRefused:
        raise
    except Image.DecompressionBombError as error:
        why = f"its pixels are more than {max_pixels / 1e6:g} megapixels"
        raise ImageRefused(RefusalKind.UNREADABLE, why) from error
    except MemoryError as error:
        raise ImageRefused(RefusalKind.UNREADABLE, "needs too much memory") from error
    except Exception as error:
        # Decoders fed with crafted bytes raise anything, and each of it means the same.
        why = "the file is truncated" if "truncated" in str(error).lower() else "the file is damaged"
        raise ImageRefused(RefusalKind.UNREADABLE, why) from error


def name_of(colour: Colour) -> str:
    """A colour for people: white, or #rrggbb."""
    return "white" if colour == WHITE else "#{:02x}{:02x}{:02x}".format(*colour)


def save_png(image: Image.Image, path: Path) -> None:
    """Writes a picture losslessly and without any metadata; equal pixels give equal bytes.

    Args:
        image: mode RGB.
        path: file to write.
    """
    image.save(path, "PNG", compress_level=PNG_COMPRESSION)


def _decode(data: bytes, type_name: str, max_pixels: int, min_side_px: int, background: Colour) -> Picture:
    """Holds as few copies as it can: a picture of 100 megapixels takes 400 MB in each of them."""
    warnings: list[str] = []
    with Image.open(io.BytesIO(data), formats=[type_name]) as opened:
        _check_size(opened.size, max_pixels, min_side_px)
        opened.load()
        profile = opened.info.get("icc_profile")
        _turn_upright(opened, warnings)
    base, alpha = _split_alpha(_reduced_to_eight_bits(opened))
    del opened
    colour = _as_srgb(base, profile, warnings)
    if alpha is not None and alpha.getextrema() != (255, 255):
        colour.paste(background, mask=ImageChops.invert(alpha))
        warnings.append(f"transparent parts became {name_of(background)}")
    colour.info = {}
    return Picture(colour, type_name, tuple(warnings))


def _check_size(size: tuple[int, int], max_pixels: int, min_side_px: int) -> None:
    width_px, height_px = size
    if width_px * height_px > max_pixels:
        limit = f"{max_pixels / 1e6:g} megapixels"
        raise ImageRefused(RefusalKind.UNREADABLE, f"{width_px}x{height_px} pixels are more than {limit}")
    if min(size) < min_side_px:
        why = f"{width_px}x{height_px} pixels are too few: both sides need {min_side_px}"
        raise ImageRefused(RefusalKind.TOO_SMALL, why)


def _turn_upright(image: Image.Image, warnings: list[str]) -> None:
    """Applies the camera's orientation; a damaged EXIF block does not make a good picture bad."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # EXIF is a format of its own, with a parser that raises as freely as the decoders
        warnings.append("its EXIF data is damaged, so it was not turned")


def _reduced_to_eight_bits(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey; the library's own conversion clips nearly all of it to white."""
    if image.mode == "F":
        raise ImageRefused(RefusalKind.UNREADABLE, "pictures of floating-point numbers are not supported")
    if image.mode.startswith("I;16"):
        image = image.convert("I")
    if image.mode != "I":
        return image
    _check_sixteen_bits(image)
    grey = image.point(_SIXTEEN_TO_EIGHT, "L")
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(image.point([0 if value == transparent else 255 for value in range(65536)], "L"))
    return grey


def _check_sixteen_bits(image: Image.Image) -> None:
    low, high = image.getextrema()
    if not 0 <= low <= high <= 65535:  # type: ignore[operator]  # one band gives two numbers
        raise ImageRefused(RefusalKind.UNREADABLE, "pictures with 32 bits a pixel are not supported")


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Separates colour and opacity, so that each colour conversion sees colours only."""
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    elif image.mode == "1":
        image = image.convert("L")
    if "transparency" in image.info and image.mode in ("L", "RGB"):
        image = image.convert("LA" if image.mode == "L" else "RGBA")
    if image.mode not in ("LA", "RGBA"):
        return image, None
    return image.convert(image.mode.removesuffix("A")), image.getchannel("A")


def _as_srgb(image: Image.Image, profile: bytes | None, warnings: list[str]) -> Image.Image:
    """Converts to sRGB by the embedded profile; without one, or with a broken one, by the usual formula."""
    if image.mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        return _transformed(image, ImageCms.ImageCmsProfile(lab))
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if not _is_srgb(source):
                return _transformed(image, source)
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            warnings.append("its colour profile is damaged and was ignored")
    return image if image.mode == "RGB" else image.convert("RGB")


def _transformed(image: Image.Image, source: ImageCms.ImageCmsProfile) -> Image.Image:
    converted = ImageCms.profileToProfile(image, source, _SRGB, outputMode="RGB")
    if converted is None:
        raise ValueError("no conversion")
    return converted


def _is_srgb(profile: ImageCms.ImageCmsProfile) -> bool:
    return "srgb" in ImageCms.getProfileDescription(profile).lower()
