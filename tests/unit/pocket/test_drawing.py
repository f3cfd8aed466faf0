"""The pixels: one scene at any size, masks that cover what is drawn, holes that show what is behind."""

import random

import numpy as np
import pytest
from PIL import Image

from models.pocket.drawing import OVERSAMPLING, draw, draw_background, shaded, texture, thing_mask
from models.pocket.figures import ASPECT, COLOURS, NOUNS, SHAPES, SUBJECTS, Features
from models.pocket.scenes import BACKGROUNDS, MARGIN, PLACES, Scene, Thing, one_thing, random_scene


def pixels(picture: Image.Image) -> np.ndarray:
    """float64, of the picture's own shape."""
    return np.asarray(picture, np.float64)


def empty(scene: Scene, size_px: int) -> np.ndarray:
    """The scene's background alone, as `draw` reduces it."""
    return pixels(draw(Scene((), scene.background, horizon=scene.horizon, shade=scene.shade), size_px))


def sample(count: int) -> list[Scene]:
    rng = random.Random("pictures")
    return [random_scene(rng) for _ in range(count)]


def test_a_scene_looks_the_same_at_every_size() -> None:
    for scene in sample(12):
        large, small = draw(scene, 256), draw(scene, 128)
        difference = np.abs(pixels(large.reduce(2)) - pixels(small))
        assert difference.mean() < 1.0, scene
        # Only edges may differ: they are where the coarser raster puts them.
        assert (difference.max(axis=2) > 8).mean() < 0.04, scene


def test_a_picture_is_square_rgb_of_the_size_asked_for() -> None:
    picture = draw(sample(1)[0], 96)
    assert (picture.mode, picture.size) == ("RGB", (96, 96))


def test_masks_cover_whatever_differs_from_the_background() -> None:
    for scene in sample(20):
        changed = np.abs(pixels(draw(scene, 128)) - empty(scene, 128)).max(axis=2) > 2
        covered = np.zeros((128, 128), bool)
        for thing in scene.things:
            covered |= pixels(thing_mask(thing, 128)) > 0
        assert changed.any()
        assert not (changed & ~covered).any(), scene


@pytest.mark.parametrize("noun", SHAPES)
def test_a_shapes_mask_is_just_where_its_colour_is(noun: str) -> None:
    scene = one_thing(random.Random(noun), "white", noun, "red")
    drawn, mask = pixels(draw(scene, 128)), pixels(thing_mask(scene.things[0], 128))
    ink = np.array(shaded(COLOURS["red"], scene.things[0].shade))
    assert (mask == 255).sum() > 200
    assert (np.abs(drawn[mask == 255] - ink) <= 1).all()
    assert (np.abs(drawn[mask == 0] - empty(scene, 128)[mask == 0]) <= 1).all()


def test_a_rings_hole_shows_the_place_behind_it() -> None:
    scene = Scene((Thing("ring", "red", None, 0.5, 0.55, 0.6),), "on the beach")
    drawn, behind = pixels(draw(scene, 128)), empty(scene, 128)
    middle = slice(58, 78)
    assert (drawn[middle, 56:72] == behind[middle, 56:72]).all()
    assert len(np.unique(drawn[middle, 56:72].reshape(-1, 3), axis=0)) > 1  # the shore runs through it
    assert pixels(thing_mask(scene.things[0], 128))[middle, 56:72].max() == 0


def test_the_margin_shows_nothing_but_background() -> None:
    edge = int(MARGIN * 128) - 1
    inner = np.zeros((128, 128), bool)
    inner[edge:-edge, edge:-edge] = True
    for scene in sample(40):
        difference = np.abs(pixels(draw(scene, 128)) - empty(scene, 128)).max(axis=2)
        assert difference[~inner].max() == 0, scene


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_flipped_figure_is_the_mirror_image(name: str) -> None:
    noun, features = SUBJECTS[name]
    other = Features(features.main, features.second, features.accent, features.form, features.mark, True)
    first, second = (
        pixels(draw(Scene((Thing(noun, features.main, one, 0.5, 0.5, 0.5),), "cyan"), 128))
        for one in (features, other)
    )
    difference = np.abs(first[:, ::-1] - second)
    # Pillow's outlines take in their right edge: mirrored, they lie half a pixel elsewhere.
    assert (difference.max(axis=2) > 40).mean() < 0.02


@pytest.mark.parametrize("noun", [noun for noun in NOUNS if noun not in SHAPES])
def test_every_form_and_mark_of_a_figure_looks_different(noun: str) -> None:
    pictures = []
    for form in range(3):
        for mark in range(3):
            features = Features("red", "green", "blue", form, mark)
            scene = Scene((Thing(noun, "red", features, 0.5, 0.5, 0.5),), "white")
            pictures.append(pixels(draw(scene, 64)))
    for index, picture in enumerate(pictures):
        for other in pictures[:index]:
            assert (np.abs(picture - other).max(axis=2) > 40).sum() > 8


def test_the_shade_moves_every_colour_a_little() -> None:
    plain = Scene((Thing("circle", "grey", None, 0.5, 0.5, 0.5),), "blue")
    other = Scene((Thing("circle", "grey", None, 0.5, 0.5, 0.5, (5, 0, -5)),), "blue", shade=(-4, 4, 2))
    difference = pixels(draw(other, 64)) - pixels(draw(plain, 64))
    assert difference[32, 32].tolist() == [5, 0, -5]
    assert difference[2, 2].tolist() == [-4, 4, 2]


def test_shaded_colours_stay_within_eight_bits() -> None:
    assert shaded((250, 3, 100), (6, -6, 6)) == (255, 0, 106)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_each_background_is_unlike_every_other(background: str) -> None:
    def border(name: str) -> np.ndarray:
        side = 64 * OVERSAMPLING
        picture = pixels(draw_background(name, 0.55, (0, 0, 0), side).reduce(OVERSAMPLING))
        return np.concatenate([picture[:4].ravel(), picture[-4:].ravel(), picture[:, :4].ravel()])

    mine = border(background)
    distances = {name: np.abs(border(name) - mine).mean() for name in BACKGROUNDS if name != background}
    assert min(distances.values()) > 5, min(distances, key=lambda name: distances[name])


def test_places_are_more_than_one_colour_and_flat_backgrounds_are_one() -> None:
    for name in BACKGROUNDS:
        colours = draw_background(name, 0.55, (0, 0, 0), 64).getcolors(64 * 64)
        assert colours is not None
        assert (len(colours) > 1) == (name in PLACES), name


def test_textures_have_a_seed_and_a_grain() -> None:
    first, again, other = (pixels(texture(random.Random(seed), 64)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert np.abs(first - other).mean() > 5
    assert first.std(axis=(0, 1)).min() > 2


@pytest.mark.parametrize("noun", NOUNS)
def test_a_thing_fills_its_box_and_stays_in_it(noun: str) -> None:
    features = None if noun in SHAPES else Features("red", "green", "blue", 0, 0)
    mask = pixels(thing_mask(Thing(noun, "red", features, 0.5, 0.5, 0.5), 256)) > 127
    height, width = np.ptp(np.flatnonzero(mask.any(axis=1))), np.ptp(np.flatnonzero(mask.any(axis=0)))
    box_height, box_width = 128, 128 * ASPECT.get(noun, 1.0)
    assert 0.85 * box_height < height <= box_height + 2
    assert 0.85 * box_width < width <= box_width + 2
