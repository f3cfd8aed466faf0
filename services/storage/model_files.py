"""Model files as they lie on disk: which of them make a model, when they changed, and what they tell about it.

Only safetensors, JSON and text are ever taken, never pickles. Of a safetensors file the header alone is read here:
eight bytes of length, then JSON that names each tensor's shape.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from services.domain.errors import BadInput

WEIGHTS: Final = ".safetensors"
TAKEN_SUFFIXES: Final = frozenset({WEIGHTS, ".json", ".txt"})
SINGLE_FILE_NAME: Final = "model.safetensors"
MAX_HEADER_BYTES: Final = 64 << 20
MAX_CONFIG_BYTES: Final = 1 << 20
SINGLE_FILE_SIZES: Final = {"sd1": 512, "sd2": 768, "sdxl": 1024}

_CROSS_ATTENTION: Final = ".attn2.to_k.weight"
_SD_CHANNELS: Final = {(320, 640, 1280, 1280): {768: "sd1", 1024: "sd2"}, (320, 640, 1280): {2048: "sdxl"}}
_SINGLE_FILE_WIDTHS: Final = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_SINGLE_FILE_MARK: Final = "model.diffusion_model."


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of one model.

    Attributes:
        paths: where each file is, by its path inside the model, sorted.
        is_single: one file in the original layout instead of a diffusers folder.
    """

    paths: Mapping[str, Path]
    is_single: bool


@dataclass(frozen=True, slots=True)
class ModelTraits:
    """What the files tell.

    Attributes:
        family: `sd1`, `sd2`, `sdxl`, or a digest of the architecture for others.
        native_size_px: side of the square picture that the model was made for; 0: the files do not tell.
    """

    family: str
    native_size_px: int


def list_files(path: Path) -> ModelFiles:
    """Finds the files of a model.

    Args:
        path: a diffusers folder, or one `.safetensors` file.

    Raises:
        BadInput: neither, or without weights.
    """
    if path.is_file() and path.suffix == WEIGHTS:
        return ModelFiles({SINGLE_FILE_NAME: path}, is_single=True)
    if not (path / "model_index.json").is_file():
        raise BadInput(
            f"there is no model at {path.name}: neither a diffusers folder nor a .safetensors file"
        )
    found = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if _is_taken(path, file)}
    if not any(name.endswith(WEIGHTS) for name in found):
        raise BadInput(f"the model {path.name} has no weights in safetensors")
    return ModelFiles(dict(sorted(found.items())), is_single=False)


def fingerprint(files: ModelFiles) -> str:
    """Changes when a file is added, removed, or written to; costs no reading."""
    lines = []
    for name, path in files.paths.items():
        stat = path.stat()
        lines.append(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def describe(files: ModelFiles) -> ModelTraits:
    """Checks that every weight file is one, and reads off what the model is.

    Raises:
        BadInput: a file is not what its name says, or the configuration lacks its numbers.
    """
    headers = {name: read_header(path) for name, path in files.paths.items() if name.endswith(WEIGHTS)}
    return _describe_single(headers[SINGLE_FILE_NAME]) if files.is_single else _describe_folder(files)


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: shapes and types by tensor.

    Raises:
        BadInput: not such a file.
    """
    with path.open("rb") as file:
        prefix = file.read(8)
        size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES + 1
        if size > MAX_HEADER_BYTES:
            raise BadInput(f"{path.name} is not a safetensors file")
        try:
            header = json.loads(file.read(size))
        except ValueError as error:
            raise BadInput(f"{path.name} is not a safetensors file") from error
    if not isinstance(header, dict):
        raise BadInput(f"{path.name} is not a safetensors file")
    return header


def _is_taken(root: Path, file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return file.suffix in TAKEN_SUFFIXES and not hidden and file.is_file()


def _describe_folder(files: ModelFiles) -> ModelTraits:
    unet, vae = _config(files, "unet"), _config(files, "vae")
    text = _config(files, "text_encoder")
    try:
        channels, width = tuple(unet["block_out_channels"]), unet["cross_attention_dim"]
        family = _SD_CHANNELS.get(channels, {}).get(width) or _architecture_digest(unet, text)
        return ModelTraits(family, int(unet["sample_size"]) << (len(vae["block_out_channels"]) - 1))
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"the model's configuration lacks {error}") from error


def _describe_single(header: Mapping[str, Any]) -> ModelTraits:
    shapes = {name: entry["shape"] for name, entry in header.items() if name.startswith(_SINGLE_FILE_MARK)}
    width = next((shape[1] for name, shape in sorted(shapes.items()) if name.endswith(_CROSS_ATTENTION)), 0)
    first = shapes.get(f"{_SINGLE_FILE_MARK}input_blocks.0.0.weight", [0])[0]
    if not shapes or not width:
        raise BadInput("the file does not hold a diffusion model in the original layout")
    family = _SINGLE_FILE_WIDTHS.get(width, "") if first == 320 else ""
    return ModelTraits(family or _digest(shapes), SINGLE_FILE_SIZES.get(family, 0))


def _config(files: ModelFiles, part: str) -> dict[str, Any]:
    path = files.paths.get(f"{part}/config.json")
    if path is None or path.stat().st_size > MAX_CONFIG_BYTES:
        raise BadInput(f"the model has no usable {part}/config.json")
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise BadInput(f"the model's {part}/config.json is not JSON") from error
    if not isinstance(config, dict):
        raise BadInput(f"the model's {part}/config.json is not an object")
    return config


def _architecture_digest(unet: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    """Equal for models whose add-ons fit: all of the UNet's shape but its picture size, and the text's width."""
    shape = {
        name: value for name, value in unet.items() if not name.startswith("_") and name != "sample_size"
    }
    sizes = {name: text.get(name) for name in ("hidden_size", "num_hidden_layers", "vocab_size")}
    return _digest({"unet": shape, "text_encoder": sizes})


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
