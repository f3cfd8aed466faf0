import hashlib
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from services.diffusion.loading import Components, load_components
from services.diffusion.tiny import DEEP, FIXTURE, build_pipeline_folder


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_config_gives_the_same_bytes(tiny_model_dir: Path, tmp_path: Path) -> None:
    again = build_pipeline_folder(tmp_path / "again", FIXTURE)
    assert digests(again) == digests(tiny_model_dir)


def test_another_seed_gives_other_weights_and_the_same_configs(tiny_model_dir: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    other = digests(build_pipeline_folder(tmp_path / "other", replace(FIXTURE, seed=1)))
    differing = {name for name, digest in digests(tiny_model_dir).items() if other[name] != digest}
    assert differing == {
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }


def test_deep_shape_draws_512_pixels_through_the_plain_pipeline(deep_model_dir: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(str(deep_model_dir), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a robot", num_inference_steps=1).images[0].size == (512, 512)
    assert DEEP.native_size_px == 512


def test_fixture_has_tensors_on_both_sides_of_the_8_bit_threshold(components: Components) -> None:
    sizes = [parameter.numel() for parameter in components.unet.parameters()]
    assert max(sizes) >= 4096 > min(sizes)


def test_numbers_of_a_model_come_from_its_configs(deep_model_dir: Path) -> None:
    loaded = load_components(deep_model_dir)
    numbers = (loaded.vae_factor, loaded.native_size_px, loaded.model_max_length, loaded.latent_channels)
    assert numbers == (32, 512, 64, 12)
    assert (loaded.prediction_type, loaded.scaling_factor) == ("epsilon", 1.0)


@pytest.mark.parametrize("text", ["a sks robot", "naïve 日本語 text", "emoji 🤖 and\ttabs", "!?%&"])
def test_any_text_survives_the_tokenizer(components: Components, text: str) -> None:
    ids = components.tokenizer(text, add_special_tokens=False).input_ids
    decoded = components.tokenizer.decode(ids)
    assert "".join(decoded.split()) == "".join(text.split())


def test_tokenizer_loads_from_vocab_and_merges_alone(tiny_model_dir: Path, components: Components) -> None:
    folder = tiny_model_dir / "tokenizer"
    old = CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    text = "a photo of a purple zebra, 7 times"
    assert old(text).input_ids == components.tokenizer(text).input_ids
