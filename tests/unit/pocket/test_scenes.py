"""The grammar: what is drawn, what never is, and that a caption says nothing that is not there."""

import itertools
import json
import random
import re
import zlib
from collections import Counter

import pytest

from models.pocket.figures import (
    ASPECT,
    COLOURS,
    FIGURES,
    NOUNS,
    SHAPES,
    SUBJECTS,
    Features,
    outline,
    random_features,
    resembles_subject,
)
from models.pocket.scenes import (
    BACKGROUNDS,
    HEIGHTS,
    MARGIN,
    PLACES,
    WORDS,
    Scene,
    Thing,
    alike,
    caption,
    colours_on,
    held_out,
    one_thing,
    pair,
    plural,
    random_scene,
    scene_from_json,
)

COUNTS = {"a": 1, "two": 2, "three": 3}
PLURALS = {plural(noun): noun for noun in NOUNS}
STAR_OVERHANG = 0.003
"""The arms of a star are 0.4 % wider than its box: share of the side by which the largest one overhangs."""


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = random.Random("a large sample")
    return [random_scene(rng) for _ in range(12_000)]


def width(thing: Thing) -> float:
    """As a share of the side."""
    return thing.height * ASPECT.get(thing.noun, 1.0)


def test_no_held_out_combination_is_ever_drawn(scenes: list[Scene]) -> None:
    for scene in scenes:
        for thing in scene.things:
            words = f"{thing.colour} {thing.noun} {scene.background}"
            assert zlib.crc32(words.encode()) % 10 != 0, words


def test_one_combination_in_ten_is_held_out_and_every_word_is_still_seen() -> None:
    combinations = [
        (colour, noun, background)
        for noun, background in itertools.product(NOUNS, BACKGROUNDS)
        for colour in colours_on(background)
    ]
    kept = [combination for combination in combinations if not held_out(*combination)]
    assert 0.08 < 1 - len(kept) / len(combinations) < 0.12
    for place, words in enumerate((COLOURS, NOUNS, BACKGROUNDS)):
        assert {combination[place] for combination in kept} == set(words)


def test_nothing_that_shares_two_colours_with_a_subject_is_ever_drawn(scenes: list[Scene]) -> None:
    figures = [thing for scene in scenes for thing in scene.things if thing.features is not None]
    assert {thing.noun for thing in figures} == set(FIGURES)
    for thing, (noun, subject) in itertools.product(figures, SUBJECTS.values()):
        if thing.noun == noun:
            assert shared_colours(thing.features, subject) < 2, (thing.features, subject)


def shared_colours(first: Features | None, second: Features) -> int:
    assert first is not None
    parts = ("main", "second", "accent")
    return sum(getattr(first, part) == getattr(second, part) for part in parts)


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_subject_resembles_itself_in_any_form_but_no_other_class(name: str) -> None:
    noun, subject = SUBJECTS[name]
    another = Features(subject.main, subject.second, "blue", 0, 0, flipped=True)
    assert resembles_subject(noun, subject)
    assert resembles_subject(noun, another)
    assert not any(resembles_subject(other, subject) for other in FIGURES if other != noun)


def test_subjects_are_drawn_only_when_asked_for() -> None:
    noun, subject = SUBJECTS["robot"]
    colours = (subject.main, subject.second, subject.accent)
    rng = random.Random(0)
    found = [random_features(noun, rng, colours, with_subjects=True) for _ in range(60)]
    assert any(shared_colours(features, subject) == 3 for features in found)
    never = [random_features(noun, rng, colours) for _ in range(60)]
    assert all(shared_colours(features, subject) < 2 for features in never)


def test_the_sample_has_every_word_kind_and_count(scenes: list[Scene]) -> None:
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {thing.noun for scene in scenes for thing in scene.things} == set(NOUNS)
    assert {thing.colour for scene in scenes for thing in scene.things} == set(COLOURS)
    assert {scene.size for scene in scenes} == {"small", "big", ""}
    assert {scene.position for scene in scenes} == {"left", "right", ""}
    kinds = Counter("pair" if scene.is_pair else len(scene.things) for scene in scenes)
    shares = {kind: count / len(scenes) for kind, count in kinds.items()}
    assert 0.45 < shares[1] < 0.57
    assert 0.19 < shares["pair"] < 0.29
    assert 0.09 < shares[2] < 0.17
    assert 0.09 < shares[3] < 0.17


