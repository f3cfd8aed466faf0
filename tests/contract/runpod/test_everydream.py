"""Inputs of everydream-v1 -> canonical specification, and jobs -> output."""

from typing import Any

import pytest
from likeness.inference.v1 import generation_job_pb2
from likeness.training.v1 import training_job_pb2 as pb

from services.domain.errors import InvalidSpec, Violation
from services.gateway.dialects.runpod import everydream_v1 as endpoint
from services.gateway.dialects.runpod.parameters import Parameter
from services.gateway.dialects.runpod.translation import MAX_DETAILS
from services.trainer.support import check_supported
from tests.contract.runpod.tables import at, cases, edges

DATA = {"data_url": "https://files.example.org/bikes.zip"}
REQUEST = {"prompt": "a red bike in snow"}


def input_of(case: dict[str, Any]) -> dict[str, Any]:
    if "input" in case:
        return dict(case["input"])
    return {"train": DATA | case.get("train", {}), "inference": case.get("inference", [REQUEST])}


def read(given: dict[str, Any]) -> Any:
    return endpoint.read_input(given, lambda: 4242)


ACCEPTED = cases("everydream_accepted.json")
REFUSED = cases("everydream_refused.json")
EDGES = edges("everydream_edges.json")


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case["name"])
def test_input_becomes_this_specification_which_the_recipe_honours(case: dict[str, Any]) -> None:
    submission = read(input_of(case))
    assert {path: at(submission.spec, path) for path in case["spec"]} == case["spec"]
    assert list(submission.ignored) == case.get("ignored", [])
    check_supported(submission.spec)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case["name"])
def test_input_is_refused_with_every_fault(case: dict[str, Any]) -> None:
    with pytest.raises(InvalidSpec) as caught:
        read(input_of(case))
    assert [str(violation) for violation in caught.value.violations] == case["faults"]


@pytest.mark.parametrize(("place", "name", "value", "accepted"), EDGES, ids=lambda part: str(part)[:40])
def test_the_last_value_of_a_range_is_taken_and_the_next_refused(
    place: str, name: str, value: Any, accepted: bool
) -> None:
    given = input_of({"train": {name: value}} if place == "train" else {"inference": REQUEST | {name: value}})
    if accepted:
        read(given)
        return
    with pytest.raises(InvalidSpec) as caught:
        read(given)
    assert [violation.field for violation in caught.value.violations] == [f"{place}.{name}"]


OF_KIND: dict[str, list[Any]] = {
    "integer": [True, "1", 1.5, 2.0, [1], {}],
    "seed": [True, "1", 1.5, [1], {}],
    "number": [True, "1", [1.0], {}],
    "boolean": [0, 1, "true", [True], {}],
    "text": [True, 1, ["x"], {}],
    "url": [True, 1, ["https://files.example.org/a.zip"], {}],
    "choice": [True, 1, ["constant"], {}],
    "texts": [True, 1, "x", [1], [None], {"0": "x"}],
}
"""Values of another type than a parameter of this kind has."""


@pytest.mark.parametrize("row", endpoint.TRAIN, ids=lambda row: row.name)
def test_no_parameter_of_a_training_takes_a_value_of_another_type(row: Parameter) -> None:
    for value in OF_KIND[row.kind]:
        with pytest.raises(InvalidSpec) as caught:
            read(input_of({"train": {row.name: value}}))
        assert [fault.field for fault in caught.value.violations][:1] == [f"train.{row.name}"]
        assert len(caught.value.violations) == 1, value


@pytest.mark.parametrize("row", endpoint.INFERENCE, ids=lambda row: row.name)
def test_no_parameter_of_a_picture_takes_a_value_of_another_type(row: Parameter) -> None:
    for value in OF_KIND[row.kind]:
        with pytest.raises(InvalidSpec) as caught:
            read(input_of({"inference": [REQUEST, REQUEST | {row.name: value}]}))
        assert [fault.field for fault in caught.value.violations] == [f"inference[1].{row.name}"], value


