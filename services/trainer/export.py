"""The trained weights as files, each read back before anybody else sees it.

A file counts only when the ordinary loader makes of it what is in memory: every tensor the same at the file's
precision, and a short drawing with the same seed the same picture.
"""

import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from services.diffusion.drawing import Drawing, decode, draw_latents
from services.diffusion.exporting import (
    TEXT_ENCODER_WEIGHTS,
    UNET_WEIGHTS,
    VAE_WEIGHTS,
    prefixed,
    save_model_index,
    save_scheduler_config,
    save_text_encoder,
    save_unet,
    save_vae,
)
from services.diffusion.loading import Components, load_components, open_model
from services.diffusion.lora import Part
from services.domain.errors import ExportMismatch
from services.domain.training_spec import LOW_RANK
from services.trainer import adapters, whole_files
from services.trainer.captions import written_caption
from services.trainer.run import Run
from services.trainer.shared_files import shared_paths
from services.trainer.trained_model import TrainedModel, parts_of, published_form
from services.trainer.updates import all_finite

logger = logging.getLogger(__name__)

EXACT_TOLERANCE = 1e-3
HALF_TOLERANCE = 0.05
"""Largest difference of two drawings, relative to their size: with the same numbers, and where some are 16-bit ones."""
PROOF_STEPS = 2
WEIGHTS: Mapping[Part, str] = {"unet": UNET_WEIGHTS, "text_encoder": TEXT_ENCODER_WEIGHTS}


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        files: relative to the export folder: those by which the model differs from its base.
        other_formats: files with the same weights for other programs, by the format's name.
        warnings: remarks for the owner.
        difference: of the drawing read back from the one in memory, relative to its size; None: neither is finite.
    """

    files: tuple[Path, ...]
    other_formats: Mapping[str, Path]
    warnings: tuple[str, ...]
    difference: float | None


def export(run: Run, model: TrainedModel) -> Exported:
    """Writes what was trained and what the base cannot share, reads it back, and adds the formats asked for.

    Args:
        run: where to write, and how.
        model: as it is to be published; its modules are put into evaluation mode.

    Raises:
        ExportMismatch: what was written is not what is in memory.
    """
    model.components.unet.eval()
    model.components.text_encoder.eval()
    components = published_form(model.components, run.spec)
    dtype, warnings = _precision(run, model)
    other_formats: dict[str, Path] = {}
    if model.adapters:
        files, other_formats = adapters.write(run, model, dtype)
        adapters.check(run, model, dtype, other_formats.values())
    else:
        files = _write_parts(run, model, dtype) + _write_frozen(run, model)
        _check_tensors(run, model, dtype)
    if components.scheduler_config != model.components.scheduler_config:
        files += save_scheduler_config(dict(components.scheduler_config), run.export_folder)
    with _read_back(run, files) as published:
        difference = _check_drawing(run, components, published, files, dtype)
        if run.spec.export_formats:
            whole = dtype if _fits(published, dtype) else torch.float32
            other_formats |= whole_files.write(published, run.spec.export_formats, run.export_folder, whole)
    if difference is None:
        warnings.append("the model draws nothing that is finite")
    return Exported(tuple(files), other_formats, tuple(warnings), difference)


def _precision(run: Run, model: TrainedModel) -> tuple[torch.dtype, list[str]]:
    if run.spec.save_full_precision:
        return torch.float32, []
    if all_finite(parameter.half() for parameter in model.parameters.values()):
        return torch.float16, []
    return torch.float32, ["published in 32 bits: some weights are too large for 16"]


def _write_parts(run: Run, model: TrainedModel, dtype: torch.dtype) -> list[Path]:
    files: list[Path] = []
    if "unet" in model.groups:
        files += save_unet(model.components.unet, run.export_folder, dtype)
    if "text_encoder" in model.groups:
        files += save_text_encoder(model.components.text_encoder, run.export_folder, dtype)
    return files


def _write_frozen(run: Run, model: TrainedModel) -> list[Path]:
    """Writes the frozen parts of a base that is one file, unchanged; those of a folder are shared as they lie."""
    base, folder = open_model(run.model_folder, torch.float32), run.export_folder
    if base.has_part_files:
        return []
    files = [save_model_index(folder, str(base.scheduler_config().get("_class_name", "DDIMScheduler")))]
    files += save_vae(base.load_vae(), folder)
    if "unet" not in model.groups:
        files += save_unet(base.load_unet(), folder)
    if "text_encoder" not in model.groups:
        files += save_text_encoder(base.load_text_encoder(), folder)
    return files


# -- read back -----------------------------------------------------------------------------------------------


def _check_tensors(run: Run, model: TrainedModel, dtype: torch.dtype) -> None:
    for part in model.groups:
        state = model.module(part).state_dict()
        expected = prefixed(state) if part == "text_encoder" else state
        _check_file(run.export_folder / WEIGHTS[part], expected, dtype)


def _check_file(path: Path, expected: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        if names != set(expected):
            odd = sorted(names ^ set(expected))
            raise ExportMismatch(f"{path.name} was not published: {len(odd)} names differ, first {odd[0]}")
        for name in sorted(names):
            wanted = expected[name].detach().cpu()
            wanted = wanted.to(dtype) if wanted.is_floating_point() else wanted
            if not torch.equal(file.get_tensor(name), wanted):
                raise ExportMismatch(f"{path.name} was not published: {name} is not what was trained")


@contextmanager
def _read_back(run: Run, files: Iterable[Path]) -> Iterator[Components]:
    """Loads the model as whoever draws with it does."""
    proof = run.workdir / "proof"
    shutil.rmtree(proof, ignore_errors=True)
    try:
        assemble(run, files, proof)
        yield load_components(proof, torch.float32, run.device)
    finally:
        shutil.rmtree(proof, ignore_errors=True)


def _check_drawing(
    run: Run,
    components: Components,
    published: Components,
    files: Iterable[Path],
    dtype: torch.dtype,
) -> float | None:
    """Draws with the model in memory and with the one from its files, and compares; returns the difference."""
    precisions = {dtype, components.unet.dtype, components.text_encoder.dtype}
    return compare_drawings(
        components,
        published,
        _proof_drawing(run, components),
        tolerance=EXACT_TOLERANCE if precisions == {torch.float32} else HALF_TOLERANCE,
        decoded=Path(VAE_WEIGHTS) in files,
    )


def _fits(components: Components, dtype: torch.dtype) -> bool:
    modules = (components.unet, components.vae, components.text_encoder)
    return all(all_finite(parameter.to(dtype) for parameter in module.parameters()) for module in modules)


def assemble(run: Run, files: Iterable[Path], folder: Path) -> None:
    """Lays a model out as whoever draws with it gets it: what it shares with its base, and the written files.

    `delivery.model_manifest` does the same with lists of stored files.
    """
    paths = {
        str(path.relative_to(run.model_folder)): path
        for path in run.model_folder.rglob("*")
        if path.is_file()
    }
    shared = shared_paths(paths, changed=parts_of(run.spec), low_rank=run.spec.method in LOW_RANK)
    for inner, path in shared.items():
        _link(paths[path], folder / inner)
    for written in files:
        _link(run.export_folder / written, folder / written)


def compare_drawings(
    in_memory: Components, read_back: Components, drawing: Drawing, *, tolerance: float, decoded: bool = True
) -> float | None:
    """Draws the same with two models.

    Args:
        in_memory: the model as it was trained.
        read_back: the model as it was loaded from its files.
        drawing: what to draw.
        tolerance: largest difference, relative to the drawing's size.
        decoded: compare the pixels too; without new files of the autoencoder the latents say all.

    Returns:
        Their difference relative to the drawing's size, at most `tolerance`; None: the one in memory is not finite.

    Raises:
        ExportMismatch: they differ more.
    """
    expected, found = draw_latents(in_memory, drawing), draw_latents(read_back, drawing)
    if not all_finite([expected]):
        return None
    pairs = [(expected, found)]
    if decoded and all_finite([found]):
        pairs.append((decode(in_memory, expected), decode(read_back, expected)))
    difference = max(float((one - other).norm() / one.norm()) for one, other in pairs)
    if not difference <= tolerance:
        raise ExportMismatch(
            f"the model was not published: read back from its files it draws otherwise ({difference:.2g} of the "
            f"picture differ, {tolerance:g} is allowed)"
        )
    return difference


def _proof_drawing(run: Run, components: Components) -> Drawing:
    """A drawing of what the first picture is said to show."""
    prompt = (
        written_caption(run.captioned.pictures[0])
        if run.captioned is not None
        else run.concepts[0].instance_pictures[0].prompt
    )
    side = min(run.spec.resolution, components.native_size_px)
    return Drawing(
        prompt=prompt,
        width_px=side,
        height_px=side,
        num_inference_steps=PROOF_STEPS,
        guidance_scale=1.0,
        clip_skip=max(1, run.spec.clip_skip),
        seed=run.spec.seed,
    )


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    os.symlink(source.absolute(), target)
