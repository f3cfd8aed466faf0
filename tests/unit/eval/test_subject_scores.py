"""The scores of the personalisation table: who is in a picture, what leaked, what the prompt said."""

import random
import statistics
from dataclasses import replace

import pytest
from PIL import Image

from models.pocket.drawing import draw
from models.pocket.figures import FIGURES, SUBJECTS, Features
from models.pocket.scenes import BACKGROUNDS, Scene, colours_on, one_thing
from tests.eval.leaks import diversity, palette_overlap
from tests.eval.recipes import SUBJECT_NAMES
from tests.eval.subject import score_subject
from tests.eval.subjects import Asked, Subject, asked_of, clear_backgrounds, drawn, judge_asked, subjects
from tests.unit.eval.softening import softened

SIZES = ("small", "", "big")
EVERY_SUBJECT = pytest.mark.parametrize("subject", subjects(), ids=SUBJECT_NAMES)


def _shown(subject: Subject, size: str, features: Features | None = None) -> Image.Image:
    rng = random.Random(f"{subject.name} {size}")
    shown = features or subject.features
    background = rng.choice(clear_backgrounds(subject))
    return draw(one_thing(rng, background, subject.noun, shown.main, shown, size))


def _others(subject: Subject, count: int) -> list[Image.Image]:
    rng = random.Random(subject.name)
    backgrounds = rng.sample(BACKGROUNDS, count)
    return [
        draw(one_thing(rng, background, subject.noun, rng.choice(colours_on(background)), size=size))
        for background, size in zip(backgrounds, SIZES * count, strict=False)
    ]


def _score(subject: Subject, picture: Image.Image) -> float:
    return score_subject(picture, subject.noun, subject.features)


@EVERY_SUBJECT
def test_real_drawings_score_near_one_and_soft_ones_not_far_below(subject: Subject) -> None:
    for index, size in enumerate(SIZES):
        picture = _shown(subject, size)
        assert _score(subject, picture) > 0.8, size
        assert _score(subject, softened(picture, index)) > 0.65, size


@EVERY_SUBJECT
def test_others_of_the_class_score_far_below_and_an_empty_picture_lowest(subject: Subject) -> None:
    others = [_score(subject, picture) for picture in _others(subject, 4)]
    empty = [_score(subject, draw(Scene((), name))) for name in BACKGROUNDS[::3]]
    assert max(others) < 0.55
    assert statistics.fmean(others) < 0.35
    assert max(empty) < 0.3
    assert statistics.fmean(empty) < min(0.1, statistics.fmean(others))


@EVERY_SUBJECT
def test_a_wall_in_the_subjects_colour_is_not_the_subject(subject: Subject) -> None:
    assert max(_score(subject, draw(Scene((), colour))) for colour in subject.colours) < 0.2


@EVERY_SUBJECT
def test_each_of_the_three_colours_counts(subject: Subject) -> None:
    whole = _score(subject, _shown(subject, ""))
    free = [name for name in ("cyan", "blue", "brown") if name not in subject.colours]
    for part in ("main", "second", "accent"):
        changed = replace(subject.features, **{part: free[0]})  # type: ignore[arg-type]
        assert _score(subject, _shown(subject, "", changed)) < whole - 0.2, part


@EVERY_SUBJECT
def test_the_subject_is_found_mirrored(subject: Subject) -> None:
    mirrored = replace(subject.features, flipped=not subject.features.flipped)
    assert _score(subject, _shown(subject, "", mirrored)) > 0.85


def test_the_subject_is_found_beside_something_else_and_at_the_edge() -> None:
    robot = subjects(("robot",))[0]
    beside = next(asked for asked in asked_of(robot) if asked.second)
    assert _score(robot, drawn(beside, 0, robot.features)) > 0.85
    picture = _shown(robot, "")
    shifted = Image.new("RGB", picture.size, picture.getpixel((2, 2)))
    shifted.paste(picture, (0, 100))
    assert _score(robot, shifted) > 0.3


def test_things_of_another_class_overlap_with_a_palette_only_if_they_took_its_colours() -> None:
    robot = subjects(("robot",))[0]
    leaked, usual = [], []
    for noun in FIGURES[1:]:
        rng = random.Random(noun)
        features = replace(robot.features, form=1, mark=1)
        leaked.append(draw(one_thing(rng, "grey", noun, features.main, features)))
        usual.append(draw(one_thing(rng, "grey", noun, "green")))
    assert min(palette_overlap(picture, "robot", robot.features) for picture in leaked) > 0.6
    assert max(palette_overlap(picture, "robot", robot.features) for picture in usual) < 0.5


def test_nothing_overlaps_with_no_palette() -> None:
    _, features = SUBJECTS["robot"]
    assert palette_overlap(draw(Scene((), "purple")), "robot", features) == 0.0


def test_one_individual_again_and_again_is_far_less_diverse_than_a_class() -> None:
    robot = subjects(("robot",))[0]
    same = [_shown(robot, size) for size in SIZES]
    assert diversity(same) < 0.4 * diversity(_others(robot, 3))
    assert diversity([same[0], same[0]]) == 0.0


@EVERY_SUBJECT
def test_drawings_of_every_prompt_are_right_with_anybody_in_them(subject: Subject) -> None:
    for index, asked in enumerate(asked_of(subject)):
        features = subject.features if index % 2 else None
        picture = drawn(asked, index, features)
        assert judge_asked(asked, softened(picture, index) if index % 3 else picture), asked.text


def test_what_a_prompt_says_must_all_be_there() -> None:
    asked = Asked("", "subject", "robot", "white", "small", "left")
    features = SUBJECTS["robot"][1]

    def right(**changes: str) -> bool:
        return judge_asked(asked, drawn(replace(asked, **changes), 1, features))  # type: ignore[arg-type]

    assert right()
    assert not right(background="black")
    assert not right(size="")
    assert not right(position="right")
    assert not judge_asked(asked, draw(Scene((), "white")))


def test_a_second_thing_must_be_there_with_its_own_colour() -> None:
    asked = Asked("", "subject", "robot", "white", second=("ring", "green"))
    features = SUBJECTS["robot"][1]
    assert judge_asked(asked, drawn(asked, 1, features))
    assert not judge_asked(asked, drawn(replace(asked, second=None), 1, features))
    assert not judge_asked(asked, drawn(replace(asked, second=("ring", "blue")), 1, features))
    assert not judge_asked(asked, drawn(replace(asked, second=("star", "green")), 1, features))
