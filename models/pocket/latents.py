"""Draws scenes and encodes them once, into files the base model's training reads again and again.

    python -m models.pocket.latents --vae runs/vae/encoder.pt --out runs/latents --size 512 --files 8

Each file holds `PER_FILE` scenes of one size with what is in them; captions are worded anew at each reading. More files
may be written while a training runs: it picks them up.
"""

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.pocket import autoencoder
from models.pocket.drawing import draw
from models.pocket.scenes import Scene, random_scene, scene_from_json
from models.pocket.train_autoencoder import to_tensor
from models.pocket.training import load_state, save_state

PER_FILE = 1024
_BATCH = 8


@dataclass(frozen=True, slots=True)
class Latents:
    """Encoded scenes of one size: `values` float16 [n, c, h, w], unit scale; `scenes` in the same order."""

    values: Tensor
    scenes: list[Scene]


def write(vae: Path, out: Path, size_px: int, index: int, count: int = PER_FILE) -> Path:
    """Draws and encodes one file of `count` scenes; the same size and index give the same scenes.

    Raises:
        FileNotFoundError: there is no `vae`, the `encoder.pt` of the autoencoder's training.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state = load_state(vae, device)
    if state is None:
        raise FileNotFoundError(f"no autoencoder at {vae}: train it first")
    model = autoencoder.build(with_norms=False).to(device, memory_format=torch.channels_last).eval()
    model.load_state_dict(state["model"])
    rng = random.Random(f"latents {size_px} {index}")
    scenes = [random_scene(rng) for _ in range(count)]
    values = []
    for start in range(0, count, _BATCH):
        drawn = np.stack([np.asarray(draw(scene, size_px)) for scene in scenes[start : start + _BATCH]])
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            values.append(model.encode(to_tensor(drawn).to(device)).latent_dist.mean.half().cpu())
    path = out / f"{size_px}-{index:04}.pt"
    save_state(path, {"values": torch.cat(values), "scenes": [scene.as_json() for scene in scenes]})
    return path


def read(path: Path) -> Latents:
    """One file that `write` made."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    return Latents(state["values"], [scene_from_json(scene) for scene in state["scenes"]])


def main() -> None:
    """Command line: see the module's text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, nargs="+", default=[512])
    parser.add_argument("--files", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for index in range(arguments.first, arguments.first + arguments.files):
        for size in arguments.size:
            if not (arguments.out / f"{size}-{index:04}.pt").exists():
                print(write(arguments.vae, arguments.out, size, index), flush=True)


if __name__ == "__main__":
    main()
