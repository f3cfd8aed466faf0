"""Seconds a picture: the drawing engine against a plain `StableDiffusionPipeline` call on the same weights."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from services.diffusion.drawing import Drawing, draw
from services.diffusion.loading import Components, load_components, quiet_libraries
from services.inference.engine import Engine
from services.inference.slot import open_slots
from services.inference.stages import encode_image, finish
from services.storage.catalogue import EMBEDDED_WEIGHTS
from tests.bench.rows import Row, compare

DRAWING = Drawing("a photo of a robot on the beach", "blurry", num_inference_steps=20, seed=1)
PEER = "diffusers StableDiffusionPipeline"


def rows() -> list[Row]:
    """One picture by the single-picture loop, and four requests at a time through the engine, DDIM 20 steps."""
    torch.set_num_threads(1)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        components, pipeline = load_components(EMBEDDED_WEIGHTS), _pipeline(EMBEDDED_WEIGHTS)
        return [
            compare(
                "one picture of 512 px, guided, 20 steps",
                PEER,
                lambda: draw(components, DRAWING),
                lambda: _by_pipeline(pipeline, DRAWING),
            ),
            compare(
                "four requests at once, to PNG files, batches of 4",
                f"{PEER}, one by one",
                lambda: _by_engine(components, 4, Path(folder)),
                lambda: [encode_image(_by_pipeline(pipeline, drawing)) for drawing in _four()],
                rounds=5,
            ),
        ]


def _pipeline(model: Path) -> Any:
    pipeline = StableDiffusionPipeline.from_pretrained(str(model), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _by_pipeline(pipeline: Any, drawing: Drawing) -> Any:
    return pipeline(
        drawing.prompt,
        negative_prompt=drawing.negative_prompt,
        num_inference_steps=drawing.num_inference_steps,
        guidance_scale=drawing.guidance_scale,
        generator=torch.Generator().manual_seed(drawing.seed),
    ).images[0]


def _by_engine(components: Components, batch_cap: int, folder: Path) -> None:
    engine = Engine(batch_cap)
    for drawing in _four():
        engine.add(open_slots(str(drawing.seed), "model", components, [drawing]))
    while not engine.is_idle:
        for slot in engine.tick().finished:
            finish(slot, folder / slot.job)


def _four() -> list[Drawing]:
    return [replace(DRAWING, seed=seed) for seed in range(1, 5)]
