"""Seconds for a batch in which every picture wears another LoRA, against the same batch wearing one LoRA throughout."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from services.diffusion.drawing import Drawing
from services.diffusion.loading import Components, load_components, quiet_libraries
from services.diffusion.lora import Factors, LoraShape, LoraWeights, attach
from services.diffusion.lora_card import LoraCard
from services.diffusion.lora_files import write_kohya
from services.inference.adapters import AdapterStore, LoraFile
from services.inference.engine import Engine
from services.inference.slot import open_slots
from services.storage.catalogue import EMBEDDED_WEIGHTS
from tests.bench.rows import Row, compare

PICTURES = 8
SHAPE = LoraShape(rank=8, alpha=8.0)
DRAWING = Drawing("a photo of a robot on the beach", "blurry", num_inference_steps=10)


def rows() -> list[Row]:
    """Eight pictures in one batch to finished latents, from LoRAs in memory, DDIM 10 steps."""
    torch.set_num_threads(1)
    quiet_libraries()
    components = load_components(EMBEDDED_WEIGHTS)
    store = AdapterStore(1 << 30, components.dtype)
    with tempfile.TemporaryDirectory() as folder:
        files = [_lora(components, Path(folder), number) for number in range(PICTURES)]
        store.fitted(components, files)
    return [
        compare(
            f"{PICTURES} pictures in one batch, {PICTURES} LoRAs of rank {SHAPE.rank}",
            "the same, one LoRA for all",
            lambda: _drawn(components, store, files),
            lambda: _drawn(components, store, files[:1] * PICTURES),
            rounds=5,
        )
    ]


def _drawn(components: Components, store: AdapterStore, files: Sequence[LoraFile]) -> None:
    engine = Engine(len(files))
    for number, file in enumerate(files):
        drawing = replace(DRAWING, seed=number)
        loras = store.fitted(components, [file])
        engine.add(open_slots(str(number), "model", components, [drawing], loras))
    while not engine.is_idle:
        if failed := engine.tick().failed:
            raise failed[0][1]


def _lora(components: Components, folder: Path, seed: int) -> LoraFile:
    generator = torch.Generator().manual_seed(seed)

    def normal(_name: str, size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, generator=generator)

    adapter = attach(components.unet, SHAPE, part="unet", initial=normal)
    adapter.detach()
    modules = {
        name: Factors(factors.a, normal(name, tuple(factors.b.shape)) * 0.01, factors.alpha)
        for name, factors in adapter.weights().modules.items()
    }
    path = folder / f"{seed}.safetensors"
    write_kohya(LoraWeights(modules), path, LoraCard(title=str(seed), base_model="pocket", family=""))
    return LoraFile(str(seed), f"{seed:064x}", path, 1.0)
