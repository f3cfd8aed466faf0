"""The pixels of a scene: backgrounds, things and masks, drawn by Pillow at twice the size and reduced.

Scenes are lists of shapes in shares of the picture's side, so one scene can be drawn at any size.
"""

import random
from collections.abc import Callable

from PIL import Image, ImageDraw, ImageFilter

from models.pocket.figures import ASPECT, COLOURS, Point, Primitive, Rgb, outline
from models.pocket.scenes import PLACES, Scene, Thing

OVERSAMPLING = 2
NATIVE_SIZE_PX = 512


def draw(scene: Scene, size_px: int = NATIVE_SIZE_PX) -> Image.Image:
    """The scene as a square RGB picture of `size_px` pixels a side."""
    canvas = draw_background(scene.background, scene.horizon, scene.shade, size_px * OVERSAMPLING)
    for thing in scene.things:
        _draw_thing(canvas, thing, scene)
    return canvas.reduce(OVERSAMPLING)


def draw_background(background: str, horizon: float, shade: tuple[int, int, int], side: int) -> Image.Image:
    """A background without things.

    Args:
        background: a name in `COLOURS`, or in `PLACES`.
        horizon: height of the skyline as a share of the side from the top; unused by flat backgrounds.
        shade: what is added to every colour's channels, a few units.
        side: pixels; drawn at this very size.
    """
    if background in COLOURS:
        return Image.new("RGB", (side, side), shaded(COLOURS[background], shade))
    return _PLACE_DRAWINGS[background](side, horizon, shade)


def thing_mask(thing: Thing, size_px: int = NATIVE_SIZE_PX) -> Image.Image:
    """Where a thing is: an "L" picture, 255 inside, soft at the edge."""
    mask = Image.new("L", (size_px * OVERSAMPLING,) * 2, 0)
    pen = ImageDraw.Draw(mask)
    for part in outline(thing.noun, thing.colour, thing.features):
        _fill(pen, part, _placed(thing, mask.width, part), 0 if part.colour == "hole" else 255)
    return mask.reduce(OVERSAMPLING)


def texture(rng: random.Random, size_px: int = NATIVE_SIZE_PX) -> Image.Image:
    """A picture of nothing: blurred colour noise of some scales and a gradient.

    What photographs have and scenes lack, so that the autoencoder does not fail on them.
    """
    picture = Image.new("RGB", (size_px, size_px), tuple(rng.randrange(256) for _ in range(3)))
    for cells in rng.sample((2, 3, 5, 9, 17, 33), 3):
        noise = Image.frombytes("RGB", (cells, cells), rng.randbytes(3 * cells * cells))
        resample = rng.choice((Image.Resampling.BICUBIC, Image.Resampling.BILINEAR))
        picture = Image.blend(picture, noise.resize((size_px, size_px), resample), rng.uniform(0.2, 0.7))
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 3)))


def shaded(colour: Rgb, shade: tuple[int, int, int]) -> Rgb:
    """A colour with a few units added to each channel, within 0..255."""
    red, green, blue = (min(255, max(0, value + extra)) for value, extra in zip(colour, shade, strict=True))
    return red, green, blue


def _draw_thing(canvas: Image.Image, thing: Thing, scene: Scene) -> None:
    pen = ImageDraw.Draw(canvas)
    for part in outline(thing.noun, thing.colour, thing.features):
        points = _placed(thing, canvas.width, part)
        if part.colour == "hole":
            behind = draw_background(scene.background, scene.horizon, scene.shade, canvas.width)
            hole = Image.new("L", canvas.size, 0)
            _fill(ImageDraw.Draw(hole), part, points, 255)
            canvas.paste(behind, (0, 0), hole)
        else:
            _fill(pen, part, points, shaded(COLOURS[part.colour], thing.shade))


def _placed(thing: Thing, side: int, part: Primitive) -> list[Point]:
    height = thing.height * side
    width = height * ASPECT.get(thing.noun, 1.0)
    left, top = thing.x * side - width / 2, thing.y * side - height / 2
    return [(left + x * width, top + y * height) for x, y in part.points]


