"""What can stand in a scene: plain shapes, and figures with features that no caption names.

Owns the vector form of every noun: a list of filled primitives in a box whose height is 1. The pixels are
`drawing.py`'s, the sentences `scenes.py`'s. A figure's class word ("robot") means a distribution over `Features`; one
draw of the features is one individual, which is what DreamBooth teaches. The individuals in `SUBJECTS` and everything
that looks much like them never occur in the base model's training.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Point = tuple[float, float]
Rgb = tuple[int, int, int]

COLOURS: dict[str, Rgb] = {
    "red": (214, 40, 40),
    "orange": (245, 130, 32),
    "yellow": (250, 215, 50),
    "green": (60, 160, 70),
    "blue": (40, 90, 205),
    "purple": (120, 60, 170),
    "pink": (245, 150, 185),
    "brown": (125, 78, 45),
    "black": (22, 22, 26),
    "white": (250, 250, 250),
    "grey": (140, 142, 148),
    "cyan": (60, 205, 215),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
FIGURES = ("robot", "cat", "house", "fish", "tree", "car")
NOUNS = SHAPES + FIGURES
ASPECT = {"robot": 0.66, "cat": 0.80, "house": 0.92, "fish": 1.45, "tree": 0.72, "car": 1.60}
"""Width over height; shapes are as wide as high."""
FORMS = 3
"""How many forms the head (or roof, crown, cabin, tail) has, and how many the mark."""


@dataclass(frozen=True, slots=True)
class Features:
    """What makes one figure this one and no other.

    Attributes:
        main, second, accent: names in `COLOURS`, all different; captions may name `main` only.
        form: 0 to `FORMS` - 1: form of the head, ears, roof, tail, crown or cabin.
        mark: 0 to `FORMS` - 1: form of the mark in the accent colour.
        flipped: mirrored left to right.
    """

    main: str
    second: str
    accent: str
    form: int
    mark: int
    flipped: bool = False


@dataclass(frozen=True, slots=True)
class Primitive:
    """One filled outline. `points`: two corners of an ellipse's box, or a polygon's vertices; x, y in 0..1, y down."""

    kind: Literal["ellipse", "polygon"]
    points: tuple[Point, ...]
    colour: str
    """A name in `COLOURS`, or "hole": what lies behind shows through."""


SUBJECTS: dict[str, tuple[str, Features]] = {
    "robot": ("robot", Features("purple", "orange", "yellow", form=0, mark=0)),
    "cat": ("cat", Features("grey", "pink", "white", form=1, mark=1)),
    "house": ("house", Features("yellow", "purple", "red", form=1, mark=2)),
    "fish": ("fish", Features("orange", "black", "white", form=1, mark=0)),
    "tree": ("tree", Features("pink", "brown", "red", form=2, mark=1)),
    "car": ("car", Features("green", "white", "orange", form=2, mark=2)),
    "second-robot": ("robot", Features("white", "red", "black", form=2, mark=1)),
    "second-cat": ("cat", Features("black", "orange", "cyan", form=0, mark=2)),
}
"""The individuals that the evaluation and the demo teach: name -> noun and features."""


def resembles_subject(noun: str, features: Features) -> bool:
    """Whether a figure shares two of its three colours, each in its place, with a subject of its class."""
    return any(
        noun == subject_noun
        and (features.main == subject.main)
        + (features.second == subject.second)
        + (features.accent == subject.accent)
        >= 2
        for subject_noun, subject in SUBJECTS.values()
    )


def random_features(
    noun: str, rng: random.Random, colours: tuple[str, ...], *, with_subjects: bool = False
) -> Features:
    """One individual of a class, drawn evenly; never one that resembles a subject unless `with_subjects`.

    Args:
        colours: at least three names to choose from.
    """
    while True:
        main, second, accent = rng.sample(colours, 3)
        features = Features(
            main, second, accent, rng.randrange(FORMS), rng.randrange(FORMS), rng.random() < 0.5
        )
        if with_subjects or not resembles_subject(noun, features):
            return features


def outline(noun: str, colour: str, features: Features | None) -> list[Primitive]:
    """The primitives of a noun, back to front.

    Args:
        noun: one of `NOUNS`.
        colour: a plain shape's colour; a figure's colours come from its features.
        features: None for plain shapes.
    """
    if features is None:
        return _SHAPE_OUTLINES[noun](colour)
    parts = _FIGURE_OUTLINES[noun](features)
    return [_mirrored(part) for part in parts] if features.flipped else parts


def _mirrored(part: Primitive) -> Primitive:
    points = tuple((1.0 - x, y) for x, y in part.points)
    if part.kind == "ellipse":
        (x1, y0), (x0, y1) = points
        points = ((x0, y0), (x1, y1))
    return Primitive(part.kind, points, part.colour)


def _ellipse(x0: float, y0: float, x1: float, y1: float, colour: str) -> Primitive:
    return Primitive("ellipse", ((x0, y0), (x1, y1)), colour)


def _box(x0: float, y0: float, x1: float, y1: float, colour: str) -> Primitive:
    return Primitive("polygon", ((x0, y0), (x1, y0), (x1, y1), (x0, y1)), colour)


def _polygon(colour: str, *points: Point) -> Primitive:
    return Primitive("polygon", points, colour)


def _star(cx: float, cy: float, outer: float, colour: str, aspect: float = 1.0) -> Primitive:
    """A five-pointed star; `aspect` corrects for boxes that are not square."""
    points = []
    for index in range(10):
        radius = outer if index % 2 == 0 else outer * 0.42
        angle = math.pi * (index / 5 - 0.5)
        points.append((cx + radius * math.cos(angle) / aspect, cy + radius * math.sin(angle)))
    return Primitive("polygon", tuple(points), colour)


def _circle_shape(colour: str) -> list[Primitive]:
    return [_ellipse(0, 0, 1, 1, colour)]


def _square_shape(colour: str) -> list[Primitive]:
    return [_box(0.06, 0.06, 0.94, 0.94, colour)]


def _triangle_shape(colour: str) -> list[Primitive]:
    return [_polygon(colour, (0.5, 0.03), (1.0, 0.95), (0.0, 0.95))]


def _star_shape(colour: str) -> list[Primitive]:
    return [_star(0.5, 0.53, 0.53, colour)]


def _ring_shape(colour: str) -> list[Primitive]:
    return [_ellipse(0, 0, 1, 1, colour), _ellipse(0.27, 0.27, 0.73, 0.73, "hole")]


def _cross_shape(colour: str) -> list[Primitive]:
    return [_box(0.34, 0.02, 0.66, 0.98, colour), _box(0.02, 0.34, 0.98, 0.66, colour)]


def _robot(f: Features) -> list[Primitive]:
    head = (
        _box(0.20, 0.10, 0.80, 0.42, f.second),
        _ellipse(0.17, 0.08, 0.83, 0.44, f.second),
        _polygon(f.second, (0.32, 0.08), (0.68, 0.08), (0.88, 0.42), (0.12, 0.42)),
    )[f.form]
    mark = (
        _ellipse(0.33, 0.52, 0.67, 0.74, f.accent),
        _box(0.30, 0.53, 0.70, 0.73, f.accent),
        _polygon(f.accent, (0.5, 0.50), (0.75, 0.76), (0.25, 0.76)),
    )[f.mark]
    return [
        _box(0.46, 0.0, 0.54, 0.12, f.accent),
        _box(0.0, 0.48, 0.14, 0.74, f.main),
        _box(0.86, 0.48, 1.0, 0.74, f.main),
        _box(0.17, 0.45, 0.83, 0.83, f.main),
        head,
        _ellipse(0.29, 0.18, 0.45, 0.31, "white"),
        _ellipse(0.55, 0.18, 0.71, 0.31, "white"),
        _ellipse(0.34, 0.21, 0.42, 0.29, "black"),
        _ellipse(0.60, 0.21, 0.68, 0.29, "black"),
        mark,
        _box(0.20, 0.83, 0.43, 1.0, f.second),
        _box(0.57, 0.83, 0.80, 1.0, f.second),
    ]


def _cat(f: Features) -> list[Primitive]:
    ears = (
        (0.12, 0.0, 0.42, 0.24),
        (0.04, 0.04, 0.40, 0.26),
        (0.16, 0.0, 0.34, 0.24),
    )[f.form]
    x0, y0, x1, y1 = ears
    mark = {
        0: [_ellipse(0.33, 0.60, 0.63, 0.88, f.accent)],
        1: [_box(0.20, 0.62, 0.76, 0.70, f.accent), _box(0.17, 0.76, 0.79, 0.84, f.accent)],
        2: [_box(0.20, 0.46, 0.76, 0.55, f.accent)],
    }[f.mark]
    return [
        _polygon(
            f.second, (0.72, 0.92), (0.98, 0.92), (0.98, 0.40), (0.86, 0.40), (0.86, 0.80), (0.72, 0.80)
        ),
        _ellipse(0.12, 0.44, 0.84, 1.0, f.main),
        *mark,
        _polygon(f.second, (x0, y0), (x1, y1), (x0, y1 + 0.06)),
        _polygon(f.second, (0.96 - x0, y0), (0.96 - x1, y1), (0.96 - x0, y1 + 0.06)),
        _ellipse(0.08, 0.10, 0.88, 0.50, f.main),
        _ellipse(0.22, 0.21, 0.38, 0.35, "white"),
        _ellipse(0.58, 0.21, 0.74, 0.35, "white"),
        _ellipse(0.27, 0.23, 0.34, 0.34, "black"),
        _ellipse(0.63, 0.23, 0.70, 0.34, "black"),
        _polygon(f.second, (0.42, 0.36), (0.54, 0.36), (0.48, 0.43)),
        _ellipse(0.16, 0.88, 0.42, 1.0, f.second),
        _ellipse(0.54, 0.88, 0.80, 1.0, f.second),
    ]


def _house(f: Features) -> list[Primitive]:
    roof = (
        _polygon(f.second, (0.5, 0.0), (1.0, 0.42), (0.0, 0.42)),
        _polygon(f.second, (0.22, 0.12), (0.78, 0.12), (1.0, 0.42), (0.0, 0.42)),
        _ellipse(0.02, 0.06, 0.98, 0.80, f.second),
    )[f.form]
    door = {
        0: [_box(0.40, 0.64, 0.62, 1.0, f.accent)],
        1: [_box(0.14, 0.62, 0.36, 1.0, f.accent)],
        2: [_ellipse(0.38, 0.58, 0.64, 0.86, f.accent), _box(0.38, 0.72, 0.64, 1.0, f.accent)],
    }[f.mark]
    windows = (
        [_box(0.70, 0.54, 0.86, 0.72, "white"), _box(0.16, 0.54, 0.32, 0.72, "white")]
        if f.mark != 1
        else [_box(0.48, 0.54, 0.66, 0.74, "white"), _box(0.72, 0.54, 0.86, 0.74, "white")]
    )
    chimney = [] if f.form == 2 else [_box(0.74, 0.04, 0.88, 0.34, f.accent)]
    return [*chimney, roof, _box(0.08, 0.42, 0.92, 1.0, f.main), *windows, *door]


def _fish(f: Features) -> list[Primitive]:
    tail = (
        _polygon(f.second, (0.30, 0.5), (0.0, 0.12), (0.0, 0.88)),
        _polygon(f.second, (0.34, 0.5), (0.0, 0.04), (0.14, 0.5), (0.0, 0.96)),
        _ellipse(0.0, 0.22, 0.32, 0.78, f.second),
    )[f.form]
    mark = {
        0: [_box(0.46, 0.13, 0.56, 0.87, f.accent), _box(0.64, 0.14, 0.72, 0.86, f.accent)],
        1: [_ellipse(0.42, 0.34, 0.64, 0.68, f.accent)],
        2: [_box(0.26, 0.44, 0.76, 0.60, f.accent)],
    }[f.mark]
    return [
        tail,
        _polygon(f.second, (0.42, 0.22), (0.56, 0.0), (0.70, 0.20)),
        _polygon(f.second, (0.48, 0.80), (0.54, 1.0), (0.66, 0.82)),
        _ellipse(0.20, 0.12, 1.0, 0.88, f.main),
        *mark,
        _ellipse(0.78, 0.30, 0.91, 0.50, "white"),
        _ellipse(0.83, 0.34, 0.90, 0.45, "black"),
    ]


def _tree(f: Features) -> list[Primitive]:
    crown = {
        0: [_ellipse(0.0, 0.0, 1.0, 0.68, f.main)],
        1: [_polygon(f.main, (0.5, 0.0), (1.0, 0.70), (0.0, 0.70))],
        2: [
            _ellipse(0.0, 0.28, 0.58, 0.72, f.main),
            _ellipse(0.42, 0.28, 1.0, 0.72, f.main),
            _ellipse(0.18, 0.0, 0.82, 0.50, f.main),
        ],
    }[f.form]
    mark = {
        0: [
            _ellipse(x, y, x + 0.17, y + 0.12, f.accent)
            for x, y in ((0.42, 0.16), (0.22, 0.44), (0.62, 0.44))
        ],
        1: [_ellipse(0.30, 0.28, 0.70, 0.56, f.accent)],
        2: [_box(0.22, 0.50, 0.78, 0.60, f.accent)],
    }[f.mark]
    return [_box(0.39, 0.60, 0.61, 1.0, f.second), *crown, *mark]


def _car(f: Features) -> list[Primitive]:
    cabin = (
        _box(0.24, 0.06, 0.78, 0.50, f.second),
        _polygon(f.second, (0.34, 0.04), (0.66, 0.04), (0.84, 0.48), (0.18, 0.48)),
        _ellipse(0.18, 0.02, 0.84, 0.90, f.second),
    )[f.form]
    mark = {
        0: [_box(0.0, 0.56, 1.0, 0.66, f.accent)],
        1: [_ellipse(0.41, 0.48, 0.61, 0.80, f.accent)],
        2: [_box(0.86, 0.46, 1.0, 0.62, f.accent), _box(0.0, 0.46, 0.10, 0.62, f.accent)],
    }[f.mark]
    return [
        cabin,
        _box(0.34, 0.16, 0.48, 0.40, "white"),
        _box(0.54, 0.16, 0.68, 0.40, "white"),
        _polygon(f.main, (0.03, 0.44), (0.94, 0.44), (1.0, 0.52), (1.0, 0.82), (0.0, 0.82), (0.0, 0.50)),
        *mark,
        _ellipse(0.12, 0.62, 0.36, 1.0, "black"),
        _ellipse(0.66, 0.62, 0.90, 1.0, "black"),
        _ellipse(0.19, 0.73, 0.29, 0.89, f.second),
        _ellipse(0.73, 0.73, 0.83, 0.89, f.second),
    ]


_SHAPE_OUTLINES: dict[str, Callable[[str], list[Primitive]]] = {
    "circle": _circle_shape,
    "square": _square_shape,
    "triangle": _triangle_shape,
    "star": _star_shape,
    "ring": _ring_shape,
    "cross": _cross_shape,
}
_FIGURE_OUTLINES: dict[str, Callable[[Features], list[Primitive]]] = {
    "robot": _robot,
    "cat": _cat,
    "house": _house,
    "fish": _fish,
    "tree": _tree,
    "car": _car,
}
