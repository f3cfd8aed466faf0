"""Makes the released folder from two trainings.

    python -m models.pocket.release --vae runs/vae/model.pt --base runs/base/state.pt --out models/pocket/weights

Draws nothing at random that a seed does not decide: the same checkpoints give the same bytes.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.pocket import autoencoder, base
from models.pocket.drawing import draw, texture
from models.pocket.scenes import random_scene
from models.pocket.train_autoencoder import reconstruction, to_tensor, whole_scenes
from models.pocket.train_base import averaged

_SIZES = (256, 384, 512, 640, 768)


def calibration_pictures() -> list[Tensor]:
    """Batches [4, 3, h, w] in -1..1 of scenes at all sizes, and of textures: what the norms are set on."""
    rng = random.Random("calibration")
    batches = []
    for size in (*_SIZES, 512, 512, 512):
        drawn = [draw(random_scene(rng), size) for _ in range(3)] + [texture(rng, size)]
        batches.append(to_tensor(np.stack([np.asarray(picture) for picture in drawn])))
    return batches


def release(vae: Path, trained_base: Path, out: Path) -> dict[str, float | int]:
    """Writes the folder; returns the counters of the base's training and the released autoencoder's quality."""
    trained = autoencoder.build(with_norms=False).eval()
    trained.load_state_dict(torch.load(vae, map_location="cpu", weights_only=True)["model"])
    unet, text_encoder, counters = averaged(trained_base)
    published = autoencoder.publish(trained, calibration_pictures())
    base.publish(published, text_encoder, unet, out)
    error, ratio = reconstruction(published, whole_scenes(2, 48))
    return {**counters, "vae_error": round(error, 4), "vae_psnr_db": round(ratio, 2)}


def main() -> None:
    """Command line: see the module's text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    print(json.dumps(release(arguments.vae, arguments.base, arguments.out)))


if __name__ == "__main__":
    main()
