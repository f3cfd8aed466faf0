"""Defaults and limits of trainings, field by field."""

from typing import Any

import pytest
from likeness.training.v1 import training_job_pb2 as pb

from services.domain.errors import InvalidSpec
from services.domain.training_spec import resolve_training_spec


def dreambooth(**fields: Any) -> pb.TrainingSpec:
    spec = pb.TrainingSpec(**fields)
    if not spec.concepts:
        concept = spec.concepts.add(instance_prompt="photo of zkw dog", class_prompt="photo of a dog")
        concept.instance_data.archive_url = "https://files.example.org/rex.zip"
    return spec


def everydream(**fields: Any) -> pb.TrainingSpec:
    spec = pb.TrainingSpec(recipe=pb.RECIPE_EVERYDREAM, **fields)
    spec.concepts.add().instance_data.archive_url = "https://files.example.org/data.zip"
    return spec


def faults_of(spec: pb.TrainingSpec) -> list[str]:
    with pytest.raises(InvalidSpec) as caught:
        resolve_training_spec(spec)
    return [violation.field for violation in caught.value.violations]


DREAMBOOTH_DEFAULTS = {
    "recipe": pb.RECIPE_DREAMBOOTH,
    "method": pb.TRAINING_METHOD_FULL,
    "base_model": "",
    "seed": 1337,
    "resolution": 512,
    "center_crop": False,
    "flip_probability": 0.0,
    "num_train_epochs": 1,
    "max_train_steps": 2000,
    "train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "learning_rate": 1e-6,
    "scale_learning_rate": False,
    "lr_scheduler": pb.LEARNING_RATE_SCHEDULE_CONSTANT,
    "lr_warmup_steps": 0,
    "lr_num_cycles": 1,
    "optimizer_precision": pb.OPTIMIZER_PRECISION_UNSPECIFIED,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 0.01,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "clip_models_separately": False,
    "with_prior_preservation": True,
    "prior_loss_weight": 1.0,
    "sample_batch_size": 2,
    "train_unet": True,
    "train_text_encoder": True,
    "pad_tokens": False,
    "caption_dropout": 0.0,
    "save_full_precision": True,
    "preview_steps": 250,
}
EVERYDREAM_DEFAULTS = {
    "seed": 555,
    "num_train_epochs": 300,
    "max_train_steps": 0,
    "train_batch_size": 2,
    "learning_rate": 2e-6,
    "max_grad_norm": 0.0,
    "clip_models_separately": True,
    "aspect_ratio_bucketing": True,
    "caption_dropout": 0.04,
    "with_prior_preservation": False,
    "save_full_precision": False,
    "rated_dataset_final_percent": 50.0,
}


@pytest.mark.parametrize(("field", "value"), DREAMBOOTH_DEFAULTS.items(), ids=DREAMBOOTH_DEFAULTS)
def test_an_unset_field_gets_the_default_of_dreambooth(field: str, value: Any) -> None:
    assert getattr(resolve_training_spec(dreambooth()), field) == value


@pytest.mark.parametrize(("field", "value"), EVERYDREAM_DEFAULTS.items(), ids=EVERYDREAM_DEFAULTS)
def test_an_unset_field_gets_the_default_of_everydream(field: str, value: Any) -> None:
    assert getattr(resolve_training_spec(everydream()), field) == value


def test_unset_zero_and_false_of_optional_fields_are_told_apart() -> None:
    spec = resolve_training_spec(
        dreambooth(
            max_grad_norm=0.0, with_prior_preservation=False, adam_weight_decay=0.0, seed=0, adam_beta1=0.0
        )
    )
    assert (spec.max_grad_norm, spec.with_prior_preservation, spec.adam_weight_decay) == (0.0, False, 0.0)
    assert (spec.seed, spec.adam_beta1) == (0, 0.0)


def test_resolving_twice_changes_nothing_and_the_input_stays_as_it_was() -> None:
    given = dreambooth(samples=[{"prompt": "zkw dog"}])
    before = given.SerializeToString(deterministic=True)
    resolved = resolve_training_spec(given)
    assert resolve_training_spec(resolved) == resolved
    assert given.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("fields", "steps", "epochs"),
    [
        ({}, 2000, 1),
        ({"num_train_epochs": 7}, 0, 7),
        ({"max_train_steps": 30}, 30, 1),
        ({"max_train_steps": 30, "num_train_epochs": 7}, 30, 7),
    ],
    ids=["neither", "epochs", "steps", "both"],
)
def test_steps_beat_epochs(fields: dict[str, int], steps: int, epochs: int) -> None:
    spec = resolve_training_spec(dreambooth(**fields))
    assert (spec.max_train_steps, spec.num_train_epochs) == (steps, epochs)


