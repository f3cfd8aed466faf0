"""A stand-in for torchvision, which diffusers' scripts import and this project does not install."""

import importlib.machinery
import random
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any


def stand_in_for_torchvision() -> None:
    """Puts a module in torchvision's place that has the few transforms the script uses, on Pillow."""
    import torch
    from PIL import Image

    def resize(size: int, interpolation: Any) -> Callable[[Image.Image], Image.Image]:
        def apply(image: Image.Image) -> Image.Image:
            scale = size / min(image.size)
            width, height = (max(size, int(side * scale)) for side in image.size)
            return image.resize((width, height), interpolation)

        return apply

    def crop(size: int, place: Callable[[int], int]) -> Callable[[Image.Image], Image.Image]:
        def apply(image: Image.Image) -> Image.Image:
            left, top = place(image.width - size), place(image.height - size)
            return image.crop((left, top, left + size, top + size))

        return apply

    def to_tensor() -> Callable[[Image.Image], torch.Tensor]:
        def apply(image: Image.Image) -> torch.Tensor:
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            return pixels.view(image.height, image.width, 3).permute(2, 0, 1).float().div(255)

        return apply

    def normalize(mean: Sequence[float], std: Sequence[float]) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda values: (values - mean[0]) / std[0]

    def compose(steps: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
        def apply(value: Any) -> Any:
            for step in steps:
                value = step(value)
            return value

        return apply

    transforms = types.ModuleType("torchvision.transforms")
    parts = {
        "Compose": compose,
        "Resize": resize,
        "CenterCrop": lambda size: crop(size, lambda room: round(room / 2)),
        "RandomCrop": lambda size: crop(size, lambda room: random.randint(0, room)),
        "ToTensor": to_tensor,
        "Normalize": normalize,
        "InterpolationMode": Image.Resampling,
    }
    for name, part in parts.items():
        setattr(transforms, name, part)
    package = types.ModuleType("torchvision")
    package.__spec__ = importlib.machinery.ModuleSpec("torchvision", None)
    package.transforms = transforms  # type: ignore[attr-defined]
    sys.modules |= {"torchvision": package, "torchvision.transforms": transforms}
