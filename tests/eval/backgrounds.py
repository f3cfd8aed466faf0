"""Which background a picture has: its border, where nothing else reaches, against renders of all eighteen."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from models.pocket.drawing import draw_background
from models.pocket.figures import COLOURS
from models.pocket.scenes import BACKGROUNDS, MARGIN
from tests.eval.pixels import SIDE, Mask, Pixels, distance, pixels_of

COARSE_SIDE = 64
COARSE_HORIZONS = tuple(0.44 + 0.02 * index for index in range(12))
"""A little beyond the 0.50 to 0.60 of drawn scenes, for skylines that a model gets wrong."""
FINE_STEP, FINE_STEPS = 0.0025, 6
MAX_SHADE = 9.0
"""Units a channel that a background may be lighter or darker as a whole; scenes are drawn within 6."""
_ERROR_LIMIT = 100.0
"""Distance in colour beyond which a pixel is simply wrong; a misplaced star must not outweigh a right sky."""


@dataclass(frozen=True, slots=True)
class Background:
    """What lies behind everything.

    Attributes:
        name: in `BACKGROUNDS`.
        error: mean clipped distance in colour along the border, 0..100.
        pixels: [SIDE, SIDE, 3], how the picture would look without things.
    """

    name: str
    error: float
    pixels: Pixels


def judge_background(picture: Pixels) -> Background:
    """The background that fits the border of [SIDE, SIDE, 3] best, at its best skyline and shade."""
    small = pixels_of(Image.fromarray(np.rint(picture).astype(np.uint8)), COARSE_SIDE)
    fits = {
        (name, horizon): _fit(small, _render(name, horizon, COARSE_SIDE))[0]
        for name in BACKGROUNDS
        for horizon in _horizons(name)
    }
    name, horizon = min(fits, key=lambda key: fits[key])
    reach = range(-FINE_STEPS, FINE_STEPS + 1) if len(_horizons(name)) > 1 else (0,)
    renders = [_render(name, round(horizon + FINE_STEP * step, 4), SIDE) for step in reach]
    found = [(_fit(picture, render), render) for render in renders]
    (error, shade), render = min(found, key=lambda entry: entry[0][0])
    return Background(name, error, render + shade)


def _horizons(name: str) -> tuple[float, ...]:
    return (0.55,) if name in COLOURS else COARSE_HORIZONS


@lru_cache(maxsize=1024)
def _render(name: str, horizon: float, side: int) -> Pixels:
    return pixels_of(draw_background(name, horizon, (0, 0, 0), 2 * side), side)


@lru_cache(maxsize=4)
def _border(side: int) -> Mask:
    width = int(MARGIN * side)
    border = np.ones((side, side), dtype=bool)
    border[width:-width, width:-width] = False
    return border


def _fit(picture: Pixels, render: Pixels) -> tuple[float, Pixels]:
    """Mean clipped error along the border, and the shade [3] that makes it so small."""
    border = _border(picture.shape[0])
    difference = picture[border] - render[border]
    shade = np.clip(np.median(difference, axis=0), -MAX_SHADE, MAX_SHADE).astype(np.float32)
    return float(np.minimum(distance(difference, shade), _ERROR_LIMIT).mean()), shade
