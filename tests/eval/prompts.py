"""The prompts of the text-to-image table: held-out combinations only, the same list each time."""

import random
from collections.abc import Callable, Container
from dataclasses import dataclass

from models.pocket.figures import FIGURES, SHAPES
from models.pocket.scenes import (
    BACKGROUNDS,
    COUNT_WORDS,
    Scene,
    alike,
    background_phrase,
    colours_on,
    held_out,
    one_thing,
    pair,
    plural,
)

SEED = 20


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """One prompt, and one scene that it is true of.

    Attributes:
        group: the key in `GROUPS`: what the prompt was made to measure.
        scene: what it asks for; drawn, it is the anchor.
        size, position: as said; "" is unsaid, whatever the scene has.
    """

    text: str
    group: str
    scene: Scene
    size: str = ""
    position: str = ""


def _single(rng: random.Random, index: int, group: str, nouns: tuple[str, ...]) -> TextPrompt:
    background, noun, colour = _held_out(rng, nouns[index % len(nouns)])
    size = ("small", "big")[index % 2] if group == "size" else ""
    position = ("left", "right")[index % 2] if group == "position" else ""
    where = f" on the {position}" if position else ""
    text = f"a {size + ' ' if size else ''}{colour} {noun}{where} {background_phrase(background)}"
    scene = one_thing(rng, background, noun, colour, None, size, position)
    return TextPrompt(text, group, scene, size, position)


def _count(rng: random.Random, index: int) -> TextPrompt:
    background, noun, colour = _held_out(rng, SHAPES[index % len(SHAPES)])
    count = (2, 3)[index // len(SHAPES) % 2]
    text = f"{COUNT_WORDS[count]} {colour} {plural(noun)} {background_phrase(background)}"
    return TextPrompt(text, "count", alike(rng, background, noun, colour, count))


def _pair(rng: random.Random, index: int) -> TextPrompt:
    """Both things held out, different in colour and in shape, so that colours may be bound wrongly."""
    while True:
        background, noun, colour = _held_out(rng, SHAPES[index % len(SHAPES)])
        others = [
            (other, shade)
            for other in SHAPES
            for shade in colours_on(background)
            if other != noun and shade != colour and held_out(shade, other, background)
        ]
        if others:
            second, second_colour = rng.choice(others)
            text = f"a {colour} {noun} and a {second_colour} {second} {background_phrase(background)}"
            scene = pair(rng, background, (noun, colour), (second, second_colour))
            return TextPrompt(text, "pair", scene)


def _held_out(rng: random.Random, noun: str) -> tuple[str, str, str]:
    """A background, the noun, and a colour that are never trained together."""
    while True:
        background = rng.choice(BACKGROUNDS)
        colour = rng.choice(colours_on(background))
        if held_out(colour, noun, background):
            return background, noun, colour


GROUPS: dict[str, tuple[int, Callable[[random.Random, int], TextPrompt]]] = {
    "shape": (60, lambda rng, index: _single(rng, index, "shape", SHAPES)),
    "size": (42, lambda rng, index: _single(rng, index, "size", SHAPES)),
    "position": (42, lambda rng, index: _single(rng, index, "position", SHAPES)),
    "count": (48, _count),
    "pair": (48, _pair),
    "figure": (60, lambda rng, index: _single(rng, index, "figure", FIGURES)),
}
"""How many prompts each group has, and what makes one."""


def text_prompts(most: int | None = None) -> list[TextPrompt]:
    """The list: 300 different prompts, groups mixed evenly, so that its first `most` are a fair part of all."""
    made: dict[str, tuple[float, TextPrompt]] = {}
    for group, (count, make) in GROUPS.items():
        for index in range(count):
            prompt = _unseen(group, index, make, made)
            made[prompt.text] = (index + 0.5) / count, prompt
    return [prompt for _, prompt in sorted(made.values(), key=lambda entry: entry[0])][:most]


def _unseen(
    group: str, index: int, make: Callable[[random.Random, int], TextPrompt], seen: Container[str]
) -> TextPrompt:
    rng = random.Random(f"{SEED} {group} {index}")
    while True:
        prompt = make(rng, index)
        if prompt.text not in seen:
            return prompt
