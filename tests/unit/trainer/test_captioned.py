"""The plan of captioned training: lists, batches, updates, and what each use is."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from services.domain.errors import BadInput
from services.trainer.buckets import BucketReader, Size, bucket_sizes
from services.trainer.captioned import CaptionedPlan, CaptionedUse
from services.trainer.captions import CaptionedPicture, UseRules
from services.trainer.data import LatentSource
from services.trainer.randomness import Purpose, normal

WIDE, SQUARE, TALL = Size(200, 100), Size(100, 100), Size(100, 200)


def picture(name: str, size: Size = SQUARE, path: Path = Path("unused.png"), **said: Any) -> CaptionedPicture:
    text = said.pop("text", f"caption of {name}")
    return CaptionedPicture(f"0/instance/{name}", path, text, 0, 7, name, size, text=text, **said)


def some(count: int, size: Size = SQUARE, prefix: str = "", **said: Any) -> list[CaptionedPicture]:
    return [picture(f"{prefix}{number:03d}.png", size, **said) for number in range(count)]


def plan_of(
    pictures: Sequence[CaptionedPicture],
    *,
    batch: int = 1,
    accumulation: int = 1,
    epochs: int = 3,
    seed: int = 7,
    percent: float | None = None,
    **rules: Any,
) -> CaptionedPlan:
    return CaptionedPlan(
        pictures,
        seed=seed,
        buckets=bucket_sizes(512),
        train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        epochs=epochs,
        rules=UseRules(**rules),
        rated_final_percent=percent,
    )


def uses(plan: CaptionedPlan, epoch: int = 0) -> list[CaptionedUse]:
    return [use for batch in plan.epoch(epoch) for use in batch]


def counted(plan: CaptionedPlan, epoch: int = 0) -> Counter[str]:
    return Counter(use.picture.name for use in uses(plan, epoch))


def mixed() -> list[CaptionedPicture]:
    return some(7, WIDE, "wide/") + some(6, SQUARE, "square/") + some(4, TALL, "tall/")


def test_five_pictures_in_batches_of_two_make_nine_updates_in_three_epochs() -> None:
    plan = plan_of(some(5), batch=2)
    assert (plan.updates_in(0), plan.total_updates) == (3, 9)


def test_each_batch_has_one_size_and_pictures_go_where_their_shape_belongs() -> None:
    plan = plan_of(mixed(), batch=4)
    for epoch in range(5):
        for batch in plan.epoch(epoch):
            assert len({use.bucket for use in batch}) == 1
            assert 1 <= len(batch) <= 4
    sizes = {use.picture.name.split("/")[0]: use.bucket for use in uses(plan)}
    assert sizes["square"] == Size(512, 512)
    assert sizes["wide"] == sizes["tall"].transposed
    assert sizes["wide"].ratio > 1
    assert dict(plan.assignments)[mixed()[0]] == sizes["wide"]


def test_only_the_last_batch_of_a_bucket_is_short() -> None:
    lengths = [(batch[0].bucket, len(batch)) for batch in plan_of(mixed(), batch=4).epoch(0)]
    for size, count in {Size(512, 512): 6, plan_of(mixed()).assignments[0][1]: 7}.items():
        found = sorted(length for bucket, length in lengths if bucket == size)
        assert found == sorted([4] * (count // 4) + ([count % 4] if count % 4 else []))


def test_every_picture_weighs_its_multiplier_in_every_epoch() -> None:
    multipliers = [0.0, 1.0, 1.0, 2.0, 3.0, 7.0]
    pictures = [
        picture(f"{number}.png", size, multiplier=multiplier)
        for number, (multiplier, size) in enumerate(zip(multipliers, [WIDE, TALL] * 3, strict=True))
    ]
    plan = plan_of(pictures, batch=4, accumulation=2)
    for epoch in range(4):
        weights: Counter[str] = Counter()
        for use in uses(plan, epoch):
            weights[use.picture.name] += use.weight  # type: ignore[assignment]
        assert {name: float(weight) for name, weight in weights.items()} == {
            f"{number}.png": multiplier for number, multiplier in enumerate(multipliers) if multiplier
        }


def test_a_fractional_multiplier_weighs_its_share_over_many_epochs() -> None:
    pictures = [picture(f"{number}.png", multiplier=0.25 + 0.5 * number) for number in range(4)]
    plan = plan_of(pictures, batch=3)
    counts: Counter[str] = Counter()
    for epoch in range(1000):
        found = counted(plan, epoch)
        assert sum(found.values()) == 4
        counts += found
    for subject in pictures:
        share = subject.multiplier % 1
        assert abs(counts[subject.name] / 1000 - subject.multiplier) < 3 * math.sqrt(
            share * (1 - share) / 1000
        )


def test_uses_of_one_picture_in_one_epoch_draw_differently() -> None:
    found = uses(plan_of([picture("a.png", multiplier=6.0)]))
    assert len({use.coordinates for use in found}) == 6


def test_epochs_have_different_orders_that_repeat_with_the_seed() -> None:
    def order(seed: int, epoch: int) -> list[str]:
        return [use.picture.name for use in uses(plan_of(mixed(), batch=2, seed=seed), epoch)]

    orders = [tuple(order(7, epoch)) for epoch in range(8)]
    assert len(set(orders)) == 8
    assert list(orders[3]) == order(7, 3)
    assert list(orders[0]) != order(8, 0)
    assert all(sorted(one) == sorted(orders[0]) for one in orders)


def test_batches_of_different_sizes_are_mixed() -> None:
    sizes = [[batch[0].bucket for batch in plan_of(mixed(), batch=2).epoch(epoch)] for epoch in range(6)]
    assert len({tuple(row) for row in sizes}) == 6
    assert any(row != sorted(row, key=lambda size: size.ratio) for row in sizes)


def test_companions_change_from_epoch_to_epoch() -> None:
    plan = plan_of(some(12), batch=3)
    batches = [
        frozenset(use.picture.name for use in batch) for epoch in range(6) for batch in plan.epoch(epoch)
    ]
    assert len(set(batches)) > 20


def test_updates_take_the_batches_of_their_epoch_one_after_the_other() -> None:
    plan = plan_of(mixed(), batch=4, accumulation=2, epochs=3)
    for epoch in range(3):
        first = sum(plan.updates_in(before) for before in range(epoch))
        taken = [
            batch for update in range(plan.updates_in(epoch)) for batch in plan.micro_steps(first + update)
        ]
        assert taken == plan.epoch(epoch)
        assert {plan.epoch_of(first + update) for update in range(plan.updates_in(epoch))} == {epoch}
        lengths = [len(plan.micro_steps(first + update)) for update in range(plan.updates_in(epoch))]
        assert lengths == [2, 2, 1]
    assert plan.total_updates == 9


def test_an_update_is_the_same_whichever_was_asked_for_before() -> None:
    first, second = (
        plan_of(mixed(), batch=3, percent=40.0, epochs=6, flip_probability=0.5) for _ in range(2)
    )
    updates = range(first.total_updates)
    forwards = [first.micro_steps(update) for update in updates]
    assert [second.micro_steps(update) for update in reversed(updates)] == forwards[::-1]


def test_updates_beyond_the_last_epoch_go_on() -> None:
    plan = plan_of(some(4), batch=2, epochs=2)
    assert plan.total_updates == 4
    assert plan.epoch_of(9) == 4
    assert len(plan.micro_steps(9)) == 1


def test_batch_layouts_of_one_update_hold_the_same_samples() -> None:
    chosen = [
        sorted(
            (use.coordinates, use.flip, use.caption)
            for batch in plan_of(some(4), batch=batch, accumulation=steps, flip_probability=0.5).micro_steps(
                0
            )
            for use in batch
        )
        for batch, steps in [(4, 1), (2, 2), (1, 4)]
    ]
    assert chosen[0] == chosen[1] == chosen[2]


def test_a_rated_dataset_shrinks_to_its_percentage_and_updates_shrink_with_it() -> None:
    pictures = some(10, multiplier=2.0)
    plan = plan_of(pictures, batch=4, epochs=5, percent=30.0)
    # 20 entries; the shares are 1, 0.825, 0.65, 0.475 and 0.3.
    assert [len(uses(plan, epoch)) for epoch in range(5)] == [20, 17, 13, 10, 6]
    assert [plan.updates_in(epoch) for epoch in range(5)] == [5, 5, 4, 3, 2]
    assert plan.total_updates == 19
    assert [plan.epoch_of(update) for update in (0, 4, 5, 9, 10, 13, 14, 16, 17, 18)] == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
        4,
        4,
    ]


def test_better_rated_pictures_stay_longer_and_equal_ones_equally_long() -> None:
    pictures = [picture(f"{number}.png", rating=float(1 + number % 3)) for number in range(12)]
    counts: Counter[str] = Counter()
    for seed in range(300):
        counts += counted(plan_of(pictures, epochs=2, percent=50.0, seed=seed), 1)
    groups = [[counts[f"{number}.png"] / 300 for number in range(rating, 12, 3)] for rating in range(3)]
    means = [sum(group) / len(group) for group in groups]
    assert means == sorted(means)
    assert means[2] - means[0] > 0.2
    for group, mean in zip(groups, means, strict=True):
        assert all(abs(share - mean) < 3 * math.sqrt(mean * (1 - mean) / 300) for share in group)


def test_without_rating_every_epoch_has_everything() -> None:
    pictures = [picture(f"{number}.png", rating=float(1 + number)) for number in range(5)]
    assert [len(uses(plan_of(pictures, epochs=4), epoch)) for epoch in range(4)] == [5] * 4


def test_a_hundred_percent_keep_everything_and_none_keep_one() -> None:
    assert len(uses(plan_of(some(6), epochs=2, percent=100.0), 1)) == 6
    assert len(uses(plan_of(some(6), epochs=2, percent=0.0), 1)) == 1


def test_pictures_are_mirrored_with_their_probability() -> None:
    subject = [picture("a.png")]
    flips = [use.flip for epoch in range(2000) for use in uses(plan_of(subject, flip_probability=0.5), epoch)]
    assert abs(sum(flips) / 2000 - 0.5) < 0.034
    assert not any(use.flip for epoch in range(50) for use in uses(plan_of(subject), epoch))
    assert all(use.flip for epoch in range(50) for use in uses(plan_of(subject, flip_probability=1.0), epoch))


@pytest.mark.parametrize("own", [0.0, 1.0])
def test_a_picture_s_own_probability_of_mirroring_counts(own: float) -> None:
    plan = plan_of([picture("a.png", flip_probability=own)], flip_probability=0.5)
    assert {use.flip for epoch in range(30) for use in uses(plan, epoch)} == {bool(own)}


def test_captions_and_loss_weights_come_with_the_uses() -> None:
    plan = plan_of(
        [picture("a.png", text="a, b, c, d, e", loss_scale=0.25)], shuffle_tags=True, caption_dropout=0.2
    )
    found = [use for epoch in range(100) for use in uses(plan, epoch)]
    assert {use.weight for use in found} == {0.25}
    assert 5 < sum(use.caption == "" for use in found) < 40
    assert len({use.caption for use in found}) > 15


def test_nothing_left_to_train_on_is_bad_input() -> None:
    with pytest.raises(BadInput, match="no picture is left"):
        plan_of(some(3, multiplier=0.0))
    with pytest.raises(BadInput, match="no picture is left"):
        plan_of(some(3, multiplier=0.1))
    with pytest.raises(BadInput, match="more than 1000000 pictures"):
        plan_of(some(1001, multiplier=1000.0))


def test_pictures_that_are_never_used_are_known() -> None:
    plan = plan_of(
        [picture("a/1.png", multiplier=0.4), *some(2, prefix="b/"), picture("c.png", multiplier=0.0)]
    )
    assert [subject.name for subject in plan.never_used] == ["a/1.png"]


def test_fractions_are_rounded_folder_by_folder() -> None:
    pictures = [picture(f"{folder}/{number}.png", multiplier=0.5) for folder in "ab" for number in range(3)]
    plan = plan_of(pictures)
    for epoch in range(20):
        found = Counter(name[0] for name in counted(plan, epoch).elements())
        assert found == {"a": 2, "b": 2}


class CountingEncoder:
    """Stands in for a VAE: mean and deviation are simple functions of the pixels."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.shapes.append(tuple(values.shape))
        pooled = values[:, ::2, ::2]
        return pooled, pooled.abs() * 0.1


