"""Pictures of a diffusers folder, drawn by the plain `StableDiffusionPipeline`; round trips through its autoencoder."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from services.diffusion.loading import quiet_libraries

SIZE_PX = 512
STEPS = 20
GUIDANCE = 4.0
BATCH = 8


def load_pipeline(folder: Path) -> Any:
    """The folder's pipeline in float32, silent."""
    quiet_libraries()
    # Not at the top: it speaks while it is imported.
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        str(folder), local_files_only=True, dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_pictures(pipeline: Any, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
    """One picture for each prompt and seed, 512 px."""
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), BATCH):
        part = slice(start, start + BATCH)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        pictures += pipeline(
            list(prompts[part]),
            height=SIZE_PX,
            width=SIZE_PX,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=generators,
        ).images
    return pictures


@torch.no_grad()
def round_trips(pipeline: Any, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Each picture after the autoencoder's encoder (its mean) and decoder: the best that the model could draw."""
    returned = []
    for picture in pictures:
        values = torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32) / 127.5 - 1)
        latents = pipeline.vae.encode(values.permute(2, 0, 1)[None]).latent_dist.mean
        decoded = pipeline.vae.decode(latents).sample[0].clamp(-1, 1)
        levels = ((decoded + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        returned.append(Image.fromarray(levels))
    return returned


def digest_of(folder: Path) -> str:
    """Twelve hexadecimal digits that change with any file of a model."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(folder)).encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]
