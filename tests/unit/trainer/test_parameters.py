"""One proof a parameter: each test fails if the recipe ignores the field it is named for."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D
from likeness.training.v1 import training_job_pb2 as pb
from safetensors.torch import load_file
from transformers import CLIPTextModel
from transformers.models.clip import modeling_clip

from services.diffusion.loading import load_components
from services.domain.errors import BadInput, InvalidSpec
from services.trainer import optim, randomness, updates
from services.trainer.batches import BatchSource, prompt_caption
from services.trainer.captions import UseRules
from services.trainer.conditioning import TextConditioner
from services.trainer.data import PictureReader, Use
from services.trainer.losses import NoiseSchedule, noise_schedule_of
from services.trainer.moving_average import MovingAverage
from services.trainer.randomness import Purpose
from services.trainer.report import REPORT
from services.trainer.support import OF_OTHERS, RECIPES, check_supported, honoured
from tests.unit.trainer.harness import (
    RESOLUTION,
    Bench,
    Trained,
    base_weights,
    complete_spec,
    is_training,
    largest_difference,
    make_concept,
    same_bits,
    spying,
)
from tests.unit.trainer.proofs import PROOFS, places


def test_every_field_of_the_specification_is_proved_refused_or_of_others() -> None:
    fields = {field.name for field in pb.TrainingSpec.DESCRIPTOR.fields}
    acted_upon = frozenset[str]().union(*(honoured(recipe) for recipe in RECIPES))
    assert set(PROOFS) == acted_upon
    assert fields >= acted_upon | OF_OTHERS.keys()
    assert not acted_upon & OF_OTHERS.keys()
    assert set(PROOFS.values()) <= places().keys()
    refused = fields - acted_upon - OF_OTHERS.keys()
    assert refused == set(REFUSED_VALUES)


OF_CAPTIONED_TRAINING: dict[str, Any] = {
    "aspect_ratio_bucketing": True,
    "crop_jitter": 0.01,
    "rated_dataset": True,
}


@pytest.mark.parametrize("field", OF_CAPTIONED_TRAINING)
def test_what_only_captioned_training_does_is_refused_by_dreambooth(field: str, bench: Bench) -> None:
    with pytest.raises(InvalidSpec, match=f"{field}: is not supported by the DreamBooth recipe"):
        bench.train(complete_spec(**{field: OF_CAPTIONED_TRAINING[field]}))


REFUSED_VALUES: dict[str, Any] = {
    "bucket_upload": pb.BucketUpload(bucket="b"),
    "subject_crop": pb.SUBJECT_CROP_CENTER,
    "sandbox": True,
}


@pytest.mark.parametrize("field", sorted(REFUSED_VALUES))
def test_what_the_recipe_cannot_do_is_refused_by_name(field: str, bench: Bench) -> None:
    with pytest.raises(InvalidSpec, match=f"{field}: is not supported"):
        bench.train(complete_spec(**{field: REFUSED_VALUES[field]}))


def test_an_unknown_recipe_is_refused(bench: Bench) -> None:
    with pytest.raises(InvalidSpec, match="recipe: must be DreamBooth or EveryDream"):
        check_supported(complete_spec(recipe=9))


def test_a_specification_with_open_defaults_is_refused(bench: Bench) -> None:
    spec = complete_spec()
    spec.ClearField("adam_epsilon")
    with pytest.raises(InvalidSpec, match="adam_epsilon: must be resolved"):
        bench.train(spec)


NOISE = noise_schedule_of({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})


class UnetSpy:
    """Notes the shapes of every forward pass of the UNet that trains; the others do not."""

    def __init__(self) -> None:
        self.samples: list[tuple[int, ...]] = []
        self.text: list[tuple[int, ...]] = []

    def __call__(
        self, unet: Any, sample: torch.Tensor, t: Any, encoder_hidden_states: torch.Tensor, **options: Any
    ) -> None:
        if is_training(sample):
            self.samples.append(tuple(sample.shape))
            self.text.append(tuple(encoder_hidden_states.shape))


def watched(bench: Bench, spec: pb.TrainingSpec, name: str = "run", **data: Any) -> tuple[Trained, UnetSpy]:
    spy = UnetSpy()
    concept = make_concept(bench.folder / f"{name}-data", **data)
    with spying(UNet2DConditionModel, "forward", spy):
        return bench.train(spec, (concept,), name), spy


def test_concepts_prompts_reach_the_text_encoder(bench: Bench) -> None:
    spec = complete_spec(with_prior_preservation=False, max_train_steps=1)
    one, _ = watched(bench, spec, "one", instance_prompt="a red circle")
    other, _ = watched(bench, spec, "other", instance_prompt="a blue star")
    assert not same_bits(one.weights(), other.weights())


def test_seed_decides_all_weights(bench: Bench) -> None:
    first = bench.train(complete_spec(), name="first")
    again = bench.train(complete_spec(), name="again")
    other = bench.train(complete_spec(seed=8), name="other")
    assert same_bits(first.weights(), again.weights())
    assert not same_bits(first.weights(), other.weights())
    assert first.report()["seed"] == 7


@pytest.mark.parametrize("resolution", [16, 32])
def test_resolution_sets_the_size_the_unet_sees(resolution: int, bench: Bench) -> None:
    spec = complete_spec(resolution=resolution, max_train_steps=1, with_prior_preservation=False)
    _, spy = watched(bench, spec, size=(40, 30))
    assert spy.samples == [(1, 4, resolution // 2, resolution // 2)]


def test_center_crop_changes_wide_pictures_and_not_square_ones(bench: Bench) -> None:
    def weights(center_crop: bool, size: tuple[int, int]) -> dict[str, torch.Tensor]:
        name = f"{center_crop}-{size[0]}"
        trained, _ = watched(bench, complete_spec(center_crop=center_crop), name, size=size)
        return trained.weights()

    assert not same_bits(weights(True, (40, 16)), weights(False, (40, 16)))
    assert same_bits(weights(True, (16, 16)), weights(False, (16, 16)))


@pytest.mark.parametrize(("probability", "at_least", "at_most"), [(0.0, 0, 0), (1.0, 24, 24), (0.5, 6, 18)])
def test_flip_probability_mirrors_its_share_of_uses_before_they_are_encoded(
    probability: float, at_least: int, at_most: int, bench: Bench
) -> None:
    encoded: list[torch.Tensor] = []
    used: list[bool] = []

    def note_square(reader: PictureReader, use: Use) -> None:
        used.append(original(reader, use).mirrored)

    original = PictureReader.geometry
    with (
        spying(AutoencoderKL, "encode", lambda vae, values: encoded.append(values)),
        spying(PictureReader, "geometry", note_square),
    ):
        spec = complete_spec(flip_probability=probability, max_train_steps=24, with_prior_preservation=False)
        trained, _ = watched(bench, spec, instances=2)
    assert trained.outcome.step == len(used) == 24
    assert at_least <= sum(used) <= at_most
    # Red grows with the column, and falls in a mirrored picture: each picture is encoded once in each form it has.
    forms = [bool(values[0, 0, 0, 0] > values[0, 0, 0, -1]) for values in encoded]
    expected = {0.0: [False] * 2, 1.0: [True] * 2, 0.5: [False, False, True, True]}
    assert sorted(forms) == expected[probability]


def test_num_train_epochs_counts_passes_over_the_longer_list(bench: Bench) -> None:
    values = {"num_train_epochs": 2, "max_train_steps": 0, "train_batch_size": 2}
    with_prior, _ = watched(bench, complete_spec(**values), "with", instances=3, classes=7)
    without, _ = watched(
        bench, complete_spec(with_prior_preservation=False, **values), "without", instances=3, classes=7
    )
    assert (with_prior.outcome.step, without.outcome.step) == (8, 4)


def test_max_train_steps_counts_updates_and_wins_over_epochs(bench: Bench) -> None:
    spec = complete_spec(max_train_steps=5, num_train_epochs=1, gradient_accumulation_steps=2)
    trained, spy = watched(bench, spec, instances=4, classes=4)
    assert trained.outcome.step == len(trained.learning_rates) == 5
    assert len(spy.samples) == 10


def test_train_batch_size_is_the_instance_half_of_what_the_unet_sees(bench: Bench) -> None:
    values = {"train_batch_size": 3, "max_train_steps": 1}
    _, with_prior = watched(bench, complete_spec(**values), "with")
    _, without = watched(bench, complete_spec(with_prior_preservation=False, **values), "without")
    assert (with_prior.samples[0][0], without.samples[0][0]) == (6, 3)


def test_gradient_accumulation_steps_make_the_update_of_one_large_batch(bench: Bench) -> None:
    # A tenth of the usual rate, and plain steps of Adam's epsilon size: differences of rounding stay small.
    values = {"max_train_steps": 1, "pad_tokens": True, "adam_epsilon": 1e-3, "learning_rate": 1e-4}
    weights = []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        spec = complete_spec(train_batch_size=batch, gradient_accumulation_steps=accumulation, **values)
        trained, spy = watched(bench, spec, f"{batch}x{accumulation}", instances=4, classes=4)
        assert len(spy.samples) == accumulation
        weights.append(trained.weights())
    assert largest_difference(weights[0], weights[1]) < 1e-5
    assert largest_difference(weights[0], weights[2]) < 1e-5
    assert largest_difference(weights[0], base_weights(bench.model_folder)) > 5e-5


def test_a_short_group_is_averaged_over_the_samples_it_has(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_one(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (prediction - target).flatten(1).sum(1) * 0 + 1

    monkeypatch.setattr(updates, "per_sample_mse", all_one)
    values = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "prior_loss_weight": 0.7}
    trained, spy = watched(bench, complete_spec(max_train_steps=4, **values), instances=5, classes=3)
    # Five pairs an epoch: an update of two passes with four pairs, and one of a single pair.
    assert [shape[0] for shape in spy.samples] == [4, 4, 2] * 2
    assert trained.losses == pytest.approx([1.7] * 4, rel=1e-6)


def training_call(seen: list[int]) -> Callable[..., None]:
    """Counts calls that gradients flow through."""

    def note(*arguments: Any, **named: Any) -> None:
        if is_training(*arguments, *named.values()):
            seen.append(1)

    return note


def test_gradient_checkpointing_recomputes_and_gives_the_same_weights(bench: Bench) -> None:
    passes: dict[str, int] = {}
    weights = {}
    for name, flag in (("plain", False), ("recomputed", True)):
        calls: list[int] = []
        text_calls: list[int] = []
        with (
            spying(modeling_clip.CLIPMLP, "forward", training_call(text_calls)),
            spying(AttnProcessor2_0, "__call__", training_call(calls)),
        ):
            trained = bench.train(complete_spec(max_train_steps=1, gradient_checkpointing=flag), name=name)
        passes[name], passes[f"{name} text"] = len(calls), len(text_calls)
        weights[name] = trained.weights()
    assert passes["recomputed"] == 2 * passes["plain"] > 0
    assert passes["recomputed text"] == 2 * passes["plain text"]
    assert largest_difference(weights["plain"], weights["recomputed"]) < 1e-6


def test_mixed_precision_sets_the_type_of_activations(bench: Bench) -> None:
    types: dict[int, torch.dtype] = {}
    losses = {}
    for precision in (pb.MIXED_PRECISION_UNSPECIFIED, pb.MIXED_PRECISION_NO, pb.MIXED_PRECISION_BF16):

        def note(block: Any, *a: Any, hidden_states: torch.Tensor, key: int = precision, **k: Any) -> None:
            if is_training(hidden_states):
                types[key] = block.resnets[0].conv1(hidden_states).dtype

        with spying(CrossAttnDownBlock2D, "forward", note):
            trained = bench.train(
                complete_spec(mixed_precision=precision, max_train_steps=2), name=str(precision)
            )
        losses[precision] = trained.losses
        assert all(tensor.dtype is torch.float32 for tensor in trained.weights().values())
    assert types[pb.MIXED_PRECISION_UNSPECIFIED] is torch.float32, "AUTO on a CPU"
    assert types[pb.MIXED_PRECISION_NO] is torch.float32
    assert types[pb.MIXED_PRECISION_BF16] is torch.bfloat16
    assert losses[pb.MIXED_PRECISION_BF16] == pytest.approx(losses[pb.MIXED_PRECISION_NO], rel=0.03)
    assert losses[pb.MIXED_PRECISION_BF16] != losses[pb.MIXED_PRECISION_NO]


def test_pictures_are_encoded_in_float32_beside_a_float16_network(bench: Bench) -> None:
    types: list[torch.dtype] = []

    def note(vae: AutoencoderKL, values: torch.Tensor) -> None:
        types.append(vae.encoder.conv_in(values).dtype)

    with spying(AutoencoderKL, "encode", note):
        for name in ("FP16", "BF16"):
            precision = pb.MixedPrecision.Value(f"MIXED_PRECISION_{name}")
            spec = complete_spec(mixed_precision=precision, max_train_steps=1, with_prior_preservation=False)
            bench.train(spec, name=name)
    assert types == [torch.float32, torch.bfloat16]


def test_disable_fused_attention_swaps_the_kernels(bench: Bench) -> None:
    runs = {}
    for flag in (False, True):
        plain: list[int] = []
        fused: list[int] = []
        plain_text: list[int] = []
        with (
            spying(AttnProcessor, "__call__", training_call(plain)),
            spying(AttnProcessor2_0, "__call__", training_call(fused)),
            spying(modeling_clip, "eager_attention_forward", training_call(plain_text)),
        ):
            runs[flag] = bench.train(
                complete_spec(disable_fused_attention=flag, max_train_steps=1), name=str(flag)
            )
        assert len(plain if flag else fused) >= 4
        assert not (fused if flag else plain)
        assert bool(plain_text) == flag
    assert runs[True].losses == pytest.approx(runs[False].losses, abs=1e-4)
    assert "sdpa" in runs[False].outcome.execution_summary
    assert "plain attention" in runs[True].outcome.execution_summary


def moved(trained: Trained, bench: Bench, component: str) -> float:
    """The largest change of any weight of one component."""
    base, weights = base_weights(bench.model_folder), trained.weights()
    names = [name for name in weights if name.startswith(component)]
    return max(float((weights[name] - base[name]).abs().max()) for name in names)


@pytest.mark.parametrize("learning_rate", [1e-3, 1e-5])
def test_learning_rate_is_the_size_of_the_first_update(learning_rate: float, bench: Bench) -> None:
    spec = complete_spec(learning_rate=learning_rate, adam_weight_decay=0.0, max_train_steps=1)
    trained = bench.train(spec)
    assert trained.learning_rates == [learning_rate]
    assert moved(trained, bench, "unet") == pytest.approx(learning_rate, rel=0.05)


def test_text_encoder_learning_rate_applies_to_the_text_encoder_alone(bench: Bench) -> None:
    spec = complete_spec(text_encoder_learning_rate=1e-4, adam_weight_decay=0.0, max_train_steps=1)
    trained = bench.train(spec)
    assert moved(trained, bench, "unet") == pytest.approx(1e-3, rel=0.05)
    assert moved(trained, bench, "text_encoder") == pytest.approx(1e-4, rel=0.05)


def test_scale_learning_rate_multiplies_by_batch_and_accumulation(bench: Bench) -> None:
    values = {"train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-5}
    for flag, factor in ((False, 1), (True, 8)):
        trained, _ = watched(bench, complete_spec(scale_learning_rate=flag, **values), str(flag), instances=8)
        assert trained.learning_rates == pytest.approx([factor * 1e-5] * 3, rel=1e-12)


CURVES = {
    "CONSTANT": [1.0, 1.0, 1.0, 1.0],
    "CONSTANT_WITH_WARMUP": [0.0, 1.0, 1.0, 1.0],
    "LINEAR": [0.0, 1.0, 2 / 3, 1 / 3],
    "COSINE": [0.0, 1.0, 0.75, 0.25],
    "COSINE_WITH_RESTARTS": [0.0, 1.0, 0.25, 0.75],
    "POLYNOMIAL": [0.0, 1.0, (2 * 1e-3 + 1e-7) / 3e-3, (1e-3 + 2e-7) / 3e-3],
}


@pytest.mark.parametrize("name", CURVES)
def test_lr_scheduler_gives_each_name_its_curve(name: str, bench: Bench) -> None:
    schedule = pb.LearningRateSchedule.Value(f"LEARNING_RATE_SCHEDULE_{name}")
    spec = complete_spec(lr_scheduler=schedule, lr_warmup_steps=1, lr_num_cycles=2, max_train_steps=4)
    trained = bench.train(spec)
    assert trained.learning_rates == pytest.approx([1e-3 * factor for factor in CURVES[name]], abs=1e-12)


def test_lr_warmup_steps_count_updates(bench: Bench) -> None:
    spec = complete_spec(
        lr_scheduler=pb.LEARNING_RATE_SCHEDULE_CONSTANT_WITH_WARMUP,
        lr_warmup_steps=4,
        gradient_accumulation_steps=2,
        max_train_steps=6,
    )
    assert bench.train(spec).learning_rates == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3], abs=1e-12)


def test_lr_decay_steps_end_the_curve(bench: Bench) -> None:
    spec = complete_spec(lr_scheduler=pb.LEARNING_RATE_SCHEDULE_LINEAR, lr_decay_steps=2, max_train_steps=4)
    assert bench.train(spec).learning_rates == pytest.approx([1e-3, 5e-4, 0, 0], abs=1e-12)


def test_lr_num_cycles_restarts_the_cosine(bench: Bench) -> None:
    schedule = pb.LEARNING_RATE_SCHEDULE_COSINE_WITH_RESTARTS
    spec = complete_spec(lr_scheduler=schedule, lr_num_cycles=2, max_train_steps=4)
    assert bench.train(spec).learning_rates == pytest.approx([1e-3, 5e-4, 1e-3, 5e-4], abs=1e-12)


@pytest.mark.parametrize(
    ("precision", "bits"),
    [
        (pb.OPTIMIZER_PRECISION_UNSPECIFIED, 32),
        (pb.OPTIMIZER_PRECISION_THIRTY_TWO_BIT, 32),
        (pb.OPTIMIZER_PRECISION_EIGHT_BIT, 8),
    ],
    ids=["auto on a CPU", "32", "8"],
)
def test_optimizer_precision_is_obeyed(precision: int, bits: int, bench: Bench) -> None:
    built: list[bool] = []
    with spying(updates, "build_adamw", lambda *a, eight_bit, **k: built.append(eight_bit)):
        trained = bench.train(complete_spec(optimizer_precision=precision, max_train_steps=2))
    assert built == [bits == 8]
    assert f"AdamW {bits}-bit" in trained.outcome.execution_summary


def test_eight_bit_moments_learn_like_32_bit_ones(bench: Bench) -> None:
    runs = [
        bench.train(complete_spec(optimizer_precision=precision, max_train_steps=6), name=str(precision))
        for precision in (pb.OPTIMIZER_PRECISION_THIRTY_TWO_BIT, pb.OPTIMIZER_PRECISION_EIGHT_BIT)
    ]
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=0.02)
    assert not same_bits(runs[0].weights(), runs[1].weights())


@pytest.mark.parametrize(
    "change",
    [{"adam_beta1": 0.5}, {"adam_beta2": 0.9}, {"adam_weight_decay": 0.5}],
    ids=lambda c: next(iter(c)),
)
def test_each_adam_parameter_changes_the_second_update(change: dict[str, float], bench: Bench) -> None:
    spec = complete_spec(max_train_steps=2)
    assert not same_bits(
        bench.train(spec, name="usual").weights(),
        bench.train(complete_spec(max_train_steps=2, **change), name="changed").weights(),
    )
    (field,) = change
    expected = {"betas": (0.9, 0.999), "epsilon": 1e-8, "weight_decay": 1e-2}
    if field.startswith("adam_beta"):
        expected["betas"] = (change.get("adam_beta1", 0.9), change.get("adam_beta2", 0.999))
    else:
        expected["weight_decay"] = 0.5
    built: list[dict[str, Any]] = []
    with spying(updates, "build_adamw", lambda groups, **named: built.append(named)):
        bench.train(complete_spec(max_train_steps=1, **change), name="spied")
    assert {name: built[0][name] for name in expected} == expected


def test_adam_epsilon_of_one_all_but_stops_learning_and_is_warned_about(bench: Bench) -> None:
    values = {"adam_weight_decay": 0.0, "max_train_steps": 1}
    usual = bench.train(complete_spec(**values), name="usual")
    huge = bench.train(complete_spec(adam_epsilon=1.0, **values), name="huge")
    assert moved(huge, bench, "unet") < moved(usual, bench, "unet") / 2
    assert not any("adam_epsilon" in warning for warning in usual.outcome.warnings)
    assert "adam_epsilon 1 is so large" in huge.outcome.warnings[0]


def test_max_grad_norm_limits_the_joint_norm(bench: Bench) -> None:
    clipped: list[float] = []

    def note(optimizer: torch.optim.Optimizer, *a: Any, **k: Any) -> None:
        gradients = [
            p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        clipped.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))

    norms = {}
    for limit in (0.0, 1e-3, 1e6):
        clipped.clear()
        with spying(torch.optim.AdamW, "step", note):
            trained = bench.train(complete_spec(max_grad_norm=limit, max_train_steps=1), name=str(limit))
        norms[limit] = clipped[0]
    before = trained.recorder.updates[0].gradient_norm
    assert before > 0.1
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-2)
    assert norms[0.0] == pytest.approx(before, rel=1e-5)
    assert norms[1e6] == pytest.approx(before, rel=1e-5)


def test_with_prior_preservation_reads_class_pictures(bench: Bench) -> None:
    concept = make_concept(bench.folder / "data")
    for picture in concept.class_pictures:
        picture.path.unlink()
    without = bench.train(complete_spec(with_prior_preservation=False), (concept,), "without")
    assert without.outcome.step == 3
    with pytest.raises(FileNotFoundError):
        bench.train(complete_spec(), (concept,), "with")


@pytest.mark.parametrize("switch", [True, False])
def test_a_concepts_own_switch_decides_whether_it_trains_with_prior_preservation(
    switch: bool, bench: Bench
) -> None:
    spec = complete_spec(with_prior_preservation=not switch, max_train_steps=1)
    spec.concepts.add(with_prior_preservation=switch)
    _, spy = watched(bench, spec)
    assert spy.samples[0][0] == (2 if switch else 1)


def test_prior_loss_weight_scales_the_class_term(bench: Bench) -> None:
    losses = [
        bench.train(complete_spec(prior_loss_weight=weight, max_train_steps=1), name=str(weight)).losses[0]
        for weight in (0.5, 1.0, 1.5)
    ]
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], abs=1e-6)
    assert losses[1] - losses[0] > 0.1


@pytest.mark.parametrize("padded", [False, True])
def test_prior_loss_weight_zero_is_bitwise_no_prior_preservation(padded: bool, bench: Bench) -> None:
    zero = bench.train(complete_spec(prior_loss_weight=0.0, pad_tokens=padded), name="zero")
    off = bench.train(complete_spec(with_prior_preservation=False, pad_tokens=padded), name="off")
    assert same_bits(zero.weights(), off.weights())


def test_train_unet_false_leaves_the_unet(bench: Bench) -> None:
    trained = bench.train(complete_spec(train_unet=False))
    assert {name.split(".")[0] for name in trained.weights()} == {"text_encoder"}
    assert moved(trained, bench, "text_encoder") > 1e-4


def test_train_text_encoder_false_leaves_the_text_encoder(bench: Bench) -> None:
    frozen: list[bool] = []

    def note(encoder: CLIPTextModel, *a: Any, **k: Any) -> None:
        frozen.append(not any(parameter.requires_grad for parameter in encoder.parameters()))

    with spying(CLIPTextModel, "forward", note):
        trained = bench.train(complete_spec(train_text_encoder=False))
    assert {name.split(".")[0] for name in trained.weights()} == {"unet"}
    # One pass a prompt, then the kept vectors; two more for the drawings that prove the export, one of a fresh model.
    assert frozen == [True, True, True, False]


def test_training_neither_model_is_refused(bench: Bench) -> None:
    with pytest.raises(InvalidSpec, match="train_unet: must be set"):
        bench.train(complete_spec(train_unet=False, train_text_encoder=False))


@pytest.mark.parametrize("trains", [True, False], ids=["trained", "frozen"])
def test_pad_tokens_sets_the_length_the_unet_attends_to(trains: bool, bench: Bench) -> None:
    values = {"max_train_steps": 1, "train_text_encoder": trains}
    short, seen_short = watched(bench, complete_spec(**values), "short")
    padded, seen_padded = watched(bench, complete_spec(pad_tokens=True, **values), "padded")
    # "a photo of a dog on the beach" is the longer prompt: eight words, a start and an end.
    assert seen_short.text == [(2, 10, 32)]
    assert seen_padded.text == [(2, 77, 32)]
    assert not same_bits(short.weights(), padded.weights())


@pytest.mark.parametrize(("full", "expected"), [(True, torch.float32), (False, torch.float16)])
def test_save_full_precision_sets_the_type_of_the_published_weights(
    full: bool, expected: torch.dtype, bench: Bench
) -> None:
    trained = bench.train(complete_spec(save_full_precision=full, max_train_steps=1))
    assert {tensor.dtype for tensor in trained.weights().values()} == {expected}


def test_weights_too_large_for_16_bits_are_published_in_32_with_a_warning(bench: Bench) -> None:
    original = optim.set_learning_rates

    def enlarge(optimizer: torch.optim.Optimizer, *a: Any) -> None:
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].view(-1)[0] = 1e6

    with spying(updates, "set_learning_rates", enlarge):
        trained = bench.train(complete_spec(save_full_precision=False, max_train_steps=1, learning_rate=1e-9))
    assert optim.set_learning_rates is original
    assert {tensor.dtype for tensor in trained.weights().values()} == {torch.float32}
    assert trained.outcome.warnings[-1] == "published in 32 bits: some weights are too large for 16"


def test_samples_and_other_peoples_fields_change_no_weight(bench: Bench) -> None:
    plain = bench.train(complete_spec(), name="plain")
    spec = complete_spec(
        sample_batch_size=4, model_name="mine", test_negative_prompt="ugly", min_usable_images=2
    )
    spec.samples.add(prompt="a sks dog in the snow")
    assert same_bits(plain.weights(), bench.train(spec, name="with").weights())


def test_the_exported_text_encoder_has_prefixed_names(bench: Bench) -> None:
    trained = bench.train(complete_spec(max_train_steps=1))
    names = load_file(trained.run.export_folder / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)
    assert trained.outcome.files[-1] == Path(REPORT)


def test_a_prompt_that_does_not_fit_is_reported_with_the_lost_words(bench: Bench) -> None:
    concept = make_concept(bench.folder / "data", instance_prompt="dog " * 80 + "in snow")
    trained = bench.train(complete_spec(max_train_steps=1), (concept,))
    assert "in snow" in trained.outcome.warnings[0]
    assert "too long" in trained.outcome.warnings[0]


def test_equal_instance_and_class_prompts_are_warned_about(bench: Bench) -> None:
    concept = make_concept(bench.folder / "data", instance_prompt="a dog", class_prompt="a dog")
    trained = bench.train(complete_spec(max_train_steps=1), (concept,))
    assert "prompt are equal" in trained.outcome.warnings[0]


def with_prediction_type(bench: Bench, name: str) -> Path:
    """A copy of the model whose noise schedule names another prediction type."""
    folder = bench.folder / name
    shutil.copytree(bench.model_folder, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": name}))
    return folder


def test_the_models_own_prediction_type_decides_what_it_learns(bench: Bench) -> None:
    seen: list[tuple[torch.Tensor, ...]] = []

    def note(schedule: NoiseSchedule, z0: torch.Tensor, e: torch.Tensor, t: torch.Tensor) -> None:
        alpha = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
        seen.append((e, alpha.sqrt() * e - (1 - alpha).sqrt() * z0))

    errors: list[torch.Tensor] = []
    with (
        spying(updates, "training_target", note),
        spying(updates, "per_sample_mse", lambda prediction, target: errors.append(target)),
    ):
        bench.train(complete_spec(max_train_steps=1), name="noise")
        folder = with_prediction_type(bench, "v_prediction")
        trained = bench.train(complete_spec(max_train_steps=1), name="velocity", model_folder=folder)
    torch.testing.assert_close(errors[0], seen[0][0])
    torch.testing.assert_close(errors[1], seen[1][1])
    assert trained.report()["configuration"]["predictionType"] == "v_prediction"


def test_a_model_with_another_prediction_type_is_refused(bench: Bench) -> None:
    folder = with_prediction_type(bench, "sample")
    with pytest.raises(BadInput, match="'sample'"):
        bench.train(complete_spec(), model_folder=folder)


def test_the_fixture_trains_at_the_size_the_tests_assume() -> None:
    assert complete_spec().resolution == RESOLUTION


def test_no_two_draws_of_a_run_share_their_random_numbers(bench: Bench) -> None:
    drawn: list[tuple[Any, ...]] = []

    def note(seed: int, purpose: Purpose, *coordinates: Any) -> None:
        drawn.append((seed, purpose, *coordinates))

    with spying(randomness, "stream", note):
        bench.train(complete_spec(max_train_steps=12))
    assert len(drawn) == len(set(drawn))
    assert {name[0] for name in drawn} == {7}
    # Four epochs of three pairs: for both halves of each noise, a timestep, a posterior and two sides of a crop.
    # The class pictures are two, so each epoch takes one round of instances and two of classes.
    assert Counter(name[1] for name in drawn) == {
        Purpose.NOISE: 24,
        Purpose.TIMESTEP: 24,
        Purpose.VAE: 24,
        Purpose.CROP: 48,
        Purpose.ORDER: 4 * (1 + 2),
        Purpose.DROPOUT: 12,
    }


def test_seed_decides_the_order_of_the_pictures(bench: Bench) -> None:
    def order(seed: int) -> tuple[str, ...]:
        seen: list[str] = []
        with spying(BatchSource, "batch", lambda source, uses, *a: seen.append(uses[0].picture.sample_id)):
            bench.train(complete_spec(seed=seed), name=str(seed))
        return tuple(seen)

    orders = [order(seed) for seed in range(5)]
    assert all(len(set(seen)) == 3 for seen in orders)
    assert len(set(orders)) > 1


def test_clip_models_separately_limits_each_models_norm(bench: Bench) -> None:
    clipped: dict[bool, list[float]] = {}

    def note(optimizer: torch.optim.Optimizer, *a: Any, **k: Any) -> None:
        clipped[separately] = [
            float(torch.stack([p.grad.norm() for p in group["params"] if p.grad is not None]).norm())
            for group in optimizer.param_groups
        ]

    for separately in (False, True):
        with spying(torch.optim.AdamW, "step", note):
            spec = complete_spec(max_grad_norm=1e-3, clip_models_separately=separately, max_train_steps=1)
            trained = bench.train(spec, name=str(separately))
    assert clipped[True] == pytest.approx([1e-3, 1e-3], rel=1e-2)
    assert torch.tensor(clipped[False]).norm().item() == pytest.approx(1e-3, rel=1e-2)
    assert trained.recorder.updates[0].gradient_norm > 0.1, "the joint norm before clipping is reported"


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_part_is_frozen_after_its_own_steps(part: str, bench: Bench) -> None:
    other = "unet" if part == "text_encoder" else "text_encoder"
    frozen_early = bench.train(complete_spec(**{f"{part}_steps": 2}, max_train_steps=4), name="early")
    two = bench.train(complete_spec(max_train_steps=2), name="two")
    four = bench.train(complete_spec(max_train_steps=4), name="four")

    def of(trained: Trained, component: str) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in trained.weights().items() if name.startswith(component)}

    assert same_bits(of(frozen_early, part), of(two, part))
    assert not same_bits(of(frozen_early, other), of(two, other))
    assert not same_bits(of(frozen_early, part), of(four, part))


def test_a_training_ends_when_all_its_parts_are_frozen(bench: Bench) -> None:
    spec = complete_spec(unet_steps=2, text_encoder_steps=3, max_train_steps=50)
    assert bench.train(spec).outcome.step == 3


def test_the_curve_of_a_part_ends_with_its_own_steps(bench: Bench) -> None:
    linear = pb.LEARNING_RATE_SCHEDULE_LINEAR
    spec = complete_spec(unet_steps=2, text_encoder_steps=4, max_train_steps=50, lr_scheduler=linear)
    # The UNet's rate while it trains, then the text encoder's, which is half way down by then.
    assert bench.train(spec).learning_rates == pytest.approx([1e-3, 5e-4, 5e-4, 2.5e-4], abs=1e-12)


@pytest.mark.parametrize("skip", [0, 1, 2, 3])
def test_clip_skip_trains_and_conditions_on_an_inner_layer(skip: int, bench: Bench) -> None:
    seen: list[torch.Tensor] = []

    def note(unet: Any, sample: Any, t: Any, encoder_hidden_states: torch.Tensor, **k: Any) -> None:
        if is_training(sample):
            seen.append(encoder_hidden_states.detach().clone())

    spec = complete_spec(clip_skip=skip, max_train_steps=1, with_prior_preservation=False)
    with spying(UNet2DConditionModel, "forward", note):
        trained = bench.train(spec, name=str(skip))
    encoder = load_components(bench.model_folder).text_encoder
    tokens = load_components(bench.model_folder).tokenizer("a photo of sks dog", return_tensors="pt")
    states = encoder(tokens.input_ids, output_hidden_states=True).hidden_states
    norm = dict(encoder.named_modules())
    (final_norm,) = [module for name, module in norm.items() if name.endswith("final_layer_norm")]
    torch.testing.assert_close(seen[0], final_norm(states[-max(1, skip)]), atol=1e-5, rtol=0)
    base, weights = base_weights(bench.model_folder), trained.weights()
    layers = encoder.config.num_hidden_layers
    for layer in range(layers):
        names = [name for name in weights if f".layers.{layer}." in name]
        unchanged = all(torch.equal(weights[name], base[name]) for name in names)
        assert names
        assert unchanged == (layer >= layers - max(0, skip - 1)), layer
    assert trained.report()["clip_skip"] == skip


def test_clip_skip_zero_and_one_are_the_same(bench: Bench) -> None:
    none = bench.train(complete_spec(clip_skip=0), name="none")
    assert same_bits(none.weights(), bench.train(complete_spec(clip_skip=1), name="one").weights())


def test_a_clip_skip_beyond_the_layers_names_the_limit(bench: Bench) -> None:
    with pytest.raises(InvalidSpec, match="clip_skip: must be between 1 and 5"):
        bench.train(complete_spec(clip_skip=6))


def test_caption_dropout_of_one_makes_the_weights_independent_of_captions(bench: Bench) -> None:
    spec = complete_spec(caption_dropout=1.0)
    one, spy = watched(bench, spec, "one", instance_prompt="a red circle", class_prompt="a circle")
    other, _ = watched(bench, spec, "other", instance_prompt="a very blue star", class_prompt="a star")
    assert same_bits(one.weights(), other.weights())
    assert {shape[1] for shape in spy.text} == {2}, "a start and an end token"
    never, _ = watched(bench, complete_spec(), "never", instance_prompt="a red circle")
    assert not same_bits(one.weights(), never.weights())


def test_caption_dropout_drops_its_share_of_uses(bench: Bench) -> None:
    (picture,) = make_concept(bench.folder / "data", instances=1, classes=0).instance_pictures
    captions = [
        [prompt_caption(Use(picture, epoch, 0), UseRules(caption_dropout=rate)) for epoch in range(count)]
        for rate, count in ((0.1, 5000), (0.0, 100))
    ]
    assert captions[0].count("") / 5000 == pytest.approx(0.1, abs=0.013)
    assert set(captions[1]) == {picture.prompt}


def test_tags_of_a_prompt_are_shuffled_and_left_out_as_asked(bench: Bench) -> None:
    def seen(name: str, **values: Any) -> list[str]:
        prompts: list[str] = []
        concept = make_concept(
            bench.folder / "data", instances=1, classes=0, instance_prompt="sks dog, red, blue, green"
        )
        with spying(TextConditioner, "vectors", lambda conditioner, batch: prompts.extend(batch)):
            spec = complete_spec(max_train_steps=8, with_prior_preservation=False, **values)
            bench.train(spec, (concept,), name)
        return prompts

    shuffled, thinned = seen("shuffled", shuffle_tags=True), seen("thinned", tag_dropout=0.5)
    assert set(seen("plain")) == {"sks dog, red, blue, green"}
    assert {tuple(sorted(prompt.split(", "))) for prompt in shuffled} == {("blue", "green", "red", "sks dog")}
    assert len(set(shuffled)) > 2
    assert len({len(prompt) for prompt in thinned}) > 1
    assert all(prompt.startswith("sks dog") for prompt in shuffled + thinned)


def test_min_snr_gamma_weights_each_sample_by_its_own_timestep(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[torch.Tensor] = []

    def all_one(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (prediction - target).flatten(1).sum(1) * 0 + 1

    monkeypatch.setattr(updates, "per_sample_mse", all_one)
    spec = complete_spec(min_snr_gamma=0.5, prior_loss_weight=0.7, max_train_steps=2)
    with spying(updates, "add_noise", lambda schedule, z0, e, t: drawn.append(t)):
        trained = bench.train(spec)
    for loss, t in zip(trained.losses, drawn, strict=True):
        alpha = NOISE.alphas_cumprod[t].double()
        weights = (alpha / (1 - alpha)).clamp(max=0.5) * (1 - alpha) / alpha
        assert loss == pytest.approx(float(weights[0] + 0.7 * weights[1]), rel=1e-5)
    assert any(loss < 1.6 for loss in trained.losses), "some sample had more signal than gamma"


def test_offset_noise_moves_the_mean_of_whole_channels(bench: Bench) -> None:
    means: dict[float, list[torch.Tensor]] = {0.0: [], 0.5: []}
    targets: list[bool] = []
    for amplitude, seen in means.items():

        def note(schedule: Any, z0: torch.Tensor, e: torch.Tensor, t: Any, to: Any = seen) -> None:
            to.append(e.mean(dim=(2, 3)))

        with (
            spying(updates, "add_noise", note),
            spying(
                updates,
                "training_target",
                lambda s, z0, e, t, to=seen: targets.append(torch.equal(e.mean(dim=(2, 3)), to[-1])),
            ),
        ):
            spec = complete_spec(offset_noise=amplitude, max_train_steps=12, learning_rate=1e-6)
            bench.train(spec, name=str(amplitude))
    assert all(targets), "what is to be predicted includes it"
    # 96 channels' means: variance 1/64 from the 8 x 8 pixels, and a squared on top of it.
    plain, offset = (torch.cat(seen).var().item() for seen in means.values())
    assert plain == pytest.approx(1 / 64, rel=0.5)
    assert offset == pytest.approx(1 / 64 + 0.25, rel=0.5)


def test_ema_decay_publishes_the_moving_average(bench: Bench) -> None:
    stages: list[dict[str, torch.Tensor]] = []

    def note(average: MovingAverage) -> None:
        parameters = average._parameters
        stages.append({name: parameter.detach().clone() for name, parameter in parameters.items()})

    with spying(MovingAverage, "follow", note):
        averaged = bench.train(complete_spec(ema_decay=0.15), name="averaged")
    plain = bench.train(complete_spec(), name="plain")
    base = base_weights(bench.model_folder)
    name = "unet.conv_in.weight"
    expected = base[name].double()
    for update, stage in enumerate(stages, start=1):
        decay = min(0.15, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * stage[name].double()
    torch.testing.assert_close(averaged.weights()[name].double(), expected, atol=1e-7, rtol=0)
    assert torch.equal(stages[-1][name], plain.weights()[name]), "what trains is not the average"
    assert not same_bits(averaged.weights(), plain.weights())
    assert (averaged.report()["weights"], plain.report()["weights"]) == ("moving average", "last")


def test_zero_terminal_snr_trains_to_no_signal_and_draws_from_there(bench: Bench) -> None:
    ends: list[float] = []
    folder = with_prediction_type(bench, "v_prediction")
    with spying(updates, "add_noise", lambda s, *a: ends.append(float(s.alphas_cumprod[-1]))):
        for flag in (False, True):
            spec = complete_spec(zero_terminal_snr=flag, max_train_steps=1)
            trained = bench.train(spec, name=str(flag), model_folder=folder)
    assert ends[0] > 0
    assert ends[1] == 0
    assert Path("scheduler/scheduler_config.json") in trained.outcome.files
    config = json.loads((trained.run.export_folder / "scheduler" / "scheduler_config.json").read_text())
    assert (config["rescale_betas_zero_snr"], config["timestep_spacing"]) == (True, "trailing")
    assert config["prediction_type"] == "v_prediction"


def test_zero_terminal_snr_of_a_model_that_predicts_noise_is_refused(bench: Bench) -> None:
    with pytest.raises(InvalidSpec, match="zero_terminal_snr: needs a base model with v-prediction"):
        bench.train(complete_spec(zero_terminal_snr=True))


def test_balance_concepts_draws_all_concepts_equally_often(bench: Bench) -> None:
    data = (
        make_concept(bench.folder / "large", instances=5, classes=0),
        make_concept(bench.folder / "small", instances=1, classes=0, index=1),
    )
    shares: dict[bool, Counter[int]] = {}
    for balanced in (False, True):
        seen: list[int] = []
        with spying(BatchSource, "batch", lambda s, uses, *a, to=seen: to.append(uses[0].picture.concept)):
            spec = complete_spec(balance_concepts=balanced, max_train_steps=12, with_prior_preservation=False)
            bench.train(spec, data, str(balanced))
        shares[balanced] = Counter(seen)
    assert shares[False] == {0: 10, 1: 2}
    assert shares[True] == {0: 6, 1: 6}
