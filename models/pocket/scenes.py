"""The grammar: what a scene may hold, how it is captioned, and which combinations are never trained on.

    [a photo of | a picture of | a drawing of] [a | two | three] [small | big] [COLOUR] NOUN
        [on the left | on the right] [and a COLOUR NOUN] [on a COLOUR background | PLACE]

A `Scene` is the truth, its captions are what can be said of it: each call of `caption` words it anew and may leave
things unsaid. One combination of colour, noun and background in ten is held out (`held_out`); the evaluation asks for
just those.
"""

import random
import string
import zlib
from dataclasses import asdict, dataclass
from typing import Any

from models.pocket.figures import ASPECT, COLOURS, FIGURES, NOUNS, SHAPES, Features, random_features

PLACES = ("on the beach", "in the snow", "on the grass", "at night", "in the desert", "under the sea")
BACKGROUNDS = (*COLOURS, *PLACES)
COUNT_WORDS = {1: "a", 2: "two", 3: "three"}
HEIGHTS = {"small": (0.20, 0.27), "": (0.36, 0.50), "big": (0.60, 0.72)}
"""Size word -> range of a thing's height, as a share of the side; "" is what goes unsaid."""
MARGIN = 0.07
"""Nothing but the background reaches into this share of the side at each edge: the judges look there."""

_CLASHING = {
    "on the beach": ("cyan", "yellow", "white"),
    "in the snow": ("white", "grey"),
    "on the grass": ("green", "cyan"),
    "at night": ("black", "blue"),
    "in the desert": ("orange", "brown", "yellow"),
    "under the sea": ("blue", "cyan", "grey"),
    "red": ("orange", "brown"),
    "orange": ("red", "yellow", "brown"),
    "yellow": ("orange",),
    "blue": ("purple",),
    "purple": ("blue",),
    "brown": ("red", "orange"),
}
"""Background -> colours that are hard to tell from it (besides itself)."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape or figure in a scene.

    Attributes:
        noun: one of `NOUNS`.
        colour: a shape's colour, a figure's main colour.
        features: the individual; None for shapes.
        x, y: its middle, as shares of the side from the left and the top.
        height: its height as a share of the side.
        shade: what is added to its colours' channels.
    """

    noun: str
    colour: str
    features: Features | None
    x: float
    y: float
    height: float
    shade: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True, slots=True)
class Scene:
    """A whole picture in words and numbers.

    Attributes:
        things: from left to right. Several of one noun and colour are a count, two different ones a pair.
        background: a name in `COLOURS` or in `PLACES`.
        size: the word that fits the single thing's height: "small", "big" or "".
        position: "left", "right" or "": where the single thing stands, if that may be said.
        horizon: height of the skyline, a share of the side from the top.
        shade: what is added to the background's channels.
    """

    things: tuple[Thing, ...]
    background: str
    size: str = ""
    position: str = ""
    horizon: float = 0.55
    shade: tuple[int, int, int] = (0, 0, 0)

    @property
    def is_pair(self) -> bool:
        """Whether two different things stand side by side."""
        return len(self.things) == 2 and _key(self.things[0]) != _key(self.things[1])

    def as_json(self) -> dict[str, Any]:
        """Plain lists and dicts; `scene_from_json` reads them back."""
        return asdict(self)


def scene_from_json(data: dict[str, Any]) -> Scene:
    """The scene that `as_json` wrote."""
    things = tuple(
        Thing(
            **{
                **thing,
                "features": Features(**thing["features"]) if thing["features"] else None,
                "shade": tuple(thing["shade"]),
            }
        )
        for thing in data["things"]
    )
    return Scene(**{**data, "things": things, "shade": tuple(data["shade"])})


def held_out(colour: str, noun: str, background: str) -> bool:
    """Whether this combination is kept from training: one in ten, by a checksum of the words."""
    return zlib.crc32(f"{colour} {noun} {background}".encode()) % 10 == 0


def colours_on(background: str) -> tuple[str, ...]:
    """The colours that can be told from a background."""
    hidden = {background, *_CLASHING.get(background, ())}
    return tuple(colour for colour in COLOURS if colour not in hidden)


