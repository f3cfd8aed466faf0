"""LoRA files against diffusers' own loader, and against key lists written down from the architecture."""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from services.diffusion.loading import Components, load_components
from services.diffusion.lora import Factors, LoraShape, LoraWeights, attach, matching_modules, merge
from services.diffusion.lora_card import LoraCard, without_credentials
from services.diffusion.lora_files import PEFT_FILE, read_lora, write_kohya, write_peft
from services.diffusion.lora_names import Slot, kohya_key, parse_key
from services.domain.errors import BadInput

SHAPE = LoraShape(rank=4, alpha=6.0, conv_rank=2, conv_alpha=5.0)
CARD = LoraCard(
    title="Rex",
    base_model="sd-v1-5",
    family="sd1",
    base_digest="ab" * 32,
    preset=SHAPE.preset,
    resolution_px=512,
    clip_skip=2,
    trigger_phrase="zkw dog",
    description="Learned from five photographs.",
    license="creativeml-openrail-m",
    finished_at=datetime(2026, 11, 21, 12, 30, tzinfo=UTC),
    tag_frequency={"rex": {"photo of zkw dog": 5}},
    training={"seed": 7, "steps": 800, "unet_lr": 1e-4},
)
Write = Callable[[LoraWeights, Path, LoraCard], None]
WRITERS: dict[str, Write] = {"peft": write_peft, "kohya": write_kohya}
each_layout = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


def normal(name: str, shape: tuple[int, ...]) -> Tensor:
    seed = sum(ord(letter) * (index + 1) for index, letter in enumerate(name))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained_weights(model: Components, shape: LoraShape = SHAPE) -> LoraWeights:
    """A LoRA with no zero matrices for both parts of a model, which is left as it was."""
    modules: dict[str, Factors] = {}
    for part in ("unet", "text_encoder"):
        adapter = attach(getattr(model, part), shape, part=part, initial=normal)
        adapter.detach()
        for name, factors in adapter.weights().modules.items():
            b = normal(f"{name}.lora_B.weight", tuple(factors.b.shape)) * 0.05
            modules[name] = Factors(factors.a, b, factors.alpha)
    return LoraWeights(modules)


@pytest.fixture(scope="module")
def sd1(sd1_model_dir: Path) -> Components:
    return load_components(sd1_model_dir)


@pytest.fixture(scope="module")
def weights(sd1: Components) -> LoraWeights:
    return trained_weights(sd1)


def is_same(one: LoraWeights, other: LoraWeights) -> bool:
    return one.modules.keys() == other.modules.keys() and all(
        torch.equal(mine.a, other.modules[name].a)
        and torch.equal(mine.b, other.modules[name].b)
        and mine.alpha == other.modules[name].alpha
        for name, mine in one.modules.items()
    )


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


# --- both layouts --------------------------------------------------------------------------------------------


@each_layout
def test_written_file_reads_back_bitwise(weights: LoraWeights, tmp_path: Path, write: Write) -> None:
    path = tmp_path / "lora.safetensors"
    write(weights, path, CARD)
    again = read_lora(path)
    assert is_same(weights, again)
    assert {factors.alpha for factors in again.modules.values()} == {6.0, 5.0}


@each_layout
def test_equal_weights_give_equal_bytes(weights: LoraWeights, tmp_path: Path, write: Write) -> None:
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for path in paths:
        write(weights, path, CARD)
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("layout", WRITERS)
def test_half_precision_rounds_matrices_and_keeps_alpha(
    weights: LoraWeights, tmp_path: Path, layout: str, dtype: torch.dtype
) -> None:
    path = tmp_path / "lora.safetensors"
    odd = LoraWeights({name: Factors(each.a, each.b, 0.3) for name, each in weights.modules.items()})
    {"peft": write_peft, "kohya": write_kohya}[layout](odd, path, CARD, dtype)
    stored = {tensor.dtype for key, tensor in load_file(path).items() if not key.endswith(".alpha")}
    assert stored == {dtype}
    for name, factors in read_lora(path).modules.items():
        assert torch.equal(factors.a, odd.modules[name].a.to(dtype).float())
        assert torch.equal(factors.b, odd.modules[name].b.to(dtype).float())
        assert factors.alpha == pytest.approx(0.3, rel=1e-7)


