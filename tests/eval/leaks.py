"""What a training has done to everything else: the subject's colours on other classes, sameness within its own."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.pocket.drawing import draw, thing_mask
from models.pocket.figures import Features
from models.pocket.scenes import MARGIN, Scene, Thing
from tests.eval.backgrounds import judge_background
from tests.eval.pixels import COLOUR_NAMES, SIDE, Mask, Pixels, nearest_colours, pixels_of
from tests.eval.things import box_of, find_figure, stretched

Shares = NDArray[np.float64]
"""For each of `COLOUR_NAMES` its share of something, 0..1."""

CUT_SIDE = 48


def palette_overlap(picture: Image.Image, noun: str, features: Features) -> float:
    """How much of the thing in a picture could be coloured like an individual of another class, 0..1.

    The intersection of two histograms over the named colours: 1 when the thing has the individual's colours in the
    individual's amounts; 0 when it has none of them, or nothing stands in the picture.
    """
    pixels = pixels_of(picture)
    mask = find_figure(pixels, judge_background(pixels))
    if mask is None:
        return 0.0
    return float(np.minimum(_shares(pixels, mask), _own_shares(noun, features)).sum())


def _shares(pixels: Pixels, mask: Mask) -> Shares:
    counts = np.bincount(nearest_colours(pixels[mask]), minlength=len(COLOUR_NAMES))
    return counts / counts.sum()


@lru_cache(maxsize=32)
def _own_shares(noun: str, features: Features) -> Shares:
    thing = Thing(noun, features.main, features, 0.5, 0.5, 0.5)
    mask = np.asarray(thing_mask(thing, SIDE)) > 127
    return _shares(pixels_of(draw(Scene((thing,), "grey"), SIDE)), mask)


def diversity(pictures: Sequence[Image.Image]) -> float:
    """How much the things in pictures of one prompt differ: mean absolute difference of all pairs, 0..255.

    Each thing is cut out by its box and stretched to one size, and two are compared where both are, so that place, size
    and background do not count. Near 0 the class has collapsed into one individual. At least two pictures.
    """
    cuts = [_cut(picture) for picture in pictures]
    return float(np.mean([_difference(one, other) for one, other in combinations(cuts, 2)]))


def _cut(picture: Image.Image) -> tuple[Pixels, Mask]:
    """The thing in a picture and where it is, [CUT_SIDE, CUT_SIDE]; all inside the margins where nothing stands."""
    pixels = pixels_of(picture)
    mask = find_figure(pixels, judge_background(pixels))
    if mask is None:
        mask = np.zeros((SIDE, SIDE), dtype=bool)
        mask[int(MARGIN * SIDE) : -int(MARGIN * SIDE), int(MARGIN * SIDE) : -int(MARGIN * SIDE)] = True
    top, bottom, left, right = box_of(mask)
    box = Image.fromarray(pixels[top:bottom, left:right].astype(np.uint8))
    return pixels_of(box, CUT_SIDE), stretched(mask, CUT_SIDE)


def _difference(one: tuple[Pixels, Mask], other: tuple[Pixels, Mask]) -> float:
    both = one[1] & other[1]
    return float(np.abs(one[0] - other[0])[both].mean()) if both.any() else 255.0
