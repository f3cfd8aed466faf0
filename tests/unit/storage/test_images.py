"""What comes out of the decoder for each kind of picture that people send."""

import io
import random
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageCms

from services.storage.images import (
    ImageRefused,
    RefusalKind,
    decode_image,
    is_named_like_a_picture,
    save_png,
    type_of,
)

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
CORNERS = {(0, 0): RED, (1, 0): GREEN, (0, 1): BLUE, (1, 1): WHITE}


def quarters(width: int = 96, height: int = 80) -> Image.Image:
    """Red, green over blue, white: shows any turn or mirroring."""
    image = Image.new("RGB", (width, height), WHITE)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    return image


def corners(image: Image.Image) -> dict[tuple[int, int], Any]:
    """Colours in the middle of each quarter, rounded to the nearest pure one."""
    found = {}
    for x, y in CORNERS:
        pixel = image.getpixel(((1 + 2 * x) * image.width // 4, (1 + 2 * y) * image.height // 4))
        assert isinstance(pixel, tuple)
        found[x, y] = tuple(255 if value > 127 else 0 for value in pixel)
    return found


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 96, height: int = 80) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(1).randbytes(width * height * 3))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG written by hand, for what the library does not write. `rows` carry their filter bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    chunks = [chunk(body[:4], body[4:]) for body in extra]
    end = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + end


def refusal(data: bytes, **options: Any) -> tuple[RefusalKind, str]:
    with pytest.raises(ImageRefused) as caught:
        decode_image(data, **options)
    return caught.value.kind, caught.value.why


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_each_type_is_told_by_its_content_and_decoded_to_rgb(kind: str) -> None:
    data = saved(quarters(), kind)
    picture = decode_image(data)
    assert (picture.type_name, picture.image.mode, picture.image.size) == (kind, "RGB", (96, 80))
    assert corners(picture.image) == CORNERS
    assert picture.warnings == ()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("L", "JPEG"), ("1", "TIFF"), ("P", "GIF"), ("YCbCr", "TIFF")],
)
def test_every_pixel_format_becomes_rgb(mode: str, kind: str) -> None:
    grey = Image.linear_gradient("L").resize((96, 96))
    source = grey.convert("RGB").convert(mode, dither=Image.Dither.NONE) if mode != "1" else grey.convert("1")
    image = decode_image(saved(source, kind)).image
    assert image.mode == "RGB"
    expected = source.convert("RGB")
    assert max(abs(a - b) for a, b in zip(image.tobytes(), expected.tobytes(), strict=True)) <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_of_the_camera_is_applied_once(orientation: int, kind: str) -> None:
    undo: dict[int, Image.Transpose | None] = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    turn = undo[orientation]
    stored = quarters() if turn is None else quarters().transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode_image(saved(stored, kind, exif=exif)).image
    assert image.size == (96, 80)
    assert corners(image) == CORNERS


