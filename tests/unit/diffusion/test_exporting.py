import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from services.diffusion import exporting
from services.diffusion.loading import Components, ModelFolder, load_components


@pytest.fixture
def exported(components: Components, tmp_path: Path) -> Path:
    exporting.save_unet(components.unet, tmp_path)
    exporting.save_vae(components.vae, tmp_path)
    exporting.save_text_encoder(components.text_encoder, tmp_path)
    exporting.save_tokenizer(components.tokenizer, tmp_path)
    exporting.save_scheduler_config(dict(components.scheduler_config), tmp_path)
    exporting.save_model_index(tmp_path, "DDIMScheduler")
    return tmp_path


def test_reloaded_components_are_bit_equal(components: Components, exported: Path) -> None:
    again = load_components(exported)
    for part in ("unet", "vae", "text_encoder"):
        before, after = getattr(components, part).state_dict(), getattr(again, part).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert again.scheduler_config == components.scheduler_config


def test_every_text_encoder_key_has_the_prefix(components: Components, exported: Path) -> None:
    keys = set(load_file(exported / exporting.TEXT_ENCODER_WEIGHTS))
    assert all(key.startswith("text_model.") for key in keys)
    assert len(keys) == len(components.text_encoder.state_dict())


def test_export_is_byte_equal_to_the_folder_it_came_from(tiny_model_dir: Path, exported: Path) -> None:
    for weights in (exporting.UNET_WEIGHTS, exporting.VAE_WEIGHTS, exporting.TEXT_ENCODER_WEIGHTS):
        assert (exported / weights).read_bytes() == (tiny_model_dir / weights).read_bytes()


def test_tokenizer_has_the_files_of_both_generations(exported: Path) -> None:
    names = {path.name for path in (exported / "tokenizer").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"} <= names


def test_configs_name_no_path_of_this_machine(exported: Path) -> None:
    assert not any("_name_or_path" in path.read_text() for path in exported.rglob("*.json"))


def test_written_precision_can_be_chosen_without_touching_the_model(
    components: Components, tmp_path: Path
) -> None:
    exporting.save_unet(components.unet, tmp_path, torch.float16)
    written = load_file(tmp_path / exporting.UNET_WEIGHTS)
    assert {tensor.dtype for tensor in written.values()} == {torch.float16}
    assert components.unet.dtype == torch.float32


def test_weights_that_are_not_finite_are_not_written(tiny_model_dir: Path, tmp_path: Path) -> None:
    unet = ModelFolder(tiny_model_dir).load_unet()
    with torch.no_grad():
        unet.conv_in.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"conv_in\.bias"):
        exporting.save_unet(unet, tmp_path)
    assert not (tmp_path / exporting.UNET_WEIGHTS).exists()


def test_functions_report_the_files_they_wrote(components: Components, tmp_path: Path) -> None:
    written = exporting.save_text_encoder(components.text_encoder, tmp_path)
    written += exporting.save_tokenizer(components.tokenizer, tmp_path)
    on_disk = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert set(written) == on_disk
    assert json.loads((tmp_path / "text_encoder/config.json").read_text())["architectures"] == [
        "CLIPTextModel"
    ]
