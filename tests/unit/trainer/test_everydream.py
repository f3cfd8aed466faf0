"""Captioned training as a whole: sizes, captions, rates and ratings reach the weights, and a restart changes none."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from likeness.training.v1 import training_job_pb2 as pb

from services.domain.errors import BadInput, InvalidSpec
from services.domain.job import JobKind, JobRef, Limits
from services.domain.life_cycle import admit_training
from services.trainer import updates
from services.trainer.buckets import Size
from services.trainer.captions import CaptionedData, Tag
from services.trainer.checkpoint import CheckpointMismatch
from services.trainer.conditioning import TextConditioner
from services.trainer.drawings import PLAIN_PROMPT, proof_drawing
from services.trainer.recipes import everydream
from services.trainer.run import Request
from tests.unit.trainer.harness import (
    Bench,
    Recorder,
    Trained,
    captioned_spec,
    is_training,
    pictures_of,
    same_bits,
    spying,
)

CALM: dict[str, Any] = {"learning_rate": 1e-6}


def trained_on(
    bench: Bench, data: CaptionedData, spec: pb.TrainingSpec, name: str = "run", **changes: Any
) -> Trained:
    return bench.train(spec, (), name, captioned=data, **changes)


def training_shapes(seen: list[tuple[int, ...]]) -> Any:
    def note(unet: Any, sample: torch.Tensor, *a: Any, **k: Any) -> None:
        if is_training(sample):
            seen.append(tuple(sample.shape))

    return note


def test_epochs_count_batches_of_all_pictures(bench: Bench) -> None:
    data = pictures_of(bench.folder / "data", 5)
    shapes: list[tuple[int, ...]] = []
    with spying(UNet2DConditionModel, "forward", training_shapes(shapes)):
        trained = trained_on(bench, data, captioned_spec(num_train_epochs=3, **CALM))
    assert trained.outcome.step == len(shapes) == 9
    assert sorted(shape[0] for shape in shapes) == [1] * 3 + [2] * 6


def test_max_train_steps_ends_a_captioned_training_within_an_epoch(bench: Bench) -> None:
    data = pictures_of(bench.folder / "data")
    assert trained_on(bench, data, captioned_spec(max_train_steps=3, **CALM)).outcome.step == 3


def test_each_picture_trains_at_the_size_of_its_bucket(bench: Bench) -> None:
    data = pictures_of(bench.folder / "data", 3, [Size(128, 128), Size(300, 75), Size(60, 240)])
    shapes: list[tuple[int, ...]] = []
    with spying(UNet2DConditionModel, "forward", training_shapes(shapes)):
        spec = captioned_spec(resolution=128, num_train_epochs=1, **CALM)
        trained = trained_on(bench, data, spec)
    assert sorted(shape[2:] for shape in shapes) == [(32, 128), (64, 64), (128, 32)]
    buckets = trained.report()["data"]["buckets"]
    assert [(bucket["width_px"], bucket["height_px"]) for bucket in buckets] == [
        (64, 256),
        (128, 128),
        (256, 64),
    ]


def test_captions_reach_the_weights_unless_all_are_dropped(bench: Bench) -> None:
    red, blue = (
        pictures_of(bench.folder / "data", text=text) for text in ("a red circle", "a blue star in snow")
    )

    def weights(data: CaptionedData, dropout: float) -> dict[str, torch.Tensor]:
        spec = captioned_spec(caption_dropout=dropout, max_train_steps=2)
        return trained_on(bench, data, spec, f"{data.pictures[0].text}{dropout}").weights()

    assert not same_bits(weights(red, 0.0), weights(blue, 0.0))
    assert same_bits(weights(red, 1.0), weights(blue, 1.0))


def captions_seen(bench: Bench, data: CaptionedData, spec: pb.TrainingSpec, name: str) -> list[str]:
    seen: list[str] = []
    with spying(TextConditioner, "vectors", lambda conditioner, prompts: seen.extend(prompts)):
        trained_on(bench, data, spec, name)
    return seen


def test_tags_are_shuffled_and_left_out_at_each_use(bench: Bench) -> None:
    data = pictures_of(bench.folder / "data", 1)
    values: dict[str, Any] = {"num_train_epochs": 8, **CALM}
    plain = captions_seen(bench, data, captioned_spec(**values), "plain")
    shuffled = captions_seen(bench, data, captioned_spec(shuffle_tags=True, **values), "shuffled")
    thinned = captions_seen(bench, data, captioned_spec(tag_dropout=0.5, **values), "thinned")
    assert set(plain) == {"picture 0, red, blue, green"}
    assert len(set(shuffled)) > 2
    assert {tuple(sorted(caption.split(", "))) for caption in shuffled} == {
        ("blue", "green", "picture 0", "red")
    }
    assert len(set(thinned)) > 2
    assert all(caption.startswith("picture 0") for caption in shuffled + thinned)


def test_a_captioned_rate_grows_with_a_power_of_the_batch(bench: Bench) -> None:
    data = pictures_of(bench.folder / "data", 8)
    spec = captioned_spec(
        train_batch_size=4,
        gradient_accumulation_steps=2,
        scale_learning_rate=True,
        num_train_epochs=1,
        **CALM,
    )
    assert trained_on(bench, data, spec).learning_rates == pytest.approx([1e-6 * 8**0.55], rel=1e-12)


def test_a_captioned_decay_is_half_as_long_again_and_warms_up_for_a_fiftieth(bench: Bench) -> None:
    data = pictures_of(bench.folder / "data", 1)
    spec = captioned_spec(
        lr_scheduler=pb.LEARNING_RATE_SCHEDULE_LINEAR, max_train_steps=40, num_train_epochs=1, **CALM
    )
    rates = trained_on(bench, data, spec).learning_rates
    # 40 updates: the curve ends after 60, and the warm-up takes the first.
    assert rates[0] == 0.0
    assert rates[1:] == pytest.approx([1e-6 * (60 - u) / 59 for u in range(1, 40)], rel=1e-12)


def test_a_rated_dataset_shrinks_to_its_share(bench: Bench) -> None:
    data = pictures_of(bench.folder / "data", 4)
    values: dict[str, Any] = {"train_batch_size": 1, "num_train_epochs": 2, **CALM}
    assert trained_on(bench, data, captioned_spec(**values), "all").outcome.step == 8
    for percent, updates_done in ((50.0, 6), (25.0, 5)):
        spec = captioned_spec(rated_dataset=True, rated_dataset_final_percent=percent, **values)
        assert trained_on(bench, data, spec, str(percent)).outcome.step == updates_done


def test_crop_jitter_moves_the_crops_of_large_pictures(bench: Bench) -> None:
    data = pictures_of(bench.folder / "data", 1, [Size(200, 200)])
    counts = {}
    for jitter in (0.0, 0.02):
        encoded: list[torch.Tensor] = []
        with spying(AutoencoderKL, "encode", lambda vae, values, to=encoded: to.append(values)):
            trained_on(
                bench, data, captioned_spec(crop_jitter=jitter, num_train_epochs=6, **CALM), str(jitter)
            )
        counts[jitter] = len(encoded)
    assert counts[0.0] == 1
    assert counts[0.02] > 2


def test_center_crop_takes_the_middle_of_a_wide_picture_each_time(bench: Bench) -> None:
    data = pictures_of(bench.folder / "data", 1, [Size(200, 64)])
    counts = {}
    for centre in (True, False):
        encoded: list[torch.Tensor] = []
        with spying(AutoencoderKL, "encode", lambda vae, values, to=encoded: to.append(values)):
            spec = captioned_spec(center_crop=centre, num_train_epochs=4, **CALM)
            trained_on(bench, data, spec, str(centre))
        counts[centre] = len(encoded)
    assert counts == {True: 1, False: 4}


def test_a_pictures_own_loss_scale_weighs_its_loss(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_one(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (prediction - target).flatten(1).sum(1) * 0 + 1

    monkeypatch.setattr(updates, "per_sample_mse", all_one)
    data = pictures_of(bench.folder / "data", 2, loss_scale=0.25)
    trained = trained_on(bench, data, captioned_spec(num_train_epochs=1, **CALM))
    assert trained.losses == pytest.approx([0.25], rel=1e-6)


def everything(**changes: Any) -> pb.TrainingSpec:
    return captioned_spec(
        gradient_accumulation_steps=2,
        num_train_epochs=6,
        lr_scheduler=pb.LEARNING_RATE_SCHEDULE_COSINE,
        caption_dropout=0.2,
        flip_probability=0.5,
        shuffle_tags=True,
        tag_dropout=0.2,
        crop_jitter=0.02,
        rated_dataset=True,
        rated_dataset_final_percent=40.0,
        ema_decay=0.9,
        offset_noise=0.05,
        min_snr_gamma=5.0,
        **changes,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "method": pb.TRAINING_METHOD_LORA,
            "lora": pb.LoraSettings(rank=2, alpha=2, dropout=0.2),
            "optimizer_precision": pb.OPTIMIZER_PRECISION_EIGHT_BIT,
        },
    ],
    ids=["full", "LoRA"],
)
def test_a_resumed_captioned_run_equals_an_undisturbed_one_bit_for_bit(
    changes: dict[str, Any], bench: Bench
) -> None:
    data = pictures_of(
        bench.folder / "data", 5, [Size(64, 64), Size(200, 70)], tags=(Tag("snow", 2.0), Tag("night"))
    )
    spec = everything(**changes)
    whole = trained_on(bench, data, spec, "whole")
    first = trained_on(bench, data, spec, recorder=Recorder(ask={3: Request.YIELD}))
    second = trained_on(bench, data, spec)
    assert first.outcome.step == 3
    assert whole.outcome.step == second.outcome.step > 6
    assert whole.losses == first.losses + second.losses
    for path in whole.outcome.files[:-1]:
        one, other = whole.run.export_folder / path, second.run.export_folder / path
        assert one.read_bytes() == other.read_bytes(), path


def test_the_report_says_what_became_of_the_data(bench: Bench) -> None:
    data = pictures_of(bench.folder / "data", 2, [Size(40, 40)], text="dog " * 90)
    trained = trained_on(bench, data, captioned_spec(num_train_epochs=1, **CALM))
    report = trained.report()["data"]
    assert report["read"] == 2
    assert report["buckets"] == [{"width_px": 64, "height_px": 64, "images": 2}]
    assert any("its caption is too long" in warning for warning in trained.outcome.warnings)
    assert any("was enlarged: 40x40 to 64x64" in warning for warning in trained.outcome.warnings)


def test_changed_captions_are_another_data_set(bench: Bench) -> None:
    spec = captioned_spec(**CALM)
    one, other = (pictures_of(bench.folder / "data", text=text) for text in ("a dog", "a cat"))
    trained_on(bench, one, spec, recorder=Recorder(ask={1: Request.YIELD}))
    with pytest.raises(CheckpointMismatch, match="data"):
        trained_on(bench, other, spec)


def test_a_training_without_pictures_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="no picture"):
        bench.train(captioned_spec(), ())

    def broken(*arguments: Any) -> Any:
        return lambda values: (torch.full((4, 32, 32), torch.nan), torch.ones(4, 32, 32))

    monkeypatch.setattr(everydream, "posterior_encoder", broken)
    with pytest.raises(BadInput, match="can encode none"):
        trained_on(bench, pictures_of(bench.folder / "data"), captioned_spec())


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("with_prior_preservation", True, "is not supported by the EveryDream recipe"),
        ("balance_concepts", True, "is not supported by the EveryDream recipe"),
        ("aspect_ratio_bucketing", False, "must be set with the EveryDream recipe"),
    ],
)
def test_what_has_no_meaning_with_captions_is_refused(
    field: str, value: bool, rule: str, bench: Bench
) -> None:
    with pytest.raises(InvalidSpec, match=f"{field}: {rule}"):
        trained_on(bench, pictures_of(bench.folder / "data"), captioned_spec(**{field: value}))


@pytest.mark.parametrize(
    ("instance", "sample", "preview", "expected"),
    [
        ("sks dog", "a", "b", "sks dog"),
        ("", "a", "b", "a"),
        ("", "", "b", "b"),
        ("", "", "", PLAIN_PROMPT),
    ],
    ids=["instance", "sample", "preview", "none"],
)
def test_the_picture_that_proves_a_captioned_model_takes_a_prompt_that_is_there(
    instance: str, sample: str, preview: str, expected: str
) -> None:
    spec = captioned_spec(preview_prompts=[preview] if preview else [])
    spec.concepts.add(instance_prompt=instance)
    if sample:
        spec.samples.add(prompt=sample)
    job = JobRef(JobKind.TRAIN, "p", "job-1")
    record = admit_training(job, spec={}, options={}, limits=Limits(), request="r", now_ms=0)
    assert proof_drawing(spec, pb.TrainingResult(model="m"), record).prompt == expected
