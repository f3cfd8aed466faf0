"""Counter-based randomness: every draw is a pure function of what it is for.

A draw is named by the job's seed, a purpose and coordinates (epoch or update, sample id, occurrence). The name is
hashed into the key of a Philox generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), or into
the number itself (`uniform`), so a draw depends neither on the batch layout, nor on the device, nor on how many numbers
anything else has drawn, and a resumed run needs no generator state.
"""

import hashlib
from enum import StrEnum

import numpy as np
import torch

GENERATOR_VERSION = "philox-blake2b-1"


class Purpose(StrEnum):
    """What a random number decides. Two purposes never share a stream."""

    ORDER = "order"
    MULTIPLY = "multiply"
    RATED = "rated"
    CROP = "crop"
    FLIP = "flip"
    TAGS = "tags"
    VAE = "vae"
    TIMESTEP = "timestep"
    NOISE = "noise"
    DROPOUT = "dropout"
    COND_DROPOUT = "cond_dropout"
    LORA_INIT = "lora_init"


Coordinate = int | str


def stream(seed: int, purpose: Purpose, *coordinates: Coordinate) -> np.random.Generator:
    """Returns the generator of one named draw.

    Args:
        seed: the job's seed.
        purpose: what the numbers decide.
        coordinates: epoch or update, sample id, occurrence; their types count (1 and "1" differ).
    """
    return np.random.Generator(np.random.Philox(key=_key(seed, purpose, coordinates)))


def uniform_integer(count: int, seed: int, purpose: Purpose, *coordinates: Coordinate) -> int:
    """Draws one integer uniformly from 0..count-1."""
    return int(stream(seed, purpose, *coordinates).integers(count))


def uniform(seed: int, purpose: Purpose, *coordinates: Coordinate) -> float:
    """Draws one number uniformly from 0..1 without 1: 53 bits of the hashed name itself, with no generator between.

    Ten times as fast as a stream of its own, for draws that every sample of an epoch needs.
    """
    return (_key(seed, purpose, coordinates) >> 75) * 2.0**-53


def permutation(length: int, seed: int, purpose: Purpose, *coordinates: Coordinate) -> list[int]:
    """Draws an order of 0..length-1."""
    return [int(index) for index in stream(seed, purpose, *coordinates).permutation(length)]


def normal(shape: tuple[int, ...], seed: int, purpose: Purpose, *coordinates: Coordinate) -> torch.Tensor:
    """Draws independent N(0, 1) values: float32 on the CPU, of the given shape, equal for every device."""
    return torch.from_numpy(stream(seed, purpose, *coordinates).standard_normal(shape, dtype=np.float32))


def library_seed(seed: int, purpose: Purpose, *coordinates: Coordinate) -> int:
    """Returns a 63-bit seed for a library's own generator (dropout inside a model)."""
    return int(stream(seed, purpose, *coordinates).integers(2**63))


def _key(seed: int, purpose: Purpose, coordinates: tuple[Coordinate, ...]) -> int:
    name = repr((int(seed), str(purpose), *coordinates)).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
