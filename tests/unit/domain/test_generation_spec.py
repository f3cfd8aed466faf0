"""Defaults and limits of drawings, field by field."""

from typing import Any

import pytest
from likeness.inference.v1 import generation_job_pb2 as pb

from services.domain.errors import InvalidSpec
from services.domain.generation_spec import resolve_generation_spec


def drawing(**fields: Any) -> pb.GenerationSpec:
    return pb.GenerationSpec(**({"prompt": "a zkw dog"} | fields))


def faults_of(spec: pb.GenerationSpec) -> list[str]:
    with pytest.raises(InvalidSpec) as caught:
        resolve_generation_spec(spec)
    return [violation.field for violation in caught.value.violations]


DEFAULTS = {
    "num_images": 1,
    "num_inference_steps": 50,
    "guidance_scale": 7.5,
    "scheduler": pb.SCHEDULER_DDIM,
    "image_format": pb.IMAGE_FORMAT_PNG,
    "upscale_factor": 1,
    "width_px": 512,
    "height_px": 512,
    "negative_prompt": "",
    "clip_skip": 0,
}


@pytest.mark.parametrize(("field", "value"), DEFAULTS.items(), ids=DEFAULTS)
def test_an_unset_field_gets_its_default(field: str, value: Any) -> None:
    assert getattr(resolve_generation_spec(drawing(), native_size_px=512), field) == value


def test_the_size_is_left_open_where_the_model_is_not_known() -> None:
    spec = resolve_generation_spec(drawing())
    assert (spec.width_px, spec.height_px) == (0, 0)


def test_an_unset_seed_stays_unset_and_zero_is_a_seed() -> None:
    assert not resolve_generation_spec(drawing()).HasField("seed")
    assert resolve_generation_spec(drawing(seed=0)).HasField("seed")


def test_guidance_of_zero_is_kept() -> None:
    assert resolve_generation_spec(drawing(guidance_scale=0.0)).guidance_scale == 0.0


def test_strength_has_a_default_only_where_a_picture_is_given() -> None:
    assert not resolve_generation_spec(drawing()).HasField("strength")
    assert resolve_generation_spec(drawing(init_image_key="k")).strength == 0.7


def test_resolving_twice_changes_nothing() -> None:
    once = resolve_generation_spec(drawing(loras=[{"model": "a"}]), native_size_px=256)
    assert resolve_generation_spec(once, native_size_px=512) == once
    assert once.loras[0].strength == 1.0


EDGES = [
    ("num_images", 10, 11),
    ("num_inference_steps", 500, 501),
    ("guidance_scale", 50.0, 50.1),
    ("guidance_scale", 0.0, -0.1),
    ("guidance_scale", 1.0, float("nan")),
    ("width_px", 64, 56),
    ("width_px", 2048, 2056),
    ("height_px", 72, 70),
    ("strength", 1.0, 1.1),
    ("self_attention_scale", 2.0, 2.1),
    ("upscale_factor", 3, 4),
    ("token_merging_ratio", 0.75, 0.76),
    ("guidance_rescale", 1.0, 1.1),
    ("eta", 1.0, 1.1),
    ("seed", 2**63 - 1, 2**63),
]


@pytest.mark.parametrize(
    ("field", "inside", "outside"), EDGES, ids=[f"{edge[0]}-{edge[2]}" for edge in EDGES]
)
def test_the_last_value_of_a_range_is_taken_and_the_next_refused(
    field: str, inside: Any, outside: Any
) -> None:
    assert getattr(resolve_generation_spec(drawing(**{field: inside})), field) == inside
    assert faults_of(drawing(**{field: outside})) == [field]


@pytest.mark.parametrize(("field", "most"), [("prompt", 4000), ("negative_prompt", 4000), ("passback", 1000)])
def test_texts_have_a_longest_length(field: str, most: int) -> None:
    resolve_generation_spec(drawing(**{field: "x" * most}))
    assert faults_of(drawing(**{field: "x" * (most + 1)})) == [field]


def test_a_prompt_is_required_unless_a_picture_is_given() -> None:
    assert faults_of(drawing(prompt="  ")) == ["prompt"]
    assert resolve_generation_spec(drawing(prompt="", init_image_key="k")).prompt == ""


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"mask_image_key": "k"}, "mask_image_key"),
        ({"circular_padding": True}, "circular_padding"),
        ({"output_names": ["a"], "num_images": 2}, "output_names"),
        ({"loras": [{"model": "a"}] * 6}, "loras"),
        ({"loras": [{"model": ""}]}, "loras[0].model"),
        ({"loras": [{"model": "a", "strength": 2.1}]}, "loras[0].strength"),
        ({"embeddings": [{"model": "a"}] * 17}, "embeddings"),
        ({"scheduler": 99}, "scheduler"),
        ({"safety_action": 99}, "safety_action"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_combination_is_refused(fields: dict[str, Any], field: str) -> None:
    assert faults_of(drawing(**fields)) == [field]


def test_all_faults_carry_the_path_they_were_asked_for() -> None:
    with pytest.raises(InvalidSpec) as caught:
        resolve_generation_spec(drawing(num_images=11, eta=2.0), path="samples[3].")
    assert [str(fault) for fault in caught.value.violations] == [
        "samples[3].num_images: must be between 1 and 10",
        "samples[3].eta: must be between 0 and 1",
    ]
