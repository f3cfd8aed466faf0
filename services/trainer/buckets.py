"""Aspect-ratio buckets: the sizes that pictures are trained at, which picture gets which, and how it is brought there.

Owns the table (by one rule), the choice, and the geometry: crop to the bucket's ratio, resize, mirror. What is drawn is
a draw of `randomness` named by the use, so each use of a picture has its own crop, and the same one after a restart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from services.trainer.data import PICTURE_CACHE_BYTES, Picture, to_values
from services.trainer.randomness import Coordinate, Purpose, uniform

STEP_PX = 64
"""Sides are multiples of this: one cell of the innermost feature map of SD 1.x, 8 latent pixels of 8 pixels each."""
MAX_RATIO = 4
LEAST_AREA_SHARE = Fraction(85, 100)
SPACING = (Fraction(112, 100), Fraction(145, 100))
"""Quotient of neighbouring ratios, where sizes allow it."""
MUCH_LOST = 0.3
"""Share of a picture beyond which losing it to the crop is worth a warning."""


@dataclass(frozen=True, slots=True)
class Size:
    """Width and height of a picture or a bucket, in pixels."""

    width_px: int
    height_px: int

    @property
    def ratio(self) -> Fraction:
        """Width by height, exactly."""
        return Fraction(self.width_px, self.height_px)

    @property
    def area(self) -> int:
        """Pixels."""
        return self.width_px * self.height_px

    @property
    def transposed(self) -> "Size":
        """The same size lying on its other side."""
        return Size(self.height_px, self.width_px)


@cache
def bucket_sizes(resolution: int, step_px: int = STEP_PX) -> tuple[Size, ...]:
    """Returns the buckets of a resolution, from the tallest to the widest; each with its transpose.

    From the square on, the next wider bucket is the size of largest area whose ratio is 1.12 to 1.45 times the last
    one's; where there is none, the size with the least ratio beyond. At the end comes the largest size of exactly 4:1,
    if there is one. Sizes are multiples of `step_px`, hold at most resolution^2 pixels and at least 85 % of that.

    Args:
        resolution: side of the square bucket in pixels, a multiple of `step_px`.
        step_px: what the sides are multiples of.
    """
    if resolution % step_px or resolution < step_px:
        raise ValueError(f"resolution must be a multiple of {step_px}")
    allowed = _landscapes(resolution, step_px)
    chosen = [Size(resolution, resolution)]
    while (wider := _next_wider(chosen[-1], allowed)) is not None:
        chosen.append(wider)
    widest = [size for size in allowed if size.ratio == MAX_RATIO]
    if widest and chosen[-1].ratio < MAX_RATIO:
        chosen.append(max(widest, key=lambda size: size.area))
    return (*(size.transposed for size in reversed(chosen[1:])), *chosen)


def _landscapes(resolution: int, step_px: int) -> list[Size]:
    most = resolution**2
    sizes = [
        Size(width, height)
        for height in range(step_px, resolution, step_px)
        for width in range(height + step_px, min(MAX_RATIO * height, most // height) + 1, step_px)
    ]
    return [size for size in sizes if LEAST_AREA_SHARE * most <= size.area]


def _next_wider(last: Size, allowed: Sequence[Size]) -> Size | None:
    spacings = {size: size.ratio / last.ratio for size in allowed}
    near = [size for size in allowed if SPACING[0] <= spacings[size] <= SPACING[1]]
    if near:
        return max(near, key=lambda size: (size.area, -size.ratio))
    beyond = [size for size in allowed if spacings[size] > SPACING[1]]
    return min(beyond, key=lambda size: (size.ratio, -size.area), default=None)


@lru_cache(maxsize=4096)
def choose_bucket(picture: Size, buckets: tuple[Size, ...]) -> Size:
    """Returns the bucket with the smallest |log(ratio of the picture / ratio of the bucket)|.

    Compared exactly, as quotients, so that a picture and its transpose always get transposed buckets; between two that
    are equally near the one closer to the square is taken.
    """
    return min(
        buckets, key=lambda bucket: (_apart(picture.ratio, bucket.ratio), _apart(bucket.ratio, Fraction(1)))
    )


def _apart(one: Fraction, other: Fraction) -> Fraction:
    """exp |log(one / other)|."""
    return max(one / other, other / one)


def lost_share(picture: Size, bucket: Size) -> float:
    """Returns the share of a picture, 0..1, that is cropped away to get the bucket's ratio."""
    return 1 - 1 / float(_apart(picture.ratio, bucket.ratio))