def _fill(pen: ImageDraw.ImageDraw, part: Primitive, points: list[Point], ink: int | Rgb) -> None:
    if part.kind == "ellipse":
        pen.ellipse([points[0], points[1]], fill=ink)
    else:
        pen.polygon(points, fill=ink)


_Pen = tuple[Image.Image, ImageDraw.ImageDraw, Callable[[int, int, int], Rgb]]


def _sky(side: int, shade: tuple[int, int, int], colour: Rgb) -> _Pen:
    picture = Image.new("RGB", (side, side), shaded(colour, shade))

    def ink(red: int, green: int, blue: int) -> Rgb:
        return shaded((red, green, blue), shade)

    return picture, ImageDraw.Draw(picture), ink


def _beach(side: int, horizon: float, shade: tuple[int, int, int]) -> Image.Image:
    picture, pen, ink = _sky(side, shade, (156, 214, 240))
    pen.rectangle((0, (horizon - 0.14) * side, side, side), fill=ink(46, 134, 193))
    pen.rectangle((0, horizon * side, side, side), fill=ink(240, 216, 154))
    return picture


def _snow(side: int, horizon: float, shade: tuple[int, int, int]) -> Image.Image:
    picture, pen, ink = _sky(side, shade, (176, 196, 220))
    pen.rectangle((0, horizon * side, side, side), fill=ink(242, 246, 250))
    for middle, width in ((0.18, 0.32), (0.80, 0.40)):
        peak = (horizon - width * 0.55) * side
        pen.polygon(
            [
                ((middle - width / 2) * side, horizon * side),
                (middle * side, peak),
                ((middle + width / 2) * side, horizon * side),
            ],
            fill=ink(222, 230, 240),
        )
    return picture


def _grass(side: int, horizon: float, shade: tuple[int, int, int]) -> Image.Image:
    picture, pen, ink = _sky(side, shade, (140, 205, 250))
    pen.rectangle((0, horizon * side, side, side), fill=ink(112, 184, 84))
    return picture


def _night(side: int, horizon: float, shade: tuple[int, int, int]) -> Image.Image:
    picture, pen, ink = _sky(side, shade, (20, 24, 60))
    pen.rectangle((0, horizon * side, side, side), fill=ink(44, 48, 84))
    pen.ellipse((0.80 * side, 0.05 * side, 0.93 * side, 0.18 * side), fill=ink(246, 236, 190))
    for x, y in ((0.08, 0.09), (0.30, 0.05), (0.52, 0.10), (0.66, 0.04), (0.05, 0.32), (0.94, 0.30)):
        pen.ellipse(
            ((x - 0.013) * side, (y - 0.013) * side, (x + 0.013) * side, (y + 0.013) * side),
            fill=ink(246, 246, 230),
        )
    return picture


def _desert(side: int, horizon: float, shade: tuple[int, int, int]) -> Image.Image:
    picture, pen, ink = _sky(side, shade, (250, 202, 140))
    pen.ellipse((-0.4 * side, (horizon - 0.12) * side, 0.75 * side, 1.2 * side), fill=ink(226, 160, 92))
    pen.ellipse((0.3 * side, (horizon - 0.04) * side, 1.5 * side, 1.4 * side), fill=ink(206, 138, 74))
    pen.rectangle((0, (horizon + 0.2) * side, side, side), fill=ink(206, 138, 74))
    return picture


def _sea(side: int, horizon: float, shade: tuple[int, int, int]) -> Image.Image:
    picture, pen, ink = _sky(side, shade, (20, 112, 160))
    pen.rectangle((0, 0.30 * side, side, side), fill=ink(14, 88, 138))
    pen.rectangle((0, (horizon + 0.14) * side, side, side), fill=ink(96, 128, 120))
    for x, y, radius in ((0.07, 0.20, 0.022), (0.93, 0.12, 0.028), (0.90, 0.40, 0.018), (0.12, 0.50, 0.026)):
        pen.ellipse(
            ((x - radius) * side, (y - radius) * side, (x + radius) * side, (y + radius) * side),
            fill=ink(150, 205, 225),
        )
    return picture


_PLACE_DRAWINGS: dict[str, Callable[[int, float, tuple[int, int, int]], Image.Image]] = dict(
    zip(PLACES, (_beach, _snow, _grass, _night, _desert, _sea), strict=True)
)
