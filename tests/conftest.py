"""Fixtures that several packages share. Nothing here loads torch before a test asks for a model."""

import os
from pathlib import Path

import pytest

# Models here are so small that a second math thread waits more than it computes, most of all beside other processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a tiny random pipeline: 16 px native, VAE factor 2. Read only."""
    return _build(tmp_path_factory, "fixture")


@pytest.fixture(scope="session")
def deep_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a deep autoencoder: 512 px native, VAE factor 32, 12 latent channels. Read only."""
    return _build(tmp_path_factory, "deep")


@pytest.fixture(scope="session")
def pocket_model_dir() -> Path:
    """The embedded model as it ships, trained weights and all. Read only."""
    from services.storage.catalogue import EMBEDDED_WEIGHTS

    _settle_torch()
    return EMBEDDED_WEIGHTS


@pytest.fixture(scope="session")
def sd1_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the four UNet blocks that the single-file layout is made for. Read only."""
    return _build(tmp_path_factory, "sd1")


def _build(tmp_path_factory: pytest.TempPathFactory, preset: str) -> Path:
    from services.diffusion.tiny import PRESETS, build_pipeline_folder

    _settle_torch()
    return build_pipeline_folder(tmp_path_factory.mktemp("models") / preset, PRESETS[preset])


def _settle_torch() -> None:
    import torch

    from services.diffusion.loading import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()
