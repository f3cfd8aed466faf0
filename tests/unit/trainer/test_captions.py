"""Captions of captioned training: what is said at each use."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from likeness.storage.v1.artifact_pb2 import Dataset
from PIL import Image

from services.trainer.buckets import Size
from services.trainer.captions import (
    CaptionedPicture,
    Tag,
    UseRules,
    captioned_pictures,
    drawn_caption,
    fingerprint,
    written_caption,
)


def picture(text: str = "", name: str = "a.png", **said: Any) -> CaptionedPicture:
    """A picture of which a text is said; `prompt` is what storage's parts make together."""
    tags = said.pop("tags", ())
    opening = said.get("main_prompt", "")
    prompt = ", ".join(part for part in (opening, text, *(tag.text for tag in tags)) if part)
    return CaptionedPicture(
        f"0/instance/{name}",
        Path("unused.png"),
        prompt,
        0,
        7,
        name,
        Size(64, 64),
        text=text,
        tags=tags,
        **said,
    )


def drawn(subject: CaptionedPicture, count: int = 1, seed: int = 7, **rules: Any) -> list[str]:
    """Captions of a picture's first use in each of some epochs."""
    return [
        drawn_caption(subject, UseRules(**rules), seed, (epoch, subject.sample_id, 0))
        for epoch in range(count)
    ]


def three_sigma(share: float, trials: int) -> float:
    return 3 * math.sqrt(share * (1 - share) / trials)


def test_without_rules_a_caption_is_verbatim() -> None:
    text = "A robot,on a hill ,, at night,"
    assert set(drawn(picture(text), 20)) == {text}
    assert drawn(picture("")) == [""]
    assert drawn(picture("on a hill", main_prompt="a robot, blue", tags=(Tag("old"),))) == [
        "a robot, blue, on a hill, old"
    ]


def test_dropout_empties_the_wanted_share_of_captions() -> None:
    subject = picture("a robot")
    assert set(drawn(subject, 200, caption_dropout=0.0)) == {"a robot"}
    assert set(drawn(subject, 200, caption_dropout=1.0)) == {""}
    empty = drawn(subject, 5000, caption_dropout=0.1).count("")
    assert abs(empty / 5000 - 0.1) < three_sigma(0.1, 5000)


@pytest.mark.parametrize(("own", "expected"), [(0.0, {"a robot"}), (1.0, {""})])
def test_a_picture_s_own_dropout_overrides_the_training_s(own: float, expected: set[str]) -> None:
    assert set(drawn(picture("a robot", caption_dropout=own), 50, caption_dropout=0.5)) == expected


def test_dropout_is_independent_of_picture_and_epoch() -> None:
    names = [f"{number}.png" for number in range(30)]
    rows = [
        [caption == "" for caption in drawn(picture("x", name), 40, caption_dropout=0.5)] for name in names
    ]
    assert len({tuple(row) for row in rows}) == 30
    assert abs(sum(map(sum, rows)) / 1200 - 0.5) < three_sigma(0.5, 1200)


def test_shuffling_keeps_the_first_part_and_all_others() -> None:
    captions = drawn(picture("a robot, blue, tall, old"), 200, shuffle_tags=True)
    assert all(caption.startswith("a robot, ") for caption in captions)
    assert {tuple(sorted(caption.split(", "))) for caption in captions} == {
        ("a robot", "blue", "old", "tall")
    }
    counts = Counter(captions)
    assert len(counts) == math.factorial(3)
    assert all(abs(count / 200 - 1 / 6) < three_sigma(1 / 6, 200) for count in counts.values())


def test_orders_differ_between_pictures_of_one_epoch() -> None:
    captions = {
        drawn(picture("a, b, c, d, e, f", f"{number}.png"), shuffle_tags=True)[0] for number in range(30)
    }
    assert len(captions) > 20


def test_orders_differ_between_occurrences_and_seeds_and_repeat() -> None:
    subject, rules = picture("a, b, c, d, e, f, g"), UseRules(shuffle_tags=True)

    def caption(seed: int, occurrence: int) -> str:
        return drawn_caption(subject, rules, seed, (0, subject.sample_id, occurrence))

    assert caption(1, 0) == caption(1, 0)
    assert len({caption(1, 0), caption(1, 1), caption(2, 0)}) == 3


def test_the_main_prompt_is_never_moved_or_divided() -> None:
    subject = picture("on a hill, at night", main_prompt="a robot, blue", tags=(Tag("old"),))
    captions = drawn(subject, 100, shuffle_tags=True)
    assert all(caption.startswith("a robot, blue, ") for caption in captions)
    assert len(set(captions)) == math.factorial(3)


def test_a_picture_s_own_choice_of_shuffling_counts() -> None:
    text = "a, b, c, d, e"
    assert set(drawn(picture(text, shuffle_tags=False), 30, shuffle_tags=True)) == {text}
    assert len(set(drawn(picture(text, shuffle_tags=True), 30))) > 10


def test_weights_bring_tags_to_the_front_in_proportion() -> None:
    tags = (Tag("light", 1.0), Tag("heavy", 3.0), Tag("middle", 2.0))
    captions = drawn(picture("a robot", tags=tags), 3000, shuffle_tags=True)
    seconds = Counter(caption.split(", ")[1] for caption in captions)
    for tag in tags:
        assert abs(seconds[tag.text] / 3000 - tag.weight / 6) < three_sigma(tag.weight / 6, 3000)
    # Given that the heavy one leads, the others follow in proportion 1 : 2.
    led = [caption.split(", ")[2] for caption in captions if caption.split(", ")[1] == "heavy"]
    assert abs(led.count("middle") / len(led) - 2 / 3) < three_sigma(2 / 3, len(led))