def test_every_limited_value_has_its_edges_in_the_data() -> None:
    tables = {"train": endpoint.TRAIN, "inference": endpoint.INFERENCE}
    limited = {
        (place, row.name)
        for place, rows in tables.items()
        for row in rows
        if row.limit is not None or row.most or (row.choices and row.kind == "integer")
    }
    assert limited == {(place, name) for place, name, _, _ in EDGES}


@pytest.mark.parametrize("row", [*endpoint.TRAIN, *endpoint.INFERENCE], ids=lambda row: row.name)
def test_the_published_default_is_what_absence_means(row: Parameter) -> None:
    if row.default is None or row.default == row.absence:
        assert row.required or row.name in {
            "clip_grad_norm", "hf_repo_subfolder", "lr_decay_steps", "lr_warmup_steps", "negative_prompt", "passback",
            "resume_ckpt_url", "sample_prompts", "seed", "useadam8bit",
        }  # fmt: skip
        return
    spec = read(input_of({})).spec
    message = spec if row in endpoint.TRAIN else spec.samples[0]
    expected = row.choices[row.default] if row.choices else row.default
    assert getattr(message, row.target) == expected


@pytest.mark.parametrize("row", endpoint.TRAIN, ids=lambda row: row.name)
def test_null_is_absence_for_every_parameter_but_the_required_one(row: Parameter) -> None:
    if row.required:
        with pytest.raises(InvalidSpec, match=f"train.{row.name}: is required"):
            read(input_of({"train": {row.name: None}}))
        return
    assert read(input_of({"train": {row.name: None}})).spec == read(input_of({})).spec


@pytest.mark.parametrize(
    "given", [{}, {"inference": None}, {"inference": []}], ids=["absent", "null", "empty"]
)
def test_a_training_without_pictures_is_accepted(given: dict[str, Any]) -> None:
    spec = read({"train": DATA} | given).spec
    check_supported(spec)
    assert not spec.samples


def test_one_picture_and_a_list_of_one_mean_the_same() -> None:
    single, listed = read(input_of({"inference": REQUEST})), read(input_of({"inference": [REQUEST]}))
    assert single.spec == listed.spec


def test_a_fault_that_is_found_later_is_told_in_the_callers_words() -> None:
    later = [
        Violation("save_optimizer", "is not supported"),
        Violation("preview_prompts[3]", "must not be empty"),
        Violation("samples[1].num_images", "must be fewer"),
        Violation("samples[1].loras[0].model", "is required"),
        Violation("concepts[0].instance_data.urls[2]", "is wrong"),
        Violation("base_model", "is not known"),
        Violation("", "try later"),
    ]
    submission = read(input_of({"inference": [REQUEST, REQUEST]}))
    assert [fault.field for fault in submission.respelled(InvalidSpec(later)).violations] == [
        "train.save_optimizer",
        "train.sample_prompts[3]",
        "inference[1].num_outputs",
        "inference[1].loras[0].model",
        "train.data_url.urls[2]",
        "base_model",
        "",
    ]


@pytest.mark.parametrize("name", ["prompt", "negative_prompt", "passback"])
def test_a_thousand_characters_are_accepted_and_one_more_is_not(name: str) -> None:
    read(input_of({"inference": REQUEST | {name: "x" * 1000}}))
    with pytest.raises(InvalidSpec, match=f"inference.{name}: must have . to 1000 characters"):
        read(input_of({"inference": REQUEST | {name: "x" * 1001}}))


def test_faults_are_listed_up_to_a_limit() -> None:
    with pytest.raises(InvalidSpec) as caught:
        read({"train": {str(key): key for key in range(200)}})
    assert len(caught.value.violations) == MAX_DETAILS


