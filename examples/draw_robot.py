"""Draws the bundled example: five pictures of one robot, each in another place, and the archive that holds them.

    python examples/draw_robot.py          # writes examples/robot/*.png and examples/robot.zip again, byte for byte

The robot is always the same one (orange head, purple body, yellow button, orange feet); place, size and position vary,
as the pictures of a real subject would.
"""

import zipfile
from pathlib import Path

from PIL import Image, ImageDraw

SIZE_PX = 512
OVERSAMPLING = 2
HERE = Path(__file__).parent

SKY, SNOW, SAND, GRASS, NIGHT, WALL = (
    (142, 202, 230), (240, 244, 248), (233, 196, 106), (88, 149, 84), (24, 28, 58), (205, 180, 219),
)  # fmt: skip
ORANGE, PURPLE, YELLOW, WHITE, BLACK = (
    (244, 132, 32),
    (112, 60, 158),
    (250, 212, 40),
    (255, 255, 255),
    (20, 20, 24),
)

SCENES = {
    "beach": (SKY, SAND, 0.62, (0.40, 0.56), 0.50),
    "grass": (SKY, GRASS, 0.55, (0.60, 0.58), 0.44),
    "night": (NIGHT, (40, 44, 84), 0.70, (0.50, 0.55), 0.54),
    "room": (WALL, (130, 98, 84), 0.72, (0.45, 0.60), 0.48),
    "snow": ((178, 206, 228), SNOW, 0.58, (0.56, 0.57), 0.46),
}
"""Place -> colours above and below, height of the horizon, middle of the robot, its height; shares of the side."""


def draw_scene(above: tuple[int, ...], below: tuple[int, ...], horizon: float) -> Image.Image:
    """The place: two flat halves."""
    side = SIZE_PX * OVERSAMPLING
    scene = Image.new("RGB", (side, side), above)
    ImageDraw.Draw(scene).rectangle((0, round(side * horizon), side, side), fill=below)
    return scene


def draw_robot(scene: Image.Image, middle: tuple[float, float], height: float) -> None:
    """The subject, into a scene.

    Args:
        scene: RGB picture, changed in place.
        middle: middle of the robot, as shares of width and height.
        height: its height as a share of the picture's.
    """
    draw = ImageDraw.Draw(scene)
    side, unit = scene.width, scene.height * height / 10
    left, top = side * middle[0], side * middle[1] - 5 * unit

    def box(x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
        return (left + x0 * unit, top + y0 * unit, left + x1 * unit, top + y1 * unit)

    draw.line((left, top, left, top + 1.2 * unit), fill=BLACK, width=round(unit / 4))
    draw.ellipse(box(-0.4, -0.4, 0.4, 0.4), fill=YELLOW)
    draw.rounded_rectangle(box(-1.9, 1.0, 1.9, 4.0), radius=unit / 2, fill=ORANGE)
    for eye in (-0.9, 0.9):
        draw.ellipse(box(eye - 0.5, 1.8, eye + 0.5, 2.8), fill=WHITE)
        draw.ellipse(box(eye - 0.2, 2.1, eye + 0.2, 2.5), fill=BLACK)
    draw.rectangle(box(-0.8, 3.2, 0.8, 3.5), fill=BLACK)
    for arm in (-3.0, 2.2):
        draw.rounded_rectangle(box(arm, 4.6, arm + 0.8, 7.2), radius=unit / 3, fill=PURPLE)
    draw.rounded_rectangle(box(-2.1, 4.2, 2.1, 8.2), radius=unit / 2, fill=PURPLE)
    draw.ellipse(box(-0.7, 5.4, 0.7, 6.8), fill=YELLOW)
    for foot in (-1.6, 0.4):
        draw.rounded_rectangle(box(foot, 8.2, foot + 1.2, 10.0), radius=unit / 3, fill=ORANGE)


def main() -> None:
    """Writes the five pictures and the archive beside this file."""
    folder = HERE / "robot"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(HERE / "robot.zip", "w", zipfile.ZIP_STORED) as archive:
        for name, (above, below, horizon, middle, height) in sorted(SCENES.items()):
            scene = draw_scene(above, below, horizon)
            draw_robot(scene, middle, height)
            path = folder / f"{name}.png"
            scene.resize((SIZE_PX, SIZE_PX), Image.Resampling.LANCZOS).save(path, optimize=True)
            archive.writestr(zipfile.ZipInfo(f"robot/{name}.png"), path.read_bytes())


if __name__ == "__main__":
    main()
