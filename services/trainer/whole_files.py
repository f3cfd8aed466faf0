"""A trained model as one file in the original layout, for programs that read nothing else."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from likeness.training.v1 import training_job_pb2 as pb
from safetensors.torch import load_file
from torch import Tensor

from services.diffusion.loading import Components
from services.diffusion.single_file import part_states, save_checkpoint, save_single_file
from services.domain.errors import ExportMismatch

FOLDER = Path("whole")
SINGLE_FILE, CKPT = "single_file", "ckpt"
"""Names of the formats in a model's manifest."""
PARTS = ("unet", "vae", "text_encoder")


def _read_checkpoint(path: Path) -> Mapping[str, Tensor]:
    # Tensors only: a pickle that would call anything is refused.
    content: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    state: Mapping[str, Tensor] = content["state_dict"]
    return state


_WRITERS: Mapping[int, tuple[str, str, Callable[[Components, Path, torch.dtype], None]]] = {
    pb.EXPORT_FORMAT_SINGLE_FILE: (SINGLE_FILE, "model.safetensors", save_single_file),
    pb.EXPORT_FORMAT_CKPT: (CKPT, "model.ckpt", save_checkpoint),
}
_READERS: Mapping[str, Callable[[Path], Mapping[str, Tensor]]] = {
    SINGLE_FILE: load_file,
    CKPT: _read_checkpoint,
}


def write(
    components: Components, formats: Iterable[int], folder: Path, dtype: torch.dtype
) -> dict[str, Path]:
    """Writes a model in the formats that are asked for, and reads each file back.

    Args:
        components: the model as it is published, adapters merged.
        formats: values of `ExportFormat`; those that are no whole model are passed over.
        folder: the export folder.
        dtype: precision of the weights.

    Returns:
        The files relative to the folder, by the format's name.

    Raises:
        ExportMismatch: a file does not hold the model.
    """
    files: dict[str, Path] = {}
    for value in dict.fromkeys(formats):
        if value not in _WRITERS:
            continue
        name, file, save = _WRITERS[value]
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        files[name] = FOLDER / file
        save(components, folder / files[name], dtype)
        _check(components, folder / files[name], _READERS[name], dtype)
    return files


def _check(
    components: Components, path: Path, read: Callable[[Path], Mapping[str, Tensor]], dtype: torch.dtype
) -> None:
    """Translates a file's names back and compares every tensor."""
    found = part_states(read(path), components)
    for part in PARTS:
        for name, tensor in getattr(components, part).state_dict().items():
            wanted = tensor.detach().cpu()
            wanted = wanted.to(dtype) if wanted.is_floating_point() else wanted
            if not torch.equal(found[part][name], wanted):
                raise ExportMismatch(f"{path.name} was not published: {part}.{name} is not what was trained")