def test_no_colour_is_lost_in_its_background(scenes: list[Scene]) -> None:
    for scene in scenes:
        for thing in scene.things:
            assert thing.colour in colours_on(scene.background)
            assert thing.colour != scene.background


def test_nothing_but_background_reaches_into_the_margin(scenes: list[Scene]) -> None:
    for thing in (thing for scene in scenes for thing in scene.things):
        overhang = STAR_OVERHANG if thing.noun == "star" else 1e-9
        for part in outline(thing.noun, thing.colour, thing.features):
            for x, y in part.points:
                across = thing.x + (x - 0.5) * width(thing)
                down = thing.y + (y - 0.5) * thing.height
                assert MARGIN - overhang <= across <= 1 - MARGIN + overhang, thing
                assert MARGIN - overhang <= down <= 1 - MARGIN + overhang, thing


def test_things_stand_from_left_to_right_and_do_not_overlap(scenes: list[Scene]) -> None:
    for scene in scenes:
        for left, right in itertools.pairwise(scene.things):
            assert left.x + width(left) / 2 <= right.x - width(right) / 2 + 1e-9, scene


def test_a_scene_comes_back_from_json(scenes: list[Scene]) -> None:
    for scene in scenes[:300]:
        assert scene_from_json(json.loads(json.dumps(scene.as_json()))) == scene


def test_the_same_seed_gives_the_same_scenes_and_captions() -> None:
    def sample(seed: int) -> list[tuple[Scene, str]]:
        rng = random.Random(seed)
        return [(scene := random_scene(rng), caption(scene, rng)) for _ in range(50)]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


@pytest.mark.parametrize("size", HEIGHTS)
@pytest.mark.parametrize("noun", NOUNS)
def test_one_thing_is_as_large_as_its_word_says_and_fits(noun: str, size: str) -> None:
    rng = random.Random(f"{noun} {size}")
    low, high = HEIGHTS[size]
    widest = (1 - 2 * MARGIN) / ASPECT.get(noun, 1.0)
    for _ in range(30):
        thing = one_thing(rng, "blue", noun, "red", size=size).things[0]
        assert min(low, widest) - 1e-9 <= thing.height <= high
        assert thing.height <= widest + 1e-9


@pytest.mark.parametrize("noun", NOUNS)
def test_one_thing_stands_where_it_is_asked_to(noun: str) -> None:
    rng = random.Random(noun)
    for _ in range(30):
        left, middle, right = (
            one_thing(rng, "in the snow", noun, "red", position=position)
            for position in ("left", "middle", "right")
        )
        assert (left.position, middle.position, right.position) == ("left", "", "right")
        assert left.things[0].x < middle.things[0].x == 0.5 < right.things[0].x


def test_a_given_individual_is_the_one_that_stands_there() -> None:
    noun, subject = SUBJECTS["second-cat"]
    scene = one_thing(random.Random(0), "green", noun, subject.main, subject)
    assert scene.things[0].features == subject


def test_alike_are_one_individual_in_several_places() -> None:
    scene = alike(random.Random(0), "at night", "robot", "red", 3)
    assert len(scene.things) == 3
    assert len({(thing.features, thing.height) for thing in scene.things}) == 1
    assert not scene.is_pair


def test_the_first_of_a_pair_stands_on_the_left() -> None:
    scene = pair(random.Random(0), "white", ("car", "red"), ("star", "blue"))
    assert [(thing.noun, thing.colour) for thing in scene.things] == [("car", "red"), ("star", "blue")]
    assert scene.is_pair
    assert scene.things[0].x < 0.5 < scene.things[1].x


# What a caption says, read back by rules of the test's own.