@each_layout
def test_weights_that_are_not_finite_are_not_written(
    weights: LoraWeights, tmp_path: Path, write: Write
) -> None:
    name, factors = next(iter(weights.modules.items()))
    broken = LoraWeights({name: Factors(factors.a * math.inf, factors.b, factors.alpha)})
    with pytest.raises(ValueError, match="not finite"):
        write(broken, tmp_path / "lora.safetensors", CARD)
    assert list(tmp_path.iterdir()) == []


def test_value_that_half_precision_cannot_hold_is_not_written(weights: LoraWeights, tmp_path: Path) -> None:
    name, factors = next(iter(weights.modules.items()))
    large = LoraWeights({name: Factors(factors.a * 1e6, factors.b, factors.alpha)})
    with pytest.raises(ValueError, match="not finite"):
        write_kohya(large, tmp_path / "lora.safetensors", CARD, torch.float16)


@each_layout
def test_lora_without_modules_is_not_written(tmp_path: Path, write: Write) -> None:
    with pytest.raises(ValueError, match="no modules"):
        write(LoraWeights({}), tmp_path / "lora.safetensors", CARD)


# --- diffusers' loader, which shares no code with ours -------------------------------------------------------


def unet_output(unet: Any) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 7, 32, generator=generator)
    with torch.no_grad():
        return unet(latents, torch.tensor([3, 800]), encoder_hidden_states=context).sample


def text_output(encoder: Any) -> Tensor:
    with torch.no_grad():
        return encoder(torch.arange(20).view(2, 10)).last_hidden_state


@each_layout
def test_diffusers_loads_the_file_and_computes_the_same(
    sd1_model_dir: Path, sd1: Components, weights: LoraWeights, tmp_path: Path, write: Write
) -> None:
    write(weights, tmp_path / PEFT_FILE, CARD)
    pipeline: Any = StableDiffusionPipeline.from_pretrained(str(sd1_model_dir), local_files_only=True)
    pipeline.load_lora_weights(str(tmp_path), weight_name=PEFT_FILE, local_files_only=True)
    base = unet_output(sd1.unet), text_output(sd1.text_encoder)
    merged = merge(sd1.unet, weights, part="unet"), merge(sd1.text_encoder, weights, part="text_encoder")
    ours = unet_output(sd1.unet), text_output(sd1.text_encoder)
    for each in merged:
        each.undo()
    theirs = unet_output(pipeline.unet), text_output(pipeline.text_encoder)
    for before, mine, other in zip(base, ours, theirs, strict=True):
        assert float((mine - before).abs().max()) > 0.01
        assert float((mine - other).abs().max()) < 1e-4


def test_our_reader_takes_what_diffusers_writes(
    sd1_model_dir: Path, weights: LoraWeights, tmp_path: Path
) -> None:
    (tmp_path / "ours").mkdir()
    write_kohya(weights, tmp_path / "ours" / PEFT_FILE, CARD)
    pipeline: Any = StableDiffusionPipeline.from_pretrained(str(sd1_model_dir), local_files_only=True)
    pipeline.load_lora_weights(str(tmp_path / "ours"), weight_name=PEFT_FILE, local_files_only=True)
    pipeline.unet.save_lora_adapter(str(tmp_path / "theirs"), adapter_name="default_0")
    layers, block = load_file(tmp_path / "theirs" / PEFT_FILE), metadata_of(tmp_path / "theirs" / PEFT_FILE)
    settings = json.loads(block["lora_adapter_metadata"])
    StableDiffusionPipeline.save_lora_weights(
        str(tmp_path / "whole"), unet_lora_layers=layers, unet_lora_adapter_metadata=settings
    )
    again = read_lora(tmp_path / "whole" / PEFT_FILE)
    assert is_same(LoraWeights(weights.of("unet")), again)