def stored(tmp_path: Path, name: str, size: Size, **said: Any) -> CaptionedPicture:
    rows, columns = np.mgrid[0 : size.height_px, 0 : size.width_px]
    pixels = np.stack([columns % 256, rows % 256, np.full_like(rows, 90)], axis=-1).astype(np.uint8)
    path = tmp_path / name
    Image.fromarray(pixels).save(path)
    return picture(name, size, path, **said)


def latents_of(
    pictures: Sequence[CaptionedPicture], *, cache: bool, centre: bool, epochs: int = 12, **rules: Any
) -> tuple[list[torch.Tensor], CountingEncoder]:
    plan = CaptionedPlan(
        pictures,
        seed=7,
        buckets=bucket_sizes(64, 8),
        train_batch_size=2,
        gradient_accumulation_steps=1,
        epochs=epochs,
        rules=UseRules(**rules),
    )
    encoder = CountingEncoder()
    reader = BucketReader(seed=7, centre=centre, crop_jitter=0.0 if centre else 0.02)
    source = LatentSource[CaptionedUse](
        reader, encoder, scaling_factor=0.5, seed=7, cache_bytes=10**7 if cache else 0
    )
    drawn = [source.latents(use) for epoch in range(epochs) for use in uses(plan, epoch)]
    return [latents for latents in drawn if latents is not None], encoder


