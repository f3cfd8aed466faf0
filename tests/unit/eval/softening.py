"""A stand-in for what an autoencoder does to drawings: soft edges, fine noise, and blotches."""

import numpy as np
from PIL import Image, ImageFilter

BLUR_PX, FINE, BLOTCHES = 2.0, 8.0, 6.0
"""At 512 px; noise in units of 0..255."""


def softened(picture: Image.Image, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(BLUR_PX)), dtype=np.float32)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    blotches = np.asarray(coarse.resize(picture.size, Image.Resampling.BICUBIC), dtype=np.float32)
    noisy = pixels + rng.normal(0, FINE, pixels.shape) + (blotches - 127.5) / 127.5 * BLOTCHES
    return Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))
