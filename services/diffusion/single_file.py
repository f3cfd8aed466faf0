"""A whole model as one file in the original (CompVis) layout, the form most other programs exchange models in.

The layout numbers blocks through, where the folders of diffusers nest them; the rules below say how. They follow the
networks' own block counts, though readers elsewhere usually expect the four UNet blocks of Stable Diffusion 1 and 2.
The text encoder of Stable Diffusion 1 (OpenAI's CLIP) keeps its names under `cond_stage_model.transformer.`; that of
Stable Diffusion 2 (OpenCLIP) goes under `cond_stage_model.model.` with query, key and value as one matrix.

The file is a `.safetensors`, or a `.ckpt` for programs that know nothing else: a pickle that holds tensors only.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from services.diffusion.exporting import TEXT_PREFIX, plain_tensors, prefixed
from services.diffusion.loading import Components, with_text_prefix
from services.domain.errors import BadInput

_CLIP = "cond_stage_model.transformer."
_OPENCLIP = "cond_stage_model.model."
_PARTS = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
_POSITION_IDS = f"{_CLIP}{TEXT_PREFIX}embeddings.position_ids"
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


_OPENCLIP_ENDS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_TEXT_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)")
_TEXT_PROJECTION = re.compile(r"self_attn\.([qkv])_proj\.(weight|bias)")


def save_single_file(components: Components, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write the whole model as one `.safetensors`.

    Args:
        components: the model; CLIP text encoder, UNet with equal layers in all blocks.
        path: file to write.
        dtype: precision of the written weights; None keeps each tensor's own.

    Raises:
        ValueError: a tensor holds a value that is not finite; nothing was written.
    """
    save_file(plain_tensors(single_file_state(components), dtype), path, metadata={"format": "pt"})


def save_checkpoint(components: Components, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write the whole model as one `.ckpt`; as :func:`save_single_file`.

    It is a torch pickle of tensors under `state_dict` and nothing else: `torch.load(weights_only=True)` reads it.
    """
    torch.save({"state_dict": plain_tensors(single_file_state(components), dtype)}, path)


def single_file_state(components: Components) -> dict[str, Tensor]:
    """The model's tensors under the names of the original layout."""
    state: dict[str, Tensor] = {}
    for part in _PARTS:
        tensors = getattr(components, part).state_dict()
        for key, name in _original_names(components, part):
            state[name] = _as_convolution(name, tensors[key])
    text = prefixed(components.text_encoder.state_dict())
    return state | (_openclip_state(text) if _is_openclip(components) else _clip_state(text))


def part_states(state: Mapping[str, Tensor], components: Components) -> dict[str, dict[str, Tensor]]:
    """The way back: a file's tensors under the names that the parts themselves use.

    Args:
        state: tensors by their original names; those of other things than weights are passed over. Text encoder keys
            without `text_model.` are accepted too.
        components: a model of the same architecture, possibly without memory for its weights (device `meta`).

    Returns:
        For `unet`, `vae` and `text_encoder` what `load_state_dict` takes. The tensors may share memory with `state`.

    Raises:
        BadInput: a weight is missing or of another shape.
    """
    state = with_text_prefix(state)
    parts: dict[str, dict[str, Tensor]] = {}
    for part in _PARTS:
        shapes = {key: tensor.shape for key, tensor in getattr(components, part).state_dict().items()}
        parts[part] = {
            key: _shaped(name, _taken(state, name), shapes[key])
            for key, name in _original_names(components, part)
        }
    parts["text_encoder"] = _text_encoder_state(state, components.text_encoder.state_dict())
    return parts


def _original_names(components: Components, part: str) -> Iterator[tuple[str, str]]:
    """Each key of the UNet or VAE with its name in the file."""
    module = getattr(components, part)
    keys = module.state_dict()
    with_attention = _blocks_with_attention(keys)
    for key in keys:
        if part == "unet":
            name = _unet_name(key, int(module.config.layers_per_block), with_attention)
        else:
            name = _vae_name(key, len(module.config.block_out_channels))
        yield key, _PARTS[part] + name


def _is_openclip(components: Components) -> bool:
    # What tells the two apart in their configs: OpenAI's CLIP was trained with an approximation of GELU.
    return bool(components.text_encoder.config.hidden_act == "gelu")


def _clip_state(text: Mapping[str, Tensor]) -> dict[str, Tensor]:
    positions = text[f"{TEXT_PREFIX}embeddings.position_embedding.weight"]
    # Original files carry this buffer, and strict loaders miss it; it stays int64 whatever the weights' precision.
    position_ids = torch.arange(positions.shape[0], device=positions.device)[None]
    return {_POSITION_IDS: position_ids} | {_CLIP + key: tensor for key, tensor in text.items()}


def _openclip_state(text: Mapping[str, Tensor]) -> dict[str, Tensor]:
    places: dict[str, dict[int, Tensor]] = {}
    for key, tensor in text.items():
        name, index = _openclip_place(key)
        places.setdefault(name, {})[index] = tensor
    return {
        _OPENCLIP + name: torch.cat([tensors[index] for index in sorted(tensors)])
        if len(tensors) > 1
        else tensors[0]
        for name, tensors in places.items()
    }


def _openclip_place(key: str) -> tuple[str, int]:
    """A text encoder key's name in OpenCLIP, and which third of that tensor it is."""
    layer = _TEXT_LAYER.fullmatch(key)
    if layer is None:
        return _OPENCLIP_ENDS[key], 0
    number, rest = layer.groups()
    stem = f"transformer.resblocks.{number}."
    if projection := _TEXT_PROJECTION.fullmatch(rest):
        return f"{stem}attn.in_proj_{projection[2]}", "qkv".index(projection[1])
    return stem + _renamed(rest, _OPENCLIP_LAYER), 0


def _text_encoder_state(state: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> dict[str, Tensor]:
    openclip = f"{_OPENCLIP}token_embedding.weight" in state
    found: dict[str, Tensor] = {}
    for key, target in wanted.items():
        full = key if key.startswith(TEXT_PREFIX) else TEXT_PREFIX + key
        name, index = _openclip_place(full) if openclip else (full, 0)
        name = (_OPENCLIP if openclip else _CLIP) + name
        tensor = _taken(state, name)
        if ".in_proj_" in name:
            rows, *rest = target.shape
            tensor = _shaped(name, tensor, torch.Size((3 * rows, *rest)))[index * rows : (index + 1) * rows]
        found[key] = _shaped(name, tensor, target.shape)
    return found


def _taken(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise BadInput(f"the checkpoint lacks {name}")
    return state[name]


def _shaped(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    # The VAE's attention is made of 1x1 convolutions in the file and of linear layers in the library.
    plain = tensor.shape[:2] if tensor.shape[2:] == (1, 1) and len(shape) == 2 else tensor.shape
    if plain != shape:
        raise BadInput(f"the checkpoint's {name} is {list(tensor.shape)}, this model's {list(shape)}")
    return tensor.reshape(shape)


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