def is_upscaled(picture: Size, bucket: Size) -> bool:
    """Whether a picture is smaller than its bucket on both sides."""
    return picture.width_px < bucket.width_px and picture.height_px < bucket.height_px


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a picture becomes pixels for one use: crop, then resize, then mirror.

    Attributes:
        box: left, top, right and bottom of the crop, in pixels of the picture.
        bucket: what the crop is resized to.
        flip: whether the result is mirrored left-right.
    """

    box: tuple[int, int, int, int]
    bucket: Size
    flip: bool


class BucketedUse(Protocol):
    """What the geometry must know of a use."""

    @property
    def size(self) -> Size:
        """Of the stored picture."""

    @property
    def bucket(self) -> Size:
        """What it is trained at."""

    @property
    def flip(self) -> bool:
        """Whether it is mirrored."""

    @property
    def coordinates(self) -> tuple[Coordinate, ...]:
        """What distinguishes this use's random draws from all others'."""


def middle_geometry(use: BucketedUse) -> Geometry:
    """Returns the crop around the middle, the same for each use of a picture."""
    left, top, width, height = _largest_crop(use.size, use.bucket)
    return Geometry((left // 2, top // 2, left // 2 + width, top // 2 + height), use.bucket, use.flip)


def drawn_geometry(use: BucketedUse, *, seed: int, crop_jitter: float = 0.0) -> Geometry:
    """Draws a crop for one use.

    First up to `crop_jitter` of the short side is cut off each axis, at random ends, yet never so much that the rest
    would be smaller than the bucket. The crop to the bucket's ratio then lies along its free axis as a triangular
    distribution around the middle says, in steps of one pixel of the bucket: finer ones cannot be seen in it.

    Args:
        use: whose.
        seed: the job's.
        crop_jitter: 0..0.02.
    """

    def draw(name: str) -> float:
        return uniform(seed, Purpose.CROP, *use.coordinates, name)

    size, bucket = use.size, use.bucket
    left = top = 0
    if crop_jitter:
        most = math.floor(crop_jitter * min(size.width_px, size.height_px))
        left, width = _jittered(size.width_px, bucket.width_px, most, draw("cut x"), draw("x"))
        top, height = _jittered(size.height_px, bucket.height_px, most, draw("cut y"), draw("y"))
        size = Size(width, height)
    free_x, free_y, width, height = _largest_crop(size, bucket)
    place = (draw("first") + draw("second")) / 2
    left += _placed(free_x, width / bucket.width_px, place)
    top += _placed(free_y, height / bucket.height_px, place)
    return Geometry((left, top, left + width, top + height), bucket, use.flip)


def _largest_crop(size: Size, bucket: Size) -> tuple[int, int, int, int]:
    """Room beside and above the largest crop of the bucket's ratio, and that crop's width and height."""
    if size.ratio >= bucket.ratio:
        width, height = max(1, round(size.height_px * bucket.ratio)), size.height_px
    else:
        width, height = size.width_px, max(1, round(size.width_px / bucket.ratio))
    return size.width_px - width, size.height_px - height, width, height


def _jittered(length: int, needed: int, most: int, cut: float, place: float) -> tuple[int, int]:
    """Start and length of what jitter leaves of one axis; `cut` and `place` are draws from 0..1."""
    removed = math.floor(cut * (max(0, min(most, length - needed)) + 1))
    return math.floor(place * (removed + 1)), length - removed


def _placed(free: int, pixel: float, place: float) -> int:
    """Start of a crop on an axis with `free` pixels to spare; `pixel` of them are one of the bucket's."""
    places = 1 + math.floor(free / max(1.0, pixel))
    if places == 1:
        return free // 2
    return round(math.floor(place * places) * free / (places - 1))


class BucketReader:
    """Reads pictures as pixels of their buckets; keeps what it decoded, up to a memory limit.

    Args:
        seed: the job's.
        crop_jitter: see :func:`drawn_geometry`.
        centre: crop around the middle, always alike, instead of drawing.
    """

    def __init__(self, *, seed: int, crop_jitter: float = 0.0, centre: bool = False) -> None:
        self._seed = seed
        self._crop_jitter = crop_jitter
        self._centre = centre
        self._decoded: dict[str, np.ndarray] = {}
        self._held_bytes = 0

    def geometry(self, use: BucketedUse) -> Geometry:
        """Returns how one use sees its picture."""
        if self._centre:
            return middle_geometry(use)
        return drawn_geometry(use, seed=self._seed, crop_jitter=self._crop_jitter)

    def values(self, picture: Picture, geometry: Geometry) -> torch.Tensor:
        """Returns the pixels of one geometry: float32 [3, height, width] in -1..1."""
        bucket = geometry.bucket
        cropped = Image.fromarray(self._load(picture)).crop(geometry.box)
        if cropped.size != (bucket.width_px, bucket.height_px):
            # Bicubic with antialiasing when shrinking.
            cropped = cropped.resize((bucket.width_px, bucket.height_px), Image.Resampling.BICUBIC)
        pixels = np.asarray(cropped)
        return to_values(np.ascontiguousarray(pixels[:, ::-1]) if geometry.flip else pixels)

    def _load(self, picture: Picture) -> np.ndarray:
        held = self._decoded.get(picture.sample_id)
        if held is not None:
            return held
        with Image.open(picture.path) as image:
            pixels = np.asarray(image.convert("RGB"))
        if self._held_bytes + pixels.nbytes <= PICTURE_CACHE_BYTES:
            self._decoded[picture.sample_id] = pixels
            self._held_bytes += pixels.nbytes
        return pixels
