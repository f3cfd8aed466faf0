"""Pictures side by side in one small PNG."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

THUMBNAIL_PX = 128
GAP_PX = 4
COLOURS = 256
"""Colours that a grid is reduced to: drawings are flat, and soft edges survive it."""


def save(path: Path, rows: Sequence[Sequence[Image.Image]]) -> None:
    """Saves rows of square pictures as thumbnails on white."""
    columns = max(len(row) for row in rows)
    pitch = THUMBNAIL_PX + GAP_PX
    grid = Image.new("RGB", (columns * pitch - GAP_PX, len(rows) * pitch - GAP_PX), "white")
    for top, row in enumerate(rows):
        for left, picture in enumerate(row):
            small = picture.convert("RGB").resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
            grid.paste(small, (left * pitch, top * pitch))
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
