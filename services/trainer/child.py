"""The process that holds the device during a training: one command in, progress out, weights as files.

Commands (JSON objects with a `command`): `train` once, then `checkpoint`, `yield` and `stop` at any time. Events (with
an `event`): `ready`, `stage`, `progress`, `checkpoint`, `version`, `preview`, and one last `ended` or `failed`; then
the process ends. `publish` in place of `train` makes a model of one checkpoint of a training that goes on in another
process. It uses no network and holds no secrets; when the device's context breaks it dies, and the parent says so.
"""

import argparse
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from google.protobuf.json_format import ParseDict
from likeness.storage.v1.artifact_pb2 import Dataset
from likeness.training.v1 import training_job_pb2 as pb

from services.adapters.child_process import ParentLink
from services.adapters.manifests import from_json
from services.adapters.telemetry import configure_logging
from services.diffusion.devices import (
    as_device_memory_error,
    device_memory_bytes,
    device_name,
    pick_device,
    use_cpu_threads,
)
from services.diffusion.loading import quiet_libraries
from services.domain.errors import InvalidSpec, public_text, row_of
from services.trainer.captions import CaptionedData, captioned_pictures
from services.trainer.checkpoint import CheckpointDamaged, CheckpointMismatch
from services.trainer.data import Concept, Picture
from services.trainer.needs import out_of_memory
from services.trainer.recipes import dreambooth, everydream
from services.trainer.run import Observer, Outcome, Preview, Progress, Request, Run, Stage
from services.trainer.versions import publish_version

logger = logging.getLogger(__name__)

PROGRESS_PAUSE_S = 0.25
BESIDE = 10
"""Politeness (see nice(2)) of a process that works beside the training, perhaps on its cores."""
RECIPES: Mapping[int, Callable[[Run, Observer], Outcome]] = {
    pb.RECIPE_UNSPECIFIED: dreambooth.train,
    pb.RECIPE_DREAMBOOTH: dreambooth.train,
    pb.RECIPE_EVERYDREAM: everydream.train,
}
Event = Mapping[str, Any]


class LinkObserver:
    """Passes on what a recipe tells, and asks the parent what it wants.

    Args:
        emit: sends an event to the parent.
        poll: the parent's next command, if one is there.
    """

    def __init__(self, emit: Callable[[Event], None], poll: Callable[[], Event | None]) -> None:
        self._emit = emit
        self._poll = poll
        self._told_at = -math.inf

    def stage(self, stage: Stage, detail: str = "") -> None:
        """Tells which stage has begun, and how it is carried out."""
        self._emit({"event": "stage", "stage": stage.value, "detail": detail})

    def progress(self, progress: Progress) -> None:
        """Tells the numbers of an update, at most four times a second and always those of the last one."""
        now = time.monotonic()
        if now - self._told_at >= PROGRESS_PAUSE_S or progress.step == progress.total_steps:
            self._told_at = now
            self._emit({"event": "progress", **asdict(progress)})

    def checkpoint_saved(self, folder: Path, step: int) -> None:
        """Tells where a whole checkpoint is."""
        self._emit({"event": "checkpoint", "folder": str(folder), "step": step})

    def version_saved(self, folder: Path, step: int) -> None:
        """Tells which checkpoint is to become a version of the model."""
        self._emit({"event": "version", "folder": str(folder), "step": step})

    def preview_drawn(self, preview: Preview) -> None:
        """Tells where a picture of the model that trains is."""
        self._emit(
            {
                "event": "preview",
                "file": str(preview.file),
                "name": preview.name,
                "step": preview.step,
                "prompt_index": preview.prompt_index,
                "seed": preview.seed,
                "side_px": preview.side_px,
            }
        )

    def request(self) -> Request:
        """Returns the parent's newest wish."""
        wanted = Request.NOTHING
        while (command := self._poll()) is not None:
            wanted = Request(command["command"])
        return wanted


def run_of(command: Mapping[str, Any], device: torch.device) -> Run:
    """Reads a `train` command.

    Args:
        command: `spec` (JSON of a TrainingSpec), `model_folder`, `model_digest`, `concepts`, `workdir`,
            `resume_from` and `start_from` (folder or null), `version_is_missing`, `checkpoint_interval_s`, `family`
            and `license` of the base model; for captioned training also `dataset`, the file of the first concept's
            dataset as storage describes it.
        device: where to train.
    """
    spec = ParseDict(command["spec"], pb.TrainingSpec(), ignore_unknown_fields=True)
    concepts = [_concept(index, entry) for index, entry in enumerate(command["concepts"])]
    return Run(
        spec=spec,
        model_folder=Path(command["model_folder"]),
        model_digest=str(command["model_digest"]),
        concepts=tuple(concepts),
        workdir=Path(command["workdir"]),
        device=device,
        resume_from=Path(command["resume_from"]) if command.get("resume_from") else None,
        start_from=Path(command["start_from"]) if command.get("start_from") else None,
        checkpoint_interval_s=float(command["checkpoint_interval_s"]),
        version_is_missing=bool(command.get("version_is_missing")),
        family=str(command.get("family", "")),
        license=str(command.get("license", "")),
        captioned=_captioned(Path(command["dataset"]), spec, concepts[0]) if command.get("dataset") else None,
    )


