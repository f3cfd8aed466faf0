"""The original layout against lists written down from the published networks, and against diffusers' loader."""

import pickletools
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from services.diffusion import exporting
from services.diffusion.loading import Components, load_components, load_single_file
from services.diffusion.single_file import part_states, save_checkpoint, save_single_file, single_file_state
from services.domain.errors import BadInput

Shapes = dict[str, list[int]]
PARTS = ("unet", "vae", "text_encoder")
SAVERS: dict[str, Callable[..., None]] = {".safetensors": save_single_file, ".ckpt": save_checkpoint}
each_form = pytest.mark.parametrize("suffix", SAVERS)


@pytest.fixture(scope="session")
def sd2_model_dir(sd1_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with what Stable Diffusion 2 does otherwise: OpenCLIP's text encoder, linear projections."""
    folder = tmp_path_factory.mktemp("models") / "sd2"
    base = load_components(sd1_model_dir)
    text_config = CLIPTextConfig(**(base.text_encoder.config.to_dict() | {"hidden_act": "gelu"}))
    unet_config = dict(base.unet.config) | {"use_linear_projection": True, "attention_head_dim": [2, 4, 4, 8]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        exporting.save_unet(UNet2DConditionModel.from_config(unet_config), folder)
        exporting.save_text_encoder(CLIPTextModel(text_config), folder)
    exporting.save_vae(base.vae, folder)
    exporting.save_tokenizer(base.tokenizer, folder)
    exporting.save_scheduler_config(dict(base.scheduler_config), folder)
    exporting.save_model_index(folder, "DDIMScheduler")
    return folder


@pytest.fixture(params=["sd1", "sd2", "fixture"])
def folder(request: pytest.FixtureRequest) -> Path:
    name = {"sd1": "sd1_model_dir", "sd2": "sd2_model_dir", "fixture": "tiny_model_dir"}[request.param]
    return Path(request.getfixturevalue(name))


@pytest.fixture(params=["sd1", "sd2"])
def four_block_folder(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(f"{request.param}_model_dir"))


def written(model: Components, folder: Path, suffix: str, dtype: torch.dtype | None = None) -> Path:
    path = folder / f"model{suffix}"
    SAVERS[suffix](model, path, dtype)
    return path


def state_of(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    content = torch.load(path, weights_only=True)
    assert list(content) == ["state_dict"]
    return dict(content["state_dict"])


def is_bitwise(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


# --- there and back ------------------------------------------------------------------------------------------


@each_form
def test_reverse_conversion_restores_every_tensor_bitwise(folder: Path, tmp_path: Path, suffix: str) -> None:
    model = load_components(folder)
    parts = part_states(state_of(written(model, tmp_path, suffix)), model)
    for part in PARTS:
        assert is_bitwise(parts[part], getattr(model, part).state_dict())


@each_form
def test_diffusers_reads_every_tensor_bitwise(four_block_folder: Path, tmp_path: Path, suffix: str) -> None:
    model = load_components(four_block_folder)
    path = written(model, tmp_path, suffix)
    loaded: Any = StableDiffusionPipeline.from_single_file(
        str(path), config=str(four_block_folder), local_files_only=True
    )
    for part in PARTS:
        assert is_bitwise(getattr(loaded, part).state_dict(), getattr(model, part).state_dict())


def test_our_loader_reads_every_tensor_bitwise(four_block_folder: Path, tmp_path: Path) -> None:
    model = load_components(four_block_folder)
    loaded = load_single_file(written(model, tmp_path, ".safetensors"), four_block_folder)
    for part in PARTS:
        assert is_bitwise(getattr(loaded, part).state_dict(), getattr(model, part).state_dict())


def test_text_encoder_keys_without_prefix_are_understood(sd1_model_dir: Path) -> None:
    model = load_components(sd1_model_dir)
    state = {key.replace("text_model.", ""): tensor for key, tensor in single_file_state(model).items()}
    assert is_bitwise(part_states(state, model)["text_encoder"], model.text_encoder.state_dict())


def test_published_files_hold_more_than_the_model_takes(sd2_model_dir: Path, tmp_path: Path) -> None:
    model = load_components(sd2_model_dir)
    state = single_file_state(model)
    unused = {
        name.replace(".resblocks.2.", ".resblocks.3."): torch.zeros_like(tensor)
        for name, tensor in state.items()
        if ".resblocks.2." in name
    }
    unused |= {"cond_stage_model.model.text_projection": torch.zeros(32, 32), "betas": torch.zeros(1000)}
    unused |= {
        "cond_stage_model.model.logit_scale": torch.zeros(()),
        "model_ema.num_updates": torch.tensor(3),
    }
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in (state | unused).items()}, path)
    loaded, parts = load_single_file(path, sd2_model_dir), part_states(load_file(path), model)
    for part in PARTS:
        assert is_bitwise(parts[part], getattr(model, part).state_dict())
        assert is_bitwise(getattr(loaded, part).state_dict(), getattr(model, part).state_dict())


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.input_blocks.0.0.weight",
        "first_stage_model.decoder.mid.attn_1.q.weight",
        "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight",
    ],
)
def test_missing_and_misshapen_weights_are_named(sd2_model_dir: Path, name: str) -> None:
    model = load_components(sd2_model_dir)
    state = single_file_state(model)
    with pytest.raises(BadInput, match=f"{name} is "):
        part_states(state | {name: state[name][1:]}, model)
    del state[name]
    with pytest.raises(BadInput, match=f"lacks {name}"):
        part_states(state, model)


