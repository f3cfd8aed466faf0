"""Model files as they lie on disk: which of them make a model, when they changed, and what they tell about it.

Only safetensors, JSON and text are ever taken, never pickles. Of a safetensors file the header alone is read here:
eight bytes of length, then JSON that names each tensor's shape.
"""

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from services.domain.artifacts import SINGLE_FILE_CONFIG, SINGLE_FILE_NAME
from services.domain.errors import BadInput

WEIGHTS: Final = ".safetensors"
TAKEN_SUFFIXES: Final = frozenset({WEIGHTS, ".json", ".txt"})
MAX_HEADER_BYTES: Final = 64 << 20
MAX_CONFIG_BYTES: Final = 1 << 20
WEIGHTED_PARTS: Final = ("unet", "vae", "text_encoder")
CONFIG_FILES: Final = (
    *(f"{part}/config.json" for part in WEIGHTED_PARTS),
    "scheduler/scheduler_config.json",
)
TOKENIZER_FILES: Final = ("tokenizer/tokenizer.json", "tokenizer/vocab.json")

_CROSS_ATTENTION: Final = ".attn2.to_k.weight"
_SD_CHANNELS: Final = {(320, 640, 1280, 1280): {768: "sd1", 1024: "sd2"}, (320, 640, 1280): {2048: "sdxl"}}
_SINGLE_FILE_MARK: Final = "model.diffusion_model."
_HALF: Final = f".fp16{WEIGHTS}"
_SHARD: Final = re.compile(r"-\d+-of-\d+\.")
_COPY: Final = re.compile(r"\.(fp16|non_ema)[.-]")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of one model.

    Attributes:
        paths: where each file is, by its path inside the model, sorted.
        is_single: one file in the original layout, its configs in the folder `config`, instead of a diffusers
            folder.
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


def list_files(path: Path, config: Path | None = None) -> ModelFiles:
    """Finds the files of a model.

    Args:
        path: a diffusers folder, or one `.safetensors` file.
        config: for a single file, the diffusers folder with its configs, tokenizer and scheduler.

    Raises:
        BadInput: neither, or without weights, or a single file without all that its `config` must hold.
    """
    if path.is_file() and path.suffix == WEIGHTS:
        return _single_file(path, config)
    if not (path / "model_index.json").is_file():
        raise BadInput(
            f"there is no model at {path.name}: neither a diffusers folder nor a .safetensors file"
        )
    found = _taken(path)
    weights = {name: found[stored] for name, stored in best_weights(found).items()}
    for part in WEIGHTED_PARTS:
        if not any(name.startswith(f"{part}/") for name in weights):
            raise BadInput(f"the model {path.name} has no weights in safetensors for its {part}")
    return ModelFiles(dict(sorted({**_without_weights(found), **weights}.items())), is_single=False)


def best_weights(names: Iterable[str]) -> dict[str, str]:
    """Chooses among the copies of each part's weights that a diffusers folder may hold.

    Full precision comes first; a part that is there in half precision only (`*.fp16.safetensors`) is taken so, under
    the plain name. Copies without moving averages and whole checkpoints beside the parts are never taken.

    Args:
        names: paths inside the folder, other files among them.

    Returns:
        Plain name to the name it is stored under.
    """
    weights = [name for name in names if name.endswith(WEIGHTS) and name.count("/") == 1]
    full = {name: name for name in weights if not _COPY.search(name)}
    parts = {name.partition("/")[0] for name in full}
    half = {name.removesuffix(_HALF) + WEIGHTS: name for name in weights if name.endswith(_HALF)}
    return full | {name: stored for name, stored in half.items() if _fills_in(name, parts)}


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
    if files.is_single:
        _check_single(headers[SINGLE_FILE_NAME], _config(files, "unet"))
    return _describe_configs(files)


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


def _fills_in(name: str, parts: set[str]) -> bool:
    """Whether half precision under this plain name is taken: the part lacks another, and it is one whole file."""
    return name.partition("/")[0] not in parts and not _COPY.search(name) and not _SHARD.search(name)


def _single_file(path: Path, config: Path | None) -> ModelFiles:
    if config is None:
        raise BadInput(f"the model {path.name} is a single file: it needs a `config` folder")
    found = _without_weights(_taken(config))
    missing = [name for name in CONFIG_FILES if name not in found]
    if not any(name in found for name in TOKENIZER_FILES):
        missing.append(TOKENIZER_FILES[0])
    if missing:
        raise BadInput(f"the config folder {config.name} of {path.name} lacks {', '.join(missing)}")
    placed = {f"{SINGLE_FILE_CONFIG}/{name}": file for name, file in sorted(found.items())}
    return ModelFiles({**placed, SINGLE_FILE_NAME: path}, is_single=True)


def _taken(root: Path) -> dict[str, Path]:
    return {file.relative_to(root).as_posix(): file for file in root.rglob("*") if _is_taken(root, file)}


def _without_weights(files: Mapping[str, Path]) -> dict[str, Path]:
    return {name: file for name, file in files.items() if not name.endswith(WEIGHTS)}


def _is_taken(root: Path, file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return file.suffix in TAKEN_SUFFIXES and not hidden and file.is_file()


def _describe_configs(files: ModelFiles) -> ModelTraits:
    unet, vae = _config(files, "unet"), _config(files, "vae")
    text = _config(files, "text_encoder")
    try:
        channels, width = tuple(unet["block_out_channels"]), unet["cross_attention_dim"]
        family = _SD_CHANNELS.get(channels, {}).get(width) or _architecture_digest(unet, text)
        return ModelTraits(family, int(unet["sample_size"]) << (len(vae["block_out_channels"]) - 1))
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"the model's configuration lacks {error}") from error


def _check_single(header: Mapping[str, Any], unet: Mapping[str, Any]) -> None:
    """Raises BadInput when the file is no diffusion model, or of another architecture than its config says."""
    shapes = {name: entry["shape"] for name, entry in header.items() if name.startswith(_SINGLE_FILE_MARK)}
    width = next((shape[1] for name, shape in sorted(shapes.items()) if name.endswith(_CROSS_ATTENTION)), 0)
    first = shapes.get(f"{_SINGLE_FILE_MARK}input_blocks.0.0.weight", [0])[0]
    if not width or not first:
        raise BadInput("the file does not hold a diffusion model in the original layout")
    try:
        told = (unet["block_out_channels"][0], unet["cross_attention_dim"])
    except (KeyError, TypeError, IndexError) as error:
        raise BadInput(f"the model's configuration lacks {error}") from error
    if told != (first, width):
        raise BadInput(
            f"the file and its config are of different models: channels and text width are {(first, width)} "
            f"in the file, {told} in the config"
        )


def _config(files: ModelFiles, part: str) -> dict[str, Any]:
    folder = f"{SINGLE_FILE_CONFIG}/{part}" if files.is_single else part
    path = files.paths.get(f"{folder}/config.json")
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
