"""What stands in a picture: segments, their colours and shapes, and what kind of figure it is.

Segmentation is by nearest colour: each pixel belongs to the fitted background or to one of the few colours of which
there is much. Silhouettes are compared within their own bounding boxes with what `models.pocket` draws.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from models.pocket.figures import ASPECT, FIGURES, FORMS, SHAPES, Features, outline
from models.pocket.scenes import HEIGHTS, MARGIN
from tests.eval.backgrounds import Background
from tests.eval.pixels import (
    COLOUR_NAMES,
    COLOUR_VALUES,
    SIDE,
    Mask,
    Pixels,
    distance,
    nearest_colour,
    nearest_colours,
)

VISIBLE = 32.0
"""Distance in colour from the background at which something stands out; the nearest that scenes combine is 46."""
SPECK = 0.004
"""Share of the picture below which a segment is no thing; the smallest thing drawn takes 0.014, a bubble 0.0025."""
RUNT = 0.12
"""Share of the largest thing below which a segment is a speck; a small star beside a large square has 0.23."""
_SHIFTS = (-8, -4, 0, 4, 8)
"""Rows by which a skyline may be off without becoming a thing."""
_BOX = 48
"""Side of the square to which silhouettes are stretched for comparison."""
_SAME = 40.0
"""Distance below which two colours in one picture are one."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One segment of a picture.

    Attributes:
        colour: the nearest name.
        shape: the best of `SHAPES`; of a figure it means nothing.
        x, y: middle of its box, shares of the side.
        width, height: of its box, shares of the side.
        area: share of the picture.
    """

    colour: str
    shape: str
    x: float
    y: float
    width: float
    height: float
    area: float


def find_things(picture: Pixels, background: Background) -> list[Thing]:
    """Plain shapes, from left to right.

    Args:
        picture: [SIDE, SIDE, 3].
        background: of this picture.
    """
    behind = difference_from(picture, background)
    colours = _main_colours(picture, behind)
    labels = np.stack([behind, *(distance(picture, colour) for colour in colours)]).argmin(0)
    found = []
    for number, colour in enumerate(colours, 1):
        # One pixel less at each edge: there colours mix, and what almost touches is parted.
        found += [_thing(mask, colour) for mask in _segments(labels == number)]
    largest = max((thing.area for thing in found), default=0.0)
    return sorted((thing for thing in found if thing.area >= RUNT * largest), key=lambda thing: thing.x)


def _segments(mask: Mask) -> list[Mask]:
    """The connected parts of a mask that are no specks."""
    parts, _ = ndimage.label(ndimage.binary_opening(mask, np.ones((3, 3))))
    areas = np.bincount(parts.ravel())
    return [parts == part for part in range(1, len(areas)) if areas[part] >= SPECK * mask.size]


def largest_thing(things: list[Thing]) -> Thing | None:
    """The one that a prompt of one thing is about."""
    return max(things, key=lambda thing: thing.area, default=None)


def difference_from(picture: Pixels, background: Background) -> NDArray[np.float32]:
    """How far each pixel is from the background near it: [SIDE, SIDE]."""
    rows = np.arange(SIDE)
    shifted = [background.pixels[np.clip(rows + shift, 0, SIDE - 1)] for shift in _SHIFTS]
    return np.min([distance(picture, pixels) for pixels in shifted], axis=0)


def _main_colours(picture: Pixels, behind: NDArray[np.float32]) -> list[Pixels]:
    """The colours of which there is much before the background, each [3]."""
    core = ndimage.binary_erosion(behind > VISIBLE, iterations=3)
    pixels = picture[core]
    names = nearest_colours(pixels)
    counts = np.bincount(names, minlength=len(COLOUR_NAMES))
    enough = max(SPECK / 2 * SIDE * SIDE, 0.06 * counts.sum())
    colours: list[Pixels] = []
    for name in np.argsort(-counts):
        middle = np.median(pixels[names == name], axis=0) if counts[name] >= enough else None
        if middle is not None and all(distance(middle, other) > _SAME for other in colours):
            colours.append(middle)
    return colours


def _thing(mask: Mask, colour: Pixels) -> Thing:
    top, bottom, left, right = box_of(mask)
    return Thing(
        nearest_colour(colour),
        _shape_of(mask),
        (left + right) / 2 / SIDE,
        (top + bottom) / 2 / SIDE,
        (right - left) / SIDE,
        (bottom - top) / SIDE,
        float(mask.mean()),
    )


def box_of(mask: Mask) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of what is set, ends excluded."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def stretched(mask: Mask, side: int = _BOX) -> Mask:
    """What is set, stretched from its own box to [side, side]."""
    top, bottom, left, right = box_of(mask)
    cut = Image.fromarray(mask[top:bottom, left:right].astype(np.uint8) * 255)
    return np.asarray(cut.resize((side, side), Image.Resampling.BILINEAR)) > 127


def _overlap(one: Mask, other: Mask) -> float:
    """Intersection over union."""
    return float((one & other).sum() / max(1, (one | other).sum()))


def _shape_of(mask: Mask) -> str:
    seen = stretched(mask)
    return max(SHAPES, key=lambda shape: _overlap(seen, _shape_template(shape)))


@lru_cache(maxsize=len(SHAPES))
def _shape_template(shape: str) -> Mask:
    return stretched(_silhouette(shape, None, frozenset()))


def _silhouette(noun: str, features: Features | None, unseen: frozenset[str]) -> Mask:
    """Where a noun is, 256 px high, without the parts in colours that cannot be seen."""
    height = 256
    width = round(height * ASPECT.get(noun, 1.0))
    mask = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(mask)
    for part in outline(noun, "red", features):
        points = [(x * width, y * height) for x, y in part.points]
        ink = 0 if part.colour == "hole" or part.colour in unseen else 255
        if part.kind == "ellipse":
            pen.ellipse([points[0], points[1]], fill=ink)
        else:
            pen.polygon(points, fill=ink)
    return np.asarray(mask) > 0


# --- one single thing of any kind --------------------------------------------------------------------------


def find_figure(picture: Pixels, background: Background) -> Mask | None:
    """Silhouette of the largest thing of whatever colours, without holes: [SIDE, SIDE]; None if nothing is there."""
    seen = ndimage.binary_opening(difference_from(picture, background) > VISIBLE, np.ones((3, 3)))
    # A robot's head, arms and body stand apart by up to 0.02 of the side.
    groups, count = ndimage.label(ndimage.binary_dilation(seen, iterations=4))
    if not count:
        return None
    sizes = ndimage.sum_labels(seen, groups, np.arange(1, count + 1))
    mask: Mask = seen & (groups == int(np.argmax(sizes)) + 1)
    return ndimage.binary_fill_holes(mask) if mask.mean() >= SPECK else None


def judge_kind(mask: Mask, background: Background) -> str:
    """Which of `FIGURES` a silhouette is: overlap within the box, less a malus for another ratio of its sides."""
    seen, ratio = stretched(mask), _ratio(mask)
    unseen = _unseen(background)
    scores: dict[str, float] = dict.fromkeys(FIGURES, -1.0)
    for kind in FIGURES:
        for template, own_ratio in _kind_templates(kind, unseen):
            malus = 0.7 * abs(float(np.log(ratio / own_ratio)))
            scores[kind] = max(scores[kind], _overlap(seen, template) - malus)
    return max(scores, key=lambda kind: scores[kind])


def _ratio(mask: Mask) -> float:
    top, bottom, left, right = box_of(mask)
    return (right - left) / (bottom - top)


def _unseen(background: Background) -> frozenset[str]:
    """Which of the two colours that every figure may have (wheels, eyes) vanish before the background."""
    middle = background.pixels.reshape(-1, 3)[:: SIDE + 1]
    names = ("black", "white")
    values = [COLOUR_VALUES[COLOUR_NAMES.index(name)] for name in names]
    hidden = [float(np.median(distance(middle, value))) < VISIBLE for value in values]
    return frozenset(name for name, gone in zip(names, hidden, strict=True) if gone)


@lru_cache(maxsize=64)
def _kind_templates(kind: str, unseen: frozenset[str]) -> list[tuple[Mask, float]]:
    """Stretched silhouettes of all forms both ways round, each with width over height."""
    templates = []
    for form, mark, flipped in product(range(FORMS), range(FORMS), (False, True)):
        features = Features("red", "green", "blue", form, mark, flipped)
        mask = ndimage.binary_fill_holes(_silhouette(kind, features, unseen))
        templates.append((stretched(mask), _ratio(mask)))
    return templates


# --- what prompts say ---------------------------------------------------------------------------------------


def size_word(noun: str, height: float) -> str:
    """ "small", "big" or "": the class of a thing whose box is `height` shares of the side high."""
    tallest = min(HEIGHTS["big"][0], (1 - 2 * MARGIN) / ASPECT.get(noun, 1.0))
    small = (HEIGHTS["small"][1] + HEIGHTS[""][0]) / 2
    big = (HEIGHTS[""][1] + tallest) / 2
    full = height / _filled_height(noun)
    return "small" if full < small else "big" if full > big else ""


@lru_cache(maxsize=16)
def _filled_height(noun: str) -> float:
    """Height of a noun's box as a share of its nominal height; of a figure, of its middle form."""
    features = Features("red", "green", "blue", form=1, mark=0) if noun in FIGURES else None
    mask = _silhouette(noun, features, frozenset())
    top, bottom, _, _ = box_of(mask)
    return (bottom - top) / mask.shape[0]


def position_word(x: float) -> str:
    """ "left", "right" or "": where the middle of a thing is."""
    return "left" if x < 0.42 else "right" if x > 0.58 else ""