def _concept(index: int, entry: Mapping[str, Any]) -> Concept:
    def pictures(kind: str) -> tuple[Picture, ...]:
        return tuple(
            Picture(
                sample_id=f"{index}/{kind}/{picture['id']}",
                path=Path(picture["path"]),
                prompt=str(picture["prompt"]),
                concept=index,
                seed=int(entry["seed"]),
            )
            for picture in entry[f"{kind}_pictures"]
        )

    return Concept(pictures("instance"), pictures("class"))


def _captioned(file: Path, spec: pb.TrainingSpec, concept: Concept) -> CaptionedData:
    """Reads what storage says of a concept's instance pictures, which lie where the concept has them."""
    dataset = from_json(file.read_bytes(), Dataset)
    paths = [picture.path for picture in concept.instance_pictures]
    pictures = captioned_pictures(dataset, paths, seed=spec.seed, fallback=spec.concepts[0].instance_prompt)
    return CaptionedData(pictures, dataset.report)


def train(run: Run, observer: LinkObserver) -> Outcome:
    """Trains; a checkpoint that this device or version cannot go on from costs its progress, not the job.

    Raises:
        OutOfDeviceMemory: the device is too small; it names a smaller plan.
    """
    try:
        return _trained(run, observer)
    except (CheckpointMismatch, CheckpointDamaged) as error:
        logger.warning("training starts anew", extra={"detail": str(error)})
        outcome = _trained(replace(run, resume_from=None, workdir=run.workdir / "anew"), observer)
        remark = f"the training was interrupted and started anew: {error}"
        return replace(outcome, warnings=(*outcome.warnings, remark))


def _trained(run: Run, observer: LinkObserver) -> Outcome:
    try:
        return RECIPES[run.spec.recipe](run, observer)
    except Exception as error:
        if as_device_memory_error(error) is None:
            raise
        raise out_of_memory(run) from error


def ended_event(outcome: Outcome) -> dict[str, Any]:
    """The last event of a run that reached an end of its own."""
    return {
        "event": "ended",
        "ending": outcome.ending.value,
        "step": outcome.step,
        "final_loss": None if math.isnan(outcome.final_loss) else outcome.final_loss,
        "files": [{"path": str(path), "file": str(outcome.export_folder / path)} for path in outcome.files],
        "other_formats": {
            name: str(outcome.export_folder / path) for name, path in outcome.other_formats.items()
        },
        "checkpoint": str(outcome.checkpoint) if outcome.checkpoint else None,
        "warnings": list(outcome.warnings),
        "report": dict(outcome.report),
        "execution_summary": outcome.execution_summary,
    }


def failed_event(error: Exception) -> dict[str, Any]:
    """The last event of a run that met a fault; raises what has broken the device for good."""
    too_small = as_device_memory_error(error)
    if isinstance(error, torch.AcceleratorError) and too_small is None:
        raise error
    known = too_small or error
    row = row_of(known)
    logger.error("training failed", extra={"reason": row.reason}, exc_info=error)
    violations = known.violations if isinstance(known, InvalidSpec) else ()
    return {
        "event": "failed",
        "reason": row.reason,
        "message": public_text(known),
        "field": violations[0].field if violations else "",
        "retryable": row.retry_job,
    }


def _arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="trains a model for the worker that started it")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cpu-threads", type=int, default=0)
    return parser.parse_args(words)


def main() -> None:
    """Open the link to the parent, wait for one training, do it."""
    arguments = _arguments(sys.argv[1:])
    configure_logging("trainer child")
    quiet_libraries()
    link = ParentLink.from_environ()
    use_cpu_threads(arguments.cpu_threads)
    device = pick_device(arguments.device)
    # On a CPU equal runs give equal bits at no cost; on a GPU that would cost speed, so there it stays off.
    torch.use_deterministic_algorithms(device.type == "cpu")
    link.emit({"event": "ready", "device": device_name(device), "memory_bytes": device_memory_bytes(device)})
    command = next(link.commands())
    if command["command"] not in ("train", "publish"):
        return
    try:
        run, observer = run_of(command, device), LinkObserver(link.emit, link.poll)
        if command["command"] == "train":
            outcome = train(run, observer)
        else:
            os.nice(BESIDE)
            outcome = publish_version(run, Path(command["checkpoint"]), observer)
        link.emit(ended_event(outcome))
    except Exception as error:
        link.emit(failed_event(error))


if __name__ == "__main__":
    main()
