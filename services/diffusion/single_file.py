"""One `.safetensors` in the original (CompVis) layout, the form most other programs exchange models in.

The layout numbers blocks through, where the folders of diffusers nest them; the rules below say how. They follow the
networks' own block counts, though readers elsewhere usually expect the four UNet blocks of Stable Diffusion 1 and 2.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from services.diffusion.exporting import prefixed
from services.diffusion.loading import Components

_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_UNET_BLOCK = re.compile(
    r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
_UNET_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_VAE_BLOCK = re.compile(
    r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
_VAE_MIDDLE = re.compile(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def save_single_file(components: Components, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write the whole model as one file.

    Args:
        components: the model; CLIP text encoder, UNet with equal layers in all blocks.
        path: file to write, `.safetensors`.
        dtype: precision of the written weights; None keeps each tensor's own.
    """
    state = {
        key: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for key, tensor in single_file_state(components).items()
    }
    save_file(state, path, metadata={"format": "pt"})


def single_file_state(components: Components) -> dict[str, Tensor]:
    """The model's tensors under the names of the original layout."""
    unet, vae = components.unet, components.vae
    with_attention = _blocks_with_attention(unet.state_dict())
    state: dict[str, Tensor] = {}
    for key, tensor in unet.state_dict().items():
        name = _unet_name(key, int(unet.config.layers_per_block), with_attention)
        state[f"model.diffusion_model.{name}"] = tensor
    levels = len(vae.config.block_out_channels)
    for key, tensor in vae.state_dict().items():
        name = _vae_name(key, levels)
        state[f"first_stage_model.{name}"] = _as_convolution(name, tensor)
    for key, tensor in prefixed(components.text_encoder.state_dict()).items():
        state[f"cond_stage_model.transformer.{key}"] = tensor
    return state


def _unet_name(key: str, layers: int, with_attention: frozenset[str]) -> str:
    if block := _UNET_BLOCK.fullmatch(key):
        return _unet_block_name(block, layers, with_attention)
    if middle := _UNET_MIDDLE.fullmatch(key):
        kind, index, rest = middle.groups()
        if kind == "attentions":
            return f"middle_block.{2 * int(index) + 1}.{rest}"
        return f"middle_block.{2 * int(index)}.{_renamed(rest, _RESNET)}"
    return _renamed(key, _UNET_ENDS)


def _unet_block_name(match: re.Match[str], layers: int, with_attention: frozenset[str]) -> str:
    side, block, kind, index, rest = match.groups()
    # Each down block ends with its downsampling as an entry of its own; each up block has one layer more instead.
    first = int(block) * (layers + 1) + (1 if side == "down" else 0)
    stem = "input_blocks" if side == "down" else "output_blocks"
    if kind == "resnets":
        return f"{stem}.{first + int(index)}.0.{_renamed(rest, _RESNET)}"
    if kind == "attentions":
        return f"{stem}.{first + int(index)}.1.{rest}"
    if kind == "downsamplers":
        return f"{stem}.{first + layers}.0.{rest.replace('conv', 'op', 1)}"
    place = 2 if f"up_blocks.{block}" in with_attention else 1
    return f"{stem}.{first + layers}.{place}.{rest}"


def _vae_name(key: str, levels: int) -> str:
    key = key.replace("conv_norm_out", "norm_out")
    if block := _VAE_BLOCK.fullmatch(key):
        part, level, kind, index, rest = block.groups()
        # The original counts the decoder's levels from the picture inwards, like the encoder's.
        number = int(level) if part == "encoder" else levels - 1 - int(level)
        stem = f"{part}.{'down' if part == 'encoder' else 'up'}.{number}"
        if kind == "resnets":
            return f"{stem}.block.{index}.{rest.replace('conv_shortcut', 'nin_shortcut')}"
        return f"{stem}.{kind.removesuffix('rs')}.{rest}"
    if middle := _VAE_MIDDLE.fullmatch(key):
        part, kind, index, rest = middle.groups()
        if kind == "resnets":
            return f"{part}.mid.block_{int(index) + 1}.{rest}"
        return f"{part}.mid.attn_{int(index) + 1}.{_renamed(rest, _VAE_ATTENTION)}"
    return key


def _as_convolution(name: str, tensor: Tensor) -> Tensor:
    # The original's attention projections are 1x1 convolutions.
    is_projection = ".mid.attn_" in name and name.endswith("weight") and tensor.ndim == 2
    return tensor[:, :, None, None] if is_projection else tensor


def _renamed(key: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        if key.startswith(old + "."):
            return new + key.removeprefix(old)
    return key


def _blocks_with_attention(state: Mapping[str, Tensor]) -> frozenset[str]:
    return frozenset(".".join(key.split(".")[:2]) for key in state if ".attentions." in key)
