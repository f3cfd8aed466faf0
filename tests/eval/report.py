"""The tables for people: on the terminal, and as the page beside the JSON files that they are made from."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.eval import personalisation, text
from tests.eval.personalisation import slug

TEXT, PERSONALISATION = "text-to-image", "personalisation"
"""Names of the two results, without their ending."""


def write_result(out: Path, name: str, result: Mapping[str, Any]) -> None:
    """Saves a result, and writes the page anew from what the folder holds."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write_page(out)


def write_page(out: Path) -> None:
    """Writes `README.md` from the JSON files of a folder."""
    found = {name: _read(out / f"{name}.json") for name in (TEXT, PERSONALISATION)}
    lines = [
        "# How well it draws and learns",
        "",
        *_paragraph(
            "This page is written by `make eval` from the JSON files beside it; `tests/eval` is the code. Every judge"
            " compares with what `models/pocket` draws: no network judges a picture."
        ),
    ]
    if found[TEXT]:
        lines += _text_section(found[TEXT])
    if found[PERSONALISATION]:
        lines += _personalisation_section(found[PERSONALISATION])
    (out / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return result


def text_table(result: Mapping[str, Any]) -> list[str]:
    """The text-to-image table as Markdown: percent right, the 95 % interval, and of how many."""
    columns = [column for column in text.COLUMNS if column in result["rows"]["model"]]
    return _table(
        columns, {row: [_percent(cells[c]) for c in columns] for row, cells in result["rows"].items()}
    )


def _percent(cell: Mapping[str, float]) -> str:
    return f"{cell['value']:.0%} ({100 * cell['low']:.0f} to {100 * cell['high']:.0f}, n={cell['n']})"


def personalisation_table(result: Mapping[str, Any]) -> list[str]:
    """The personalisation table as Markdown: means and their 95 % intervals."""
    columns = list(personalisation.COLUMNS)
    rows = {row: [_interval(name, cells) for name in columns] for row, cells in result["rows"].items()}
    return _table(columns, rows)


def _interval(column: str, cells: Mapping[str, Mapping[str, float]]) -> str:
    if column not in cells:
        return ""
    digits = 0 if column in ("diversity", "training s", "all s") else 2
    value, low, high = (cells[column][name] for name in ("value", "low", "high"))
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _table(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    return lines + [f"| {row} | {' | '.join(cells)} |" for row, cells in rows.items()]


def _text_section(result: Mapping[str, Any]) -> list[str]:
    drawing, about = result["drawing"], result["about"]
    grid = [f"{number}. {', '.join(row)}" for number, row in enumerate(result["grid"], 1)]
    return [
        "",
        "## Text to image",
        "",
        *_paragraph(
            f"{result['prompts']} prompts on combinations of colour, noun and background that were kept from training."
            f" One picture each, {drawing['size_px']} px, {drawing['num_inference_steps']} steps"
            f" ({drawing['scheduler']}), guidance {drawing['guidance_scale']:g}, by `StableDiffusionPipeline`,"
            f" {about['seconds_a_picture']:.2f} s a picture. Share right, with its 95 % Wilson interval."
        ),
        "",
        *text_table(result),
        "",
        *_meanings(text.ROWS),
        "",
        *_meanings(text.COLUMNS),
        "",
        "Right forms by noun: "
        + ", ".join(f"{noun} {share}" for noun, share in result["by_noun"].items())
        + ".",
        "",
        _about(about),
        "",
        "![pictures](text-to-image.png)",
        "",
        "The first pictures of each kind of prompt, unchosen:",
        "",
        *grid,
    ]


def _personalisation_section(result: Mapping[str, Any]) -> list[str]:
    names = list(result["subjects"])
    prompts = result["prompts"][names[0]]
    grids = [row for row in result["rows"] if row in result["recipes"] or row == "untrained base"]
    lines = [
        "",
        "## Personalisation",
        "",
        *_paragraph(
            f"Subjects: {', '.join(names)}; individuals that the base has never seen. Five pictures of each on"
            f" different backgrounds teach it; {result['seeds']} pictures of each prompt are drawn,"
            f" {result['pictures_a_subject']} a subject. The service's rows were trained and drawn by the embedded"
            " platform over HTTP, one job at a time; the script's row beside them by its own process, drawn by"
            " `StableDiffusionPipeline`, each side with half of the cores. Means, with 95 % bootstrap intervals over"
            " subjects and, within them, seeds."
        ),
        "",
        *personalisation_table(result),
        "",
        *_meanings({name: recipe["text"] for name, recipe in result["recipes"].items()}),
        *_meanings(personalisation.ANCHORS),
        "",
        *_meanings(personalisation.COLUMNS),
        "",
        "What the recipes ask for:",
        "",
        *[
            f"* {name}: `{json.dumps(recipe['input'] | recipe['concept'])}`"
            for name, recipe in result["recipes"].items()
        ],
        "",
        _about(result["about"]),
        "",
        f"The prompts of the first subject: {'; '.join(prompts)}.",
    ]
    for row in grids:
        lines += [
            "",
            f"{row}: a picture it learned from, then the first prompts, unchosen, a row for each subject.",
            "",
        ]
        lines += [f"![{row}](personalisation-{slug(row)}.png)"]
    return lines


def _paragraph(text: str) -> list[str]:
    return textwrap.wrap(text, 118, break_long_words=False, break_on_hyphens=False)


def _meanings(texts: Mapping[str, str]) -> list[str]:
    return [f"* **{name}**: {meaning}." for name, meaning in texts.items()]


def _about(about: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"Measured {about['date']} with {about['model']} (digest {about['model_digest']}) on {about['machine']}; "
        f"Python {about['python']}, {versions}."
    )
