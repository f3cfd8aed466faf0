from pathlib import Path

import pytest

from services.domain.errors import BadInput
from services.storage.model_files import ModelFiles, describe, fingerprint, list_files
from tests.unit.storage.model_folders import (
    SD1_UNET,
    TINY_UNET,
    write_model_folder,
    write_safetensors,
    write_single_file,
)


def test_a_folder_gives_safetensors_json_and_text_only(tmp_path: Path) -> None:
    root = write_model_folder(tmp_path / "model")
    for name in (
        "unet/diffusion_pytorch_model.bin",
        "x.ckpt",
        "README.md",
        ".cache/x.json",
        "vae/.hidden.json",
    ):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("{}")
    files = list_files(root)
    assert list(files.paths) == sorted(files.paths)
    assert set(files.paths) == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_a_folder_without_index_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no model at"):
        list_files(tmp_path)


def test_a_folder_with_pickles_only_is_refused(tmp_path: Path) -> None:
    root = write_model_folder(tmp_path / "model")
    for weights in root.rglob("*.safetensors"):
        weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(BadInput, match="no weights in safetensors"):
        list_files(root)


@pytest.mark.parametrize(
    ("unet", "family", "size"),
    [
        (SD1_UNET, "sd1", 512),
        ({**SD1_UNET, "cross_attention_dim": 1024, "sample_size": 96}, "sd2", 768),
        (
            {
                **SD1_UNET,
                "block_out_channels": [320, 640, 1280],
                "cross_attention_dim": 2048,
                "sample_size": 128,
            },
            "sdxl",
            1024,
        ),
    ],
    ids=["sd1", "sd2", "sdxl"],
)
def test_the_family_is_told_from_the_configs(tmp_path: Path, unet: dict, family: str, size: int) -> None:
    traits = describe(list_files(write_model_folder(tmp_path / "model", unet)))
    assert (traits.family, traits.native_size_px) == (family, size)


def test_another_architecture_is_named_by_its_digest(tmp_path: Path) -> None:
    def family(name: str, unet: dict) -> str:
        return describe(list_files(write_model_folder(tmp_path / name, unet))).family

    tiny = dict(TINY_UNET)
    assert len(family("a", tiny)) == 16
    assert family("a", tiny) == family("b", tiny | {"sample_size": 32, "_name_or_path": "x"})
    assert family("a", tiny) != family("c", tiny | {"block_out_channels": [8, 24]})


def single_files(tmp_path: Path, unet: dict, channels: int, width: int) -> ModelFiles:
    config = write_model_folder(tmp_path / "config", unet)
    return list_files(write_single_file(tmp_path / "m.safetensors", channels, width), config)


def test_a_single_file_comes_with_what_its_config_folder_holds(tmp_path: Path) -> None:
    files = single_files(tmp_path, dict(TINY_UNET), 8, 16)
    assert files.is_single
    assert set(files.paths) == {
        "config/model_index.json",
        "config/scheduler/scheduler_config.json",
        "config/text_encoder/config.json",
        "config/tokenizer/merges.txt",
        "config/tokenizer/vocab.json",
        "config/unet/config.json",
        "config/vae/config.json",
        "model.safetensors",
    }
    assert describe(files) == describe(list_files(tmp_path / "config"))


@pytest.mark.parametrize(("width", "family"), [(768, "sd1"), (1024, "sd2")])
def test_a_single_file_has_the_family_of_its_architecture(tmp_path: Path, width: int, family: str) -> None:
    unet = {**SD1_UNET, "cross_attention_dim": width}
    assert describe(single_files(tmp_path, unet, 320, width)).family == family


@pytest.mark.parametrize(("channels", "width"), [(8, 24), (16, 16)])
def test_a_single_file_of_another_architecture_than_its_config_is_refused(
    tmp_path: Path, channels: int, width: int
) -> None:
    with pytest.raises(BadInput, match="are of different models"):
        describe(single_files(tmp_path, dict(TINY_UNET), channels, width))


def test_a_single_file_that_is_no_diffusion_model_is_refused(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "m.safetensors", {"w": [1]})
    with pytest.raises(BadInput, match="original layout"):
        describe(list_files(path, write_model_folder(tmp_path / "config")))


def test_a_single_file_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="needs a `config` folder"):
        list_files(write_single_file(tmp_path / "m.safetensors"))


@pytest.mark.parametrize(
    "name",
    [
        "unet/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
    ],
)
def test_what_a_config_folder_lacks_is_named(tmp_path: Path, name: str) -> None:
    config = write_model_folder(tmp_path / "config")
    (config / name).unlink()
    expected = "tokenizer/tokenizer.json" if name.startswith("tokenizer") else name
    with pytest.raises(BadInput, match=f"the config folder config of m.safetensors lacks {expected}"):
        list_files(write_single_file(tmp_path / "m.safetensors"), config)


def test_full_precision_is_preferred_and_half_precision_fills_in_under_plain_names(tmp_path: Path) -> None:
    root = write_model_folder(tmp_path / "model")
    half = root / "unet/diffusion_pytorch_model.fp16.safetensors"
    (root / "unet/diffusion_pytorch_model.safetensors").rename(half)
    for beside in ("vae/diffusion_pytorch_model.fp16", "unet/diffusion_pytorch_model.non_ema", "whole"):
        (root / f"{beside}.safetensors").write_bytes(b"not wanted")
    paths = list_files(root).paths
    assert {name: path.name for name, path in paths.items() if name.endswith(".safetensors")} == {
        "text_encoder/model.safetensors": "model.safetensors",
        "unet/diffusion_pytorch_model.safetensors": half.name,
        "vae/diffusion_pytorch_model.safetensors": "diffusion_pytorch_model.safetensors",
    }


@pytest.mark.parametrize("name", ["x.non_ema.fp16", "x.fp16-00001-of-00002", "x-00001-of-00002.fp16"])
def test_a_part_without_whole_weights_is_named(tmp_path: Path, name: str) -> None:
    root = write_model_folder(tmp_path / "model")
    (root / "unet/diffusion_pytorch_model.safetensors").rename(root / f"unet/{name}.safetensors")
    with pytest.raises(BadInput, match="no weights in safetensors for its unet"):
        list_files(root)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x02}q\0.", b"\xff" * 100, b"\x08" + b"\0" * 7 + b"not json", b"\x02" + b"\0" * 7 + b"[]"],
    ids=["empty", "pickle", "huge-header", "no-json", "no-object"],
)
def test_a_weight_file_that_is_no_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    root = write_model_folder(tmp_path / "model")
    (root / "vae/diffusion_pytorch_model.safetensors").write_bytes(content)
    with pytest.raises(BadInput, match="not a safetensors file"):
        describe(list_files(root))


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_broken_config_is_refused(tmp_path: Path, content: str) -> None:
    root = write_model_folder(tmp_path / "model")
    (root / "unet/config.json").write_text(content)
    with pytest.raises(BadInput, match="config"):
        describe(list_files(root))


def test_the_fingerprint_changes_with_the_files(tmp_path: Path) -> None:
    root = write_model_folder(tmp_path / "model")
    before = fingerprint(list_files(root))
    assert fingerprint(list_files(root)) == before
    (root / "tokenizer/merges.txt").write_text("#version: 0.2\na b\n")
    assert fingerprint(list_files(root)) != before