# --- the file itself -----------------------------------------------------------------------------------------


@each_form
def test_half_precision_casts_weights_and_leaves_position_ids(
    sd1_model_dir: Path, tmp_path: Path, suffix: str
) -> None:
    model = load_components(sd1_model_dir)
    state = state_of(written(model, tmp_path, suffix, torch.float16))
    position_ids = state.pop("cond_stage_model.transformer.text_model.embeddings.position_ids")
    assert torch.equal(position_ids, torch.arange(77)[None])
    assert position_ids.dtype is torch.int64
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert model.dtype is torch.float32


def test_checkpoint_is_a_pickle_of_tensors_and_nothing_else(sd1_model_dir: Path, tmp_path: Path) -> None:
    path = written(load_components(sd1_model_dir), tmp_path, ".ckpt")
    assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []
    with zipfile.ZipFile(path) as archive:
        pickle = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    called = {argument for code, argument, _ in pickletools.genops(pickle) if code.name == "GLOBAL"}
    assert called == {
        "torch._utils _rebuild_tensor_v2",
        "torch FloatStorage",
        "torch LongStorage",
        "collections OrderedDict",
    }


@each_form
def test_model_that_is_not_finite_is_not_written(sd1_model_dir: Path, tmp_path: Path, suffix: str) -> None:
    model = load_components(sd1_model_dir)
    with torch.no_grad():
        model.vae.quant_conv.bias[0] = float("inf")
    with pytest.raises(ValueError, match=r"first_stage_model\.quant_conv\.bias"):
        written(model, tmp_path, suffix)
    assert list(tmp_path.iterdir()) == []


# --- the lists, after the networks' published definitions ----------------------------------------------------


def layer(name: str, *shape: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": list(shape)} | ({f"{name}.bias": [shape[0]]} if bias else {})


def conv(name: str, inputs: int, outputs: int, kernel: int = 3) -> Shapes:
    return layer(name, outputs, inputs, kernel, kernel)


def residual(name: str, inputs: int, outputs: int, embedding: int = 1280) -> Shapes:
    shapes = layer(f"{name}.in_layers.0", inputs) | conv(f"{name}.in_layers.2", inputs, outputs)
    shapes |= layer(f"{name}.emb_layers.1", outputs, embedding)
    shapes |= layer(f"{name}.out_layers.0", outputs) | conv(f"{name}.out_layers.3", outputs, outputs)
    return shapes | (conv(f"{name}.skip_connection", inputs, outputs, 1) if inputs != outputs else {})


def transformer(name: str, width: int, context: int, *, is_linear: bool) -> Shapes:
    shapes = layer(f"{name}.norm", width)
    for end in ("proj_in", "proj_out"):
        plain = layer(f"{name}.{end}", width, width)
        shapes |= plain if is_linear else conv(f"{name}.{end}", width, width, 1)
    block = f"{name}.transformer_blocks.0"
    for attention, inputs in (("attn1", width), ("attn2", context)):
        shapes |= layer(f"{block}.{attention}.to_q", width, width, bias=False)
        shapes |= layer(f"{block}.{attention}.to_k", width, inputs, bias=False)
        shapes |= layer(f"{block}.{attention}.to_v", width, inputs, bias=False)
        shapes |= layer(f"{block}.{attention}.to_out.0", width, width)
    shapes |= layer(f"{block}.ff.net.0.proj", 8 * width, width) | layer(f"{block}.ff.net.2", width, 4 * width)
    for norm in ("norm1", "norm2", "norm3"):
        shapes |= layer(f"{block}.{norm}", width)
    return shapes


def original_unet(context: int, *, is_linear: bool) -> Shapes:
    """Stable Diffusion's UNet: 320 channels times 1, 2, 4, 4; two residual blocks a level, attention in three."""
    shapes = layer("time_embed.0", 1280, 320) | layer("time_embed.2", 1280, 1280)
    shapes |= conv("input_blocks.0.0", 4, 320)
    channels, skips, index = 320, [320], 1
    for level, factor in enumerate((1, 2, 4, 4)):
        for _ in range(2):
            shapes |= residual(f"input_blocks.{index}.0", channels, 320 * factor)
            channels = 320 * factor
            if level < 3:
                shapes |= transformer(f"input_blocks.{index}.1", channels, context, is_linear=is_linear)
            skips.append(channels)
            index += 1
        if level < 3:
            shapes |= conv(f"input_blocks.{index}.0.op", channels, channels)
            skips.append(channels)
            index += 1
    shapes |= residual("middle_block.0", 1280, 1280) | residual("middle_block.2", 1280, 1280)
    shapes |= transformer("middle_block.1", 1280, context, is_linear=is_linear)
    index = 0
    for level, factor in ((3, 4), (2, 4), (1, 2), (0, 1)):
        for number in range(3):
            shapes |= residual(f"output_blocks.{index}.0", channels + skips.pop(), 320 * factor)
            channels = 320 * factor
            if level < 3:
                shapes |= transformer(f"output_blocks.{index}.1", channels, context, is_linear=is_linear)
            if level > 0 and number == 2:
                place = 2 if level < 3 else 1
                shapes |= conv(f"output_blocks.{index}.{place}.conv", channels, channels)
            index += 1
    return shapes | layer("out.0", 320) | conv("out.2", 320, 4)


def vae_residual(name: str, inputs: int, outputs: int) -> Shapes:
    shapes = layer(f"{name}.norm1", inputs) | conv(f"{name}.conv1", inputs, outputs)
    shapes |= layer(f"{name}.norm2", outputs) | conv(f"{name}.conv2", outputs, outputs)
    return shapes | (conv(f"{name}.nin_shortcut", inputs, outputs, 1) if inputs != outputs else {})


def vae_middle(name: str) -> Shapes:
    shapes = vae_residual(f"{name}.block_1", 512, 512) | vae_residual(f"{name}.block_2", 512, 512)
    shapes |= layer(f"{name}.attn_1.norm", 512)
    for end in ("q", "k", "v", "proj_out"):
        shapes |= conv(f"{name}.attn_1.{end}", 512, 512, 1)
    return shapes


def original_vae() -> Shapes:
    """The autoencoder: 128 channels times 1, 2, 4, 4, four latent channels."""
    shapes = conv("encoder.conv_in", 3, 128) | vae_middle("encoder.mid") | vae_middle("decoder.mid")
    channels = 128
    for level, factor in enumerate((1, 2, 4, 4)):
        for number in range(2):
            shapes |= vae_residual(f"encoder.down.{level}.block.{number}", channels, 128 * factor)
            channels = 128 * factor
        if level < 3:
            shapes |= conv(f"encoder.down.{level}.downsample.conv", channels, channels)
    shapes |= layer("encoder.norm_out", 512) | conv("encoder.conv_out", 512, 8)
    shapes |= conv("quant_conv", 8, 8, 1) | conv("post_quant_conv", 4, 4, 1) | conv("decoder.conv_in", 4, 512)
    for level, factor in ((3, 4), (2, 4), (1, 2), (0, 1)):
        for number in range(3):
            shapes |= vae_residual(f"decoder.up.{level}.block.{number}", channels, 128 * factor)
            channels = 128 * factor
        if level > 0:
            shapes |= conv(f"decoder.up.{level}.upsample.conv", channels, channels)
    return shapes | layer("decoder.norm_out", 128) | conv("decoder.conv_out", 128, 3)


def clip_text() -> Shapes:
    """OpenAI's CLIP ViT-L/14, text half, in its library's names of the time, with the buffer of positions."""
    stem = "transformer.text_model"
    shapes: Shapes = {f"{stem}.embeddings.position_ids": [1, 77]}
    shapes |= layer(f"{stem}.embeddings.token_embedding", 49408, 768, bias=False)
    shapes |= layer(f"{stem}.embeddings.position_embedding", 77, 768, bias=False)
    for number in range(12):
        block = f"{stem}.encoder.layers.{number}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= layer(f"{block}.self_attn.{name}", 768, 768)
        shapes |= layer(f"{block}.layer_norm1", 768) | layer(f"{block}.layer_norm2", 768)
        shapes |= layer(f"{block}.mlp.fc1", 3072, 768) | layer(f"{block}.mlp.fc2", 768, 3072)
    return shapes | layer(f"{stem}.final_layer_norm", 768)


def openclip_text() -> Shapes:
    """OpenCLIP ViT-H/14, text half, without the last layer, which Stable Diffusion 2 does not use."""
    shapes: Shapes = {"model.positional_embedding": [77, 1024], "model.token_embedding.weight": [49408, 1024]}
    for number in range(23):
        block = f"model.transformer.resblocks.{number}"
        shapes |= {f"{block}.attn.in_proj_weight": [3072, 1024], f"{block}.attn.in_proj_bias": [3072]}
        shapes |= layer(f"{block}.attn.out_proj", 1024, 1024)
        shapes |= layer(f"{block}.ln_1", 1024) | layer(f"{block}.ln_2", 1024)
        shapes |= layer(f"{block}.mlp.c_fc", 4096, 1024) | layer(f"{block}.mlp.c_proj", 1024, 4096)
    return shapes | layer("model.ln_final", 1024)


def on_meta(generation: int) -> Components:
    """The real architectures, without memory for their weights."""
    sizes: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8}
    text: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    text |= {"num_attention_heads": 12, "hidden_act": "quick_gelu"}
    if generation == 2:
        sizes = {
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        }
        text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23}
        text |= {"num_attention_heads": 16, "hidden_act": "gelu"}
    blocks = 4
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            layers_per_block=2,
        )
        no_tokenizer: Any = None
        return Components(
            UNet2DConditionModel(**sizes), vae, CLIPTextModel(CLIPTextConfig(**text)), no_tokenizer, {}
        )


def prefixed(prefix: str, shapes: Shapes) -> Iterator[tuple[str, list[int]]]:
    return ((f"{prefix}.{name}", shape) for name, shape in shapes.items())


@pytest.mark.parametrize("generation", [1, 2], ids=["sd1.5", "sd2.1"])
def test_keys_and_shapes_of_real_models_are_those_of_the_original(generation: int) -> None:
    unet = original_unet(768 if generation == 1 else 1024, is_linear=generation == 2)
    vae, text = original_vae(), clip_text() if generation == 1 else openclip_text()
    assert (len(unet), len(vae)) == (686, 248)  # as published checkpoints have them
    wanted = dict(prefixed("model.diffusion_model", unet)) | dict(prefixed("first_stage_model", vae))
    wanted |= dict(prefixed("cond_stage_model", text))
    state = single_file_state(on_meta(generation))
    assert {name: list(tensor.shape) for name, tensor in state.items()} == wanted
