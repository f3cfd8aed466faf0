"""LoRAs worn by rows against the library's own adapters, and against LoRAs merged into the weights."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from services.diffusion.drawing import Drawing, Row, encode_context, initial_noise, predict, sampler_of
from services.diffusion.loading import Components, load_components
from services.diffusion.lora import Factors, LoraShape, LoraWeights, merge
from services.diffusion.lora_files import read_lora, write_kohya, write_peft
from services.diffusion.lora_rows import LoraRows, PackedLora, fit, pack
from services.domain.errors import BadInput
from tests.unit.diffusion.loras import made
from tests.unit.diffusion.test_lora_files import CARD

WRITERS: dict[str, Callable[..., None]] = {"peft": write_peft, "kohya": write_kohya}
each_layout = pytest.mark.parametrize("layout", WRITERS)
SMALL = LoraShape(rank=2, alpha=3.0)
LOCON = LoraShape(rank=5, alpha=2.5, conv_rank=3, conv_alpha=4.0)
STRENGTHS = (0.8, 1.3)
PROMPTS = ["blurry", "a photo of a dog"]


@pytest.fixture(scope="module")
def sd1(sd1_model_dir: Path) -> Components:
    return load_components(sd1_model_dir)


@pytest.fixture(scope="module")
def weights(sd1: Components) -> list[LoraWeights]:
    return [made(sd1, SMALL, 1), made(sd1, LOCON, 2)]


def packed(weights: LoraWeights) -> PackedLora:
    return pack(weights, torch.float32)


def context_of(components: Components, loras: Sequence[PackedLora], strengths: Sequence[float]) -> Tensor:
    worn = tuple(
        (fit(components.text_encoder, lora, "text_encoder"), strength)
        for lora, strength in zip(loras, strengths, strict=True)
    )
    with torch.inference_mode(), LoraRows([worn] * 2).worn():
        return encode_context(components, Drawing(PROMPTS[1], PROMPTS[0]))


def row_of(components: Components, seed: int) -> Row:
    drawing = Drawing("x", num_inference_steps=3, seed=seed)
    sampler = sampler_of(components, drawing)
    return Row(sampler, sampler.start(initial_noise(components, drawing, sampler.generator)), 1)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@each_layout
def test_two_loras_with_strengths_agree_with_the_librarys_pipeline(
    layout: str, sd1: Components, sd1_model_dir: Path, weights: list[LoraWeights], tmp_path: Path
) -> None:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(str(sd1_model_dir), local_files_only=True)
    files = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for number, (file, lora) in enumerate(zip(files, weights, strict=True)):
        WRITERS[layout](lora, file, CARD)
        pipeline.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name=f"lora{number}")
    row = row_of(sd1, 4)
    with torch.inference_mode():
        plain = predict(sd1, [row], encode_context(sd1, Drawing(PROMPTS[1], PROMPTS[0])))
        pipeline.set_adapters(["lora0", "lora1"], list(STRENGTHS))
        embeds, negative = pipeline.encode_prompt(PROMPTS[1], "cpu", 1, True, PROMPTS[0])
        theirs_context = torch.cat([negative, embeds])
        theirs = predict(sd1.with_modules(unet=pipeline.unet), [row], theirs_context)

    loras = [packed(read_lora(file)) for file in files]
    context = context_of(sd1, loras, STRENGTHS)
    worn = tuple(
        (fit(sd1.unet, lora, "unet"), strength) for lora, strength in zip(loras, STRENGTHS, strict=True)
    )
    with torch.inference_mode(), LoraRows([worn] * 2).worn():
        ours = predict(sd1, [row], context)

    assert float((context - theirs_context).abs().max()) < 1e-3
    assert float((ours - theirs).abs().max()) < 1e-3
    assert float((ours - plain).abs().max()) > 0.1, "the LoRAs change something"


def test_each_row_of_a_call_gets_its_own_loras_or_none(sd1: Components, weights: list[LoraWeights]) -> None:
    rows = [row_of(sd1, seed) for seed in range(5)]
    strengths = [(0.0, 0.0), (1.0, 0.0), (0.0, 0.5), (0.7, 1.2), (0.0, 0.0)]
    fitted = [fit(sd1.unet, packed(lora), "unet") for lora in weights]
    worn = [
        tuple((lora, strength) for lora, strength in zip(fitted, pair, strict=True) if strength)
        for pair in strengths
    ]
    with torch.inference_mode():
        context = encode_context(sd1, replace(Drawing("a"), guidance_scale=1.0))
        together = context.expand(len(rows), -1, -1)
        plain = predict(sd1, rows, together)
        with LoraRows(worn).worn():
            mixed = predict(sd1, rows, together)
        assert torch.equal(predict(sd1, rows, together), plain), "nothing stays behind"
        for number, (row, pair) in enumerate(zip(rows, strengths, strict=True)):
            merges = [
                merge(sd1.unet, lora, part="unet", strength=strength)
                for lora, strength in zip(weights, pair, strict=True)
            ]
            alone = predict(sd1, [row], context)
            for done in reversed(merges):
                done.undo()
            assert float((mixed[number] - alone[0]).abs().max()) < 1e-4, pair
    assert torch.equal(mixed[[0, 4]], plain[[0, 4]])


def test_lora_takes_no_tensor_of_the_model_and_leaves_no_hook(
    sd1: Components, weights: list[LoraWeights]
) -> None:
    before = {name: (tensor.data_ptr(), tensor._version) for name, tensor in sd1.unet.state_dict().items()}
    rows = LoraRows([((fit(sd1.unet, packed(weights[1]), "unet"), 1.0),)])
    with pytest.raises(RuntimeError, match="broken"), rows.worn():
        raise RuntimeError("broken")
    assert before == {
        name: (tensor.data_ptr(), tensor._version) for name, tensor in sd1.unet.state_dict().items()
    }
    assert not any(module._forward_hooks for module in sd1.unet.modules())


def test_file_that_writes_a_matrix_as_a_convolution_is_worn_the_same(sd1: Components) -> None:
    lora = made(sd1, SMALL, 3)
    wide = {
        name: Factors(factors.a[:, :, None, None], factors.b[:, :, None, None], factors.alpha)
        if factors.a.ndim == 2
        else Factors(factors.a.flatten(1), factors.b.flatten(1), factors.alpha)
        for name, factors in lora.modules.items()
    }
    row, context = row_of(sd1, 1), torch.zeros(1, 77, 32)
    outputs = []
    for weights in (lora, LoraWeights(wide)):
        rows = LoraRows([((fit(sd1.unet, packed(weights), "unet"), 1.0),)])
        with torch.inference_mode(), rows.worn():
            outputs.append(predict(sd1, [row], context))
    assert torch.equal(*outputs)


def test_number_that_half_precision_cannot_hold_is_refused() -> None:
    huge = Factors(torch.ones(1, 2), torch.full((2, 1), 1e4), alpha=1e3)
    with pytest.raises(BadInput, match="values that are too large"):
        pack(LoraWeights({"unet.conv_in": huge}), torch.float16)


def test_lora_of_another_shape_is_refused_by_the_modules_name(sd1: Components) -> None:
    odd = Factors(torch.ones(1, 7), torch.ones(9, 1), alpha=1.0)
    name = next(iter(made(sd1, SMALL, 1).modules))
    with pytest.raises(BadInput, match=f"does not fit this model: {name}"):
        fit(sd1.unet, packed(LoraWeights({name: odd})), "unet")
