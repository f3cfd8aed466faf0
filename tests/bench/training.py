"""Seconds an update: the DreamBooth recipe against diffusers' own `train_dreambooth.py`, on the same model and data.

Both train as processes of their own and take turns update by update, so that a busy machine slows both alike. Needs a
diffusers checkout, named by `LIKENESS_DIFFUSERS`; without one there is nothing to compare with and no row.
"""

import argparse
import importlib.machinery
import random
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from services.adapters.settings import BenchSettings, load_or_exit
from tests.bench.rows import Row

RESOLUTION = 128
INSTANCES, CLASSES = 6, 12
UPDATES, WARM_UP = 42, 6
INSTANCE_PROMPT, CLASS_PROMPT = "a photo of sks dog", "a photo of a dog"
SCRIPT = "examples/dreambooth/train_dreambooth.py"
SEED = 7


def rows() -> list[Row]:
    """One row for pictures whose latents can be kept, one for random crops, where none can."""
    checkout = load_or_exit(BenchSettings).diffusers
    if checkout is None:
        sys.stderr.write(
            "training: no peer to compare with, set LIKENESS_DIFFUSERS to a diffusers checkout\n"
        )
        return []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _build_model(folder / "model")
        return [
            _compared("an update, prior + text encoder, square pictures", checkout, folder, (160, 160)),
            _compared("an update, prior + text encoder, random crops", checkout, folder, (208, 160)),
        ]


def _build_model(folder: Path) -> None:
    from services.diffusion.loading import quiet_libraries
    from services.diffusion.tiny import TinyConfig, build_pipeline_folder

    quiet_libraries()
    # 8.8 M parameters in the UNet, 2 M in the VAE, 1.4 M in the text encoder: small, in SD 1's proportions of cost.
    config = TinyConfig(
        sample_size=RESOLUTION // 8,
        unet_channels=(64, 128, 192),
        unet_cross_attention=(True, True, False),
        unet_layers=1,
        unet_norm_groups=32,
        unet_heads=8,
        vae_channels=(48, 48, 96, 96),
        vae_norm_groups=16,
        vae_mid_attention=True,
        latent_channels=4,
        scaling_factor=0.18215,
        text_layers=4,
        text_width=160,
        text_heads=4,
        text_positions=77,
    )
    build_pipeline_folder(folder, config)


def _compared(what: str, checkout: Path, folder: Path, size: tuple[int, int]) -> Row:
    data = folder / f"data-{size[0]}"
    _save_pictures(data / "instance", INSTANCES, size)
    _save_pictures(data / "class", CLASSES, size)
    common = [f"--model={folder / 'model'}", f"--data={data}"]
    with ExitStack() as stack:
        ours = stack.enter_context(_Side("ours", [*common, f"--out={data / 'ours'}"]))
        peer = stack.enter_context(
            _Side("peer", [*common, f"--out={data / 'peer'}", f"--script={checkout / SCRIPT}"])
        )
        pairs = [(ours.update(), peer.update()) for _ in range(UPDATES)][WARM_UP:]
    ratios = sorted(theirs / mine for mine, theirs in pairs)
    mine, theirs = (statistics.median(pair[side] for pair in pairs) for side in (0, 1))
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    note = f"{len(pairs)} updates in turns, ratios {low:.2f} to {high:.2f} (middle 80 %)"
    return Row(what, "diffusers train_dreambooth.py", mine, theirs, statistics.median(ratios), note)


def _save_pictures(folder: Path, count: int, size: tuple[int, int]) -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    for number in range(count):
        pixels = random.Random(number).randbytes(size[0] * size[1] * 3)
        Image.frombytes("RGB", size, pixels).save(folder / f"{number:02}.png")


