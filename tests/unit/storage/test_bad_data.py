"""Everything bad that people send, in one archive: each file for itself, and none spoils another."""

import asyncio
import io
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
from PIL import Image

from services.storage.decode_child import DecodeTask
from services.storage.decoding import Decoded, DecodedImage, decode
from services.storage.images import RefusalKind

SIZE = (96, 72)
LEFT, RIGHT = (10, 36), (86, 36)


def halves(mode: str = "RGB") -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", SIZE, "blue")
    image.paste("red", (0, 0, 48, 72))
    return image.convert(mode)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    return saved(halves().transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif)


def sixteen_bits() -> bytes:
    image = Image.new("I;16", SIZE, 65535)
    for x in range(48):
        for y in range(72):
            image.putpixel((x, y), 25700)
    return saved(image)


def see_through_palette() -> bytes:
    image = halves().quantize(2)
    return saved(image, transparency=image.getpixel(LEFT))


def larger_than_the_limit() -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 10_001, 10_000, 1, 0, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(bytes((10_001 + 7) // 8 + 1) * 10_000))
    return b"\x89PNG\r\n\x1a\n" + header + rows + chunk(b"IEND", b"")


def bomb() -> bytes:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 20)]
    return "\n".join(lines).encode()


def nested() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("inner.png", saved(halves()))
    return buffer.getvalue()


FILES: dict[str, bytes] = {
    "good.png": saved(halves()),
    "truncated.jpg": saved(Image.effect_noise((300, 300), 90), "JPEG")[:-500],
    "cmyk.jpg": saved(halves("CMYK"), "JPEG", quality=95),
    "sixteen.png": sixteen_bits(),
    "palette.png": see_through_palette(),
    "turned.jpg": turned(),
    "huge.png": larger_than_the_limit(),
    "animated.gif": saved(halves(), "GIF", save_all=True, append_images=[Image.new("RGB", SIZE, "green")]),
    "phone.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200),
    "empty.png": b"",
    "path.png": saved(halves()),
    "path.txt": b"/etc/passwd",
    "unfolds.png": saved(halves()),
    "unfolds.yaml": bomb(),
    "unfolds.txt": b"two halves",
    "one/same.png": saved(halves()),
    "two/same.png": saved(Image.new("RGB", SIZE, "green")),
    "nested.zip": nested(),
    "cafX.png": saved(halves()),  # see below: the name becomes CP437
}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Decoded:
    folder = tmp_path_factory.mktemp("import")
    with zipfile.ZipFile(folder / "archive.zip", "w") as archive:
        for name, body in FILES.items():
            archive.writestr(name, body)
    data = (folder / "archive.zip").read_bytes().replace(b"cafX.png", b"caf\x82.png")
    (folder / "archive.zip").write_bytes(data)
    task = DecodeTask(str(folder), archive=str(folder / "archive.zip"), read_captions=True)
    return asyncio.run(decode(task))


@pytest.fixture
def read(imported: Decoded) -> dict[str, DecodedImage]:
    return {image.id: image for image in imported.images}


@pytest.fixture
def skipped(imported: Decoded) -> dict[str, tuple[RefusalKind, str]]:
    return {file.id: (file.kind, file.why) for file in imported.skipped}


def colours(image: DecodedImage) -> tuple[object, object]:
    """Colours of the left and the right half, each channel rounded to 0, 100 or 255."""

    def nearest(value: int) -> int:
        return min((0, 100, 255), key=lambda known: abs(known - value))

    with Image.open(image.path) as opened:
        assert (opened.mode, opened.size) == ("RGB", SIZE)
        pixels = [opened.getpixel(place) for place in (LEFT, RIGHT)]
    left, right = (tuple(map(nearest, pixel)) for pixel in pixels if isinstance(pixel, tuple))
    return left, right


RED, BLUE, WHITE, GREY = (255, 0, 0), (0, 0, 255), (255, 255, 255), (100, 100, 100)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("good.png", (RED, BLUE)),
        ("cmyk.jpg", (RED, BLUE)),
        ("sixteen.png", (GREY, WHITE)),
        ("palette.png", (WHITE, BLUE)),
        ("turned.jpg", (RED, BLUE)),
        ("animated.gif", (RED, BLUE)),
    ],
)
def test_unusual_picture_becomes_an_ordinary_one(
    name: str, expected: tuple[object, object], read: dict[str, DecodedImage]
) -> None:
    assert colours(read[name]) == expected


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("truncated.jpg", "the file is truncated"),
        ("huge.png", "10001x10000 pixels are more than 100 megapixels"),
        ("phone.heic", "HEIC pictures are not supported"),
        ("empty.png", "is not a picture"),
    ],
)
def test_unusable_picture_is_skipped_with_its_reason(
    name: str, why: str, read: dict[str, DecodedImage], skipped: dict[str, tuple[RefusalKind, str]]
) -> None:
    assert name not in read
    assert skipped[name] == (RefusalKind.UNREADABLE, why)


def test_nothing_else_is_skipped(skipped: dict[str, tuple[RefusalKind, str]]) -> None:
    assert sorted(skipped) == ["empty.png", "huge.png", "phone.heic", "truncated.jpg"]


def test_caption_that_is_a_path_is_text(read: dict[str, DecodedImage]) -> None:
    assert read["path.png"].caption == "/etc/passwd"


def test_yaml_that_unfolds_is_ignored_with_a_warning(read: dict[str, DecodedImage]) -> None:
    assert read["unfolds.png"].caption == "two halves"
    assert read["unfolds.png"].faults == ("unfolds.yaml: holds aliases; it was ignored",)


def test_equal_names_in_two_folders_are_two_pictures(read: dict[str, DecodedImage]) -> None:
    assert read["one/same.png"].digest != read["two/same.png"].digest
    assert colours(read["one/same.png"]) == (RED, BLUE)


def test_name_that_is_not_utf8_is_read_as_the_format_says(read: dict[str, DecodedImage]) -> None:
    assert read["caf\u00e9.png"].description is not None
    assert read["caf\u00e9.png"].description.text == "caf\u00e9"


def test_nested_archive_and_texts_are_no_pictures(imported: Decoded) -> None:
    assert "inner.png" not in {image.id for image in imported.images}
    assert imported.ignored == 4


async def test_empty_archive_holds_nothing(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    task = DecodeTask(str(tmp_path), archive=str(tmp_path / "empty.zip"), read_captions=True)
    assert await decode(task) == Decoded()


async def test_damaged_text_file_never_costs_a_picture(tmp_path: Path) -> None:
    """A text whose packed bytes were changed; the picture beside it is whole."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", saved(halves()))
        archive.writestr("a.txt", b"words that are damaged")
    data = buffer.getvalue().replace(b"words that", b"words thaX", 1)
    (tmp_path / "a.zip").write_bytes(data)
    decoded = await decode(DecodeTask(str(tmp_path), archive=str(tmp_path / "a.zip"), read_captions=True))
    (image,) = decoded.images
    assert image.faults == ("a.txt: is damaged inside the archive; it was ignored",)
    assert image.caption is None
