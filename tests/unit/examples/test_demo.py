"""The demo's promises: one robot, scenes that it was not taught in, and the same drawings before and after."""

import zipfile
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from examples import demo, draw_robot
from examples.sheet import CELL_PX, Row, draw_sheet
from models.pocket.figures import SUBJECTS
from models.pocket.scenes import BACKGROUNDS, WORDS
from services.domain.generation_spec import resolve_generation_spec
from services.gateway.dialects.runpod.dream_booth_v1 import read_input


def test_the_bundled_pictures_are_those_that_the_script_draws(tmp_path: Path) -> None:
    draw_robot.write(tmp_path)
    drawn = sorted((tmp_path / "robot").glob("*.png"))
    bundled = sorted(demo.INSTANCE_PICTURES.glob("*.png"))
    assert [path.name for path in bundled] == [path.name for path in drawn]
    assert len(bundled) == 5
    for ours, theirs in zip(bundled, drawn, strict=True):
        with Image.open(ours) as one, Image.open(theirs) as other:
            assert ImageChops.difference(one, other).getbbox() is None
    with zipfile.ZipFile(demo.INSTANCE_PICTURES.with_suffix(".zip")) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {
            f"robot/{path.name}": path.read_bytes() for path in bundled
        }


def test_every_picture_shows_the_one_robot_on_a_background_of_its_own() -> None:
    scenes = [draw_robot.scene_of(name) for name in draw_robot.PICTURES]
    assert {(len(scene.things), scene.things[0].features) for scene in scenes} == {(1, SUBJECTS["robot"][1])}
    assert len({scene.background for scene in scenes}) == 5


@pytest.mark.parametrize("prompt", demo.PROMPTS)
def test_a_prompt_asks_for_a_background_that_no_picture_showed(prompt: str) -> None:
    asked = [name for name in BACKGROUNDS if prompt.endswith((f" {name}", f" {name} background"))]
    assert len(asked) == 1
    assert asked[0] not in {background for background, _, _ in draw_robot.PICTURES.values()}


@pytest.mark.parametrize("prompt", [*demo.PROMPTS, demo.INSTANCE_PROMPT, demo.CLASS_PROMPT])
def test_prompts_are_worded_as_the_base_model_learned_them(prompt: str) -> None:
    assert set(prompt.split()) - set(WORDS) == ({"sks"} if prompt != demo.CLASS_PROMPT else set())


def test_the_base_draws_what_the_taught_model_is_asked_for() -> None:
    submission = read_input(demo.training("http://192.0.2.1/robot.zip")["input"], lambda: 0)
    assert not submission.ignored
    assert list(submission.spec.samples) == [resolve_generation_spec(drawing) for drawing in demo.drawings()]


def test_the_sheet_shows_what_was_taught_above_what_was_drawn_before_and_after(tmp_path: Path) -> None:
    taught, before, after = [tmp_path / "red.png"], tmp_path / "blue.png", tmp_path / "green.png"
    for path in (*taught, before, after):
        Image.new("RGB", (64, 64), path.stem).save(path)
    rows = [Row(prompt, before, after) for prompt in demo.PROMPTS]
    with Image.open(draw_sheet("A robot", taught, rows, tmp_path / "out" / "sheet.png")) as sheet:
        red, blue, green = (_box(sheet, colour) for colour in ("red", "blue", "green"))
    assert (red[2] - red[0], red[3] - red[1]) == (CELL_PX, CELL_PX)
    assert blue[2] - blue[0] > len(rows) * CELL_PX
    assert (blue[0], blue[2]) == (green[0], green[2]), "a prompt's two pictures share a column"
    assert red[3] < blue[1] < blue[3] < green[1]


def test_a_long_prompt_on_the_sheet_stays_in_its_column(tmp_path: Path) -> None:
    picture = tmp_path / "red.png"
    Image.new("RGB", (64, 64), "red").save(picture)
    rows = [Row("a sks robot " * words, picture, picture) for words in (1, 12)]
    sizes = []
    for row in rows:
        with Image.open(draw_sheet("A robot", [], [row], tmp_path / "sheet.png")) as sheet:
            sizes.append(sheet.size)
    assert sizes[0][0] == sizes[1][0]
    assert sizes[0][1] < sizes[1][1], "the prompt takes more lines"


def _box(sheet: Image.Image, colour: str) -> tuple[int, int, int, int]:
    """Around every pixel of exactly this colour."""
    difference = ImageChops.difference(sheet, Image.new("RGB", sheet.size, colour)).convert("L")
    box = difference.point(lambda value: 255 * (value == 0)).getbbox()
    assert box is not None, f"there is no {colour}"
    return box