def test_keys_that_no_encoding_holds_are_named() -> None:
    assert read(input_of({}) | {"\ud800": 1}).ignored == ("\\ud800",)
    with pytest.raises(InvalidSpec, match=r"train\.\\ud800: is not a parameter"):
        read(input_of({"train": {"\ud800": 1}}))


def test_no_value_is_told_back() -> None:
    with pytest.raises(InvalidSpec) as caught:
        read(input_of({"train": {"data_url": "https://user:hunter2@x.example.org/a.zip", "seed": "hunter2"}}))
    assert "hunter2" not in str(caught.value)


def picture(key: str, seed: int) -> generation_job_pb2.GeneratedImage:
    return generation_job_pb2.GeneratedImage(key=key, seed=seed, media_type="image/png")


def finished_job(**result: Any) -> pb.TrainingJob:
    spec = read(
        input_of(
            {
                "inference": [
                    REQUEST | {"num_outputs": 2},
                    {"prompt": "y", "scheduler": "DPM-S", "passback": "p"},
                ]
            }
        )
    ).spec
    samples = [
        pb.SampleImage(sample_index=index, spec=spec.samples[index], image=picture(key, seed))
        for index, key, seed in ((0, "k1", 11), (0, "k2", 12), (1, "k3", 5))
    ]
    return pb.TrainingJob(result=pb.TrainingResult(samples=samples, **result))


URLS = {key: f"http://h/{key}" for key in ("k1", "k2", "k3", "v1", "v2")}


def test_output_is_an_object_with_a_flat_list_of_pictures() -> None:
    job = finished_job()
    assert [file.name for file in endpoint.files_of(job)] == ["0-0.png", "0-1.png", "1-0.png"]
    output = endpoint.render_output(job, URLS)
    assert output["train"] == {}
    assert output["inference"] == endpoint.render_pictures(job, URLS)
    assert output["inference"][1] == {
        "image": "http://h/k2",
        "prompt": "a red bike in snow",
        "negative_prompt": None,
        "width": 512,
        "height": 512,
        "num_inference_steps": 50,
        "guidance_scale": 7.5,
        "scheduler": "K-LMS",
        "seed": 12,
        "passback": None,
    }
    assert (output["inference"][2]["scheduler"], output["inference"][2]["passback"]) == ("DPM-S", "p")


def test_pictures_drawn_while_training_are_addresses_in_their_order() -> None:
    previews = [
        pb.PreviewImage(
            step=250 * (place + 1), name=f"preview-{place}.png", image=picture(f"v{place + 1}", 555)
        )
        for place in range(2)
    ]
    job = finished_job(previews=previews)
    assert [file.name for file in endpoint.files_of(job)][:2] == ["preview-0.png", "preview-1.png"]
    assert endpoint.render_output(job, URLS)["train"] == {"samples": ["http://h/v1", "http://h/v2"]}


def test_of_very_many_pictures_drawn_while_training_the_newest_are_named() -> None:
    drawn = [pb.PreviewImage(name=f"{place}.png", image=picture(f"v{place}", 555)) for place in range(600)]
    files = endpoint.files_of(pb.TrainingJob(result=pb.TrainingResult(previews=drawn)))
    assert [file.name for file in files] == [f"{place}.png" for place in range(100, 600)]


def test_a_job_without_pictures_has_an_empty_list() -> None:
    assert endpoint.render_output(pb.TrainingJob(), {}) == {"train": {}, "inference": []}


def test_the_published_example_is_accepted_and_the_schema_names_every_parameter() -> None:
    schema = endpoint.input_schema()
    check_supported(read(schema["examples"][0]).spec)
    train, inference = schema["properties"]["train"], schema["properties"]["inference"]
    assert set(train["properties"]) == {row.name for row in endpoint.TRAIN}
    assert train["required"] == ["data_url"]
    several, single = inference["anyOf"]
    assert several["items"] == single
    assert set(single["properties"]) == {row.name for row in endpoint.INFERENCE}
    assert single["properties"]["width"]["enum"][:2] == [128, 256]
