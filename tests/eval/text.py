"""The text-to-image table: does a base model draw what held-out prompts ask for?"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from models.pocket.drawing import draw
from models.pocket.figures import FIGURES
from tests.eval import grids, pipelines
from tests.eval.backgrounds import Background, judge_background
from tests.eval.machine import about_run
from tests.eval.pixels import Pixels, pixels_of
from tests.eval.prompts import TextPrompt, text_prompts
from tests.eval.stats import Share, wilson
from tests.eval.things import (
    Thing,
    find_figure,
    find_things,
    judge_kind,
    largest_thing,
    position_word,
    size_word,
)

COLUMNS: dict[str, str] = {
    "background": "the border is nearest to the named background, of eighteen",
    "colour": "the one shape has the named colour, of twelve",
    "shape": "the one shape is the named one, of six",
    "size": "a thing said to be small or big is so, of three sizes",
    "position": "a thing said to be on the left or right is there",
    "count": "as many shapes as asked for, two or three, of the named colour each",
    "pair": "exactly two shapes, each with its own colour and form",
    "kind": "a figure's silhouette is that of the named class, of six",
    "all": "everything that was measured of a picture is right",
}
ROWS: dict[str, str] = {
    "model": "what the model draws",
    "round trip": "drawings of the same scenes, once through the autoencoder: the most a model behind it could reach",
    "drawn": "drawings of the same scenes: how often the judges are right",
}
GRID_GROUPS = ("figure", "figure", "shape", "count", "pair", "size")
GRID_COLUMNS = 8


def judge_text(prompt: TextPrompt, picture: Image.Image) -> dict[str, bool]:
    """Which of the columns that a prompt speaks of are right in a picture; "all" is always among them."""
    pixels = pixels_of(picture)
    background = judge_background(pixels)
    facts = {"background": background.name == prompt.scene.background}
    if prompt.scene.things[0].noun in FIGURES:
        facts |= _judge_figure(prompt, pixels, background)
    else:
        facts |= _judge_shapes(prompt, find_things(pixels, background))
    return facts | {"all": all(facts.values())}


def _judge_figure(prompt: TextPrompt, pixels: Pixels, background: Background) -> dict[str, bool]:
    mask = find_figure(pixels, background)
    return {"kind": mask is not None and judge_kind(mask, background) == prompt.scene.things[0].noun}


def _judge_shapes(prompt: TextPrompt, things: list[Thing]) -> dict[str, bool]:
    asked = sorted((thing.noun, thing.colour) for thing in prompt.scene.things)
    if prompt.group == "pair":
        return {"pair": sorted((thing.shape, thing.colour) for thing in things) == asked}
    if prompt.group == "count":
        return {"count": [thing.colour for thing in things] == [colour for _, colour in asked]}
    thing = largest_thing(things)
    noun, colour = asked[0]
    facts = {
        "colour": thing is not None and thing.colour == colour,
        "shape": thing is not None and thing.shape == noun,
    }
    if prompt.size:
        facts["size"] = thing is not None and size_word(noun, thing.height) == prompt.size
    if prompt.position:
        facts["position"] = thing is not None and position_word(thing.x) == prompt.position
    return facts


def evaluate(model: Path, most: int | None, out: Path, *, anchors: bool = True) -> dict[str, Any]:
    """Draws, judges, and saves a grid of pictures.

    Args:
        model: a diffusers folder.
        most: so many of the prompts; None: all.
        out: folder for `text-to-image.png`.
        anchors: judge drawings and round trips too.

    Returns:
        The table as plain data.
    """
    prompts = text_prompts(most)
    pipeline = pipelines.load_pipeline(model)
    started = time.monotonic()
    drawn_by_model = pipelines.draw_pictures(
        pipeline, [prompt.text for prompt in prompts], range(len(prompts))
    )
    seconds = time.monotonic() - started
    pictures = {"model": drawn_by_model} | (_anchors(prompts, pipeline) if anchors else {})
    judged = {
        row: [judge_text(*pair) for pair in zip(prompts, drawings, strict=True)]
        for row, drawings in pictures.items()
    }
    grid = _grid(prompts, drawn_by_model)
    grids.save(out / "text-to-image.png", [[drawn_by_model[index] for index in row] for row in grid])
    return {
        "about": about_run(model) | {"seconds_a_picture": round(seconds / len(prompts), 3)},
        "drawing": {
            "size_px": pipelines.SIZE_PX,
            "num_inference_steps": pipelines.STEPS,
            "guidance_scale": pipelines.GUIDANCE,
            "scheduler": type(pipeline.scheduler).__name__,
        },
        "prompts": len(prompts),
        "rows": {row: _shares(facts) for row, facts in judged.items()},
        "by_noun": _by_noun(prompts, judged["model"]),
        "grid": [[prompts[index].text for index in row] for row in grid],
    }


def _anchors(prompts: Sequence[TextPrompt], pipeline: Any) -> dict[str, list[Image.Image]]:
    drawn = [draw(prompt.scene, pipelines.SIZE_PX) for prompt in prompts]
    return {"round trip": pipelines.round_trips(pipeline, drawn), "drawn": drawn}


def _shares(judged: Sequence[dict[str, bool]]) -> dict[str, dict[str, float]]:
    shares = {}
    for column in COLUMNS:
        values = [facts[column] for facts in judged if column in facts]
        if values:
            shares[column] = as_json(wilson(sum(values), len(values)))
    return shares


def as_json(share: Share) -> dict[str, float]:
    """A share for the JSON file."""
    return asdict(share) | {
        "value": round(share.value, 4),
        "low": round(share.low, 4),
        "high": round(share.high, 4),
    }


def _by_noun(prompts: Sequence[TextPrompt], judged: Sequence[dict[str, bool]]) -> dict[str, str]:
    """For each noun how often its form was right, "right/n": where a model is weak."""
    forms: dict[str, list[bool]] = {}
    for prompt, facts in zip(prompts, judged, strict=True):
        form = facts.get("shape", facts.get("kind"))
        if form is not None:
            forms.setdefault(prompt.scene.things[0].noun, []).append(form)
    return {noun: f"{sum(values)}/{len(values)}" for noun, values in forms.items()}


def _grid(prompts: Sequence[TextPrompt], pictures: Sequence[Image.Image]) -> list[list[int]]:
    """Positions of the pictures to show, row by row: the first of each group, whatever they look like."""
    left = {group: [i for i, p in enumerate(prompts) if p.group == group] for group in set(GRID_GROUPS)}
    rows = []
    for group in GRID_GROUPS:
        rows.append(left[group][:GRID_COLUMNS])
        left[group] = left[group][GRID_COLUMNS:]
    return [row for row in rows if row]