BACKGROUND = re.compile(r" (?:on a (?P<flat>\w+) background|(?P<place>" + "|".join(PLACES) + "))$")
OPENING = re.compile(r"^a (?:photo|picture|drawing) of (?=a |two |three )")
PHRASE = re.compile(
    r"^(?P<count>a|two|three) (?:(?P<size>small|big) )?"
    rf"(?:(?P<colour>{'|'.join(COLOURS)}) )?(?:(?P<unknown>[a-z]{{3,4}}) )?"
    r"(?P<noun>\w+)(?: on the (?P<side>left|right))?$"
)


def claims(sentence: str) -> tuple[str | None, list[dict[str, str | None]]]:
    """The background that a caption names, and what it says of each thing or group."""
    sentence = OPENING.sub("", sentence)
    found = BACKGROUND.search(sentence)
    background = (found["flat"] or found["place"]) if found else None
    body = sentence[: found.start()] if found else sentence
    phrases = [PHRASE.match(phrase) for phrase in body.split(" and ")]
    assert all(phrases), sentence
    return background, [phrase.groupdict() for phrase in phrases if phrase]


def check_phrase(said: dict[str, str | None], things: list[Thing]) -> None:
    thing = things[0]
    assert said["count"] is not None
    assert COUNTS[said["count"]] == len(things)
    noun = said["noun"] or ""
    assert (PLURALS[noun] if len(things) > 1 else noun) == thing.noun
    assert said["colour"] in (None, thing.colour)
    assert said["unknown"] not in WORDS
    if said["size"] == "small":
        assert thing.height <= HEIGHTS["small"][1]
    if said["size"] == "big":
        widest = (1 - 2 * MARGIN) / ASPECT.get(thing.noun, 1.0)
        assert thing.height >= min(HEIGHTS["big"][0], widest) - 1e-9
        assert thing.height > HEIGHTS[""][1]
    if said["side"]:
        assert (thing.x < 0.5) == (said["side"] == "left")


def check_caption(sentence: str, scene: Scene) -> None:
    background, phrases = claims(sentence)
    assert background in (None, scene.background)
    groups = [[thing] for thing in scene.things] if scene.is_pair else [list(scene.things)]
    for said, things in zip(phrases, groups, strict=True):
        check_phrase(said, things)


def test_captions_are_true_of_the_scene(scenes: list[Scene]) -> None:
    rng = random.Random("wording")
    for scene in scenes[:6000]:
        sentence = caption(scene, rng)
        try:
            check_caption(sentence, scene)
        except AssertionError as error:
            raise AssertionError(f"{sentence!r} of {scene}") from error


def test_the_reading_of_captions_notices_what_is_false() -> None:
    rng = random.Random(3)
    scene = one_thing(rng, "blue", "robot", "red", size="small", position="left")
    for sentence in (
        "a blue robot on a blue background",
        "a robot on a red background",
        "a robot in the snow",
        "two robots on a blue background",
        "a cat on a blue background",
        "a big robot",
        "a red robot on the right",
        "a robot and a robot",
    ):
        with pytest.raises((AssertionError, ValueError, KeyError)):
            check_caption(sentence, scene)
    check_caption("a small red robot on the left on a blue background", scene)


def test_captions_vary_in_what_they_leave_unsaid(scenes: list[Scene]) -> None:
    rng = random.Random("unsaid")
    single = next(scene for scene in scenes if len(scene.things) == 1 and scene.things[0].noun in FIGURES)
    read = [claims(caption(single, rng)) for _ in range(400)]
    share = {
        "background": sum(background is None for background, _ in read) / len(read),
        "colour": sum(phrases[0]["colour"] is None for _, phrases in read) / len(read),
        "unknown": sum(phrases[0]["unknown"] is not None for _, phrases in read) / len(read),
    }
    assert 0.02 < share["background"] < 0.12
    assert 0.40 < share["colour"] < 0.60
    assert 0.03 < share["unknown"] < 0.15


def test_shapes_have_no_features_and_figures_do(scenes: list[Scene]) -> None:
    for thing in (thing for scene in scenes for thing in scene.things):
        assert (thing.features is None) == (thing.noun in SHAPES)
        assert thing.features is None or thing.features.main == thing.colour
