"""`make demo`: the main job on this machine, from pictures to pictures.

Starts the embedded platform with data of its own and draws some prompts with the base model as it is. Then it teaches
the bundled robot over HTTP, shows the progress, and has the same prompts drawn with the same seeds by the model that
was taught. It saves the pictures to `out/`, puts all of them on one sheet, and stops everything again.

Only the pictures of the base are asked for over gRPC, as the HTTP side offers trainings with their samples only.
"""

import os
import sys
from pathlib import Path
from typing import Any, Final

from likeness.inference.v1.generation_job_pb2 import GenerationSpec
from rich.console import Console

from examples.base_drawings import DrawingFailed, draw_all
from examples.sheet import Row, draw_sheet
from services.cli.gateway_client import Gateway, GatewayError
from services.cli.show import save_pictures, show_progress
from services.domain.errors import LikenessError
from services.launcher.platform import Platform, PlatformFailed

OUT: Final = Path("out")
HOME: Final = Path(os.environ.get("LIKENESS_HOME", ".likeness")) / "demo"
PROJECT: Final = "dev"
"""The project of the development key."""

SETTINGS: Final = {"LIKENESS_BATCH_CAP": "4"}
"""Class pictures are drawn in batches: a fifth faster, and equal to pictures drawn alone but for the last bits."""

# What is taught, and how. No instance picture shows a place or a background that is asked for below.
INSTANCE_PICTURES: Final = Path(__file__).parent / "robot"
INSTANCE_PROMPT: Final = "a photo of a sks robot"
CLASS_PROMPT: Final = "a robot"
CLASS_IMAGES: Final = 28
UPDATES: Final = 240
BATCH_SIZE: Final = 4
LEARNING_RATE: Final = 4e-4

# What is asked for: prompts in the words that the base model knows, and the word that it does not.
PROMPTS: Final = (
    "a photo of a sks robot on the beach",
    "a photo of a sks robot at night",
    "a picture of a sks robot under the sea",
    "a drawing of a sks robot in the desert",
    "a photo of a sks robot on a green background",
    "a photo of a sks robot on a pink background",
)
FIRST_SEED: Final = 11
STEPS: Final = 20
GUIDANCE: Final = 4.0


def drawings() -> list[GenerationSpec]:
    """One picture for each prompt, each with a seed of its own, as the base is asked for them."""
    return [
        GenerationSpec(
            prompt=prompt, seed=FIRST_SEED + number, num_inference_steps=STEPS, guidance_scale=GUIDANCE
        )
        for number, prompt in enumerate(PROMPTS)
    ]


def training(archive: str) -> dict[str, Any]:
    """The body of the training: five pictures, and the same drawings as its samples.

    Args:
        archive: URL of the pictures.
    """
    concept = {
        "instance_data": archive,
        "instance_prompt": INSTANCE_PROMPT,
        "class_prompt": CLASS_PROMPT,
        "num_class_images": CLASS_IMAGES,
    }
    samples = [
        {
            "prompt": drawing.prompt,
            "seed": drawing.seed,
            "infer_steps": drawing.num_inference_steps,
            "guidance_scale": drawing.guidance_scale,
        }
        for drawing in drawings()
    ]
    settings = {
        "max_train_steps": UPDATES,
        "train_batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler": "cosine",
        # The base was trained with every prompt padded to its full length, and pictures are drawn so.
        "pad_tokens": True,
        "sample_batch_size": 8,
    }
    return {"input": {"concepts": [concept], "samples": samples, **settings}}


def main() -> int:
    """Runs the demo.

    Returns:
        Exit status: 0 when the pictures are there.
    """
    console = Console()
    console.print("starting the platform: NATS, storage, trainer, inference, gateway ...")
    try:
        with (
            Platform(HOME.absolute(), SETTINGS) as platform,
            Gateway(platform.url, platform.api_key) as gateway,
        ):
            console.print(f"serving at {platform.url}; the base model draws {len(PROMPTS)} prompts as it is")
            before = _draw_with_the_base(platform)
            after = _teach_and_draw(gateway, platform.example_url, console)
    except (GatewayError, PlatformFailed, LikenessError, DrawingFailed) as error:
        console.print(str(error), style="red", highlight=False, markup=False)
        return 1
    rows = [Row(*row) for row in zip(PROMPTS, before, after, strict=True)]
    pictures = sorted(INSTANCE_PICTURES.glob("*.png"))
    title = f'The base model was taught these pictures as "{INSTANCE_PROMPT}"'
    sheet = draw_sheet(title, pictures, rows, OUT / "sheet.png")
    console.print(f"the pictures: {OUT}/before and {OUT}/after; all of them on one sheet: {sheet}")
    return 0


def _draw_with_the_base(platform: Platform) -> list[Path]:
    inference, storage = (platform.settings[f"LIKENESS_{name}_ADDR"] for name in ("INFERENCE", "STORAGE"))
    return draw_all(inference, storage, PROJECT, drawings(), OUT / "before")


def _teach_and_draw(gateway: Gateway, archive: str, console: Console) -> list[Path]:
    """Trains, and returns the pictures that the taught model drew."""
    console.print(f"teaching it the five pictures of {archive}")
    ended = show_progress(gateway.follow(gateway.submit(training(archive))), console)
    if ended.status != "COMPLETED":
        raise GatewayError(f"the job ended {ended.status}: {ended.body.get('error', '')}")
    waited, worked = ended.body["delayTime"] / 1000, ended.body["executionTime"] / 1000
    console.print(f"done: waited {waited:.1f} s, worked {worked:.1f} s")
    return save_pictures(gateway, ended, OUT / "after")


if __name__ == "__main__":
    sys.exit(main())