def random_scene(rng: random.Random) -> Scene:
    """A scene for training: never a held-out combination, never a subject.

    Half show one thing, a quarter two or three alike, a quarter a pair.
    """
    while True:
        background = rng.choice(BACKGROUNDS) if rng.random() < 0.6 else rng.choice(PLACES)
        kind = rng.choice(("one", "one", "count", "pair"))
        if kind == "one":
            scene = _one(rng, background)
        elif kind == "count":
            scene = _several(rng, background)
        else:
            scene = _pair(rng, background)
        if not any(held_out(thing.colour, thing.noun, background) for thing in scene.things):
            return scene


def one_thing(
    rng: random.Random,
    background: str,
    noun: str,
    colour: str,
    features: Features | None = None,
    size: str = "",
    position: str = "",
) -> Scene:
    """A scene of one thing: what is not given is drawn at random.

    Args:
        features: of a figure; drawn when None, with `colour` as the main colour.
        size: "small", "big" or "".
        position: "left", "right", "middle" or ""; "" is anywhere.
    """
    height = rng.uniform(*HEIGHTS[size])
    half = height * ASPECT.get(noun, 1.0) / 2
    if half > 0.5 - MARGIN:
        height *= (0.5 - MARGIN) / half
        half = 0.5 - MARGIN
    low, high = MARGIN + half, 1.0 - MARGIN - half
    if position == "left":
        x = rng.uniform(low, max(low, min(high, 0.36)))
    elif position == "right":
        x = rng.uniform(min(high, max(low, 0.64)), high)
    elif position == "middle":
        x = 0.5
    else:
        x = rng.uniform(max(low, 0.28), max(low, min(high, 0.72)))
    placed = "" if position == "middle" else position or _position_word(x, half)
    return _scene(rng, background, [(noun, colour, features, x, height)], size, placed)


def _position_word(x: float, half: float) -> str:
    if x + half * 0.5 < 0.42:
        return "left"
    return "right" if x - half * 0.5 > 0.58 else ""


def _one(rng: random.Random, background: str) -> Scene:
    noun = _random_noun(rng)
    size = rng.choice(("small", "", "", "big"))
    position = rng.choice(("left", "right", "", ""))
    if size == "big" and position:
        size = ""
    return one_thing(rng, background, noun, rng.choice(colours_on(background)), None, size, position)


def _several(rng: random.Random, background: str) -> Scene:
    noun, colour, count = _random_noun(rng), rng.choice(colours_on(background)), rng.choice((2, 3))
    return alike(rng, background, noun, colour, count)


def alike(rng: random.Random, background: str, noun: str, colour: str, count: int) -> Scene:
    """Two or three of the same thing, side by side."""
    features = _features(rng, background, noun, colour)
    aspect = ASPECT.get(noun, 1.0)
    pitch = (1.0 - 2 * MARGIN) / count
    height = min(rng.uniform(0.26, 0.36), 0.88 * pitch / max(aspect, 0.8))
    slack = (pitch - height * aspect) / 2
    places = [MARGIN + pitch * (index + 0.5) + rng.uniform(-0.7, 0.7) * slack for index in range(count)]
    return _scene(rng, background, [(noun, colour, features, x, height) for x in places], "", "")


def _pair(rng: random.Random, background: str) -> Scene:
    while True:
        first, second = ((_random_noun(rng), rng.choice(colours_on(background))) for _ in range(2))
        if first != second:
            return pair(rng, background, first, second)


def pair(rng: random.Random, background: str, left: tuple[str, str], right: tuple[str, str]) -> Scene:
    """Two different things side by side, each (noun, colour); the first named stands on the left."""
    things = []
    for index, (noun, colour) in enumerate((left, right)):
        aspect = ASPECT.get(noun, 1.0)
        height = min(rng.uniform(0.30, 0.42), 0.40 / aspect)
        slack = 0.215 - height * aspect / 2
        x = 0.285 + 0.43 * index + rng.uniform(-0.8, 0.8) * slack
        things.append((noun, colour, _features(rng, background, noun, colour), x, height))
    return _scene(rng, background, things, "", "")