# --- key lists of Stable Diffusion 1.5 -----------------------------------------------------------------------

# (path, channels) of each transformer, and (path, inputs, outputs) of each residual block, from the published
# architecture: 320, 640, 1280, 1280 channels, two layers a block, skips concatenated on the way up.
TRANSFORMERS = [
    *[(f"down_blocks.{block}.attentions.{i}", 320 << block) for block in range(3) for i in range(2)],
    ("mid_block.attentions.0", 1280),
    *[(f"up_blocks.{4 - block}.attentions.{i}", 320 << (block - 1)) for block in (3, 2, 1) for i in range(3)],
]
RESIDUALS = [
    *[("down_blocks.0", 320, 320), ("down_blocks.0", 320, 320), ("down_blocks.1", 320, 640)],
    *[("down_blocks.1", 640, 640), ("down_blocks.2", 640, 1280), ("down_blocks.2", 1280, 1280)],
    *[("down_blocks.3", 1280, 1280), ("down_blocks.3", 1280, 1280)],
    *[("mid_block", 1280, 1280), ("mid_block", 1280, 1280)],
    *[("up_blocks.0", 2560, 1280), ("up_blocks.0", 2560, 1280), ("up_blocks.0", 2560, 1280)],
    *[("up_blocks.1", 2560, 1280), ("up_blocks.1", 2560, 1280), ("up_blocks.1", 1920, 1280)],
    *[("up_blocks.2", 1920, 640), ("up_blocks.2", 1280, 640), ("up_blocks.2", 960, 640)],
    *[("up_blocks.3", 960, 320), ("up_blocks.3", 640, 320), ("up_blocks.3", 640, 320)],
]
SAMPLERS = [
    *[
        (f"down_blocks.{block}.downsamplers.0.conv", channels)
        for block, channels in enumerate((320, 640, 1280))
    ],
    *[(f"up_blocks.{block}.upsamplers.0.conv", channels) for block, channels in enumerate((1280, 1280, 640))],
]


def linear(rank: int, inputs: int, outputs: int, kernel: int = 0) -> tuple[list[int], list[int]]:
    return [rank, inputs] + [kernel] * 2 * (kernel > 0), [outputs, rank] + [1] * 2 * (kernel > 0)


def sd15_unet(rank: int) -> Iterator[tuple[str, tuple[list[int], list[int]]]]:
    for path, channels in TRANSFORMERS:
        block = f"{path}.transformer_blocks.0"
        yield f"{path}.proj_in", linear(rank, channels, channels, kernel=1)
        yield f"{path}.proj_out", linear(rank, channels, channels, kernel=1)
        for attention, context in (("attn1", channels), ("attn2", 768)):
            yield f"{block}.{attention}.to_q", linear(rank, channels, channels)
            yield f"{block}.{attention}.to_k", linear(rank, context, channels)
            yield f"{block}.{attention}.to_v", linear(rank, context, channels)
            yield f"{block}.{attention}.to_out.0", linear(rank, channels, channels)
        yield f"{block}.ff.net.0.proj", linear(rank, channels, 8 * channels)
        yield f"{block}.ff.net.2", linear(rank, 4 * channels, channels)


def sd15_convolutions(rank: int) -> Iterator[tuple[str, tuple[list[int], list[int]]]]:
    counts: dict[str, int] = {}
    for block, inputs, outputs in RESIDUALS:
        path = f"{block}.resnets.{counts.setdefault(block, 0)}"
        counts[block] += 1
        yield f"{path}.conv1", linear(rank, inputs, outputs, kernel=3)
        yield f"{path}.conv2", linear(rank, outputs, outputs, kernel=3)
    for path, channels in SAMPLERS:
        yield path, linear(rank, channels, channels, kernel=3)


def sd15_text(rank: int) -> Iterator[tuple[str, tuple[list[int], list[int]]]]:
    for layer in range(12):
        path = f"text_model.encoder.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{path}.self_attn.{name}", linear(rank, 768, 768)
        yield f"{path}.mlp.fc1", linear(rank, 768, 3072)
        yield f"{path}.mlp.fc2", linear(rank, 3072, 768)


