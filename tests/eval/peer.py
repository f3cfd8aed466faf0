"""diffusers' own `train_dreambooth.py` as a peer, run as the process it is made for; drawn by the plain pipeline."""

import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from tests.bench.torchvision_stand_in import stand_in_for_torchvision
from tests.bench.training import SCRIPT
from tests.eval import pipelines
from tests.eval.recipes import Recipe
from tests.eval.service import Learned, path_of, seeds_of

THREADS = max(1, (os.cpu_count() or 1) // 2)
"""Half of the cores, at least one: what a worker of the service takes."""


SWITCHES = ("with_prior_preservation", "train_text_encoder")
NUMBERS = ("prior_loss_weight", "max_train_steps", "train_batch_size", "learning_rate", "resolution", "seed")
"""Keys of a recipe that the script calls by the same names."""


def learn(
    recipe: Recipe,
    checkout: Path,
    model: Path,
    prompts: tuple[str, str],
    pictures: Sequence[tuple[Image.Image, str]],
    samples: Sequence[str],
    seeds: int,
    folder: Path,
) -> Learned:
    """As `Service.learn`, by the script of a diffusers checkout.

    Raises:
        RuntimeError: the script failed; the text has the end of what it said.
    """
    with tempfile.TemporaryDirectory(prefix="likeness-eval-") as name:
        work = Path(name)
        (work / "instance").mkdir()
        for index, (picture, _) in enumerate(pictures):
            picture.save(work / "instance" / f"{index}.png")
        started = time.monotonic()
        _run(checkout / SCRIPT, arguments_of(recipe, model, work, prompts))
        training_seconds = time.monotonic() - started
        _draw(work / "model", samples, seeds, folder)
        return Learned(round(time.monotonic() - started, 1), round(training_seconds, 1))


def arguments_of(recipe: Recipe, model: Path, work: Path, prompts: tuple[str, str]) -> list[str]:
    """The script's arguments: a recipe in its words. `work`: a folder with the pictures in `instance`."""
    return [
        f"--pretrained_model_name_or_path={model}",
        f"--instance_data_dir={work / 'instance'}",
        f"--class_data_dir={work / 'class'}",
        f"--instance_prompt={prompts[0]}",
        f"--class_prompt={prompts[1]}",
        *([f"--{name}" for name in SWITCHES if recipe.input[name]]),
        *([f"--{name}={recipe.input[name]}" for name in NUMBERS]),
        f"--num_class_images={recipe.concept['num_class_images']}",
        "--lr_scheduler=constant",
        "--lr_warmup_steps=0",
        "--checkpointing_steps=100000",
        "--mixed_precision=no",
        f"--logging_dir={work / 'logs'}",
        "--report_to=all",
        f"--output_dir={work / 'model'}",
    ]


def _run(script: Path, arguments: Sequence[str]) -> None:
    command = [sys.executable, "-m", "tests.eval.peer", str(script), *arguments]
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(THREADS)}
    done = subprocess.run(command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script.name} ended with {done.returncode}: {done.stderr[-2000:]}")


def _draw(model: Path, samples: Sequence[str], seeds: int, folder: Path) -> None:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        drawn_to(pipelines.load_pipeline(model), samples, seeds, folder)
    finally:
        torch.set_num_threads(threads)


def drawn_to(pipeline: object, samples: Sequence[str], seeds: int, folder: Path) -> None:
    """Draws `seeds` pictures of each prompt and saves them by `path_of`."""
    wanted = [(sample, offset, prompt) for sample, prompt in enumerate(samples) for offset in range(seeds)]
    prompts = [prompt for _, _, prompt in wanted]
    drawn = pipelines.draw_pictures(
        pipeline, prompts, [seeds_of(sample, seeds)[offset] for sample, offset, _ in wanted]
    )
    folder.mkdir(parents=True, exist_ok=True)
    for (sample, offset, _), picture in zip(wanted, drawn, strict=True):
        picture.save(path_of(folder, sample, offset))


def main() -> None:
    """Runs the script named first with the arguments that follow."""
    # The libraries look for torchvision when they are imported, so the stand-in comes after them.
    import diffusers  # noqa: F401
    import torch
    import transformers  # noqa: F401

    stand_in_for_torchvision()
    torch.set_num_threads(THREADS)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
