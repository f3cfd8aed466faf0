"""How much a picture shows one individual: its drawing is searched for at every place and size.

A part is one of the individual's three colours with all that is drawn in it. At one place, a part scores the share of
its inside that has its colour, times the share of its surroundings that has not: a wall of its colour is no body. The
subject score is the mean over the three parts, at the best place. All places of one size are tried at once, as
correlations by Fourier transform.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import fft, ndimage

from models.pocket.figures import ASPECT, COLOURS, Features, outline
from tests.eval.pixels import Pixels, distance, pixels_of

SEARCH_SIDE = 128
"""Side in pixels at which the search runs."""
HEIGHTS = tuple(0.18 * 1.09**step for step in range(17))
"""Sizes that are tried first, as shares of the side: 0.18 to 0.71."""
FINE_HEIGHTS = (0.945, 0.97, 1.0, 1.03, 1.06)
FINE_WIDTHS = (0.94, 1.0, 1.06)
"""Factors around the best of them: a model does not keep proportions to the pixel."""
RIGHT, WRONG = 14.0, 90.0
"""Distances in colour up to which a pixel is wholly right (scenes are shaded by up to 10), and from which wrong."""
_PADDING = 12
"""Pixels around the picture, like its edge: what stands at the very edge is found too."""
_OVERSAMPLING = 4

Layers = NDArray[np.float32]
"""[3, h, w]: one plane for each part."""


@dataclass(frozen=True, slots=True)
class _Template:
    """An individual at one size: weights of each part's inside and surroundings, each plane's sum 1, [3, h, w]."""

    inside: Layers
    around: Layers


def score_subject(picture: Image.Image, noun: str, features: Features) -> float:
    """How much of an individual is in a picture, 0..1: near 1 for a drawing of it, near 0 without its colours.

    Args:
        picture: square, of any size.
        noun: one of `FIGURES`.
        features: the individual; it may stand mirrored.
    """
    wrong = _wrongness(pixels_of(picture, SEARCH_SIDE), features)
    spectrum = fft.rfft2(wrong)
    tried = [
        (_best(spectrum, noun, replace(features, flipped=flipped), height, 1.0), height, flipped)
        for height in HEIGHTS
        for flipped in (False, True)
    ]
    _, height, flipped = max(tried)
    turned = replace(features, flipped=flipped)
    return max(
        _best(spectrum, noun, turned, height * taller, wider)
        for taller in FINE_HEIGHTS
        for wider in FINE_WIDTHS
    )


def _wrongness(pixels: Pixels, features: Features) -> Layers:
    """How far each pixel is from each of the three colours, 0 (has it) to 1: [3, side + padding, side + padding]."""
    names = (features.main, features.second, features.accent)
    colours = [np.array(COLOURS[name], dtype=np.float32) for name in names]
    planes = [np.clip((distance(pixels, colour) - RIGHT) / (WRONG - RIGHT), 0, 1) for colour in colours]
    return np.stack([np.pad(plane, _PADDING, mode="edge") for plane in planes])


def _best(
    spectrum: NDArray[np.complex64], noun: str, features: Features, height: float, wider: float
) -> float:
    """The best score over all places at one size; 0 where the individual does not fit in."""
    side = SEARCH_SIDE + 2 * _PADDING
    rows, columns, inside, around = _spectra(noun, features, round(height, 4), wider)
    if rows > side or columns > side:
        return 0.0
    right = 1 - fft.irfft2(spectrum * inside, s=(side, side))[:, : side - rows + 1, : side - columns + 1]
    apart = fft.irfft2(spectrum * around, s=(side, side))[:, : side - rows + 1, : side - columns + 1]
    return float((right * apart).mean(0).max())


@lru_cache(maxsize=512)
def _spectra(
    noun: str, features: Features, height: float, wider: float
) -> tuple[int, int, NDArray[np.complex64], NDArray[np.complex64]]:
    """Rows and columns of a template, and the conjugate transforms of its planes: products with them correlate."""
    side = SEARCH_SIDE + 2 * _PADDING
    template = _draw_template(noun, features, height * SEARCH_SIDE, wider)
    _, rows, columns = template.inside.shape
    if rows > side or columns > side:
        nothing = np.zeros((3, 1, 1), dtype=np.complex64)
        return rows, columns, nothing, nothing
    transforms = [np.conj(fft.rfft2(planes, s=(side, side))) for planes in (template.inside, template.around)]
    return rows, columns, transforms[0], transforms[1]


def _draw_template(noun: str, features: Features, height_px: float, wider: float) -> _Template:
    """Draws each part on its own; the soft pixels along its edge count little, and as no surroundings."""
    reach = 2 + round(0.06 * height_px)
    covers = np.stack(
        [
            _cover(noun, features, name, height_px, wider, reach + 1)
            for name in (features.main, features.second, features.accent)
        ]
    )
    inside = np.clip(2 * covers - 1, 0, 1)
    near = ndimage.grey_dilation(covers, size=(1, 3, 3))
    around = ndimage.grey_dilation(covers, size=(1, 2 * reach + 1, 2 * reach + 1)) - near
    return _Template(_normalised(inside), _normalised(around))


def _normalised(planes: Layers) -> Layers:
    return planes / np.maximum(planes.sum((1, 2), keepdims=True), 1e-6)


def _cover(
    noun: str, features: Features, colour: str, height_px: float, wider: float, margin: int
) -> NDArray[np.float32]:
    """How much of each pixel one colour of the individual covers: [h, w] in 0..1, with a margin in pixels."""
    scale = height_px * _OVERSAMPLING
    width = scale * ASPECT[noun] * wider
    shape = [int(np.ceil(extent / _OVERSAMPLING)) + 2 * margin for extent in (width, scale)]
    cover = Image.new("L", (shape[0] * _OVERSAMPLING, shape[1] * _OVERSAMPLING), 0)
    pen, start = ImageDraw.Draw(cover), margin * _OVERSAMPLING
    for part in outline(noun, features.main, features):
        points = [(start + x * width, start + y * scale) for x, y in part.points]
        ink = 255 if part.colour == colour else 0
        if part.kind == "ellipse":
            pen.ellipse([points[0], points[1]], fill=ink)
        else:
            pen.polygon(points, fill=ink)
    return np.asarray(cover.reduce(_OVERSAMPLING), dtype=np.float32) / np.float32(255)