def test_weights_change_nothing_without_shuffling() -> None:
    tags = (Tag("light", 0.1), Tag("heavy", 9.0))
    assert set(drawn(picture("a robot", tags=tags), 20)) == {"a robot, light, heavy"}


def test_tag_dropout_leaves_out_each_part_but_the_first_with_its_probability() -> None:
    captions = drawn(picture("a robot, blue, tall, old"), 2000, tag_dropout=0.3)
    assert all(caption.split(", ")[0] == "a robot" for caption in captions)
    for tag in ("blue", "tall", "old"):
        share = sum(tag in caption.split(", ") for caption in captions) / 2000
        assert abs(share - 0.7) < three_sigma(0.7, 2000)
    both = sum({"blue", "tall"} <= set(caption.split(", ")) for caption in captions) / 2000
    assert abs(both - 0.49) < three_sigma(0.49, 2000), "tags are left out independently of each other"
    assert set(drawn(picture("a robot, blue"), 20, tag_dropout=1.0)) == {"a robot"}


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (0, "a robot, blue, on a hill, old"),
        (100, "a robot, blue, on a hill, old"),
        (29, "a robot, blue, on a hill, old"),
        (28, "a robot, blue, on a hill"),
        (13, "a robot, blue"),
        (12, "a robot"),
        (3, "a robot"),
    ],
)
def test_the_limit_leaves_out_whole_tags_from_the_end(limit: int, expected: str) -> None:
    subject = picture("a robot, blue, on a hill, old", max_caption_chars=limit)
    assert written_caption(subject) == expected
    assert drawn(subject) == [expected]


def test_the_limit_holds_after_shuffling() -> None:
    captions = drawn(picture("a, bb, cccc, dddddddd", max_caption_chars=8), 300, shuffle_tags=True)
    assert set(captions) == {"a", "a, bb", "a, cccc"}


def image(name: str, **fields: Any) -> dict[str, Any]:
    return {"id": name, "width_px": 80, "height_px": 60, **fields}


def pictures_of(*images: dict[str, Any], fallback: str = "") -> tuple[CaptionedPicture, ...]:
    dataset = ParseDict({"images": list(images)}, Dataset())
    return captioned_pictures(
        dataset, [Path(f"{n}.png") for n in range(len(images))], seed=7, fallback=fallback
    )


def test_all_that_storage_found_reaches_the_picture() -> None:
    (found,) = pictures_of(
        image(
            "x/a.png",
            caption_parts={
                "main_prompt": "a robot",
                "text": "on a hill, at night",
                "tags": [{"text": "blue"}, {"text": "old", "weight": 2.5}],
                "source": "CAPTION_SOURCE_YAML",
                "max_caption_chars": 90,
            },
            settings={
                "multiplier": 0.0,
                "rating": 2.0,
                "caption_dropout": 0.0,
                "flip_probability": 0.5,
                "shuffle_tags": False,
                "loss_scale": 0.25,
                "batch_id": "night",
            },
        )
    )
    assert found == CaptionedPicture(
        sample_id="0/instance/x/a.png",
        path=Path("0.png"),
        prompt="a robot, on a hill, at night, blue, old",
        concept=0,
        seed=7,
        name="x/a.png",
        size=Size(80, 60),
        main_prompt="a robot",
        text="on a hill, at night",
        tags=(Tag("blue"), Tag("old", 2.5)),
        max_caption_chars=90,
        multiplier=0.0,
        rating=2.0,
        caption_dropout=0.0,
        flip_probability=0.5,
        shuffle_tags=False,
        loss_scale=0.25,
        batch_id="night",
    )
    assert found.folder == "x"


def test_what_nobody_said_is_left_to_the_training() -> None:
    said = {"text": "a", "source": "CAPTION_SOURCE_TEXT"}
    (found,) = pictures_of(image("a.png", caption_parts=said, settings={}))
    assert (found.multiplier, found.rating, found.loss_scale, found.batch_id) == (1.0, 1.0, 1.0, "")
    assert (found.caption_dropout, found.flip_probability, found.shuffle_tags) == (None, None, None)


def test_only_a_picture_without_any_caption_gets_the_fallback() -> None:
    found = pictures_of(
        image("empty.png", caption_parts={"source": "CAPTION_SOURCE_TEXT"}),
        image("name.png", caption_parts={"text": "name", "source": "CAPTION_SOURCE_FILE_NAME"}),
        image("none.png", caption_parts={}),
        image("older.png", caption="as one text"),
        fallback="a photo",
    )
    assert [picture.prompt for picture in found] == ["", "name", "a photo", "as one text"]


def test_the_fingerprint_follows_everything_that_is_said(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "b.png")
    base = replace(picture("a robot"), path=tmp_path / "a.png")
    moved = tmp_path / "elsewhere.png"
    moved.write_bytes(base.path.read_bytes())
    assert fingerprint([base]) == fingerprint([replace(base, path=moved)])
    changes: list[dict[str, Any]] = [
        {"path": tmp_path / "b.png"},
        {"name": "b.png"},
        {"text": "a wall"},
        {"main_prompt": "x"},
        {"tags": (Tag("x"),)},
        {"tags": (Tag("x", 2.0),)},
        {"max_caption_chars": 5},
        {"multiplier": 2.0},
        {"rating": 2.0},
        {"caption_dropout": 0.0},
        {"flip_probability": 0.0},
        {"shuffle_tags": False},
        {"loss_scale": 0.5},
        {"batch_id": "x"},
    ]
    digests = {fingerprint([replace(base, **change)]) for change in changes} | {fingerprint([base])}
    assert len(digests) == len(changes) + 1
    assert fingerprint([base, replace(base, name="b.png")]) != fingerprint(
        [replace(base, name="b.png"), base]
    )
