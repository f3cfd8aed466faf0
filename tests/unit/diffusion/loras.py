"""LoRAs to try things with."""

import torch
from torch import Tensor

from services.diffusion.loading import Components
from services.diffusion.lora import Factors, LoraShape, LoraWeights, attach


def made(components: Components, shape: LoraShape, seed: int) -> LoraWeights:
    """A LoRA without zeros for both parts of a model, large enough to be seen."""
    generator = torch.Generator().manual_seed(seed)

    def normal(_name: str, size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, generator=generator)

    modules: dict[str, Factors] = {}
    for part in ("unet", "text_encoder"):
        adapter = attach(getattr(components, part), shape, part=part, initial=normal)
        adapter.detach()
        for name, factors in adapter.weights().modules.items():
            modules[name] = Factors(factors.a, normal(name, tuple(factors.b.shape)) * 0.1, factors.alpha)
    return LoraWeights(modules)
