"""Small model folders written by hand: real safetensors, configs with the numbers that matter, no torch."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SD1_UNET: Mapping[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "sample_size": 64,
}
TINY_UNET: Mapping[str, Any] = {
    **SD1_UNET,
    "block_out_channels": [8, 16],
    "cross_attention_dim": 16,
    "sample_size": 8,
}


def write_safetensors(path: Path, shapes: Mapping[str, list[int]], fill: bytes = b"\0") -> Path:
    """A file with 8-bit tensors of these shapes."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        size = 1
        for side in shape:
            size *= side
        header[name] = {"dtype": "U8", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + fill * end)
    return path


CROSS_ATTENTION = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"


def write_single_file(path: Path, channels: int = 8, width: int = 16) -> Path:
    """One file in the original layout; by default of the architecture that `TINY_UNET` describes."""
    return write_safetensors(path, {CROSS_ATTENTION: [1, width], FIRST_LAYER: [channels, 1]})


def write_model_folder(root: Path, unet: Mapping[str, Any] = TINY_UNET, fill: bytes = b"\0") -> Path:
    """A diffusers folder; `fill` changes the UNet's weights only."""
    write_safetensors(root / "unet/diffusion_pytorch_model.safetensors", {"w": [32]}, fill)
    write_safetensors(root / "vae/diffusion_pytorch_model.safetensors", {"w": [16]})
    write_safetensors(root / "text_encoder/model.safetensors", {"w": [8]})
    configs: dict[str, Any] = {
        "model_index.json": {"_class_name": "StableDiffusionPipeline"},
        "unet/config.json": unet,
        "vae/config.json": {"block_out_channels": [4, 4, 4, 4]},
        "text_encoder/config.json": {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 100},
        "scheduler/scheduler_config.json": {"beta_start": 0.1},
        "tokenizer/vocab.json": {"a": 0},
    }
    for name, content in configs.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    (root / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    return root


def write_catalogue(path: Path) -> Path:
    """A catalogue of one small model, called pocket as the default base is, in a folder beside the file."""
    folder = write_model_folder(path.parent / "small")
    path.write_text(f'[pocket]\nsource = "file:{folder}"\nnote = "a small one"\n')
    return path
