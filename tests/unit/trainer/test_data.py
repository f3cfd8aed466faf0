"""Epoch lists, geometry and the latent cache."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from services.trainer.data import (
    Concept,
    EpochPlan,
    LatentSource,
    Pair,
    Picture,
    PictureReader,
    Use,
    centre_offset,
    fingerprint,
    random_offset,
    resize_shorter_side,
)
from services.trainer.randomness import Purpose, normal
from tests.unit.trainer.harness import column_coded, make_concept


def picture(name: str, concept: int = 0, path: Path = Path("unused.png")) -> Picture:
    return Picture(name, path, "a prompt", concept, seed=7)


def listed(instances: int, classes: int, concept: int = 0) -> Concept:
    return Concept(
        tuple(picture(f"{concept}/i{n}", concept) for n in range(instances)),
        tuple(picture(f"{concept}/c{n}", concept) for n in range(classes)),
    )


def plan_of(*concepts: Concept, batch: int = 1, accumulation: int = 1, seed: int = 7) -> EpochPlan:
    return EpochPlan(concepts, seed=seed, train_batch_size=batch, gradient_accumulation_steps=accumulation)


def names(pairs: list[Pair]) -> list[str]:
    return [pair.instance.picture.sample_id for pair in pairs]


def class_names(pairs: list[Pair]) -> list[str]:
    return [pair.class_use.picture.sample_id for pair in pairs if pair.class_use is not None]


def test_three_instance_and_seven_class_pictures_make_four_batches_of_two() -> None:
    assert plan_of(listed(3, 7), batch=2).updates_per_epoch == 4
    assert plan_of(listed(3, 0), batch=2).updates_per_epoch == 2


def test_each_picture_of_the_longer_list_occurs_once_and_the_shorter_wraps_around() -> None:
    pairs = plan_of(listed(3, 7)).epoch(0)
    assert sorted(class_names(pairs)) == [f"0/c{n}" for n in range(7)]
    assert sorted(Counter(names(pairs)).values()) == [2, 2, 3]


def test_epochs_have_different_orders_that_repeat_with_the_seed() -> None:
    orders = [tuple(names(plan_of(listed(6, 0)).epoch(epoch))) for epoch in range(8)]
    assert len(set(orders)) > 5
    assert orders == [tuple(names(plan_of(listed(6, 0)).epoch(epoch))) for epoch in range(8)]
    assert orders[0] != tuple(names(plan_of(listed(6, 0), seed=8).epoch(0)))


def test_a_batch_larger_than_the_list_wraps_around() -> None:
    plan = plan_of(listed(3, 0), batch=5)
    (batch,) = plan.micro_steps(0)
    assert len(batch) == 5
    assert {use.instance.coordinates for use in batch} == {use.instance.coordinates for use in plan.epoch(0)}
    assert len({use.instance.coordinates for use in batch}) == 5, "two uses of one picture draw alike"


def test_the_end_of_an_epoch_cuts_batch_and_group_short() -> None:
    plan = plan_of(listed(7, 0), batch=2, accumulation=3)
    assert plan.updates_per_epoch == 2
    assert [len(batch) for batch in plan.micro_steps(0)] == [2, 2, 2]
    assert [len(batch) for batch in plan.micro_steps(1)] == [1]
    assert plan.epoch_of(2) == 1


def test_batch_layouts_of_one_update_hold_the_same_samples() -> None:
    layouts = [(4, 1), (2, 2), (1, 4)]
    chosen = []
    for batch, accumulation in layouts:
        steps = plan_of(listed(4, 4), batch=batch, accumulation=accumulation).micro_steps(0)
        chosen.append([pair for step in steps for pair in step])
    assert chosen[0] == chosen[1] == chosen[2]


def test_instance_samples_are_paired_with_class_pictures_of_their_concept() -> None:
    plan = plan_of(listed(2, 3, 0), listed(4, 2, 1))
    pairs = [pair for epoch in range(3) for pair in plan.epoch(epoch)]
    assert all(
        pair.class_use and pair.class_use.picture.concept == pair.instance.picture.concept for pair in pairs
    )


def test_the_concept_seed_drives_the_order_of_its_class_pictures() -> None:
    concept = listed(6, 6)
    reseeded = Concept(
        *(
            tuple(replace(p, seed=8) for p in part)
            for part in (concept.instance_pictures, concept.class_pictures)
        )
    )
    usual, other = plan_of(concept).epoch(0), plan_of(reseeded).epoch(0)
    assert names(usual) == names(other)
    assert class_names(usual) != class_names(other)


def test_concepts_have_shares_in_proportion_to_their_pictures() -> None:
    pairs = plan_of(listed(2, 0, 0), listed(6, 0, 1)).epoch(0)
    assert Counter(pair.instance.picture.concept for pair in pairs) == {0: 2, 1: 6}


def test_a_concept_without_class_pictures_trains_without_them() -> None:
    pairs = plan_of(listed(2, 0, 0), listed(2, 2, 1)).epoch(0)
    assert {pair.instance.picture.concept for pair in pairs if pair.class_use is None} == {0}


def test_a_concept_without_pictures_is_refused() -> None:
    with pytest.raises(ValueError, match="no instance picture"):
        plan_of(listed(0, 3))


def test_the_fingerprint_follows_contents_prompts_and_order(tmp_path: Path) -> None:
    concept = make_concept(tmp_path / "a")
    same = make_concept(tmp_path / "b")
    reversed_order = Concept(concept.instance_pictures[::-1], concept.class_pictures)
    other_prompt = make_concept(tmp_path / "c", instance_prompt="something else")
    assert fingerprint([concept]) == fingerprint([same])
    assert len({fingerprint([concept]), fingerprint([reversed_order]), fingerprint([other_prompt])}) == 3
    column_coded(16, 16, 77).save(concept.instance_pictures[0].path)
    assert fingerprint([concept]) != fingerprint([same])


@pytest.mark.parametrize(
    ("size", "expected"),
    [((40, 20), (32, 16)), ((20, 40), (16, 32)), ((8, 8), (16, 16)), ((16, 16), (16, 16))],
)
def test_the_shorter_side_becomes_the_resolution(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resize_shorter_side(column_coded(*size), 16).size == expected


def test_shrinking_mixes_pixels_instead_of_leaving_some_out() -> None:
    chequered = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = np.asarray(resize_shorter_side(Image.fromarray(np.stack([chequered] * 3, axis=-1)), 16))
    assert np.abs(small.astype(int) - 127).max() < 20


@pytest.mark.parametrize(("size", "expected"), [((64, 16), (24, 0)), ((16, 64), (0, 24)), ((16, 16), (0, 0))])
def test_the_middle_square_is_in_the_middle_of_either_side(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert centre_offset(size, 16) == expected


def test_random_squares_of_a_picture_that_is_free_both_ways_move_independently() -> None:
    offsets = [random_offset((40, 40), 16, Use(picture("0/i0"), epoch, 0)) for epoch in range(50)]
    assert len({left for left, _ in offsets}) > 10
    assert sum(left == top for left, top in offsets) < 15


def wide_picture(tmp_path: Path) -> Picture:
    path = tmp_path / "wide.png"
    column_coded(64, 16).save(path)
    return picture("0/wide", path=path)


def cropped(reader: PictureReader, use: Use) -> torch.Tensor:
    return reader.values(use.picture, reader.geometry(use))


def left_offset(values: torch.Tensor) -> int:
    """The column that a column-coded square begins with."""
    return round((float(values[0, 0, 0]) + 1) * 127.5)


def test_values_run_from_minus_one_to_one(tmp_path: Path) -> None:
    values = cropped(PictureReader(resolution=16, center_crop=True), Use(wide_picture(tmp_path), 0, 0))
    assert values.shape == (3, 16, 16)
    assert values.dtype is torch.float32
    red = torch.tensor([column / 127.5 - 1 for column in range(24, 40)])
    torch.testing.assert_close(values[0], red.expand(16, 16), atol=1e-6, rtol=0)


def test_centre_crops_are_constant_and_random_ones_are_spread_and_new_in_each_epoch(tmp_path: Path) -> None:
    wide = wide_picture(tmp_path)
    uses = [Use(wide, epoch, 0) for epoch in range(200)]
    centre, free = (PictureReader(resolution=16, center_crop=flag) for flag in (True, False))
    assert {left_offset(cropped(centre, use)) for use in uses} == {24}
    offsets = [left_offset(cropped(free, use)) for use in uses]
    assert offsets[0] != offsets[1]
    assert min(offsets) <= 2
    assert max(offsets) >= 46
    assert len(set(offsets)) > 35


def test_the_concept_seed_drives_the_crops(tmp_path: Path) -> None:
    wide = wide_picture(tmp_path)
    other = Picture(wide.sample_id, wide.path, wide.prompt, wide.concept, seed=8)
    reader = PictureReader(resolution=16, center_crop=False)
    crops = [[left_offset(cropped(reader, Use(p, epoch, 0))) for epoch in range(10)] for p in (wide, other)]
    assert crops[0] != crops[1]


class CountingEncoder:
    """Stands in for a VAE: mean and deviation are simple functions of the pixels."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        pooled = values[:, ::2, ::2]
        return pooled, pooled.abs() * 0.1


