"""LoRAs of requests in one engine: who wears what, what stays in memory, and whose fault is whose."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from services.diffusion.drawing import Drawing, decode, to_image
from services.diffusion.loading import Components
from services.diffusion.lora import LoraShape, merge
from services.diffusion.lora_card import LoraCard
from services.diffusion.lora_files import read_lora, write_kohya, write_peft
from services.domain.errors import BadInput
from services.inference.adapters import (
    NO_LORAS,
    AdapterStore,
    EmbeddingFile,
    LoraFile,
    WornLoras,
    embeddings_for,
)
from services.inference.engine import Engine
from services.inference.slot import Slot, open_slots
from tests.unit.diffusion.loras import made

BASE = Drawing("a photo of a dog", "blurry", num_inference_steps=3, seed=5)
CARD = LoraCard(title="x", base_model="tiny", family="tiny")
PLENTY = 1 << 40


def lora_file(
    components: Components, path: Path, seed: int, shape: LoraShape, strength: float = 1.0
) -> LoraFile:
    """A LoRA for both parts that can be seen in pictures."""
    write = write_kohya if seed % 2 else write_peft
    write(made(components, shape, seed), path, CARD)
    return LoraFile(path.stem, f"{seed:064x}", path, strength)


@pytest.fixture(scope="module")
def files(components: Components, tmp_path_factory: pytest.TempPathFactory) -> list[LoraFile]:
    folder = tmp_path_factory.mktemp("loras")
    shapes = [LoraShape(2, 3.0), LoraShape(5, 2.5, conv_rank=3, conv_alpha=4.0), LoraShape(1, 2.0)]
    return [
        lora_file(components, folder / f"lora{seed}.safetensors", seed, shape)
        for seed, shape in enumerate(shapes)
    ]


def store_of(budget_bytes: int = PLENTY) -> AdapterStore:
    return AdapterStore(budget_bytes, torch.float32)


def slot_of(components: Components, drawing: Drawing, loras: WornLoras) -> Slot:
    (slot,) = open_slots("job", "m", components, [drawing], loras)
    return slot


def run(slots: Sequence[Slot], cap: int) -> list[int]:
    """Draws them and returns how many shared each call."""
    engine, calls = Engine(cap), []
    engine.add(slots)
    while not engine.is_idle:
        tick = engine.tick()
        assert tick.failed == []
        calls.append(len(tick.stepped))
    return calls


def picture(slot: Slot) -> Tensor:
    """8-bit pixels, as they are."""
    image = to_image(decode(slot.components, slot.latents)[0])
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int()


def test_mixed_batch_makes_one_call_a_step_and_draws_for_each_what_it_draws_alone(
    components: Components, files: list[LoraFile]
) -> None:
    store = store_of()
    wishes: list[list[LoraFile]] = [
        [],
        files[:1],
        [replace(files[1], strength=0.6)],
        [replace(files[0], strength=0.5), files[1], files[2]],
        [files[2]],
    ]

    def opened() -> list[Slot]:
        return [
            slot_of(components, replace(BASE, seed=seed), store.fitted(components, wish))
            for seed, wish in enumerate(wishes)
        ]

    together, alone = opened(), opened()
    assert run(together, cap=len(wishes)) == [len(wishes)] * BASE.num_inference_steps
    for slot in alone:
        run([slot], cap=1)
    for mixed, solo in zip(together, alone, strict=True):
        assert int((picture(mixed) - picture(solo)).abs().max()) <= 2
        assert float((mixed.latents - solo.latents).abs().max() / solo.latents.abs().max()) < 1e-4

    bare = slot_of(components, replace(BASE, seed=3), NO_LORAS)
    run([bare], cap=1)
    assert float((bare.latents - alone[3].latents).abs().max()) > 0.1, "the LoRAs change something"


def test_picture_is_the_one_of_the_lora_merged_into_the_weights(
    components: Components, files: list[LoraFile]
) -> None:
    worn = slot_of(components, BASE, store_of().fitted(components, [replace(files[1], strength=0.7)]))
    run([worn], cap=1)
    weights = read_lora(files[1].path)
    merges = [
        merge(components.unet, weights, part="unet", strength=0.7),
        merge(components.text_encoder, weights, part="text_encoder", strength=0.7),
    ]
    try:
        merged = slot_of(components, BASE, NO_LORAS)
        run([merged], cap=1)
    finally:
        for done in merges:
            done.undo()
    assert float((worn.latents - merged.latents).abs().max() / merged.latents.abs().max()) < 1e-4


def test_lora_of_strength_nought_is_not_worn(components: Components, files: list[LoraFile]) -> None:
    assert store_of().fitted(components, [replace(files[0], strength=0.0)]) == NO_LORAS


def test_file_is_parsed_once(components: Components, files: list[LoraFile], tmp_path: Path) -> None:
    copy = replace(files[0], path=tmp_path / "copy.safetensors")
    shutil.copy(files[0].path, copy.path)
    store = store_of()
    first = store.fitted(components, [copy])
    copy.path.unlink()
    assert store.fitted(components, [copy]).unet[0][0] is first.unet[0][0]
    del first
    assert store.fitted(components, [copy]).unet, "from host memory, where nobody wears it any more"


def test_least_recently_used_lora_leaves_when_the_budget_is_used_up(
    components: Components, files: list[LoraFile]
) -> None:
    probe = store_of()
    sizes = []
    for file in files:
        before = probe.used_bytes
        probe.fitted(components, [file])
        sizes.append(probe.used_bytes - before)
    store = store_of(sum(sizes) - 1)
    for number in (0, 1, 0, 2):
        store.fitted(components, [files[number]])
    assert store.held == [files[0].digest, files[2].digest]
    assert store.used_bytes == sizes[0] + sizes[2]


def test_lora_larger_than_the_budget_is_worn_and_not_kept(
    components: Components, files: list[LoraFile]
) -> None:
    store = store_of(10)
    assert store.fitted(components, [files[0]]).unet
    assert store.held == []


def test_lora_that_is_no_file_is_named_in_the_refusal(components: Components, tmp_path: Path) -> None:
    broken = LoraFile("rex", "b" * 64, tmp_path / "b.safetensors", 1.0)
    broken.path.write_bytes(b"\x80\x04 pickled")
    with pytest.raises(BadInput, match="'rex': the LoRA cannot be used: it is a pickle") as caught:
        store_of().fitted(components, [broken])
    assert caught.value.violations[0].field == "loras"


def test_embedding_of_another_width_is_named_in_the_refusal(components: Components, tmp_path: Path) -> None:
    torch.save({"<rex>": torch.ones(2, 768)}, tmp_path / "rex.bin")
    with pytest.raises(BadInput, match="'rex' was made for text encoders of width 768, this model's has 32"):
        embeddings_for(components, [EmbeddingFile("rex", tmp_path / "rex.bin")])


def test_activation_from_memory_takes_at_most_50_ms(components: Components, files: list[LoraFile]) -> None:
    store = store_of()
    store.fitted(components, files)
    times: list[float] = []
    for _ in range(5):
        started = time.perf_counter()
        loras: Any = store.fitted(components, files[1:2])
        times.append(time.perf_counter() - started)
        del loras
    assert min(times) < 0.05
