"""The table of buckets, which picture gets which, and how it is brought there."""

import math
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from services.domain.training_spec import EVERYDREAM_RESOLUTIONS
from services.trainer.buckets import (
    BucketReader,
    Geometry,
    Size,
    bucket_sizes,
    choose_bucket,
    drawn_geometry,
    is_upscaled,
    lost_share,
    middle_geometry,
)
from services.trainer.data import Picture
from services.trainer.randomness import Coordinate

# Resolution: number of buckets, landscape sizes, widest ratio, percent lost midway between two buckets at worst.
TABLE = {
    256: (7, "256x256 320x192 448x128 512x128", 4.00, 31),
    384: (11, "384x384 448x320 512x256 576x256 704x192 768x192", 4.00, 22),
    448: (7, "448x448 512x384 576x320 704x256", 2.75, 19),
    512: (11, "512x512 576x448 640x384 768x320 896x256 1024x256", 4.00, 17),
    576: (9, "576x576 640x512 704x448 832x384 960x320", 3.00, 15),
    640: (13, "640x640 704x576 768x512 896x448 1024x384 1216x320 1280x320", 4.00, 16),
    704: (11, "704x704 768x640 832x576 960x512 1088x448 1280x384", 3.33, 15),
    768: (13, "768x768 832x704 896x640 1024x576 1152x512 1280x448 1536x384", 4.00, 15),
    832: (15, "832x832 896x768 960x704 1024x640 1152x576 1344x512 1536x448 1536x384", 4.00, 13),
    896: (13, "896x896 960x832 1024x768 1216x640 1344x576 1536x512 1792x448", 4.00, 16),
    960: (15, "960x960 1024x896 1088x832 1280x704 1408x640 1600x576 1792x512 1792x448", 4.00, 15),
    1024: (15, "1024x1024 1088x960 1152x896 1344x768 1472x704 1600x640 1792x576 2048x512", 4.00, 14),
    1088: (
        17,
        "1088x1088 1152x1024 1216x960 1408x832 1536x768 1664x704 1792x640 2048x576 2048x512",
        4.00,
        13,
    ),
    1152: (11, "1152x1152 1280x1024 1472x896 1728x768 2048x640 2304x576", 4.00, 16),
}


@pytest.mark.parametrize("resolution", EVERYDREAM_RESOLUTIONS)
def test_the_rule_gives_the_published_table(resolution: int) -> None:
    count, landscapes, widest, worst_percent = TABLE[resolution]
    buckets = bucket_sizes(resolution)
    wide = [size for size in buckets if size.ratio >= 1]
    assert " ".join(f"{size.width_px}x{size.height_px}" for size in wide) == landscapes
    assert len(buckets) == count
    assert round(float(wide[-1].ratio), 2) == widest
    steps = [after.ratio / before.ratio for before, after in pairwise(wide)]
    assert round(100 * (1 - 1 / math.sqrt(max(steps)))) == worst_percent


@pytest.mark.parametrize("resolution", range(64, 1217, 64))
def test_every_resolution_has_the_square_and_transposes_within_its_area(resolution: int) -> None:
    buckets = bucket_sizes(resolution)
    assert Size(resolution, resolution) in buckets
    assert {size.transposed for size in buckets} == set(buckets)
    assert len(set(buckets)) == len(buckets)
    assert list(buckets) == sorted(buckets, key=lambda size: size.ratio)
    for size in buckets:
        assert size.width_px % 64 == size.height_px % 64 == 0
        assert 0.85 * resolution**2 <= size.area <= resolution**2
        assert 0.25 <= size.ratio <= 4


