"""Writing components as folders that `StableDiffusionPipeline.from_pretrained` reads, old versions included.

Two habits of newer transformers would make such a folder unreadable elsewhere, and both are put right here:
text encoders are saved with the `text_model.` prefix on every key (without it older versions silently keep
random weights), and a tokenizer gets its `vocab.json` and `merges.txt` beside `tokenizer.json`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

TEXT_PREFIX = "text_model."
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
VAE_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
TEXT_ENCODER_WEIGHTS = "text_encoder/model.safetensors"

_MODEL_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def save_unet(unet: UNet2DConditionModel, folder: Path, dtype: torch.dtype | None = None) -> list[Path]:
    """Write a UNet as `folder/unet/`.

    Args:
        unet: the network; its own tensors are left as they are.
        folder: the model folder, made if missing.
        dtype: precision of the written weights; None keeps the network's own.

    Returns:
        The written files, relative to `folder`.

    Raises:
        ValueError: a tensor holds a value that is not finite.
    """
    return _save_diffusers(unet, folder, UNET_WEIGHTS, dtype)


def save_vae(vae: AutoencoderKL, folder: Path, dtype: torch.dtype | None = None) -> list[Path]:
    """Write an autoencoder as `folder/vae/`; as `save_unet`."""
    return _save_diffusers(vae, folder, VAE_WEIGHTS, dtype)


def save_text_encoder(encoder: CLIPTextModel, folder: Path, dtype: torch.dtype | None = None) -> list[Path]:
    """Write a CLIP text encoder as `folder/text_encoder/`, every key under `text_model.`; as `save_unet`."""
    path = folder / TEXT_ENCODER_WEIGHTS
    path.parent.mkdir(parents=True, exist_ok=True)
    _save_tensors(prefixed(encoder.state_dict()), path, dtype)
    config = encoder.config.to_dict()
    config.pop("_name_or_path", None)
    config["architectures"] = ["CLIPTextModel"]
    config["dtype"] = _dtype_name(dtype or encoder.dtype)
    _write_json(path.parent / "config.json", config)
    return [Path(TEXT_ENCODER_WEIGHTS), Path("text_encoder/config.json")]


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> list[Path]:
    """Write a tokenizer as `folder/tokenizer/`, in the new form and in the two files older versions need."""
    target = folder / "tokenizer"
    tokenizer.save_pretrained(target)
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    by_id = dict(sorted(state["vocab"].items(), key=lambda item: item[1]))
    (target / "vocab.json").write_text(json.dumps(by_id, ensure_ascii=False), encoding="utf-8")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in state["merges"]]
    (target / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    special = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    special |= {"unk_token": tokenizer.unk_token, "pad_token": tokenizer.pad_token}
    _write_json(target / "special_tokens_map.json", special)
    return sorted(path.relative_to(folder) for path in target.iterdir())


def save_scheduler_config(config: dict[str, Any], folder: Path) -> list[Path]:
    """Write a noise scheduler's configuration, `_class_name` included, as `folder/scheduler/`."""
    path = folder / "scheduler" / "scheduler_config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_json(path, config)
    return [path.relative_to(folder)]


def save_model_index(folder: Path, scheduler_class: str) -> Path:
    """Write the `model_index.json` that names the parts; returns its path relative to `folder`."""
    _write_json(folder / "model_index.json", _MODEL_INDEX | {"scheduler": ["diffusers", scheduler_class]})
    return Path("model_index.json")


def prefixed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors with `text_model.` before every key that lacks it."""
    return {
        key if key.startswith(TEXT_PREFIX) else TEXT_PREFIX + key: tensor for key, tensor in state.items()
    }


def _save_diffusers(
    module: UNet2DConditionModel | AutoencoderKL, folder: Path, weights: str, dtype: torch.dtype | None
) -> list[Path]:
    path = folder / weights
    path.parent.mkdir(parents=True, exist_ok=True)
    _save_tensors(module.state_dict(), path, dtype)
    config = json.loads(module.to_json_string())
    config.pop("_name_or_path", None)
    _write_json(path.parent / "config.json", config)
    return [Path(weights), Path(weights).with_name("config.json")]


def plain_tensors(state: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Tensors as they go into a file: on the CPU, contiguous, finite.

    Args:
        state: the tensors by name; they are left as they are.
        dtype: precision of those in floating point; None keeps each one's own.

    Raises:
        ValueError: a tensor holds a value that is not finite, or that this precision cannot hold.
    """
    tensors = {key: _plain(tensor, dtype) for key, tensor in state.items()}
    broken = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise ValueError(f"not written: {len(broken)} tensors are not finite, first {broken[0]}")
    return tensors


def _save_tensors(state: dict[str, torch.Tensor], path: Path, dtype: torch.dtype | None) -> None:
    save_file(plain_tensors(state, dtype), path, metadata={"format": "pt"})


def _plain(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    tensor = tensor.detach().cpu().contiguous()
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
