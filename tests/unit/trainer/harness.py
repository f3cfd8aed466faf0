"""A tiny model, a few generated pictures and a recorder: what all tests of the trainer run on."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from likeness.storage.v1.artifact_pb2 import DatasetReport
from likeness.training.v1 import training_job_pb2 as pb
from PIL import Image
from safetensors.torch import load_file

from services.trainer.buckets import Size
from services.trainer.captions import CaptionedData, CaptionedPicture
from services.trainer.child import RECIPES
from services.trainer.data import Concept, Picture
from services.trainer.report import REPORT
from services.trainer.run import Outcome, Preview, Progress, Request, Run, Stage

RESOLUTION = 16
Tensors = dict[str, torch.Tensor]


def complete_spec(**changes: Any) -> pb.TrainingSpec:
    """A specification with all defaults resolved and the sizes of a test; `changes` are fields."""
    values: dict[str, Any] = {
        "recipe": pb.RECIPE_DREAMBOOTH,
        "method": pb.TRAINING_METHOD_FULL,
        "seed": 7,
        "resolution": RESOLUTION,
        "num_train_epochs": 1,
        "max_train_steps": 3,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler": pb.LEARNING_RATE_SCHEDULE_CONSTANT,
        "lr_warmup_steps": 0,
        "lr_num_cycles": 1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_weight_decay": 1e-2,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "with_prior_preservation": True,
        "prior_loss_weight": 1.0,
        "sample_batch_size": 2,
        "train_unet": True,
        "train_text_encoder": True,
        "caption_dropout": 0.0,
        "preview_steps": 250,
        "save_full_precision": True,
    }
    return pb.TrainingSpec(**(values | changes))


def column_coded(width: int, height: int, shade: int = 0) -> Image.Image:
    """A picture whose red value says the column and whose green value says the row."""
    rows, columns = np.mgrid[0:height, 0:width]
    blue = np.full_like(rows, shade % 256)
    return Image.fromarray(np.stack([columns, rows, blue], axis=-1).astype(np.uint8))


def save_pictures(folder: Path, sizes: list[tuple[int, int]], shade: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, (width, height) in enumerate(sizes):
        path = folder / f"{index}.png"
        column_coded(width, height, shade + 40 * index).save(path)
        paths.append(path)
    return paths


def make_concept(
    folder: Path,
    *,
    instances: int = 3,
    classes: int = 2,
    size: tuple[int, int] = (RESOLUTION, RESOLUTION),
    index: int = 0,
    seed: int = 7,
    instance_prompt: str = "a photo of sks dog",
    class_prompt: str = "a photo of a dog on the beach",
) -> Concept:
    """One concept with pictures of one size."""

    def pictures(kind: str, count: int, prompt: str, shade: int) -> tuple[Picture, ...]:
        paths = save_pictures(folder / f"{kind}-{index}", [size] * count, shade)
        return tuple(
            Picture(f"{index}/{kind}/{number}", path, prompt, index, seed)
            for number, path in enumerate(paths)
        )

    return Concept(
        pictures("instance", instances, instance_prompt, 10), pictures("class", classes, class_prompt, 130)
    )


def captioned_spec(**changes: Any) -> pb.TrainingSpec:
    """As the recipe's defaults resolve, at the sizes of a test: one bucket of 64 px."""
    values: dict[str, Any] = {
        "recipe": pb.RECIPE_EVERYDREAM,
        "resolution": 64,
        "num_train_epochs": 2,
        "max_train_steps": 0,
        "train_batch_size": 2,
        "max_grad_norm": 0.0,
        "with_prior_preservation": False,
        "aspect_ratio_bucketing": True,
        "clip_models_separately": True,
        "rated_dataset_final_percent": 50.0,
    }
    spec = complete_spec(**(values | changes))
    if "lr_warmup_steps" not in changes:
        spec.ClearField("lr_warmup_steps")
    return spec


