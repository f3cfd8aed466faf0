"""Checkpoints that torch has pickled, read as tensors and nothing else, without torch.

Such a file is a zip archive: `<top>/data.pkl` says which tensors there are, `<top>/data/<n>` are their bytes. A pickle
is a program; the one here may call what makes a dictionary or describes a tensor, and is refused at the first other
name. Files from before torch 1.6, which are bare pickles, are refused too.
"""

import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Final

from services.domain.errors import BadInput

MAX_PICKLE_BYTES: Final = 64 << 20
CHUNK_BYTES: Final = 1 << 20
ORIGINAL_PARTS: Final = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
"""What a whole model has in the original layout; other tensors (averages, losses) are left behind."""

_INDEX: Final = "/data.pkl"
_STORAGES: Final[Mapping[str, tuple[str, int]]] = {
    "DoubleStorage": ("F64", 8),
    "LongStorage": ("I64", 8),
    "FloatStorage": ("F32", 4),
    "IntStorage": ("I32", 4),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "ShortStorage": ("I16", 2),
    "ByteStorage": ("U8", 1),
    "CharStorage": ("I8", 1),
    "BoolStorage": ("BOOL", 1),
}
_PICKLE_FAULTS: Final = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    RecursionError,
    TypeError,
    UnicodeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class _Bytes:
    """Where a tensor's numbers are: an entry of the archive, and of what type."""

    dtype: str
    item_bytes: int
    key: str


@dataclass(frozen=True, slots=True)
class _Tensor:
    """What the pickle says of one tensor; sizes and strides count items."""

    source: _Bytes
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.source.item_bytes


class _TensorsOnly(pickle.Unpickler):
    """Runs a pickle that may describe tensors; refuses it at the first name of anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *ignored: tensor
        if module == "torch" and name in _STORAGES:
            return name
        raise BadInput(f"the checkpoint is a program that asks for {module}.{name}: only tensors are read")

    def persistent_load(self, reference: Any) -> _Bytes:
        kind, storage, key, *_ = reference
        if kind != "storage" or not str(key).isalnum():
            raise BadInput("the checkpoint refers to something that is not a tensor's bytes")
        return _Bytes(*_STORAGES[storage], key=str(key))


def is_torch_archive(archive: zipfile.ZipFile) -> bool:
    """Whether a zip archive is a checkpoint that torch has written."""
    return _index_name(archive) is not None


def convert(archive: zipfile.ZipFile, target: Path) -> None:
    """Writes a checkpoint's model as a safetensors file.

    Args:
        archive: as torch wrote it.
        target: file to write; only tensors of a whole model in the original layout get into it.

    Raises:
        BadInput: the pickle holds anything but tensors, or there is no such model in it.
    """
    index = _index_name(archive)
    if index is None:
        raise BadInput("the checkpoint is not an archive that torch has written")
    tensors = _tensors(archive, index)
    top = index.removesuffix(_INDEX)
    if f"{top}/byteorder" in archive.namelist() and archive.read(f"{top}/byteorder") != b"little":
        raise BadInput("the checkpoint's numbers are not little-endian")
    # The widest items first, so that each tensor begins where its type may begin.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].source.item_bytes, item[0]))
    with target.open("wb") as file:
        file.write(_header(ordered))
        for name, tensor in ordered:
            _copy(archive, f"{top}/data/{tensor.source.key}", tensor, file, name)


def _index_name(archive: zipfile.ZipFile) -> str | None:
    names = [name for name in archive.namelist() if name.endswith(_INDEX) and name.count("/") == 1]
    return names[0] if len(names) == 1 else None


def _tensor(source: _Bytes, offset: int, shape: Any, stride: Any, *ignored: Any) -> _Tensor:
    sizes, strides = tuple(map(int, shape)), tuple(map(int, stride))
    if not isinstance(source, _Bytes) or min((offset, *sizes, *strides), default=0) < 0 or len(sizes) > 8:
        raise BadInput("the checkpoint describes a tensor that cannot be")
    return _Tensor(source, int(offset), sizes, strides)


def _tensors(archive: zipfile.ZipFile, index: str) -> dict[str, _Tensor]:
    if archive.getinfo(index).file_size > MAX_PICKLE_BYTES:
        raise BadInput("the checkpoint's list of tensors is too long")
    try:
        content = _TensorsOnly(BytesIO(archive.read(index))).load()
        state = content.get("state_dict", content)
        found = {name: value for name, value in state.items() if isinstance(value, _Tensor)}
    except _PICKLE_FAULTS as error:
        raise BadInput("the checkpoint's list of tensors cannot be read") from error
    model = {name: tensor for name, tensor in found.items() if str(name).startswith(ORIGINAL_PARTS)}
    if not model:
        raise BadInput("the checkpoint does not hold a diffusion model in the original layout")
    return model


def _header(tensors: list[tuple[str, _Tensor]]) -> bytes:
    entries, end = {}, 0
    for name, tensor in tensors:
        offsets = [end, end + tensor.size_bytes]
        entries[name] = {"dtype": tensor.source.dtype, "shape": tensor.shape, "data_offsets": offsets}
        end += tensor.size_bytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _copy(archive: zipfile.ZipFile, entry: str, tensor: _Tensor, file: BinaryIO, name: str) -> None:
    """Appends one tensor's bytes."""
    if not _is_row_major(tensor):
        raise BadInput(f"the checkpoint's {name} does not lie in memory as other programs expect")
    left = tensor.size_bytes
    try:
        with archive.open(entry) as source:
            source.seek(tensor.offset * tensor.source.item_bytes)
            while left and (part := source.read(min(left, CHUNK_BYTES))):
                left -= len(part)
                file.write(part)
    except (KeyError, zipfile.BadZipFile, EOFError) as error:
        raise BadInput(f"the checkpoint lacks the numbers of {name}") from error
    if left:
        raise BadInput(f"the checkpoint lacks the numbers of {name}")


def _is_row_major(tensor: _Tensor) -> bool:
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
