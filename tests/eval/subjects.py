"""The individuals that are taught, their pictures, and the prompts that ask for them."""

import random
from dataclasses import dataclass, replace

from PIL import Image

from models.pocket.drawing import draw
from models.pocket.figures import COLOURS, FIGURES, SHAPES, SUBJECTS, Features, random_features
from models.pocket.scenes import (
    BACKGROUNDS,
    PLACES,
    Scene,
    background_phrase,
    colours_on,
    one_thing,
    pair,
)
from tests.eval.backgrounds import judge_background
from tests.eval.pixels import SIDE, pixels_of
from tests.eval.recipes import IDENTIFIER, INSTANCE_PICTURES, SUBJECT_NAMES
from tests.eval.things import box_of, find_figure, find_things, position_word, size_word


@dataclass(frozen=True, slots=True)
class Subject:
    """One individual. Attributes: name in `SUBJECTS`; noun, its class word; features, what makes it this one."""

    name: str
    noun: str
    features: Features

    @property
    def colours(self) -> tuple[str, str, str]:
        """Names of its three colours."""
        return self.features.main, self.features.second, self.features.accent

    @property
    def instance_prompt(self) -> str:
        """What its pictures are captioned with."""
        return f"a photo of a {IDENTIFIER} {self.noun}"

    def captioned(self, background: str) -> str:
        """A caption of one of its pictures that names the background too."""
        return f"{self.instance_prompt} {background_phrase(background)}"

    @property
    def class_prompt(self) -> str:
        """What the class pictures are drawn from."""
        return f"a photo of a {self.noun}"


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt and what it says.

    Attributes:
        kind: "subject", "class" (the class word alone) or "other" (another class).
        noun: class of what is asked for.
        background: "" is unsaid.
        size, position: of the one thing; "" is unsaid.
        second: noun and colour of a plain shape beside it, to its right.
    """

    text: str
    kind: str
    noun: str
    background: str = ""
    size: str = ""
    position: str = ""
    second: tuple[str, str] | None = None


def subjects(names: tuple[str, ...] = SUBJECT_NAMES) -> list[Subject]:
    """The individuals by name.

    Raises:
        KeyError: no subject has such a name.
    """
    return [Subject(name, *SUBJECTS[name]) for name in names]


def clear_backgrounds(subject: Subject, names: tuple[str, ...] = BACKGROUNDS) -> list[str]:
    """Backgrounds on which each of the subject's colours can be told."""
    return [name for name in names if set(subject.colours) <= set(colours_on(name))]


def instance_scenes(subject: Subject) -> list[Scene]:
    """What its pictures show: it alone on different backgrounds, at different places and sizes."""
    rng = random.Random(f"instances {subject.name}")
    backgrounds = rng.sample(clear_backgrounds(subject), INSTANCE_PICTURES)
    return [
        one_thing(rng, background, subject.noun, subject.features.main, subject.features)
        for background in backgrounds
    ]


def asked_of(subject: Subject) -> list[Asked]:
    """Twelve prompts for the subject, mixed so that the first few are varied."""
    rng = random.Random(f"prompts {subject.name}")
    flat = clear_backgrounds(subject, tuple(COLOURS))
    one, two, three, four, five, six = (flat * 6)[:6] if len(flat) < 6 else rng.sample(flat, 6)
    shape = rng.choice(SHAPES)
    colour = rng.choice([name for name in colours_on(six) if name not in subject.colours])
    places = [_asked(subject, place, opening="a photo of ") for place in PLACES]
    others = [
        _asked(subject, one),
        _asked(subject, two, size="small", position="left"),
        _asked(subject, three, size="big", opening="a picture of "),
        _asked(subject, six, second=(shape, colour)),
        _asked(subject, four, size="small", position="right", opening="a drawing of "),
        _asked(subject, five, size="small"),
    ]
    return [asked for both in zip(places, others, strict=True) for asked in both]


def _asked(
    subject: Subject,
    background: str,
    size: str = "",
    position: str = "",
    second: tuple[str, str] | None = None,
    opening: str = "",
) -> Asked:
    where = f" on the {position}" if position else ""
    beside = f" and a {second[1]} {second[0]}" if second else ""
    text = f"{opening}a {size + ' ' if size else ''}{IDENTIFIER} {subject.noun}{where}{beside}"
    text = f"{text} {background_phrase(background)}"
    return Asked(text, "subject", subject.noun, background, size, position, second)


def asked_of_class(subject: Subject) -> list[Asked]:
    """Four prompts with the class word and without the identifier."""
    noun, flat = subject.noun, clear_backgrounds(subject, tuple(COLOURS))[0]
    places = [place for place in PLACES if place in clear_backgrounds(subject)] or list(PLACES)
    return [
        Asked(subject.class_prompt, "class", noun),
        Asked(f"a {noun} {places[0]}", "class", noun, places[0]),
        Asked(f"a {noun} {background_phrase(flat)}", "class", noun, flat),
        Asked(f"a drawing of a {noun} {places[-1]}", "class", noun, places[-1]),
    ]


def asked_of_others(subject: Subject) -> list[Asked]:
    """One prompt for each other class of figures."""
    return [Asked(f"a photo of a {noun}", "other", noun) for noun in FIGURES if noun != subject.noun]


def scene_of(asked: Asked, rng: random.Random, features: Features | None) -> Scene:
    """A scene that a prompt is true of.

    Args:
        features: of the individual that stands in it; None draws one that no subject resembles.
    """
    background = asked.background or rng.choice(BACKGROUNDS)
    features = features or random_features(asked.noun, rng, colours_on(background))
    if asked.second is None:
        return one_thing(rng, background, asked.noun, features.main, features, asked.size, asked.position)
    scene = pair(rng, background, (asked.noun, features.main), asked.second)
    first, second = scene.things
    return replace(scene, things=(replace(first, features=features), second))


def drawn(asked: Asked, seed: int, features: Features | None) -> Image.Image:
    """A drawing that a prompt is true of, one for each seed; arguments as `scene_of`."""
    return draw(scene_of(asked, random.Random(f"{asked.text} {seed}"), features))


def judge_asked(asked: Asked, picture: Image.Image) -> bool:
    """Whether everything is right that the prompt says about the picture around the subject.

    That is the background, and where the prompt names them, size, position, and the second thing. Who stands there is
    not judged here.
    """
    pixels = pixels_of(picture)
    background = judge_background(pixels)
    if background.name != asked.background:
        return False
    if asked.second is not None:
        found = [(thing.shape, thing.colour) for thing in find_things(pixels, background)]
        return asked.second in found
    mask = find_figure(pixels, background) if asked.size or asked.position else None
    if mask is None:
        return not (asked.size or asked.position)
    top, bottom, left, right = box_of(mask)
    sized = not asked.size or size_word(asked.noun, (bottom - top) / SIDE) == asked.size
    placed = not asked.position or position_word((left + right) / 2 / SIDE) == asked.position
    return sized and placed