def expected(layout: str, convolutions: bool) -> dict[str, list[int]]:
    unet = [*sd15_unet(2), *(sd15_convolutions(1) if convolutions else ())]
    assert (len(list(sd15_unet(2))), len(list(sd15_text(2)))) == (192, 72)  # as Kohya's scripts count them
    shapes: dict[str, list[int]] = {}
    for part, kohya, modules in (("unet", "lora_unet", unet), ("text_encoder", "lora_te", [*sd15_text(2)])):
        for path, (a, b) in modules:
            if layout == "peft":
                shapes[f"{part}.{path}.lora_A.weight"], shapes[f"{part}.{path}.lora_B.weight"] = a, b
            else:
                name = f"{kohya}_{path.replace('.', '_')}"
                shapes[f"{name}.lora_down.weight"], shapes[f"{name}.lora_up.weight"] = a, b
                shapes[f"{name}.alpha"] = []
    return shapes


@pytest.fixture(scope="module")
def sd15() -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """The real architecture, without memory for its weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
            )
        )
    return unet, text


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("convolutions", [False, True], ids=["lora", "locon"])
def test_keys_and_shapes_for_stable_diffusion_1_5_are_those_of_the_list(
    sd15: tuple[UNet2DConditionModel, CLIPTextModel], tmp_path: Path, layout: str, convolutions: bool
) -> None:
    shape = LoraShape(2, 1.0, conv_rank=1, conv_alpha=0.5) if convolutions else LoraShape(2, 1.0)
    adapters = [
        attach(sd15[0], shape, part="unet", initial=lambda name, size: torch.ones(size)),
        attach(sd15[1], shape, part="text_encoder", initial=lambda name, size: torch.ones(size)),
    ]
    modules: dict[str, Factors] = {}
    for adapter in adapters:
        adapter.detach()
        shapes = {name: tuple(tensor.shape) for name, tensor in adapter.parameters().items()}
        for name in adapter.modules:
            a, b = (torch.zeros(shapes[f"{name}.lora_{each}.weight"]) for each in "AB")
            modules[name] = Factors(a, b, 1.0)
    path = tmp_path / "lora.safetensors"
    WRITERS[layout](LoraWeights(modules), path, CARD)
    assert {key: list(tensor.shape) for key, tensor in load_file(path).items()} == expected(
        layout, convolutions
    )
    assert matching_modules(sd15[0], read_lora(path), "unet").keys() == set(adapters[0].modules)
    assert matching_modules(sd15[1], read_lora(path), "text_encoder").keys() == set(adapters[1].modules)


def test_module_that_the_kohya_layout_cannot_name_is_refused_when_writing() -> None:
    with pytest.raises(ValueError, match="no name of its own"):
        kohya_key("unet.down_blocks.0.attentions.0.my_layer", Slot.A)


# --- other namings -------------------------------------------------------------------------------------------

QUERY = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q"
OUT = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0"
TEXT = "text_encoder.text_model.encoder.layers.3"


@pytest.mark.parametrize(
    ("key", "module", "slot"),
    [
        (
            "lora_te1_text_model_encoder_layers_3_self_attn_out_proj.lora_up.weight",
            f"{TEXT}.self_attn.out_proj",
            "B",
        ),
        ("lora_te_encoder_layers_3_mlp_fc1.lora_down.weight", f"{TEXT}.mlp.fc1", "A"),
        (
            "lora_unet_down_blocks_1_resnets_0_time_emb_proj.alpha",
            "unet.down_blocks.1.resnets.0.time_emb_proj",
            "alpha",
        ),
        (
            "lora_unet_up_blocks_0_resnets_2_conv_shortcut.lora_up.weight",
            "unet.up_blocks.0.resnets.2.conv_shortcut",
            "B",
        ),
        ("lora_unet_time_embedding_linear_2.lora_down.weight", "unet.time_embedding.linear_2", "A"),
        (QUERY.replace(".to_q", ".processor.to_q_lora.down.weight"), QUERY, "A"),
        (QUERY.replace(".to_q", ".processor.to_q_lora.up.weight").removeprefix("unet."), QUERY, "B"),
        (f"{QUERY}.lora.down.weight", QUERY, "A"),
        (QUERY.replace(".to_q", ".processor.to_out_lora.up.weight"), OUT, "B"),
        (
            "text_encoder.text_model.encoder.layers.3.self_attn.to_out_lora.down.weight",
            f"{TEXT}.self_attn.out_proj",
            "A",
        ),
        ("text_encoder.encoder.layers.3.self_attn.q_proj.lora_A.weight", f"{TEXT}.self_attn.q_proj", "A"),
        (f"{TEXT}.self_attn.v_proj.lora_linear_layer.up.weight", f"{TEXT}.self_attn.v_proj", "B"),
        (f"{TEXT}.mlp.fc2.lora_linear_layer.down.weight", f"{TEXT}.mlp.fc2", "A"),
    ],
)
def test_older_and_other_names_are_understood(key: str, module: str, slot: str) -> None:
    assert parse_key(key) == (module, Slot(slot))


def test_missing_alpha_is_the_rank(tmp_path: Path) -> None:
    tensors = {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(3, 32),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(128, 3),
    }
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    factors = read_lora(path).modules["text_encoder.text_model.encoder.layers.0.mlp.fc1"]
    assert (factors.alpha, factors.scale) == (3.0, 1.0)
    assert torch.equal(factors.delta(), torch.full((128, 32), 3.0))


def peft_file(path: Path, block: object) -> Path:
    tensors = {f"{QUERY}.lora_A.weight": torch.ones(4, 8), f"{QUERY}.lora_B.weight": torch.ones(8, 4)}
    text = block if isinstance(block, str) else json.dumps(block)
    save_file(tensors, path, metadata={"lora_adapter_metadata": text})
    return path


@pytest.mark.parametrize(
    ("block", "alpha"),
    [
        ({"unet.lora_alpha": 3}, 3.0),
        ({"unet.lora_alpha": 3, "unet.alpha_pattern": {"to_q": 7}}, 7.0),
        ({"unet.lora_alpha": 3, "unet.alpha_pattern": {f"^{QUERY.removeprefix('unet.')}": 7}}, 7.0),
        ({"unet.lora_alpha": 3, "unet.alpha_pattern": {"^to_q": 7, "o_q": 8, "to_k": 9}}, 3.0),
        ({"unet.lora_alpha": 3, "unet.use_rslora": True}, 6.0),
        ({"text_encoder.lora_alpha": 3}, 4.0),
        ({}, 4.0),
    ],
)
def test_alpha_of_the_header_is_worked_out_as_peft_does(tmp_path: Path, block: object, alpha: float) -> None:
    factors = read_lora(peft_file(tmp_path / "lora.safetensors", block)).modules[QUERY]
    assert factors.alpha == alpha


# --- what the header says ------------------------------------------------------------------------------------


def test_header_says_what_front_ends_show(weights: LoraWeights, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    write_kohya(weights, path, CARD)
    metadata = metadata_of(path)
    wanted = {
        "ss_sd_model_name": "sd-v1-5",
        "ss_new_sd_model_hash": "ab" * 32,
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "6",
        "ss_network_args": '{"preset": "attn-mlp+conv3x3", "conv_dim": "2", "conv_alpha": "5"}',
        "ss_resolution": "(512, 512)",
        "ss_clip_skip": "2",
        "ss_tag_frequency": '{"rex": {"photo of zkw dog": 5}}',
        "ss_seed": "7",
        "ss_unet_lr": "0.0001",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "Rex",
        "modelspec.date": "2026-11-21T12:30:00+00:00",
        "modelspec.resolution": "512x512",
        "modelspec.trigger_phrase": "zkw dog",
        "modelspec.prediction_type": "epsilon",
    }
    assert {key: metadata.get(key) for key in wanted} == wanted
    assert read_lora(path).metadata == metadata


def test_digest_in_the_header_is_that_of_the_tensors(weights: LoraWeights, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    write_peft(weights, path, CARD)
    content = path.read_bytes()
    digest = hashlib.sha256(content[8 + struct.unpack("<Q", content[:8])[0] :]).hexdigest()
    metadata = metadata_of(path)
    assert metadata["modelspec.hash_sha256"] == f"0x{digest}"
    assert metadata["sshs_model_hash"] == digest


@pytest.mark.parametrize(
    ("family", "prediction", "version", "architecture", "v2"),
    [
        ("sd2", "v_prediction", "sd_v2_v", "stable-diffusion-v2-768-v/lora", "True"),
        ("sd2", "epsilon", "sd_v2", "stable-diffusion-v2-512/lora", "True"),
        ("0123abcd", "epsilon", "0123abcd", "0123abcd/lora", "False"),
    ],
)
def test_header_names_the_family_of_the_base(
    weights: LoraWeights, family: str, prediction: str, version: str, architecture: str, v2: str
) -> None:
    header = LoraCard("x", "base", family, prediction).header(weights)
    assert (header["ss_base_model_version"], header["ss_v2"]) == (version, v2)
    assert header["modelspec.architecture"] == architecture


def test_header_never_holds_credentials(weights: LoraWeights, tmp_path: Path) -> None:
    canary = "canary-4711"
    card = LoraCard(
        title=f"mine https://files.example.org/a.zip?token={canary}",
        base_model=f"https://user:{canary}@models.example.org/base",
        family="sd1",
        description=f"from s3://key:{canary}/b@host/x and https://plain.example.org/page#{canary} too",
        trigger_phrase="zkw dog",
    )
    path = tmp_path / "lora.safetensors"
    write_peft(weights, path, card)
    assert canary.encode() not in path.read_bytes()
    assert metadata_of(path)["modelspec.title"] == "mine https://files.example.org/a.zip"


def test_text_without_addresses_is_left_alone() -> None:
    text = "a photo of zkw dog: 50% off? me@example.org #1"
    assert without_credentials(text) == text


def test_unknown_training_key_is_refused() -> None:
    with pytest.raises(ValueError, match="s3_secret"):
        LoraCard("x", "base", "sd1", training={"s3_secret": "x"})


# --- files from anybody --------------------------------------------------------------------------------------

A, B = f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight"
GOOD = {A: torch.ones(4, 8), B: torch.ones(8, 4)}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({A: torch.ones(4, 8)}, "lacks its matrix B"),
        ({B: torch.ones(8, 4)}, "lacks its matrix A"),
        (GOOD | {B: torch.ones(8, 5)}, r"do not go together: A is \[4, 8\], B is \[8, 5\]"),
        (GOOD | {A: torch.ones(4)}, "do not go together"),
        (GOOD | {B: torch.ones(8, 4, 3, 3)}, "do not go together"),
        (GOOD | {A: torch.ones(4, 0)}, r"is empty: \[4, 0\]"),
        (GOOD | {A: torch.tensor([[1.0, math.nan]])}, "not finite"),
        (GOOD | {A: torch.full((4, 8), math.inf)}, "not finite"),
        (GOOD | {A: torch.full((4, 8), 1e300, dtype=torch.float64)}, "not finite"),
        (GOOD | {A: torch.ones(4, 8, dtype=torch.int64)}, "not 16, 32 or 64-bit floating point"),
        (GOOD | {f"{QUERY}.alpha": torch.ones(2)}, r"alpha of .* is \[2\] instead of one number"),
        (GOOD | {f"{QUERY}.alpha": torch.tensor(math.nan)}, "not finite"),
        (GOOD | {f"{QUERY}.lora.down.weight": torch.ones(4, 8)}, "second time"),
        (GOOD | {f"{QUERY}.lora_magnitude_vector": torch.ones(8)}, "no matrix of a plain LoRA"),
        (GOOD | {"lora_unet_mid_block_x.hada_w1_a": torch.ones(8)}, "no matrix of a plain LoRA"),
        ({"model.diffusion_model.out.2.weight": torch.ones(8)}, "no matrix of a plain LoRA"),
        (
            {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(4, 8)},
            "made for SDXL",
        ),
        ({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": torch.ones(4, 8)}, "belongs to no module"),
        ({"transformer.blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 8)}, "belongs to no module"),
        ({"unet.down_blocks.\n\x1b[31m.lora_A.weight": torch.ones(4, 8)}, r"'unet.down_blocks.\\n\\x1b\[31m"),
        ({"unet.down_blocks." + "a" * 500 + "é.lora_A.weight": torch.ones(4, 8)}, r"aaa\.\.\.'"),
        ({}, "holds no tensors"),
    ],
)
def test_unusable_tensors_are_refused_with_the_reason(
    tmp_path: Path, tensors: dict[str, Tensor], said: str
) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    with pytest.raises(BadInput, match=f"^the LoRA cannot be used: .*{said}"):
        read_lora(path)


def header_only(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ENTRY = {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 128]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no safetensors file"),
        (b"\x08\x00", "no safetensors file"),
        (b"GIF89a and more", "no safetensors file"),
        (struct.pack("<Q", 1 << 40) + b'{"a":1}', "header has 1099511627776 bytes, more than the"),
        (struct.pack("<Q", 1 << 63) + b'{"a":1}', "more than the"),
        (struct.pack("<Q", 1000) + b'{"a":1}', "cut off"),
        (header_only(b"{not json"), "damaged"),
        (header_only(b'{"a":' * 100_000), "damaged"),
        (header_only({A: ENTRY}, b"\0" * 64), "damaged"),
        (header_only({A: ENTRY, B: ENTRY}, b"\0" * 128), "damaged"),
        (header_only({A: ENTRY | {"shape": [1 << 40, 1 << 40]}}, b"\0" * 128), "damaged"),
        (header_only({A: ENTRY | {"data_offsets": [0, -1]}}, b"\0" * 128), "damaged"),
    ],
)
def test_damaged_files_are_refused_with_the_reason(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=f"^the LoRA cannot be used: .*{said}"):
        read_lora(path)


class Harmful:
    """An object whose unpickling would leave a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "plain"])
