"""One picture that tells the whole story: what was taught, what was asked for, and what came before and after."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image, ImageDraw, ImageFont

CELL_PX: Final = 232
GAP_PX: Final = 12
LABEL_PX: Final = 96
"""Width of the words at the left."""
LINE_PX: Final = 24
TEXT_PX: Final = 17
LABELS: Final = (["taught"], ["asked for"], ["before", "teaching"], ["after", "teaching"])
PAPER: Final = (255, 255, 255)
INK: Final = (30, 30, 34)


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt with the pictures that came of it."""

    prompt: str
    before: Path
    after: Path


def draw_sheet(title: str, taught: Sequence[Path], rows: Sequence[Row], path: Path) -> Path:
    """Writes the sheet: the taught pictures on top, below them a column a prompt.

    Args:
        title: what the taught pictures are.
        taught: the pictures trained on.
        rows: what was drawn, with the same seed before and after.
        path: PNG file to write; its folder is made.

    Returns:
        `path`.
    """
    columns = max(len(taught), len(rows))
    prompts = [_lines(row.prompt) for row in rows]
    prompt_px = LINE_PX * max((len(lines) for lines in prompts), default=0)
    side = CELL_PX + GAP_PX
    tops = _tops([LINE_PX, CELL_PX, LINE_PX // 2, prompt_px, CELL_PX, CELL_PX])
    sheet = Image.new("RGB", (GAP_PX + LABEL_PX + columns * side, tops[-1]), PAPER)
    pen = ImageDraw.Draw(sheet)
    _write(pen, GAP_PX, tops[0], [title])
    for top, words in zip((tops[1], *tops[3:6]), LABELS, strict=True):
        _write(pen, GAP_PX, top, words)
    for column, picture in enumerate(taught):
        _place(sheet, picture, _left(column), tops[1])
    for column, row in enumerate(rows):
        _write(pen, _left(column), tops[3], prompts[column])
        _place(sheet, row.before, _left(column), tops[4])
        _place(sheet, row.after, _left(column), tops[5])
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _tops(heights: Sequence[int]) -> list[int]:
    """Where bands of these heights begin, a gap before each; the end of the last comes last."""
    tops = [GAP_PX]
    for height in heights:
        tops.append(tops[-1] + height + GAP_PX)
    return tops


def _left(column: int) -> int:
    return GAP_PX + LABEL_PX + column * (CELL_PX + GAP_PX)


def _place(sheet: Image.Image, path: Path, left: int, top: int) -> None:
    with Image.open(path) as picture:
        sheet.paste(picture.convert("RGB").resize((CELL_PX, CELL_PX), Image.Resampling.LANCZOS), (left, top))


def _write(pen: ImageDraw.ImageDraw, left: int, top: int, lines: Sequence[str]) -> None:
    for number, line in enumerate(lines):
        pen.text((left, top + number * LINE_PX), line, INK, _font())


def _lines(text: str) -> list[str]:
    """The text, broken at spaces into lines as wide as a cell."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _font().getlength(longer) <= CELL_PX:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(TEXT_PX)
