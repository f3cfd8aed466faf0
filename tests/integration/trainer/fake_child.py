"""A training child without torch that behaves as its command line says; what it exports are a few bytes."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from services.adapters.child_process import ParentLink

TOTAL = 1000


def progress(step: int) -> dict[str, Any]:
    numbers = {"loss": 0.5, "learning_rate": 1e-6, "gradient_norm": float("nan"), "seconds_left": 9.0}
    return {"event": "progress", "step": step, "total_steps": TOTAL, "images_per_second": 4.0, **numbers}


def ended(ending: str, folder: Path, *, files: bool = True) -> dict[str, Any]:
    path = folder / "weights"
    path.write_bytes(b"trained weights")
    file = {"path": "unet/diffusion_pytorch_model.safetensors", "file": str(path)}
    return {
        "event": "ended",
        "ending": ending,
        "step": 12,
        "final_loss": 0.25,
        "files": [file] if files else [],
        "checkpoint": None,
        "warnings": ["a remark"],
        "report": {"versions": {"torch": "0"}},
        "execution_summary": "fp32",
    }


def save_checkpoint(folder: Path, step: int) -> dict[str, Any]:
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(str(step))
    return {"event": "checkpoint", "folder": str(checkpoint), "step": step}


def preview(folder: Path) -> dict[str, Any]:
    name = "preview-000003-1.png"
    place = {"step": 3, "prompt_index": 0, "seed": 7, "side_px": 16}
    return {"event": "preview", "file": str(folder / name), "name": name, **place}


def publish(link: ParentLink, scenario: str, command: dict[str, Any]) -> None:
    """Makes a version of a checkpoint, whose file says which update it is of."""
    folder = Path(command["workdir"])
    folder.mkdir(parents=True)
    link.emit({"event": "stage", "stage": "exporting", "detail": ""})
    if scenario == "cannot publish":
        failure = {"reason": "EXPORT_MISMATCH", "message": "it draws otherwise", "field": ""}
        link.emit({"event": "failed", "retryable": True, **failure})
        return
    made = ended("trained", folder)
    Path(made["files"][0]["file"]).write_text((Path(command["checkpoint"]) / "state.json").read_text())
    link.emit(made)


def work(link: ParentLink, scenario: str, command: dict[str, Any]) -> None:
    folder = Path(command["workdir"])
    if command["command"] == "publish":
        publish(link, scenario, command)
        return
    if scenario == "is deaf":
        time.sleep(600)
    failure = {"reason": "BAD_INPUT", "message": "the model is broken", "field": "base_model"}
    if scenario == "fails at once":
        link.emit({"event": "failed", "retryable": False, **failure})
        return
    link.emit({"event": "stage", "stage": "loading", "detail": ""})
    link.emit({"event": "stage", "stage": "training", "detail": "fp32"})
    if scenario == "hangs":
        time.sleep(600)
    if scenario == "tells of a preview that is not there":
        link.emit(preview(folder))
    if scenario in ("publishes", "cannot publish"):
        checkpoint = save_checkpoint(folder, 3)
        link.emit({**checkpoint, "event": "version"})
        link.emit(checkpoint)
    if scenario == "saves and ends":
        link.emit(save_checkpoint(folder, 3))
    if scenario == "dies":
        link.emit(save_checkpoint(folder, 3))
        time.sleep(0.5)
        raise SystemExit(9)
    if scenario == "fails":
        link.emit({"event": "failed", "retryable": False, **failure})
    elif scenario == "diverges":
        link.emit(ended("diverged", folder))
    elif scenario == "diverges at once":
        link.emit(ended("diverged", folder, files=False))
    elif scenario == "trains for ever":
        for step in range(1, TOTAL * 100):
            link.emit(progress(step))
            time.sleep(0.02)
    elif scenario == "tells what is missing":
        link.emit({**ended("trained", folder), "warnings": [str(command["version_is_missing"])]})
    elif scenario == "tells its start":
        files = sorted(Path(command["start_from"]).iterdir())
        told = [f"{file.name}: {file.read_text()}" for file in files]
        link.emit({**ended("trained", folder), "warnings": told})
    elif scenario == "tells its data":
        images = json.loads(Path(command["dataset"]).read_text())["images"]
        paths = [picture["path"] for picture in command["concepts"][0]["instance_pictures"]]
        told = [
            f"{image['caption_parts']['main_prompt']} {Path(path).exists()}"
            for image, path in zip(images, paths, strict=True)
        ]
        link.emit({**ended("trained", folder), "warnings": told})
    else:
        link.emit(progress(12))
        link.emit(ended("trained", folder))


def main() -> None:
    link = ParentLink.from_environ()
    link.emit({"event": "ready", "device": "cpu", "memory_bytes": 0})
    work(link, sys.argv[1], next(link.commands()))


if __name__ == "__main__":
    main()