def source(encoder: CountingEncoder, *, center_crop: bool, cache: bool) -> LatentSource:
    reader = PictureReader(resolution=16, center_crop=center_crop)
    return LatentSource(reader, encoder, scaling_factor=0.5, seed=7, cache_bytes=10**6 if cache else 0)


def drawn(latents: LatentSource, subject: Picture, uses: int = 200) -> list[np.ndarray]:
    result = [latents.latents(Use(subject, epoch, 0)) for epoch in range(uses)]
    return [latent.numpy() for latent in result if latent is not None]


@pytest.mark.parametrize("center_crop", [True, False], ids=["centre", "random"])
def test_the_latent_cache_never_changes_a_result(center_crop: bool, tmp_path: Path) -> None:
    wide = wide_picture(tmp_path)
    with_cache = drawn(source(CountingEncoder(), center_crop=center_crop, cache=True), wide)
    without = drawn(source(CountingEncoder(), center_crop=center_crop, cache=False), wide)
    assert all(np.array_equal(one, other) for one, other in zip(with_cache, without, strict=True))


def test_a_picture_is_encoded_once_for_each_place_that_a_crop_falls_on(tmp_path: Path) -> None:
    wide = wide_picture(tmp_path)
    fixed, free, uncached = CountingEncoder(), CountingEncoder(), CountingEncoder()
    drawn(source(fixed, center_crop=True, cache=True), wide)
    drawn(source(free, center_crop=False, cache=True), wide)
    drawn(source(uncached, center_crop=False, cache=False), wide)
    places = {
        left_offset(cropped(PictureReader(resolution=16, center_crop=False), Use(wide, n, 0)))
        for n in range(200)
    }
    assert (fixed.calls, free.calls, uncached.calls) == (1, len(places), 200)


