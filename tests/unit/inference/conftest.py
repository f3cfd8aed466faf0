"""The tiny model in memory, loaded only for the tests that draw."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def components(tiny_model_dir: Path) -> Any:
    from services.diffusion.loading import load_components

    return load_components(tiny_model_dir)


@pytest.fixture
def model_command(tiny_model_dir: Path) -> dict[str, Any]:
    """The tiny model as the child's commands name it."""
    return model_of(tiny_model_dir, "a" * 64)


def model_of(folder: Path, digest: str, **parts: str) -> dict[str, Any]:
    names = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    return {"digest": digest, "folder": str(folder), "parts": {name: digest + name for name in names} | parts}