def test_the_first_concept_seed_becomes_the_jobs_seed_unless_the_job_has_one() -> None:
    spec = dreambooth()
    spec.concepts[0].seed = 42
    assert resolve_training_spec(spec).seed == 42
    spec.seed = 7
    assert resolve_training_spec(spec).seed == 7


def test_low_rank_training_gets_its_own_rate_and_settings() -> None:
    spec = resolve_training_spec(dreambooth(method=pb.TRAINING_METHOD_LOCON))
    assert spec.learning_rate == 1e-4
    assert (spec.lora.rank, spec.lora.alpha, spec.lora.conv_rank, spec.lora.conv_alpha) == (4, 4.0, 4, 4.0)
    assert resolve_training_spec(dreambooth(method=pb.TRAINING_METHOD_LORA)).lora.conv_rank == 0


def test_samples_are_resolved_and_keep_an_unset_seed() -> None:
    sample = resolve_training_spec(dreambooth(samples=[{"prompt": "zkw dog"}])).samples[0]
    assert (sample.num_inference_steps, sample.guidance_scale, sample.num_images) == (50, 7.5, 1)
    assert not sample.HasField("seed")


EDGES = [
    ("train_batch_size", 32, 33),
    ("gradient_accumulation_steps", 64, 65),
    ("num_train_epochs", 10_000, 10_001),
    ("max_train_steps", 100_000, 100_001),
    ("learning_rate", 1.0, 1.0001),
    ("learning_rate", 1e-12, -1e-6),
    ("text_encoder_learning_rate", 1.0, 0.0),
    ("lr_num_cycles", 100, 101),
    ("adam_beta1", 0.9999, 1.0),
    ("adam_beta1", 0.0, -0.1),
    ("adam_beta2", 0.9999, 1.0),
    ("adam_weight_decay", 1.0, 1.01),
    ("adam_epsilon", 1.0, 1.01),
    ("adam_epsilon", 1e-12, 0.0),
    ("max_grad_norm", 1000.0, 1000.1),
    ("max_grad_norm", 0.0, -1.0),
    ("prior_loss_weight", 10.0, 10.1),
    ("prior_loss_weight", 0.0, float("nan")),
    ("sample_batch_size", 32, 33),
    ("clip_skip", 4, 5),
    ("caption_dropout", 1.0, 1.1),
    ("flip_probability", 1.0, 1.1),
    ("resolution", 256, 192),
    ("resolution", 1024, 1088),
    ("resolution", 576, 520),
    ("seed", 2**63 - 1, 2**63),
    ("crop_jitter", 0.02, 0.03),
    ("ema_decay", 0.999, 1.0),
    ("publish_every_minutes", 0.0, float("inf")),
]


@pytest.mark.parametrize(
    ("field", "inside", "outside"), EDGES, ids=[f"{edge[0]}-{edge[2]}" for edge in EDGES]
)
def test_the_last_value_of_a_range_is_taken_and_the_next_refused(
    field: str, inside: Any, outside: Any
) -> None:
    assert getattr(resolve_training_spec(dreambooth(**{field: inside})), field) == inside
    assert faults_of(dreambooth(**{field: outside})) == [field]


def test_everydream_knows_its_own_resolutions() -> None:
    assert resolve_training_spec(everydream(resolution=1152)).resolution == 1152
    assert faults_of(everydream(resolution=320)) == ["resolution"]


def test_all_faults_are_reported_together() -> None:
    spec = pb.TrainingSpec(
        train_batch_size=99,
        learning_rate=2,
        samples=[{"prompt": "", "num_images": 11}],
        concepts=[pb.Concept(class_prompt="dog", instance_data=pb.ImageSource(archive_url="ftp://x/y"))],
    )
    assert faults_of(spec) == [
        "train_batch_size",
        "learning_rate",
        "concepts[0].instance_data",
        "concepts[0].instance_prompt",
        "samples[0].num_images",
        "samples[0].prompt",
    ]


def test_concepts_are_required_and_counted() -> None:
    assert faults_of(pb.TrainingSpec()) == ["concepts"]
    spec = dreambooth()
    for _ in range(8):
        spec.concepts.add().CopyFrom(spec.concepts[0])
    assert faults_of(spec) == ["concepts"]
    spec = everydream()
    spec.concepts.add().CopyFrom(spec.concepts[0])
    assert faults_of(spec) == ["concepts"]


def test_samples_are_counted_and_name_no_model() -> None:
    assert faults_of(dreambooth(samples=[{"prompt": "x"}] * 33)) == ["samples"]
    assert faults_of(dreambooth(samples=[{"prompt": "x", "model": "other"}])) == ["samples[0].model"]


def test_prior_preservation_without_any_class_picture_is_refused() -> None:
    spec = dreambooth()
    spec.concepts[0].num_class_images = 0
    assert faults_of(spec) == ["concepts[0].num_class_images"]
    spec.with_prior_preservation = False
    assert resolve_training_spec(spec).concepts[0].num_class_images == 0
    spec.concepts[0].class_prompt = ""
    spec.ClearField("with_prior_preservation")
    spec.concepts[0].class_data.archive_url = "https://files.example.org/dogs.zip"
    assert faults_of(spec) == ["concepts[0].class_prompt"]
    spec.concepts[0].class_prompt = "dog"
    assert resolve_training_spec(spec).concepts[0].num_class_images == 0


def test_a_prompt_may_have_a_thousand_characters_and_not_one_more() -> None:
    spec = dreambooth()
    spec.concepts[0].instance_prompt = "x" * 1000
    resolve_training_spec(spec)
    spec.concepts[0].instance_prompt = "x" * 1001
    assert faults_of(spec) == ["concepts[0].instance_prompt"]


def test_a_polynomial_schedule_must_start_above_its_end() -> None:
    polynomial = {"lr_scheduler": pb.LEARNING_RATE_SCHEDULE_POLYNOMIAL, "max_train_steps": 100}
    assert faults_of(dreambooth(**polynomial, learning_rate=1e-7)) == ["learning_rate"]
    assert faults_of(dreambooth(**polynomial, text_encoder_learning_rate=1e-8)) == [
        "text_encoder_learning_rate"
    ]
    scaled = dreambooth(**polynomial, learning_rate=1e-7, scale_learning_rate=True, train_batch_size=2)
    assert resolve_training_spec(scaled).learning_rate == 1e-7


def test_a_polynomial_schedule_needs_updates_after_its_warm_up() -> None:
    polynomial = {"lr_scheduler": pb.LEARNING_RATE_SCHEDULE_POLYNOMIAL, "max_train_steps": 100}
    assert faults_of(dreambooth(**polynomial, lr_warmup_steps=100)) == ["lr_warmup_steps"]
    assert resolve_training_spec(dreambooth(**polynomial, lr_warmup_steps=99)).lr_warmup_steps == 99
    linear = {"lr_scheduler": pb.LEARNING_RATE_SCHEDULE_LINEAR, "max_train_steps": 100}
    assert resolve_training_spec(dreambooth(**linear, lr_warmup_steps=100)).lr_warmup_steps == 100


def test_something_must_train() -> None:
    assert faults_of(dreambooth(train_unet=False, train_text_encoder=False)) == ["train_text_encoder"]


def test_unknown_enumeration_values_are_refused() -> None:
    assert faults_of(dreambooth(lr_scheduler=99)) == ["lr_scheduler"]


@pytest.mark.parametrize(
    ("fields", "faults"),
    [
        ({"resume_checkpoint_url": "file:///models/a.ckpt"}, ["resume_checkpoint_url"]),
        ({"resume_checkpoint_url": "../a"}, ["resume_checkpoint_url"]),
        ({"resume_checkpoint_url": "a/b/c"}, ["resume_checkpoint_url"]),
        ({"revision": "main"}, ["revision"]),
    ],
)
def test_starting_weights_that_are_neither_an_address_nor_a_repository_are_refused(
    fields: dict[str, str], faults: list[str]
) -> None:
    assert faults_of(dreambooth(**fields)) == faults


@pytest.mark.parametrize("address", ["somebody/a-model.v2", "https://models.example.org/a.ckpt"])
def test_starting_weights_are_named_by_an_address_or_a_repository(address: str) -> None:
    spec = resolve_training_spec(dreambooth(resume_checkpoint_url=address, revision="main"))
    assert (spec.resume_checkpoint_url, spec.revision) == (address, "main")


@pytest.mark.parametrize("folder", ["../x", "/x", "a/../b", "C:/x", "a\\..\\b"])
def test_a_hub_subfolder_stays_inside_the_repository(folder: str) -> None:
    fields = {"resume_checkpoint_url": "https://hub.example.org/a/b", "hub_subfolder": folder}
    assert faults_of(dreambooth(**fields)) == ["hub_subfolder"]


def test_lora_settings_without_a_low_rank_method_are_refused() -> None:
    assert faults_of(dreambooth(lora={"rank": 4})) == ["lora"]
    assert faults_of(dreambooth(method=pb.TRAINING_METHOD_LORA, lora={"rank": 1025})) == ["lora.rank"]


def test_addresses_with_credentials_are_refused_without_showing_them() -> None:
    spec = dreambooth()
    spec.concepts[0].instance_data.archive_url = "https://user:hunter2@files.example.org/rex.zip"
    with pytest.raises(InvalidSpec) as caught:
        resolve_training_spec(spec)
    assert "hunter2" not in str(caught.value)
    assert caught.value.violations[0].field == "concepts[0].instance_data"
