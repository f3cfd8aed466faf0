"""Draws the bundled example: five pictures of one robot, each on another background, and the archive that holds them.

    python examples/draw_robot.py          # writes examples/robot/*.png and examples/robot.zip again, byte for byte

The robot is the subject of that name in `models.pocket.figures`, which the base model has never seen; background, size
and position vary, as the pictures of a real subject would.
"""

import random
import zipfile
from pathlib import Path
from typing import Final

from models.pocket.drawing import draw
from models.pocket.figures import SUBJECTS
from models.pocket.scenes import Scene, one_thing

HERE: Final = Path(__file__).parent
PICTURES: Final = {
    "cyan": ("cyan", "big", "middle"),
    "grass": ("on the grass", "", "left"),
    "grey": ("grey", "", "right"),
    "snow": ("in the snow", "", "middle"),
    "white": ("white", "big", ""),
}
"""File name -> background, size and position, as `models.pocket.scenes.one_thing` takes them."""


def scene_of(name: str) -> Scene:
    """The scene of one picture; where exactly the robot stands is drawn from the picture's name."""
    noun, features = SUBJECTS["robot"]
    background, size, position = PICTURES[name]
    return one_thing(random.Random(name), background, noun, features.main, features, size, position)


def write(folder: Path) -> None:
    """Writes `robot/*.png` and `robot.zip` below a folder; the same bytes each time."""
    (folder / "robot").mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "robot.zip", "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(PICTURES):
            path = folder / "robot" / f"{name}.png"
            draw(scene_of(name)).save(path, optimize=True)
            archive.writestr(zipfile.ZipInfo(f"robot/{name}.png"), path.read_bytes())


if __name__ == "__main__":
    write(HERE)