def test_the_latent_cache_stops_growing_at_its_limit(tmp_path: Path) -> None:
    wide, encoder = wide_picture(tmp_path), CountingEncoder()
    reader = PictureReader(resolution=16, center_crop=False)
    one_entry = 2 * 3 * 8 * 8 * 4
    latents = LatentSource(reader, encoder, scaling_factor=0.5, seed=7, cache_bytes=3 * one_entry)
    drawn(latents, wide)
    assert len(latents._moments) == 3


def test_the_posterior_is_sampled_anew_at_each_use_and_scaled(tmp_path: Path) -> None:
    wide = wide_picture(tmp_path)
    first, second, *_ = drawn(source(CountingEncoder(), center_crop=True, cache=True), wide)
    assert not np.array_equal(first, second)
    mean, deviation = CountingEncoder()(
        cropped(PictureReader(resolution=16, center_crop=True), Use(wide, 0, 0))
    )
    for epoch, latents in enumerate((first, second)):
        n = normal(tuple(mean.shape), 7, Purpose.VAE, epoch, wide.sample_id, 0)
        assert np.array_equal(latents, (0.5 * (mean + deviation * n)).numpy())


def test_a_picture_whose_latents_are_not_finite_is_left_out_and_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((3, 8, 8), torch.nan), torch.ones(3, 8, 8)

    reader = PictureReader(resolution=16, center_crop=True)
    latents = LatentSource(reader, broken, scaling_factor=1.0, seed=7)
    wide = wide_picture(tmp_path)
    assert [latents.latents(Use(wide, epoch, 0)) for epoch in range(3)] == [None, None, None]
    assert [record.message for record in caplog.records] == ["picture left out: its latents are not finite"]
