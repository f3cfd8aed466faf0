"""The judges of the text-to-image table, on drawings whose truth is known."""

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from models.pocket.drawing import draw
from models.pocket.figures import FIGURES, SHAPES
from models.pocket.scenes import BACKGROUNDS, Scene, alike, one_thing, pair, random_scene
from tests.eval.backgrounds import judge_background
from tests.eval.pixels import pixels_of
from tests.eval.prompts import TextPrompt, text_prompts
from tests.eval.text import COLUMNS, judge_text
from tests.eval.things import find_figure, find_things
from tests.unit.eval.softening import softened


def _shares_right(pictures: list[tuple[TextPrompt, Image.Image]]) -> dict[str, float]:
    judged = [judge_text(prompt, picture) for prompt, picture in pictures]
    return {
        column: float(np.mean([facts[column] for facts in judged if column in facts])) for column in COLUMNS
    }


def test_every_judge_is_right_about_drawings() -> None:
    shares = _shares_right([(prompt, draw(prompt.scene)) for prompt in text_prompts(50)])
    assert min(shares.values()) >= 0.99, shares


def test_every_judge_is_right_about_soft_and_noisy_drawings() -> None:
    prompts = text_prompts(50)
    shares = _shares_right([(prompt, softened(draw(prompt.scene), i)) for i, prompt in enumerate(prompts)])
    assert min(shares.values()) >= 0.97, shares


@pytest.mark.parametrize("soft", [False, True], ids=["drawn", "soft"])
def test_all_backgrounds_are_told_apart_behind_anything(soft: bool) -> None:
    rng = random.Random(3)
    wrong = []
    for index in range(36):
        scene = random_scene(rng)
        background = BACKGROUNDS[index % len(BACKGROUNDS)]
        picture = draw(replace(scene, background=background))
        seen = judge_background(pixels_of(softened(picture, index) if soft else picture)).name
        wrong += [(background, seen)] if seen != background else []
    assert not wrong


def _red_circle(**changes: str) -> TextPrompt:
    scene = one_thing(random.Random(1), "white", "circle", "red")
    return TextPrompt("a red circle on a white background", "shape", scene, **changes)


def _single(
    noun: str, colour: str, background: str = "white", size: str = "", position: str = ""
) -> Image.Image:
    return draw(one_thing(random.Random(5), background, noun, colour, None, size, position))


@pytest.mark.parametrize(
    ("picture", "wrong"),
    [
        (_single("circle", "red"), set()),
        (_single("circle", "red", "yellow"), {"background"}),
        (_single("circle", "red", "in the snow"), {"background"}),
        (_single("circle", "purple"), {"colour"}),
        (_single("ring", "red"), {"shape"}),
        (_single("square", "green"), {"colour", "shape"}),
        (draw(Scene((), "white")), {"colour", "shape"}),
        (Image.new("RGB", (512, 512), (127, 127, 127)), {"background", "colour", "shape"}),
    ],
    ids=["right", "flat", "place", "colour", "shape", "both", "empty", "grey"],
)
def test_what_is_wrong_in_a_picture_of_one_thing_is_named(picture: Image.Image, wrong: set[str]) -> None:
    facts = judge_text(_red_circle(), picture)
    assert {column for column, right in facts.items() if not right} == (wrong | {"all"} if wrong else set())


@pytest.mark.parametrize("noun", SHAPES)
def test_each_shape_is_told_from_all_others_at_every_size(noun: str) -> None:
    for size in ("small", "", "big"):
        for other in SHAPES:
            prompt = TextPrompt("", "shape", one_thing(random.Random(1), "grey", noun, "blue"))
            facts = judge_text(prompt, _single(other, "blue", "grey", size))
            assert facts["shape"] is (noun == other), (size, other)


@pytest.mark.parametrize("said", ["small", "big"])
def test_a_size_is_right_only_if_the_thing_has_it(said: str) -> None:
    for size in ("small", "", "big"):
        facts = judge_text(_red_circle(size=said), _single("circle", "red", size=size))
        assert facts["size"] is (size == said), size


@pytest.mark.parametrize("said", ["left", "right"])
def test_a_position_is_right_only_if_the_thing_is_there(said: str) -> None:
    for position in ("left", "middle", "right"):
        facts = judge_text(_red_circle(position=said), _single("circle", "red", position=position))
        assert facts["position"] is (position == said), position


@pytest.mark.parametrize("noun", SHAPES)
def test_two_and_three_things_that_nearly_touch_are_counted(noun: str) -> None:
    for asked in (2, 3):
        prompt = TextPrompt("", "count", alike(random.Random(1), "grey", noun, "yellow", asked))
        for count in (2, 3):
            picture = draw(alike(random.Random(count), "grey", noun, "yellow", count))
            assert judge_text(prompt, picture)["count"] is (asked == count)


def test_one_of_several_things_in_another_colour_is_no_right_count() -> None:
    prompt = TextPrompt("", "count", alike(random.Random(1), "grey", "star", "yellow", 2))
    mixed = draw(pair(random.Random(1), "grey", ("star", "yellow"), ("star", "blue")))
    assert not judge_text(prompt, mixed)["count"]


def test_a_pair_is_right_only_with_each_colour_on_its_own_form() -> None:
    asked = ("star", "yellow"), ("ring", "blue")
    prompt = TextPrompt("", "pair", pair(random.Random(1), "grey", *asked))

    def right(*things: tuple[str, str]) -> bool:
        return judge_text(prompt, draw(pair(random.Random(2), "grey", things[0], things[1])))["pair"]

    assert right(*asked)
    assert right(asked[1], asked[0])
    assert not right(("star", "blue"), ("ring", "yellow"))
    assert not right(("star", "yellow"), ("circle", "blue"))
    assert not judge_text(prompt, _single("star", "yellow", "grey"))["pair"]
    three = alike(random.Random(3), "grey", "star", "yellow", 3)
    assert not judge_text(prompt, draw(three))["pair"]


def test_each_figure_is_told_from_all_others() -> None:
    for noun in FIGURES:
        prompt = TextPrompt("", "figure", one_thing(random.Random(1), "black", noun, "red"))
        for other in FIGURES:
            picture = draw(one_thing(random.Random(other), "black", other, "red"))
            assert judge_text(prompt, picture)["kind"] is (noun == other), (noun, other)


def test_nothing_is_found_on_an_empty_background() -> None:
    for name in BACKGROUNDS:
        pixels = pixels_of(draw(Scene((), name, horizon=0.57)))
        background = judge_background(pixels)
        assert find_things(pixels, background) == []
        assert find_figure(pixels, background) is None


def test_specks_and_a_missing_skyline_detail_are_no_things() -> None:
    picture = _single("square", "orange", "at night")
    pen = ImageDraw.Draw(picture)
    pen.ellipse((405, 20, 480, 95), fill=(20, 24, 60))  # no moon
    for x, y in ((60, 200), (420, 420), (90, 430)):
        pen.ellipse((x, y, x + 12, y + 12), fill=(250, 250, 250))
    pixels = pixels_of(picture)
    background = judge_background(pixels)
    assert background.name == "at night"
    assert [(thing.shape, thing.colour) for thing in find_things(pixels, background)] == [
        ("square", "orange")
    ]


def test_noise_is_judged_in_no_time_and_never_right() -> None:
    noise = Image.frombytes("RGB", (512, 512), random.Random(1).randbytes(512 * 512 * 3))
    for prompt in text_prompts(12):
        assert not judge_text(prompt, noise)["all"]