def test_smaller_steps_serve_smaller_models() -> None:
    assert bucket_sizes(64, 8) == tuple(
        Size(size.width_px // 8, size.height_px // 8) for size in bucket_sizes(512, 64)
    )


@pytest.mark.parametrize("resolution", [0, 100, 520])
def test_a_resolution_off_the_grid_is_refused(resolution: int) -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        bucket_sizes(resolution)


def test_the_nearest_bucket_is_the_nearest_by_logarithm() -> None:
    buckets = bucket_sizes(512)
    for width, height in [(100, 100), (4000, 3000), (3000, 4000), (1920, 1080), (900, 1600), (3000, 1000)]:
        picture = Size(width, height)
        distance = {bucket: abs(math.log(picture.ratio / bucket.ratio)) for bucket in buckets}
        assert distance[choose_bucket(picture, buckets)] == min(distance.values())


def test_a_picture_and_its_transpose_get_transposed_buckets() -> None:
    for resolution in (256, 512, 768, 1088):
        buckets = bucket_sizes(resolution)
        for width in range(64, 900, 31):
            for height in range(64, 900, 43):
                picture = Size(width, height)
                assert (
                    choose_bucket(picture.transposed, buckets) == choose_bucket(picture, buckets).transposed
                )


def test_by_plain_ratio_portraits_and_landscapes_would_be_treated_differently() -> None:
    """So the test above can fail: by plain difference this picture and its transpose go to unlike buckets."""
    buckets, picture = bucket_sizes(256), Size(1270, 1000)

    def plainly(size: Size) -> Size:
        return min(buckets, key=lambda bucket: abs(size.ratio - bucket.ratio))

    assert plainly(picture.transposed) != plainly(picture).transposed
    assert choose_bucket(picture.transposed, buckets) == choose_bucket(picture, buckets).transposed


def test_halfway_between_two_buckets_the_squarer_one_is_taken_whichever_way_a_picture_lies() -> None:
    buckets = (Size(1, 4), Size(1, 1), Size(4, 1))
    assert choose_bucket(Size(2, 1), buckets) == choose_bucket(Size(1, 2), buckets) == Size(1, 1)


def test_beyond_the_last_bucket_much_is_lost() -> None:
    buckets = bucket_sizes(512)
    panorama = Size(6000, 1000)
    assert choose_bucket(panorama, buckets) == Size(1024, 256)
    assert lost_share(panorama, Size(1024, 256)) == pytest.approx(1 / 3)
    assert lost_share(panorama.transposed, Size(256, 1024)) == pytest.approx(1 / 3)
    assert lost_share(Size(1024, 256), Size(1024, 256)) == 0


@pytest.mark.parametrize(
    ("size", "expected"),
    [(Size(500, 400), True), (Size(576, 400), False), (Size(500, 448), False), (Size(800, 700), False)],
)
def test_upscaled_means_smaller_on_both_sides(size: Size, expected: bool) -> None:
    assert is_upscaled(size, Size(576, 448)) is expected


@dataclass(frozen=True)
class AUse:
    size: Size
    bucket: Size
    flip: bool = False
    epoch: int = 0

    @property
    def coordinates(self) -> tuple[Coordinate, ...]:
        return (self.epoch, "0/instance/a.png", 0)


def widths(geometry: Geometry) -> tuple[int, int]:
    left, top, right, bottom = geometry.box
    return right - left, bottom - top


@pytest.mark.parametrize(
    ("size", "bucket", "box"),
    [
        (Size(1000, 500), Size(64, 64), (250, 0, 750, 500)),
        (Size(500, 1000), Size(64, 64), (0, 250, 500, 750)),
        (Size(640, 480), Size(640, 480), (0, 0, 640, 480)),
        (Size(80, 100), Size(128, 64), (0, 30, 80, 70)),
    ],
)
def test_the_middle_crop_is_in_the_middle(size: Size, bucket: Size, box: tuple[int, int, int, int]) -> None:
    assert middle_geometry(AUse(size, bucket)).box == box


@pytest.mark.parametrize("size", [Size(1500, 1000), Size(1000, 1500), Size(90, 70), Size(65, 1000)])
@pytest.mark.parametrize("bucket", bucket_sizes(512))
@pytest.mark.parametrize("jitter", [0.0, 0.02])
def test_a_crop_lies_inside_the_picture_and_has_the_bucket_s_ratio(
    size: Size, bucket: Size, jitter: float
) -> None:
    for epoch in range(20):
        use = AUse(size, bucket, epoch=epoch)
        left, top, right, bottom = drawn_geometry(use, seed=1, crop_jitter=jitter).box
        assert 0 <= left < right <= size.width_px
        assert 0 <= top < bottom <= size.height_px
        # One side is exact, the other is rounded to whole pixels.
        error = min(
            abs((right - left) - (bottom - top) * bucket.ratio),
            abs((bottom - top) - (right - left) / bucket.ratio),
        )
        assert error <= 0.5 or (right - left, bottom - top).count(1)


def test_without_jitter_the_crop_is_as_large_as_can_be() -> None:
    for epoch in range(50):
        assert widths(drawn_geometry(AUse(Size(1500, 1000), Size(512, 512), epoch=epoch), seed=1)) == (
            1000,
            1000,
        )


def positions(count: int = 4000) -> np.ndarray:
    """Left edges of crops of 2000 pixels with 1048 to spare: 262 places, one bucket pixel of 4 apart."""
    uses = [AUse(Size(3048, 2000), Size(512, 512), epoch=epoch) for epoch in range(count)]
    return np.array([drawn_geometry(use, seed=1).box[0] for use in uses])


def test_crop_positions_are_triangular_around_the_middle() -> None:
    found = positions() / 1048
    assert found.min() >= 0
    assert found.max() <= 1
    # The middle half of a symmetric triangle holds 3/4 of it, the outer quarters 1/8 each.
    for low, high, share in [(0.0, 0.25, 0.125), (0.25, 0.5, 0.375), (0.5, 0.75, 0.375), (0.75, 1.01, 0.125)]:
        counted = float(((found >= low) & (found < high)).mean())
        assert abs(counted - share) < 3 * (share * (1 - share) / 4000) ** 0.5 + 1 / 262
    assert len(np.unique(found)) > 200


def test_crop_positions_differ_between_epochs_and_pictures_and_seeds_and_repeat() -> None:
    use = AUse(Size(3048, 2000), Size(512, 512))
    assert drawn_geometry(use, seed=1) == drawn_geometry(use, seed=1)
    assert drawn_geometry(use, seed=1) != drawn_geometry(use, seed=2)
    assert len(set(positions(count=20).tolist())) > 15


def test_jitter_cuts_at_most_its_share_and_only_where_there_is_something_to_spare() -> None:
    large = [
        drawn_geometry(AUse(Size(1500, 1500), Size(512, 512), epoch=n), seed=1, crop_jitter=0.02)
        for n in range(500)
    ]
    sides = Counter(widths(geometry)[0] for geometry in large)
    assert min(sides) >= 1500 - 30
    assert max(sides) <= 1500
    assert len(sides) > 20
    corners = {geometry.box[:2] for geometry in large}
    assert len(corners) > 200
    barely = [
        drawn_geometry(AUse(Size(516, 512), Size(512, 512), epoch=n), seed=1, crop_jitter=0.02)
        for n in range(200)
    ]
    assert {widths(geometry) for geometry in barely} == {(512, 512)}
    small = [
        drawn_geometry(AUse(Size(300, 300), Size(512, 512), epoch=n), seed=1, crop_jitter=0.02)
        for n in range(50)
    ]
    assert {geometry.box for geometry in small} == {(0, 0, 300, 300)}


def saved(tmp_path: Path, width: int, height: int) -> tuple[Picture, Size]:
    """A picture whose red value says the column and whose green value says the row."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([columns * 255 / width, rows * 255 / height, np.zeros_like(rows)], axis=-1)
    path = tmp_path / f"{width}x{height}.png"
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return Picture(f"0/instance/{path.name}", path, "", 0, 7), Size(width, height)


def test_values_are_the_crop_resized_and_then_mirrored(tmp_path: Path) -> None:
    picture, size = saved(tmp_path, 200, 100)
    reader = BucketReader(seed=1, centre=True)
    plain = reader.values(picture, reader.geometry(AUse(size, Size(32, 64))))
    mirrored = reader.values(picture, reader.geometry(AUse(size, Size(32, 64), flip=True)))
    assert plain.shape == (3, 64, 32)
    assert plain.dtype is torch.float32
    assert torch.equal(mirrored, plain.flip(2))
    left, right = float(plain[0, :, 0].mean()), float(plain[0, :, -1].mean())
    # The middle 50 of 200 columns: from 75 to 125 hundredths of the range.
    assert [left, right] == pytest.approx([75 / 100 - 1, 125 / 100 - 1], abs=0.02)
    assert float(plain.min()) >= -1
    assert float(plain.max()) <= 1


def test_pixels_outside_the_crop_never_show(tmp_path: Path) -> None:
    path = tmp_path / "framed.png"
    image = Image.new("RGB", (300, 100), "white")
    image.paste("black", (100, 0, 200, 100))
    image.save(path)
    reader = BucketReader(seed=1, centre=True)
    use = AUse(Size(300, 100), Size(64, 64))
    values = reader.values(Picture("a", path, "", 0, 7), reader.geometry(use))
    assert float(values.max()) == -1.0


def test_shrinking_mixes_pixels_instead_of_leaving_some_out(tmp_path: Path) -> None:
    chequered = (np.indices((256, 256)).sum(axis=0) % 2 * 255).astype(np.uint8)
    path = tmp_path / "chequered.png"
    Image.fromarray(np.stack([chequered] * 3, axis=-1)).save(path)
    reader = BucketReader(seed=1)
    use = AUse(Size(256, 256), Size(64, 64))
    values = reader.values(Picture("a", path, "", 0, 7), reader.geometry(use))
    assert float(values.abs().max()) < 0.2


def test_drawn_crops_show_different_parts_in_different_epochs(tmp_path: Path) -> None:
    picture, size = saved(tmp_path, 400, 100)
    reader = BucketReader(seed=1)
    uses = [AUse(size, Size(64, 64), epoch=epoch) for epoch in range(40)]
    firsts = {round(float(reader.values(picture, reader.geometry(use))[0, 0, 0]), 3) for use in uses}
    assert len(firsts) > 25
