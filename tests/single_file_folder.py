"""A single-file base as workers get it: `model.safetensors`, and the folder `config` beside it."""

import shutil
from pathlib import Path

import torch

from services.diffusion.loading import load_components
from services.diffusion.single_file import save_single_file


def write_single_file_folder(model: Path, folder: Path, dtype: torch.dtype | None = None) -> Path:
    """Turns a diffusers folder with four UNet blocks into such a folder; `dtype` as in `save_single_file`."""
    shutil.copytree(model, folder / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    save_single_file(load_components(model), folder / "model.safetensors", dtype)
    return folder