def _random_noun(rng: random.Random) -> str:
    return rng.choice(FIGURES) if rng.random() < 0.6 else rng.choice(SHAPES)


def _features(rng: random.Random, background: str, noun: str, colour: str) -> Features | None:
    if noun not in FIGURES:
        return None
    while True:
        others = tuple(name for name in colours_on(background) if name != colour)
        drawn = random_features(noun, rng, (colour, *others))
        if drawn.main == colour:
            return drawn


def _scene(
    rng: random.Random,
    background: str,
    things: list[tuple[str, str, Features | None, float, float]],
    size: str,
    position: str,
) -> Scene:
    horizon = rng.uniform(0.50, 0.60)
    floor = rng.uniform(0.72, 0.86) if background in PLACES else None
    placed = []
    for noun, colour, given, x, height in things:
        features = given or _features(rng, background, noun, colour)
        low, high = MARGIN + height / 2, 1.0 - MARGIN - height / 2
        y = floor - height / 2 if floor is not None else rng.uniform(0.42, 0.58)
        placed.append(Thing(noun, colour, features, x, min(high, max(low, y)), height, _shade(rng)))
    return Scene(tuple(placed), background, size, position, horizon, _shade(rng))


def _shade(rng: random.Random) -> tuple[int, int, int]:
    return rng.randint(-6, 6), rng.randint(-6, 6), rng.randint(-6, 6)


def caption(scene: Scene, rng: random.Random) -> str:
    """One sentence that is true of the scene; wording and what goes unsaid vary from call to call."""
    opening = rng.choice(("", "", "a photo of ", "a picture of ", "a drawing of "))
    first = scene.things[0]
    if scene.is_pair:
        explicit = rng.random() < 0.3
        left, right = (" on the left", " on the right") if explicit else ("", "")
        body = f"{_noun_phrase(first, rng)}{left} and {_noun_phrase(scene.things[1], rng)}{right}"
    elif len(scene.things) > 1:
        body = f"{COUNT_WORDS[len(scene.things)]} {_described(first, rng)}{plural(first.noun)}"
    else:
        size = f"{scene.size} " if scene.size else ""
        where = f" on the {scene.position}" if scene.position and rng.random() < 0.7 else ""
        body = f"a {size}{_described(first, rng)}{first.noun}{where}"
    unsaid = rng.random() < 0.06
    return opening + body + ("" if unsaid else " " + background_phrase(scene.background))


def background_phrase(background: str) -> str:
    """ "on a blue background" or the place's own words."""
    return background if background in PLACES else f"on a {background} background"


def plural(noun: str) -> str:
    """The noun for more than one."""
    return {"fish": "fish", "cross": "crosses"}.get(noun, noun + "s")


def _noun_phrase(thing: Thing, rng: random.Random) -> str:
    return f"a {_described(thing, rng)}{thing.noun}"


def _described(thing: Thing, rng: random.Random) -> str:
    """The adjectives: the colour, said of most shapes and half of the figures; sometimes a meaningless word."""
    said = rng.random() < (0.5 if thing.features else 0.92)
    colour = f"{thing.colour} " if said else ""
    word = f"{meaningless_word(rng)} " if rng.random() < 0.08 else ""
    return colour + word


def meaningless_word(rng: random.Random) -> str:
    """Letters that mean nothing: the model learns that an unknown word changes nothing, until it is taught."""
    while True:
        word = "".join(rng.choices(string.ascii_lowercase, k=rng.choice((3, 3, 4))))
        if word not in WORDS:
            return word


def _key(thing: Thing) -> tuple[str, str]:
    return thing.noun, thing.colour


def _all_words() -> list[str]:
    """Every word a caption can hold."""
    words = ["a", "photo", "picture", "drawing", "of", "two", "three", "small", "big", "on", "the", "left"]
    words += ["right", "and", "background", *COLOURS, *NOUNS, *(plural(noun) for noun in NOUNS)]
    return list(dict.fromkeys([*words, *" ".join(PLACES).split()]))


WORDS = tuple(_all_words())
