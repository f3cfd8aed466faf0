"""Encoded scenes: written once, read again with what is in them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from models.pocket import latents
from models.pocket.drawing import draw
from models.pocket.train_autoencoder import to_tensor
from models.pocket.training import save_state


@pytest.fixture(scope="module")
def vae(briefly_trained: AutoencoderKL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vae") / "encoder.pt"
    save_state(path, {"model": briefly_trained.state_dict()})
    return path


@torch.no_grad()
def test_a_file_holds_the_encoded_pictures_of_its_scenes(
    vae: Path, tmp_path: Path, briefly_trained: AutoencoderKL
) -> None:
    path = latents.write(vae, tmp_path, 96, 3, count=9)
    assert path == tmp_path / "96-0003.pt"
    found = latents.read(path)
    assert found.values.shape == (9, 12, 3, 3)
    assert found.values.dtype == torch.float16
    drawn = np.stack([np.asarray(draw(scene, 96)) for scene in found.scenes])
    expected = briefly_trained.encode(to_tensor(drawn)).latent_dist.mean
    # Encoded in bfloat16, which keeps eight bits.
    assert (found.values.float() - expected).square().mean().sqrt() < 0.03 * expected.std()


def test_size_and_index_decide_the_scenes(vae: Path, tmp_path: Path) -> None:
    def scenes(size_px: int, index: int) -> object:
        return latents.read(latents.write(vae, tmp_path, size_px, index, count=2)).scenes

    assert scenes(32, 0) == scenes(32, 0)
    assert scenes(32, 0) != scenes(32, 1)
    assert scenes(32, 0) != scenes(64, 0)


def test_without_an_autoencoder_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train it first"):
        latents.write(tmp_path / "encoder.pt", tmp_path, 32, 0, count=1)