def test_pickles_are_refused_unopened(tmp_path: Path, zipped: bool) -> None:
    path, mark = tmp_path / "lora.safetensors", tmp_path / "mark"
    torch.save({"lora_unet": Harmful(mark)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(BadInput, match="is a pickle, which can hold programs; only safetensors are read"):
        read_lora(path)
    assert not mark.exists()


def test_file_that_is_not_there_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="No such file"):
        read_lora(tmp_path / "lora.safetensors")


def test_too_many_tensors_are_refused(tmp_path: Path) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    path = tmp_path / "lora.safetensors"
    path.write_bytes(header_only({f"t{index}": empty for index in range(20_001)}))
    with pytest.raises(BadInput, match="holds 20001 tensors, more than the 20000 allowed"):
        read_lora(path)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "is not an object"),
        ({"unet.use_dora": True, "unet.lora_alpha": 4}, "DoRA"),
        ({"unet.r": 4}, "gives .* no alpha"),
        ({"unet.lora_alpha": "4"}, "gives .* no alpha"),
        ({"unet.lora_alpha": True}, "gives .* no alpha"),
        ('{"unet.lora_alpha": NaN}', "gives .* no alpha"),
        ({"unet.lora_alpha": 4, "unet.alpha_pattern": [1]}, "alpha_pattern of something else"),
        ({"unet.lora_alpha": 4, "unet.alpha_pattern": {"(a+)+$": 1}}, "alpha_pattern of something else"),
    ],
)
def test_unusable_header_blocks_are_refused(tmp_path: Path, block: object, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        read_lora(peft_file(tmp_path / "lora.safetensors", block))