@pytest.mark.parametrize("centre", [True, False], ids=["centre", "drawn"])
def test_the_latent_cache_never_changes_a_result(centre: bool, tmp_path: Path) -> None:
    pictures = [stored(tmp_path, "wide.png", Size(150, 100)), stored(tmp_path, "tall.png", Size(90, 200))]
    cached, encoder = latents_of(pictures, cache=True, centre=centre, flip_probability=0.5)
    uncached, every_time = latents_of(pictures, cache=False, centre=centre, flip_probability=0.5)
    assert all(torch.equal(one, other) for one, other in zip(cached, uncached, strict=True))
    assert len(every_time.shapes) == 24
    assert len(encoder.shapes) == 4 if centre else len(encoder.shapes) > 12


def test_moments_are_kept_for_the_picture_and_for_its_mirror_image(tmp_path: Path) -> None:
    subject = stored(tmp_path, "square.png", Size(64, 64))
    _, plain = latents_of([subject], cache=True, centre=False, epochs=30)
    _, both = latents_of([subject], cache=True, centre=False, epochs=30, flip_probability=0.5)
    assert (len(plain.shapes), len(both.shapes)) == (1, 2)


def test_drawn_crops_go_on_changing_with_the_cache(tmp_path: Path) -> None:
    subject = stored(tmp_path, "wide.png", Size(200, 100))
    latents, encoder = latents_of([subject], cache=True, centre=False, epochs=40)
    assert len(encoder.shapes) > 20
    firsts = {round(float(drawn[0, 0, 0]), 6) for drawn in latents}
    assert len(firsts) == 40


def test_latents_have_the_shape_of_their_bucket_and_a_draw_of_their_own(tmp_path: Path) -> None:
    subject = stored(tmp_path, "wide.png", Size(128, 64))
    latents, encoder = latents_of([subject], cache=True, centre=True, epochs=2)
    (height, width) = encoder.shapes[0][1:]
    bucket = Size(width, height)
    assert bucket in bucket_sizes(64, 8)
    assert bucket.ratio > 1
    reader = BucketReader(seed=7, centre=True)
    for epoch, drawn in enumerate(latents):
        use = CaptionedUse(subject, epoch, 0, bucket, flip=False, caption="", weight=1.0)
        mean, deviation = CountingEncoder()(reader.values(subject, reader.geometry(use)))
        n = normal(tuple(mean.shape), 7, Purpose.VAE, epoch, subject.sample_id, 0)
        assert torch.equal(drawn, 0.5 * (mean + deviation * n))
