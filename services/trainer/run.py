"""What a recipe is given, what it tells while it runs, and what it leaves behind. Shared by all recipes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import torch
from likeness.training.v1 import training_job_pb2 as pb

from services.trainer.captions import CaptionedData
from services.trainer.data import Concept


@dataclass(frozen=True, slots=True)
class Run:
    """One training as a recipe sees it: everything local, everything resolved.

    Attributes:
        spec: complete specification, defaults resolved.
        model_folder: the base model's files.
        model_digest: names the base model's exact weights; a checkpoint of another base is refused.
        concepts: pictures and prompts, one entry a concept.
        workdir: the run's own folder; checkpoints and exports go there.
        device: where the tensors live.
        resume_from: folder of one checkpoint to go on from; None: the newest in `workdir`, if there is one.
        start_from: folder of a checkpoint that somebody else's training, or an earlier one, published; used where there
            is none of this run's own. It is gone on from where nothing that decides the weights differs, else its
            weights are what this run begins with.
        checkpoint_interval_s: seconds between recovery checkpoints.
        version_is_missing: an earlier attempt was interrupted before a version that it had begun was published, so the
            next one is due at once.
        family: of the base model, for those who look for add-ons that fit it; empty: unknown.
        license: of the base model; empty: unknown.
        captioned: pictures with captions of their own; None unless the recipe trains on such.
    """

    spec: pb.TrainingSpec
    model_folder: Path
    model_digest: str
    concepts: tuple[Concept, ...]
    workdir: Path
    device: torch.device
    resume_from: Path | None = None
    start_from: Path | None = None
    checkpoint_interval_s: float = 60.0
    version_is_missing: bool = False
    family: str = ""
    license: str = ""
    captioned: CaptionedData | None = None

    @property
    def checkpoint_folder(self) -> Path:
        """Where recovery checkpoints are written."""
        return self.workdir / "checkpoints"

    @property
    def preview_folder(self) -> Path:
        """Where previews are written."""
        return self.workdir / "previews"

    @property
    def export_folder(self) -> Path:
        """Where the trained components are written, in the layout of a diffusers folder."""
        return self.workdir / "export"


class Stage(StrEnum):
    """What a recipe is doing."""

    LOADING = "loading"
    TRAINING = "training"
    EXPORTING = "exporting"


class Request(StrEnum):
    """What a recipe is asked for; it answers between two updates."""

    NOTHING = "nothing"
    CHECKPOINT = "checkpoint"
    YIELD = "yield"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Progress:
    """Numbers of the last update.

    Attributes:
        step: updates that are over.
        total_steps: updates in all.
        loss: value of the objective; NaN when it was not finite.
        learning_rate: of the UNet, or of what trains.
        gradient_norm: joint L2 norm before clipping.
        seconds_left: estimate for the updates that remain.
        images_per_second: training images seen, class images counted.
    """

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    seconds_left: float
    images_per_second: float


@dataclass(frozen=True, slots=True)
class Preview:
    """A picture of the model that trains.

    Attributes:
        folder: where its file is.
        step: updates that the model had behind it.
        prompt_index: which of the specification's `preview_prompts` it shows, from 0.
        seed: that it was drawn with.
        side_px: width and height.
    """

    folder: Path
    step: int
    prompt_index: int
    seed: int
    side_px: int

    @property
    def name(self) -> str:
        """Name of the file; sorts by updates, then by prompts."""
        return f"preview-{self.step:06d}-{self.prompt_index + 1}.png"

    @property
    def file(self) -> Path:
        """The picture."""
        return self.folder / self.name


class Observer(Protocol):
    """Whom a recipe tells how it gets on; nothing it does changes a weight."""

    def stage(self, stage: Stage, detail: str = "") -> None:
        """Another stage has begun; `detail` says in words how it is carried out, if there is anything to say."""

    def progress(self, progress: Progress) -> None:
        """An update is over."""

    def checkpoint_saved(self, folder: Path, step: int) -> None:
        """A recovery checkpoint is whole on the disk."""

    def version_saved(self, folder: Path, step: int) -> None:
        """The same checkpoint is to be published as a version of the model, beside the training that goes on."""

    def preview_drawn(self, preview: Preview) -> None:
        """A picture of the model that trains is whole on the disk; whoever is told may take its file away."""

    def request(self) -> Request:
        """Returns what is wanted; asked once between two updates."""


class Ending(StrEnum):
    """How a recipe ended."""

    TRAINED = "trained"
    DIVERGED = "diverged"
    YIELDED = "yielded"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a recipe leaves behind.

    Attributes:
        ending: how it ended; DIVERGED delivers the last good weights.
        step: updates that are over (of the delivered weights).
        final_loss: mean loss of the last 50 updates; NaN when there was none.
        export_folder: where the exported files are.
        files: exported files of the model, relative to that folder; empty after YIELDED and STOPPED.
        other_formats: files with the same weights for other programs, relative to that folder, by the format's name.
        checkpoint: folder of the checkpoint that a yielded run goes on from.
        warnings: remarks for the owner.
        report: seed, effective configuration and versions: enough to repeat the run.
        execution_summary: precision, attention, optimizer and determinism that really ran.
    """

    ending: Ending
    step: int
    final_loss: float
    export_folder: Path = Path()
    files: tuple[Path, ...] = ()
    other_formats: Mapping[str, Path] = field(default_factory=dict)
    checkpoint: Path | None = None
    warnings: tuple[str, ...] = ()
    report: Mapping[str, object] = field(default_factory=dict)
    execution_summary: str = ""
