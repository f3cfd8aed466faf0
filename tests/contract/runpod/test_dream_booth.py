"""Inputs of dream-booth-v1 -> canonical specification, and jobs -> output."""

from typing import Any

import pytest
from likeness.inference.v1 import generation_job_pb2
from likeness.training.v1 import training_job_pb2 as pb

from services.domain.errors import InvalidSpec
from services.gateway.dialects.runpod import dream_booth_v1 as endpoint
from services.gateway.dialects.runpod.parameters import Parameter
from services.gateway.dialects.runpod.translation import MAX_DETAILS
from tests.contract.runpod.tables import at, cases, edges

CONCEPT = {
    "instance_data": "https://files.example.org/rex.zip",
    "instance_prompt": "photo of zkw dog",
    "class_prompt": "photo of a dog",
}
SAMPLE = {"prompt": "zkw dog on the moon"}


def input_of(case: dict[str, Any]) -> dict[str, Any]:
    if "input" in case:
        return dict(case["input"])
    concept, sample = CONCEPT | case.get("concept", {}), SAMPLE | case.get("sample", {})
    return {"concepts": [concept], "samples": [sample]} | case.get("top", {})


def read(given: dict[str, Any]) -> Any:
    return endpoint.read_input(given, lambda: 4242)


ACCEPTED = cases("dream_booth_accepted.json")
REFUSED = cases("dream_booth_refused.json")
EDGES = edges("dream_booth_edges.json")


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case["name"])
def test_input_becomes_this_specification(case: dict[str, Any]) -> None:
    submission = read(input_of(case))
    assert {path: at(submission.spec, path) for path in case["spec"]} == case["spec"]
    assert list(submission.ignored) == case.get("ignored", [])


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case["name"])
def test_input_is_refused_with_every_fault(case: dict[str, Any]) -> None:
    with pytest.raises(InvalidSpec) as caught:
        read(input_of(case))
    assert [str(violation) for violation in caught.value.violations] == case["faults"]


@pytest.mark.parametrize(("place", "name", "value", "accepted"), EDGES, ids=lambda part: str(part))
def test_the_last_value_of_a_range_is_taken_and_the_next_refused(
    place: str, name: str, value: Any, accepted: bool
) -> None:
    given = input_of({place: {name: value}})
    if accepted:
        read(given)
        return
    path = name if place == "top" else f"{place}s[0].{name}"
    with pytest.raises(InvalidSpec) as caught:
        read(given)
    assert [violation.field for violation in caught.value.violations] == [path]


def test_every_number_has_its_edges_in_the_data() -> None:
    tables = {"top": endpoint.INPUT, "concept": endpoint.CONCEPT, "sample": endpoint.SAMPLE}
    numbers = {(place, row.name) for place, rows in tables.items() for row in rows if row.limit is not None}
    assert numbers == {(place, name) for place, name, _, _ in EDGES}


@pytest.mark.parametrize("row", [*endpoint.INPUT, *endpoint.SAMPLE], ids=lambda row: row.name)
def test_the_published_default_is_what_absence_means(row: Parameter) -> None:
    if row.default is None or not row.target or row.name == "num_train_epochs":
        assert row.name in {"use_8bit_adam", "seed", "prompt", "negative_prompt", "num_train_epochs"}
        return
    place = "samples[0]." if row in endpoint.SAMPLE else ""
    expected = row.choices[row.default] if row.choices else row.default
    value = getattr(read(input_of({})).spec if not place else read(input_of({})).spec.samples[0], row.target)
    assert value == expected


@pytest.mark.parametrize("given", [{"train": {"data_url": "x"}, "inference": []}, {"inference": [{}]}])
def test_the_later_form_of_the_endpoint_is_refused_and_the_expected_keys_are_named(
    given: dict[str, Any],
) -> None:
    with pytest.raises(InvalidSpec) as caught:
        read(given)
    assert [violation.field for violation in caught.value.violations] == list(given)
    assert "expected keys are concepts, samples, num_train_epochs" in str(caught.value)


