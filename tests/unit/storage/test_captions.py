"""How what several files say of one picture is put together."""

import json

import pytest

from services.storage.captions import Description, Source, Tag, file_name_caption


def tags(*texts: str) -> tuple[Tag, ...]:
    return tuple(Tag(text) for text in texts)


def test_the_caption_is_main_prompt_text_and_tags_in_this_order() -> None:
    described = Description(main_prompt="a robot", text="on a hill, at night", tags=tags("blue", "old"))
    assert described.caption == "a robot, on a hill, at night, blue, old"
    assert Description(text="", tags=tags("blue")).caption == "blue"
    assert Description().caption == ""


def test_the_nearer_file_s_words_stand_alone() -> None:
    near = Description(text="a red wall", source=Source.TEXT)
    far = Description(main_prompt="a photo", text="of a wall", source=Source.FOLDER)
    merged = near.over(far)
    assert (merged.main_prompt, merged.text, merged.source) == (None, "a red wall", Source.TEXT)
    assert Description(rating=2.0).over(far).caption == "a photo, of a wall"


def test_an_empty_caption_counts_as_words() -> None:
    merged = Description(text="", source=Source.TEXT).over(Description(text="far", source=Source.FOLDER))
    assert (merged.text, merged.source) == ("", Source.TEXT)


@pytest.mark.parametrize(
    ("field", "near", "far"),
    [
        ("multiplier", 0.0, 2.0),
        ("rating", 1.5, 3.0),
        ("caption_dropout", 0.0, 0.5),
        ("flip_probability", 0.0, 1.0),
        ("shuffle_tags", False, True),
        ("loss_scale", 0.0, 2.0),
        ("batch_id", "a", "b"),
        ("max_caption_chars", 10, 20),
    ],
)
def test_the_nearer_file_s_setting_wins_even_where_it_is_zero(field: str, near: object, far: object) -> None:
    one, other = Description(**{field: near}), Description(**{field: far})  # type: ignore[arg-type]
    assert getattr(one.over(other), field) == near
    assert getattr(Description().over(other), field) == far


def test_tags_add_up_without_duplicates_nearest_first() -> None:
    near = Description(tags=(Tag("Blue", 2.0), Tag("old")))
    far = Description(tags=tags("blue", "tall", "tall"))
    assert near.over(far).tags == (Tag("Blue", 2.0), Tag("old"), Tag("tall"))


def test_tags_that_the_words_hold_already_are_left_out() -> None:
    described = Description(
        main_prompt="a robot", text="Blue eyes,  on a hill", tags=tags("blue eyes", "hill", "A robot")
    )
    assert described.finished().tags == tags("hill")


def test_a_description_survives_its_way_between_processes() -> None:
    described = Description(
        text="a", tags=(Tag("b", 0.5),), source=Source.YAML, multiplier=0.0, shuffle_tags=True
    )
    assert Description.from_message(json.loads(json.dumps(described.to_message()))) == described
    assert Description.from_message(Description().to_message()) == Description()


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("a/a robot, on a hill_001.png", "a robot, on a hill"),
        ("IMG_1234.jpg", "IMG"),
        ("robot.v2.jpeg", "robot.v2"),
        ("folder_1/robot.png", "robot"),
        ("_1.png", ""),
    ],
)
def test_a_file_s_name_is_its_caption_up_to_the_first_underscore(name: str, caption: str) -> None:
    assert file_name_caption(name) == caption
