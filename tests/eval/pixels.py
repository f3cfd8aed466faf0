"""Pictures as numbers for the judges, and the named colours beside them."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.pocket.figures import COLOURS

SIDE = 256
"""Side in pixels at which things and backgrounds are judged."""

Pixels = NDArray[np.float32]
"""[h, w, 3] in 0..255, or a list of colours [n, 3]."""
Mask = NDArray[np.bool_]
"""[h, w]."""

COLOUR_NAMES = tuple(COLOURS)
COLOUR_VALUES: Pixels = np.array(list(COLOURS.values()), dtype=np.float32)


def pixels_of(picture: Image.Image, side: int = SIDE) -> Pixels:
    """A picture as float32 [side, side, 3] in 0..255; each value is the mean of what it covers."""
    if picture.size != (side, side):
        picture = picture.resize((side, side), Image.Resampling.BOX)
    return np.asarray(picture.convert("RGB"), dtype=np.float32)


def distance(pixels: Pixels, colour: Pixels) -> NDArray[np.float32]:
    """Euclidean distance of each pixel [..., 3] from one colour [3], or from pixels of its own shape: [...], 0..442."""
    return np.sqrt(np.square(pixels - colour).sum(-1))


def nearest_colours(pixels: Pixels) -> NDArray[np.intp]:
    """Position in `COLOUR_NAMES` of the colour that is nearest to each pixel [..., 3]: [...]."""
    return np.square(pixels[..., None, :] - COLOUR_VALUES).sum(-1).argmin(-1)


def nearest_colour(colour: Pixels) -> str:
    """Name of the colour that is nearest to [3]."""
    return COLOUR_NAMES[int(nearest_colours(colour))]
