"""What real clients send for a value, and what it is read as; the training that a request means."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from likeness.storage.v1.model_pb2 import Model

from services.domain.errors import InvalidSpec
from services.gateway.dialects.sdapi import drawing, training
from services.gateway.dialects.sdapi.envelope import BadBody, fields_of, read_body
from services.gateway.dialects.sdapi.values import Picture, Reading
from services.gateway.dialects.sdapi.values import read_body as read_values

HERE = Path(__file__).parent
IMAGE = "https://files.example.org/1.png"


def table(name: str) -> Any:
    return json.loads((HERE / name).read_text())


def coercions(kind: str) -> list[Any]:
    return [
        pytest.param(rows["field"], row, id=f"{name} {row!r}")
        for name, rows in table("coercion.json").items()
        for row in rows[kind]
    ]


def read(field: str, value: Any) -> Reading:
    rows = [replace(row, required=False) for row in drawing.INPAINT]
    return read_values({"prompt": "x", field: value}, rows)


@pytest.mark.parametrize(("field", "row"), coercions("same"))
def test_a_value_is_read_in_every_spelling(field: str, row: list[Any]) -> None:
    sent, means = row
    reading = read(field, sent)
    assert not reading.faults
    assert reading.values[field] == means
    assert type(reading.values[field]) is type(means)


@pytest.mark.parametrize(("field", "value"), coercions("nothing"))
def test_words_for_nothing_are_read_as_absence(field: str, value: Any) -> None:
    reading = read(field, value)
    assert (field in reading.values, reading.faults) == (False, [])


@pytest.mark.parametrize(("field", "value"), coercions("wrong"))
def test_what_is_no_such_value_is_a_fault_of_its_field(field: str, value: Any) -> None:
    reading = read(field, value)
    assert [fault.field for fault in reading.faults] == [field]
    sentences = fields_of(tuple(reading.faults))
    assert isinstance(sentences, dict)
    [sentence] = sentences[field]
    assert sentence.startswith(f"The {field.replace('_', ' ')} must ")
    assert sentence.endswith(".")


@pytest.mark.parametrize(
    ("sent", "picture"),
    [
        (f" {IMAGE} ", Picture(url=IMAGE)),
        ("UE5H", Picture(data=b"PNG")),
        ("data:image/jpeg;base64,UE5H", Picture(data=b"PNG")),
        ("UE5\nH\r\n", Picture(data=b"PNG")),
        ("UE4", Picture(data=b"PN")),
    ],
    ids=["address", "base64", "data URI", "lines", "no padding"],
)
def test_a_picture_is_an_address_or_base64(sent: str, picture: Picture) -> None:
    assert read("init_image", sent).values["init_image"] == picture


@pytest.mark.parametrize(
    ("sent", "name"),
    [("steps", "num_inference_steps"), ("clipskip", "clip_skip"), ("safetychecker", "safety_checker")],
)
def test_other_names_of_a_field_count_when_its_own_is_absent(sent: str, name: str) -> None:
    assert name in read(sent, "1").values
    both = read_values({"prompt": "x", sent: "0", name: "1"}, drawing.TEXT_TO_IMAGE)
    assert both.values[name] in (1, True)


def wish(**changes: Any) -> training.Wish:
    given = {"instance_prompt": "photo of zkw", "images": [IMAGE]} | changes
    return training.read_training(given)


@pytest.mark.parametrize("row", table("images.json")["same"], ids=repr)
def test_pictures_are_links_in_a_list_or_in_a_text(row: list[Any]) -> None:
    assert len(wish(images=row[0]).values["images"]) == row[1]


@pytest.mark.parametrize("kind", ["missing", "wrong"])
def test_anything_else_is_a_fault_of_images(kind: str) -> None:
    for value in table("images.json")[kind]:
        with pytest.raises(InvalidSpec) as caught:
            wish(images=value)
        assert [(fault.field, bool(fault.rule)) for fault in caught.value.violations] == [
            ("images", kind == "wrong")
        ], value


def test_more_pictures_than_are_taken_are_a_fault() -> None:
    assert wish(images=[IMAGE] * training.MAX_IMAGES)
    with pytest.raises(InvalidSpec, match="images: must have 1 to 30 elements"):
        wish(images=[IMAGE] * (training.MAX_IMAGES + 1))


@pytest.mark.parametrize("row", table("trainings.json")["max_train_steps"], ids=repr)
def test_steps_are_literal_up_to_the_most_and_200_a_picture_by_default(row: dict[str, Any]) -> None:
    asked = wish(images=[IMAGE] * row["images"], max_train_steps=row["sent"])
    spec = training.submission_of(asked, Model(model="pocket"), 1).spec
    assert spec.max_train_steps == row["steps"]


@pytest.mark.parametrize("row", table("trainings.json")["training_type"], ids=repr)
def test_a_class_prompt_that_is_absent_comes_of_the_type(row: dict[str, Any]) -> None:
    spec = training.submission_of(wish(training_type=row["sent"]), Model(model="pocket"), 1).spec
    assert spec.concepts[0].class_prompt == row["class"]
    given = wish(training_type=row["sent"], class_prompt="photo of person")
    assert training.submission_of(given, Model(), 1).spec.concepts[0].class_prompt == "photo of person"


@pytest.mark.parametrize("row", table("trainings.json")["native_size"], ids=repr)
def test_trainings_have_the_size_of_their_base(row: dict[str, Any]) -> None:
    base = Model(model="pocket")
    base.manifest.native_size_px = row["native"]
    assert training.submission_of(wish(), base, 1).spec.resolution == row["resolution"]


@pytest.mark.parametrize(
    ("sent", "seed"), [("0", 0), (0, 0), (None, 41), ("null", 41), ("-1", 41), (10**12, 10**12)]
)
def test_the_seed_zero_is_a_seed_and_none_is_drawn(sent: Any, seed: int) -> None:
    assert training.submission_of(wish(seed=sent), Model(model="pocket"), 41).spec.seed == seed


@pytest.mark.parametrize(
    ("body", "read_as"),
    [
        (b"", {}),
        (b"  \n", {}),
        (b'{"a": 1}', {"a": 1}),
        (b"a=1&b=x%20y&c=", {"a": "1", "b": "x y", "c": ""}),
        (b"images[]=1&images[]=2", {"images": ["1", "2"]}),
        (b"images[1]=1&images[0]=2&images[5]=3", {"images": ["1", "2", "3"]}),
        (b"images=1&images=2", {"images": ["1", "2"]}),
    ],
)
def test_a_body_is_json_or_a_form(body: bytes, read_as: dict[str, Any]) -> None:
    assert read_body(body) == read_as


@pytest.mark.parametrize(
    "body", [b"{", b"[1]", b"1", b"null", b"text", b'{"a": NaN}', b"\xff=1", b'{"a":1}x=2']
)
def test_any_other_body_is_refused(body: bytes) -> None:
    with pytest.raises(BadBody):
        read_body(body)
