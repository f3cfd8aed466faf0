"""A small trained autoencoder, and a whole folder published from untrained parts."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from models.pocket import autoencoder, base
from models.pocket.drawing import draw, texture
from models.pocket.scenes import random_scene
from models.pocket.train_autoencoder import crops, to_tensor
from services.diffusion.loading import quiet_libraries


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    quiet_libraries()


def pictures(seed: str, side: int, scenes: int, textures: int = 0) -> Tensor:
    """[scenes + textures, 3, side, side] in -1..1."""
    rng = random.Random(seed)
    drawn = [draw(random_scene(rng), side) for _ in range(scenes)]
    drawn += [texture(rng, side) for _ in range(textures)]
    return to_tensor(np.stack([np.asarray(picture) for picture in drawn]))


@pytest.fixture(scope="session")
def some_pictures() -> Callable[..., Tensor]:
    """Draws scenes and textures from a seed of its own."""
    return pictures


@pytest.fixture(scope="session")
def briefly_trained() -> AutoencoderKL:
    """An autoencoder without norms after a few steps, its biases far from their zero start. Read only.

    The biases matter: in an untrained network they are zero, and an export that forgets them would pass.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = autoencoder.build(with_norms=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        rng = random.Random("brief training")
        for _ in range(8):
            batch = to_tensor(crops(rng, 64, 6))
            error = model.decode(model.encode(batch).latent_dist.mean).sample - batch
            optimizer.zero_grad()
            (error.abs().mean() + error.square().mean()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") and "quant" not in name:
                    parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="session")
def published(briefly_trained: AutoencoderKL) -> AutoencoderKL:
    """The same as it is published. Read only."""
    return autoencoder.publish(briefly_trained, [pictures("calibration", 128, 3, 1)])


@pytest.fixture(scope="session")
def published_folder(published: AutoencoderKL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as it is released, with untrained UNet and text encoder. Read only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet = base.build_unet()
        text_encoder = base.build_text_encoder(len(base.build_tokenizer()))
    return base.publish(published, text_encoder, unet, tmp_path_factory.mktemp("pocket") / "weights")
