"""The tiny model in memory, and the library's own pipeline as the one to compare with."""

from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline

from services.diffusion.loading import Components, load_components


@pytest.fixture(scope="session")
def components(tiny_model_dir: Path) -> Components:
    return load_components(tiny_model_dir)


@pytest.fixture
def pipeline(tiny_model_dir: Path) -> Any:
    loaded = StableDiffusionPipeline.from_pretrained(str(tiny_model_dir), local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded
