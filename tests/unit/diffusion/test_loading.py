import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.diffusion.drawing import Drawing, decode, draw_latents
from services.diffusion.exporting import TEXT_ENCODER_WEIGHTS, UNET_WEIGHTS, VAE_WEIGHTS
from services.diffusion.loading import (
    Components,
    ModelFolder,
    load_components,
    load_single_file,
    open_model,
)
from services.diffusion.single_file import save_single_file
from services.domain.errors import BadInput
from tests.single_file_folder import write_single_file_folder

DRAWING = Drawing("a robot", num_inference_steps=2, seed=3)


def decoded(components: Components) -> torch.Tensor:
    return decode(components, draw_latents(components, DRAWING))


@pytest.fixture
def model_copy(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def test_text_encoder_keys_without_prefix_load_the_same_weights(
    model_copy: Path, components: Components
) -> None:
    path = model_copy / TEXT_ENCODER_WEIGHTS
    state = load_file(path)
    save_file(
        {key.removeprefix("text_model."): tensor for key, tensor in state.items()}, path, {"format": "pt"}
    )
    bare = ModelFolder(model_copy).load_text_encoder().state_dict()
    assert all(torch.equal(bare[key], tensor) for key, tensor in components.text_encoder.state_dict().items())


@pytest.mark.parametrize("weights", [UNET_WEIGHTS, TEXT_ENCODER_WEIGHTS])
def test_model_that_lacks_weights_is_refused(model_copy: Path, weights: str) -> None:
    state = load_file(model_copy / weights)
    state.pop(sorted(state)[-1])
    save_file(state, model_copy / weights, {"format": "pt"})
    with pytest.raises(BadInput):
        load_components(model_copy)


def test_damaged_weights_are_refused(model_copy: Path) -> None:
    content = (model_copy / UNET_WEIGHTS).read_bytes()
    (model_copy / UNET_WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(BadInput, match="unet cannot be used"):
        load_components(model_copy)


def test_pickled_weights_are_not_read(model_copy: Path) -> None:
    state = load_file(model_copy / UNET_WEIGHTS)
    (model_copy / UNET_WEIGHTS).unlink()
    torch.save(state, model_copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(BadInput, match="unet"):
        load_components(model_copy)


@pytest.mark.parametrize("part", ["vae", "tokenizer", "scheduler"])
def test_missing_part_is_named(model_copy: Path, part: str) -> None:
    shutil.rmtree(model_copy / part)
    with pytest.raises(BadInput, match=part):
        load_components(model_copy)


def test_dtype_of_all_weights_can_be_chosen(tiny_model_dir: Path) -> None:
    loaded = load_components(tiny_model_dir, torch.bfloat16)
    parts = (loaded.unet, loaded.vae, loaded.text_encoder)
    assert {parameter.dtype for part in parts for parameter in part.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("prefix", ["text_model.", ""], ids=["with_prefix", "without_prefix"])
def test_single_file_draws_the_same_picture_as_the_folder(
    sd1_model_dir: Path, tmp_path: Path, prefix: str
) -> None:
    folder, path = load_components(sd1_model_dir), tmp_path / "model.safetensors"
    save_single_file(folder, path)
    state = {key.replace("text_model.", prefix): tensor for key, tensor in load_file(path).items()}
    save_file(state, path, {"format": "pt"})
    single = load_single_file(path, sd1_model_dir)
    difference = (decoded(single) - decoded(folder)).abs().max()
    assert float(difference) < 1e-4


def test_single_file_of_another_architecture_is_refused(
    sd1_model_dir: Path, deep_model_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_single_file(load_components(sd1_model_dir), path)
    with pytest.raises(BadInput):
        load_single_file(path, deep_model_dir)


@pytest.fixture
def single_file_dir(sd1_model_dir: Path, tmp_path: Path) -> Path:
    return write_single_file_folder(sd1_model_dir, tmp_path / "single")


def test_folder_with_a_single_file_loads_like_any_other(sd1_model_dir: Path, single_file_dir: Path) -> None:
    opened = open_model(single_file_dir)
    assert not opened.has_part_files
    assert open_model(sd1_model_dir).has_part_files
    loaded, original = opened.load(), load_components(sd1_model_dir)
    assert loaded.native_size_px == original.native_size_px
    assert loaded.scheduler_config == original.scheduler_config
    assert float((decoded(loaded) - decoded(original)).abs().max()) < 1e-4


def test_dtype_of_a_single_file_can_be_chosen(single_file_dir: Path) -> None:
    loaded = load_components(single_file_dir, torch.bfloat16)
    parts = (loaded.unet, loaded.vae, loaded.text_encoder)
    assert {parameter.dtype for part in parts for parameter in part.parameters()} == {torch.bfloat16}


def test_single_file_in_half_precision_loads_in_full(sd1_model_dir: Path, tmp_path: Path) -> None:
    folder = write_single_file_folder(sd1_model_dir, tmp_path / "half", torch.float16)
    loaded, original = load_components(folder), load_components(sd1_model_dir)
    assert loaded.dtype is torch.float32
    assert torch.equal(loaded.unet.conv_in.weight, original.unet.conv_in.weight.half().float())


PARTS = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("how_many", [1, 10_000], ids=["one-weight", "all-weights"])
def test_part_that_a_single_file_lacks_is_named(single_file_dir: Path, part: str, how_many: int) -> None:
    path = single_file_dir / "model.safetensors"
    state = load_file(path)
    for key in [key for key in sorted(state) if key.startswith(PARTS[part])][-how_many:]:
        del state[key]
    save_file(state, path, {"format": "pt"})
    with pytest.raises(BadInput, match=part):
        load_components(single_file_dir)


def test_damaged_single_file_is_refused(single_file_dir: Path) -> None:
    path = single_file_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BadInput, match="unet cannot be used"):
        load_components(single_file_dir)


OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_attention_name(key: str) -> str:
    if ".attentions." in key:
        for new, old in OLD_ATTENTION.items():
            key = key.replace(new, old)
    return key


def test_folder_as_older_libraries_wrote_it_loads_the_same(model_copy: Path, components: Components) -> None:
    (model_copy / "tokenizer/tokenizer.json").unlink()
    vae = load_file(model_copy / VAE_WEIGHTS)
    old_vae = {old_attention_name(key): tensor for key, tensor in vae.items()}
    assert old_vae.keys() != vae.keys()
    save_file(old_vae, model_copy / VAE_WEIGHTS, {"format": "pt"})
    text = load_file(model_copy / TEXT_ENCODER_WEIGHTS)
    text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(text, model_copy / TEXT_ENCODER_WEIGHTS, {"format": "pt"})
    old = load_components(model_copy)
    assert torch.equal(decoded(old), decoded(components))


def test_native_size_follows_the_unet_config(model_copy: Path) -> None:
    config = json.loads((model_copy / "unet/config.json").read_text())
    (model_copy / "unet/config.json").write_text(json.dumps(config | {"sample_size": 16}))
    assert load_components(model_copy).native_size_px == 32