class _Side:
    """One of the two trainings: a process that does one update for each line it is sent."""

    def __init__(self, side: str, arguments: Sequence[str]) -> None:
        command = [sys.executable, "-m", "tests.bench.training", f"--side={side}", *arguments]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )

    def __enter__(self) -> "_Side":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def update(self) -> float:
        """Lets it do one update; returns the seconds that took."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("update "):
                return float(line.split()[1])
        self._log.seek(0)
        raise RuntimeError(f"the training ended early: {self._log.read()[-2000:]}")


# -- in the processes ---------------------------------------------------------------------------------------


def _take_turns() -> None:
    """Makes every optimizer step end one update: tell its time, wait for the next turn."""
    import torch

    step: Callable[..., Any] = torch.optim.AdamW.step
    answers = sys.stdout
    sys.stdout = sys.stderr
    began = [0.0]

    def wait() -> None:
        if not sys.stdin.readline():
            raise SystemExit
        began[0] = time.perf_counter()

    def timed_step(self: Any, *arguments: Any, **named: Any) -> Any:
        result = step(self, *arguments, **named)
        answers.write(f"update {time.perf_counter() - began[0]}\n")
        answers.flush()
        wait()
        return result

    torch.optim.AdamW.step = timed_step  # type: ignore[method-assign]
    wait()


def _train_ours(model: Path, data: Path, out: Path) -> None:
    import torch
    from likeness.training.v1 import training_job_pb2 as pb

    from services.domain.training_spec import resolve_training_spec
    from services.trainer.data import Concept, Picture
    from services.trainer.recipes import dreambooth
    from services.trainer.run import Run

    def pictures(kind: str, prompt: str) -> tuple[Picture, ...]:
        paths = sorted((data / kind).iterdir())
        return tuple(Picture(path.name, path, prompt, 0, SEED) for path in paths)

    concept = pb.Concept(instance_prompt=INSTANCE_PROMPT, class_prompt=CLASS_PROMPT)
    concept.instance_data.dataset_key = concept.class_data.dataset_key = "given"
    asked = pb.TrainingSpec(concepts=[concept], max_train_steps=UPDATES + 1, learning_rate=5e-6, seed=SEED)
    spec = resolve_training_spec(asked)
    spec.resolution, spec.pad_tokens = RESOLUTION, True  # as the script does
    concepts = (Concept(pictures("instance", INSTANCE_PROMPT), pictures("class", CLASS_PROMPT)),)
    dreambooth.train(Run(spec, model, "bench", concepts, out, torch.device("cpu")), _Silent())


class _Silent:
    """An observer that hears nothing and wants nothing."""

    def stage(self, stage: Any, detail: str = "") -> None:
        """Ignored."""

    def progress(self, progress: Any) -> None:
        """Ignored."""

    def checkpoint_saved(self, folder: Path, step: int) -> None:
        """Ignored."""

    def preview_drawn(self, preview: Any) -> None:
        """Ignored."""

    def request(self) -> Any:
        """Returns that training goes on."""
        from services.trainer.run import Request

        return Request.NOTHING


def _train_peer(script: Path, model: Path, data: Path, out: Path) -> None:
    # The libraries look for torchvision when they are imported, so the stand-in comes after them.
    import diffusers  # noqa: F401
    import transformers  # noqa: F401

    stand_in_for_torchvision()
    sys.argv = [
        str(script),
        f"--pretrained_model_name_or_path={model}",
        f"--instance_data_dir={data / 'instance'}",
        f"--class_data_dir={data / 'class'}",
        f"--instance_prompt={INSTANCE_PROMPT}",
        f"--class_prompt={CLASS_PROMPT}",
        "--with_prior_preservation",
        "--train_text_encoder",
        f"--num_class_images={CLASSES}",
        f"--resolution={RESOLUTION}",
        "--train_batch_size=1",
        "--learning_rate=5e-6",
        "--lr_scheduler=constant",
        "--lr_warmup_steps=0",
        f"--max_train_steps={UPDATES + 1}",
        "--checkpointing_steps=100000",
        "--mixed_precision=no",
        "--report_to=all",
        f"--seed={SEED}",
        f"--output_dir={out}",
    ]
    runpy.run_path(str(script), run_name="__main__")


def stand_in_for_torchvision() -> None:
    """Puts a module in torchvision's place that has the few transforms the script uses, on Pillow."""
    import torch
    from PIL import Image

    def resize(size: int, interpolation: Any) -> Callable[[Image.Image], Image.Image]:
        def apply(image: Image.Image) -> Image.Image:
            scale = size / min(image.size)
            width, height = (max(size, int(side * scale)) for side in image.size)
            return image.resize((width, height), interpolation)

        return apply

    def crop(size: int, place: Callable[[int], int]) -> Callable[[Image.Image], Image.Image]:
        def apply(image: Image.Image) -> Image.Image:
            left, top = place(image.width - size), place(image.height - size)
            return image.crop((left, top, left + size, top + size))

        return apply

    def to_tensor() -> Callable[[Image.Image], torch.Tensor]:
        def apply(image: Image.Image) -> torch.Tensor:
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            return pixels.view(image.height, image.width, 3).permute(2, 0, 1).float().div(255)

        return apply

    def normalize(mean: Sequence[float], std: Sequence[float]) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda values: (values - mean[0]) / std[0]

    def compose(steps: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
        def apply(value: Any) -> Any:
            for step in steps:
                value = step(value)
            return value

        return apply

    transforms = types.ModuleType("torchvision.transforms")
    parts = {
        "Compose": compose,
        "Resize": resize,
        "CenterCrop": lambda size: crop(size, lambda room: round(room / 2)),
        "RandomCrop": lambda size: crop(size, lambda room: random.randint(0, room)),
        "ToTensor": to_tensor,
        "Normalize": normalize,
        "InterpolationMode": Image.Resampling,
    }
    for name, part in parts.items():
        setattr(transforms, name, part)
    package = types.ModuleType("torchvision")
    package.__spec__ = importlib.machinery.ModuleSpec("torchvision", None)
    package.transforms = transforms  # type: ignore[attr-defined]
    sys.modules |= {"torchvision": package, "torchvision.transforms": transforms}


def main() -> None:
    """One side, as a process that a benchmark started."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", choices=["ours", "peer"], required=True)
    for name in ("model", "data", "out", "script"):
        parser.add_argument(f"--{name}", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    _take_turns()
    if arguments.side == "ours":
        _train_ours(arguments.model, arguments.data, arguments.out)
    else:
        _train_peer(arguments.script, arguments.model, arguments.data, arguments.out)


if __name__ == "__main__":
    main()