def test_several_concepts_keep_their_order_and_the_first_seed_rules() -> None:
    concepts = [CONCEPT, CONCEPT | {"seed": 5, "instance_prompt": "photo of qrx cat"}, CONCEPT | {"seed": 6}]
    spec = read({"concepts": concepts, "samples": [SAMPLE]}).spec
    assert [concept.instance_prompt for concept in spec.concepts][1] == "photo of qrx cat"
    assert spec.seed == 5


def test_faults_of_a_later_element_carry_its_position() -> None:
    given = {"concepts": [CONCEPT, 7, CONCEPT | {"seed": "x"}], "samples": [SAMPLE]}
    with pytest.raises(InvalidSpec) as caught:
        read(given)
    assert [violation.field for violation in caught.value.violations] == ["concepts[1]", "concepts[2].seed"]


def test_a_thousand_characters_of_prompt_are_accepted_and_one_more_is_not() -> None:
    read(input_of({"sample": {"prompt": "x" * 1000, "negative_prompt": "x" * 1000}}))
    with pytest.raises(InvalidSpec, match="must have 1 to 1000 characters"):
        read(input_of({"sample": {"prompt": "x" * 1001}}))


def test_text_that_no_encoding_holds_is_refused() -> None:
    with pytest.raises(InvalidSpec, match="valid Unicode"):
        read(input_of({"sample": {"prompt": "\ud800"}}))


def test_unknown_keys_are_named_even_when_no_encoding_holds_them() -> None:
    assert read(input_of({"top": {"\ud800": 1, "x" * 5000: 2}})).ignored == ("\\ud800", "x" * 100)


def test_faults_are_listed_up_to_a_limit() -> None:
    with pytest.raises(InvalidSpec) as caught:
        read(
            {
                "concepts": [{}] * 8,
                "samples": [{"prompt": 1, "seed": "x", "num_outputs": 0, "scheduler": 2}] * 32,
            }
        )
    assert len(caught.value.violations) == MAX_DETAILS


def test_no_value_is_told_back() -> None:
    with pytest.raises(InvalidSpec) as caught:
        read(
            input_of(
                {"concept": {"instance_data": "https://user:hunter2@x.example.org/a.zip", "seed": "hunter2"}}
            )
        )
    assert "hunter2" not in str(caught.value)


def sample_image(index: int, key: str, seed: int, **spec: Any) -> pb.SampleImage:
    picture = generation_job_pb2.GeneratedImage(key=key, seed=seed, media_type="image/png")
    asked: dict[str, Any] = {
        "prompt": "zkw dog",
        "guidance_scale": 7.5,
        "num_inference_steps": 50,
        "scheduler": 1,
    } | spec
    return pb.SampleImage(sample_index=index, spec=generation_job_pb2.GenerationSpec(**asked), image=picture)


def test_output_is_a_bare_list_with_one_element_a_picture() -> None:
    result = pb.TrainingResult(
        samples=[
            sample_image(0, "k1", 11),
            sample_image(0, "k2", 12),
            sample_image(1, "k3", 5, negative_prompt="blurry", scheduler=6),
        ]
    )
    job = pb.TrainingJob(result=result)
    assert [file.name for file in endpoint.files_of(job)] == ["0-0.png", "0-1.png", "1-0.png"]
    output = endpoint.render_output(job, {"k1": "http://h/1", "k2": "http://h/2", "k3": "http://h/3"})
    assert output[1] == {
        "image": "http://h/2",
        "seed": 12,
        "prompt": "zkw dog",
        "negative_prompt": None,
        "guidance_scale": 7.5,
        "inference_steps": 50,
        "scheduler": "DDIM",
    }
    assert output[2]["negative_prompt"] == "blurry"
    assert output[2]["scheduler"] == "K_EULER_ANCESTRAL"


def test_the_published_example_is_accepted_and_the_schema_names_every_parameter() -> None:
    schema = endpoint.input_schema()
    read(schema["examples"][0])
    assert set(schema["properties"]) == {"concepts", "samples", *(row.name for row in endpoint.INPUT)}
    assert schema["properties"]["concepts"]["items"]["required"] == [
        "instance_data",
        "instance_prompt",
        "class_prompt",
    ]