def pictures_of(
    folder: Path, count: int = 3, sizes: Sequence[Size] = (Size(64, 64),), **said: Any
) -> CaptionedData:
    """Pictures of some sizes, each with a caption of tags; `said` are fields of all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for number in range(count):
        size, name = sizes[number % len(sizes)], f"{number}.png"
        rows, columns = np.mgrid[0 : size.height_px, 0 : size.width_px]
        pixels = np.stack([columns % 256, rows % 256, np.full_like(rows, 40 * number % 256)], axis=-1)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
        text = said.get("text", f"picture {number}, red, blue, green")
        pictures.append(
            CaptionedPicture(
                f"0/instance/{name}", folder / name, text, 0, 7, name, size, **(said | {"text": text})
            )
        )
    return CaptionedData(tuple(pictures), DatasetReport(read=count))


@dataclass
class Recorder:
    """Writes down what a recipe tells; asks for something after a given number of updates."""

    ask: dict[int, Request] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    updates: list[Progress] = field(default_factory=list)
    saved: list[tuple[Path, int]] = field(default_factory=list)
    previews: list[Preview] = field(default_factory=list)
    versions: list[tuple[Path, int]] = field(default_factory=list)

    def stage(self, stage: Stage, detail: str = "") -> None:
        self.stages.append(stage)
        self.details.append(detail)

    def progress(self, progress: Progress) -> None:
        self.updates.append(progress)

    def checkpoint_saved(self, folder: Path, step: int) -> None:
        self.saved.append((folder, step))

    def version_saved(self, folder: Path, step: int) -> None:
        self.versions.append((folder, step))

    def preview_drawn(self, preview: Preview) -> None:
        self.previews.append(preview)

    def request(self) -> Request:
        return self.ask.pop(len(self.updates), Request.NOTHING)


@dataclass(frozen=True)
class Bench:
    """Where a test trains: the tiny base model and a folder of its own."""

    model_folder: Path
    folder: Path

    def run(
        self, spec: pb.TrainingSpec, concepts: tuple[Concept, ...] | None = None, name: str = "run"
    ) -> Run:
        data = concepts if concepts is not None else (make_concept(self.folder / "data"),)
        return Run(
            spec=spec,
            model_folder=self.model_folder,
            model_digest="tiny",
            concepts=data,
            workdir=self.folder / name,
            device=torch.device("cpu"),
            checkpoint_interval_s=3600.0,
        )

    def train(
        self,
        spec: pb.TrainingSpec,
        concepts: tuple[Concept, ...] | None = None,
        name: str = "run",
        recorder: Recorder | None = None,
        **changes: Any,
    ) -> "Trained":
        """Trains and reads back what was exported."""
        watcher = recorder or Recorder()
        run = replace(self.run(spec, concepts, name), **changes)
        outcome = RECIPES[spec.recipe](run, watcher)
        return Trained(run, outcome, watcher)


@dataclass(frozen=True)
class Trained:
    """A run that is over."""

    run: Run
    outcome: Outcome
    recorder: Recorder

    @property
    def losses(self) -> list[float]:
        return [progress.loss for progress in self.recorder.updates]

    @property
    def learning_rates(self) -> list[float]:
        return [progress.learning_rate for progress in self.recorder.updates]

    def weights(self) -> Tensors:
        """All exported tensors by component and name."""
        return exported_weights(self.run.export_folder)

    def report(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.run.export_folder / REPORT).read_text())
        return document


def exported_weights(folder: Path) -> Tensors:
    tensors = {}
    for path in sorted(folder.glob("*/*.safetensors")):
        for name, tensor in load_file(path).items():
            tensors[f"{path.parent.name}.{name}"] = tensor
    return tensors


def base_weights(model_folder: Path) -> Tensors:
    weights = exported_weights(model_folder)
    return {name: tensor for name, tensor in weights.items() if not name.startswith("vae.")}


def same_bits(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def largest_difference(one: Tensors, other: Tensors) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


@contextmanager
def spying(owner: Any, name: str, note: Callable[..., None]) -> Iterator[None]:
    """Calls `note` with the arguments of every call of `owner.name`, which works on unchanged."""
    original = getattr(owner, name)

    def spy(*arguments: Any, **named: Any) -> Any:
        note(*arguments, **named)
        return original(*arguments, **named)

    setattr(owner, name, spy)
    try:
        yield
    finally:
        setattr(owner, name, original)


def is_training(*values: Any) -> bool:
    """Whether a call belongs to an update: gradients flow through it, and its tensors have numbers.

    A training also draws with the finished model to prove it, and counts beforehand what one pass will take.
    """
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return torch.is_grad_enabled() and not any(tensor.is_meta for tensor in tensors)