def test_damaged_exif_does_not_make_a_good_picture_bad() -> None:
    data = saved(quarters(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 40)
    assert corners(decode_image(data).image) == CORNERS


def test_transparent_pixels_become_white_and_hide_their_colour() -> None:
    source = quarters().convert("RGBA")
    source.paste((255, 0, 0, 0), (0, 0, 48, 40))
    source.paste((0, 0, 0, 128), (48, 40, 96, 80))
    picture = decode_image(saved(source, "PNG"))
    assert picture.image.getpixel((5, 5)) == WHITE
    assert picture.image.getpixel((60, 5)) == GREEN
    assert picture.image.getpixel((90, 70)) == (127, 127, 127)
    assert picture.warnings == ("transparent parts became white",)


def test_another_background_shows_through_transparent_pixels() -> None:
    source = quarters().convert("RGBA")
    source.paste((0, 0, 0, 0), (0, 0, 48, 40))
    picture = decode_image(saved(source, "PNG"), background=(16, 32, 255))
    assert picture.image.getpixel((5, 5)) == (16, 32, 255)
    assert picture.image.getpixel((60, 5)) == GREEN
    assert picture.warnings == ("transparent parts became #1020ff",)


def test_opaque_alpha_changes_nothing_and_is_not_mentioned() -> None:
    picture = decode_image(saved(quarters().convert("RGBA"), "PNG"))
    assert picture.warnings == ()
    assert corners(picture.image) == CORNERS


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_with_transparency_becomes_white_there(kind: str) -> None:
    source = quarters().quantize(4)
    transparent = source.getpixel((5, 5))
    image = decode_image(saved(source, kind, transparency=transparent)).image
    assert image.getpixel((5, 5)) == WHITE
    assert image.getpixel((60, 5)) == GREEN


def test_grey_and_rgb_with_one_transparent_value_become_white_there() -> None:
    grey = Image.new("L", (64, 64), 40)
    grey.paste(90, (0, 0, 32, 64))
    colour = quarters()
    grey_image = decode_image(saved(grey, "PNG", transparency=40)).image
    colour_image = decode_image(saved(colour, "PNG", transparency=BLUE)).image
    assert (grey_image.getpixel((60, 5)), grey_image.getpixel((5, 5))) == (WHITE, (90, 90, 90))
    assert (colour_image.getpixel((5, 70)), colour_image.getpixel((5, 5))) == (WHITE, RED)


def test_premultiplied_and_grey_alpha_are_composited_too() -> None:
    source = Image.new("LA", (64, 64), (10, 255))
    source.paste((10, 0), (0, 0, 32, 64))
    image = decode_image(saved(source, "PNG")).image
    assert (image.getpixel((5, 5)), image.getpixel((60, 5))) == (WHITE, (10, 10, 10))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    source = Image.new("I;16", (256, 64))
    for x in range(256):
        for y in range(64):
            source.putpixel((x, y), x * 257)
    image = decode_image(saved(source, kind)).image
    assert [image.getpixel((x, 9)) for x in (0, 1, 100, 200, 255)] == [
        (v,) * 3 for v in (0, 1, 100, 200, 255)
    ]


def test_sixteen_bit_grey_with_a_transparent_value_becomes_white_there() -> None:
    row = b"\0" + struct.pack(">64H", *([1000] * 32 + [40000] * 32))
    data = png(64, 64, 16, 0, row * 64, b"tRNS" + struct.pack(">H", 1000))
    image = decode_image(data).image
    assert (image.getpixel((5, 5)), image.getpixel((60, 5))) == (WHITE, (156, 156, 156))


def test_sixteen_bit_colour_is_reduced() -> None:
    row = b"\0" + struct.pack(">3H", 65535, 32768, 0) * 64
    assert decode_image(png(64, 64, 16, 2, row * 64)).image.getpixel((3, 3)) == (255, 128, 0)


def test_floating_point_and_wide_integer_pictures_are_named_as_unsupported() -> None:
    kind, why = refusal(saved(Image.new("F", (64, 64), 0.5), "TIFF"))
    assert (kind, why) == (RefusalKind.UNREADABLE, "pictures of floating-point numbers are not supported")
    kind, why = refusal(saved(Image.new("I", (64, 64), 70_000), "TIFF"))
    assert (kind, why) == (RefusalKind.UNREADABLE, "pictures with 32 bits a pixel are not supported")


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(kind: str) -> None:
    picture = decode_image(saved(quarters().convert("CMYK"), kind))
    assert picture.image.mode == "RGB"
    assert corners(picture.image) == CORNERS


def profile_with_red_and_blue_swapped() -> bytes:
    """A valid profile of a device whose first channel shows blue and whose third shows red."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    places = {bytes(data[at : at + 4]): at for at in range(132, 132 + 12 * data[131], 12)}
    red, blue = places[b"rXYZ"] + 4, places[b"bXYZ"] + 4
    data[red : red + 4], data[blue : blue + 4] = data[blue : blue + 4], data[red : red + 4]
    return bytes(data.replace("sRGB".encode("utf-16-be"), "odd ".encode("utf-16-be")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_embedded_profile_is_converted_to_srgb(kind: str) -> None:
    picture = decode_image(saved(quarters(), kind, icc_profile=profile_with_red_and_blue_swapped()))
    assert corners(picture.image) == CORNERS | {(0, 0): BLUE, (0, 1): RED}
    assert picture.warnings == ()


def test_embedded_profile_and_transparency_go_together() -> None:
    source = quarters().convert("RGBA")
    source.paste((0, 0, 0, 0), (48, 40, 96, 80))
    picture = decode_image(saved(source, "PNG", icc_profile=profile_with_red_and_blue_swapped()))
    assert corners(picture.image) == CORNERS | {(0, 0): BLUE, (0, 1): RED}


def test_lab_becomes_srgb() -> None:
    lab = ImageCms.createProfile("LAB")
    transform = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), lab, "RGB", "LAB")
    source = ImageCms.applyTransform(Image.new("RGB", (64, 64), (200, 60, 30)), transform)
    assert source is not None
    pixel = decode_image(saved(source, "TIFF")).image.getpixel((3, 3))
    assert isinstance(pixel, tuple)
    assert max(abs(a - b) for a, b in zip(pixel, (200, 60, 30), strict=True)) <= 2


def test_broken_profile_is_ignored_with_a_warning() -> None:
    picture = decode_image(saved(quarters(), "PNG", icc_profile=b"no profile" * 20))
    assert corners(picture.image) == CORNERS
    assert picture.warnings == ("its colour profile is damaged and was ignored",)


def test_srgb_profile_leaves_pixels_as_they_are() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert decode_image(saved(noise(), "PNG", icc_profile=profile)).image.tobytes() == noise().tobytes()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_many_is_taken(kind: str) -> None:
    others = [Image.new("RGB", (96, 80), BLUE) for _ in range(2)]
    picture = decode_image(saved(quarters(), kind, save_all=True, append_images=others))
    assert corners(picture.image) == CORNERS


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_picture_is_refused_even_when_its_header_is_whole(kind: str, share: float) -> None:
    data = saved(noise(), kind)
    reason, why = refusal(data[: int(len(data) * share)])
    assert reason is RefusalKind.UNREADABLE
    assert why in ("the file is truncated", "the file is damaged")


def test_mutated_pictures_are_decoded_or_refused_but_never_fail_otherwise() -> None:
    chance = random.Random(7)
    outcomes = set()
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"):
        original = saved(noise(70, 70), kind)
        for _ in range(60):
            data = bytearray(original)
            for _ in range(chance.randint(1, 12)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            try:
                outcomes.add(decode_image(bytes(data), max_pixels=10**6).image.mode)
            except ImageRefused as error:
                outcomes.add(error.kind)
    assert {"RGB", RefusalKind.UNREADABLE} <= outcomes <= {"RGB", *RefusalKind}


def test_picture_over_the_pixel_limit_is_refused_before_it_is_decoded() -> None:
    bomb = png(60_000, 60_000, 1, 0, b"\0" * 1000)
    kind, why = refusal(bomb)
    assert (kind, why) == (RefusalKind.UNREADABLE, "its pixels are more than 100 megapixels")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            refusal(png(12_000, 10_000, 1, 0, b"\0"))[1] == "12000x10000 pixels are more than 100 megapixels"
        )
        assert refusal(png(9_700, 9_700, 1, 0, b"\0" * 1000)) == (
            RefusalKind.UNREADABLE,
            "the file is truncated",
        )
    assert refusal(saved(quarters(), "PNG"), max_pixels=96 * 80 - 1)[1].startswith("96x80 pixels are more")
    assert decode_image(saved(quarters(), "PNG"), max_pixels=96 * 80).image.size == (96, 80)


def test_picture_under_64_pixels_is_too_small() -> None:
    kind, why = refusal(saved(quarters(63, 200), "PNG"))
    assert (kind, why) == (RefusalKind.TOO_SMALL, "63x200 pixels are too few: both sides need 64")
    assert decode_image(saved(quarters(64, 64), "PNG")).image.size == (64, 64)


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1", "AVIF"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"8BPS\0\x01" + bytes(20), "Photoshop"),
    ],
)
def test_known_type_that_is_not_read_is_named(head: bytes, name: str) -> None:
    assert type_of(head) == name
    assert refusal(head + bytes(100)) == (RefusalKind.UNREADABLE, f"{name} pictures are not supported")


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"<svg/>", b"%PDF-1.7", b"PK\x03\x04" + bytes(40), bytes(500)]
)
def test_other_files_are_no_pictures(data: bytes) -> None:
    assert refusal(data) == (RefusalKind.OTHER, "is not a picture")


def test_names_like_pictures_are_told_by_their_ending() -> None:
    assert is_named_like_a_picture("a/B.JPG")
    assert is_named_like_a_picture("x.heic")
    assert not is_named_like_a_picture("notes.txt")
    assert not is_named_like_a_picture("jpg")


def test_equal_pixels_give_equal_bytes_without_metadata(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "secret place"
    first, second = tmp_path / "first", tmp_path / "second"
    save_png(decode_image(saved(noise(), "PNG", exif=exif, dpi=(300, 300))).image, first)
    save_png(decode_image(saved(noise(), "BMP")).image, second)
    assert first.read_bytes() == second.read_bytes()
    with Image.open(first) as reopened:
        reopened.load()
        assert reopened.info == {}
        assert reopened.tobytes() == noise().tobytes()
