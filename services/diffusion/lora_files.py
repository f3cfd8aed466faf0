"""LoRA files: written in the two layouts that the world exchanges, read from those and their forerunners.

Both are `.safetensors`; pickles are never opened. What is read may come from anybody: its size, header, names, shapes
and numbers are checked, and a fault is a `BadInput` that says what it is.

* diffusers/PEFT, `pytorch_lora_weights.safetensors`. The keys carry no alpha; it stands in the header's block
  `lora_adapter_metadata`, as current diffusers writes and reads it. A reader that knows no such block takes the rank
  for alpha, so there the other file is the one to use.
* Kohya (the Web UI, ComfyUI). Each module has its `alpha` beside it.

The bytes of a file depend on nothing but weights, card and precision, so that equal LoRAs are one blob in storage. The
safetensors library shuffles the header's entries, which is why the header is put together here.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from services.diffusion.exporting import TEXT_PREFIX, plain_tensors
from services.diffusion.lora import PARTS, Factors, LoraWeights
from services.diffusion.lora_card import LoraCard
from services.diffusion.lora_names import Slot, kohya_key, parse_key, peft_key, shown
from services.domain.errors import BadInput

PEFT_FILE = "pytorch_lora_weights.safetensors"
"""The name under which diffusers looks for it in a folder."""
MAX_FILE_BYTES = 4 << 30
MAX_HEADER_BYTES = 16 << 20
"""Room for a thumbnail and the tags of a large data set; names and shapes of all modules take a tenth of it."""
MAX_TENSORS = 20_000

_PEFT_BLOCK = "lora_adapter_metadata"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PLAIN_PATTERN = re.compile(r"\^?[A-Za-z0-9_.]{1,300}")


def write_peft(weights: LoraWeights, path: Path, card: LoraCard, dtype: torch.dtype | None = None) -> None:
    """Write the diffusers layout.

    Args:
        weights: what to write.
        path: the file, by custom named `PEFT_FILE`; it is replaced.
        card: for the header.
        dtype: precision of the matrices; None keeps float32.

    Raises:
        ValueError: there is nothing to write, or a value is not finite in this precision; nothing was written.
    """
    tensors: dict[str, Tensor] = {}
    for module, factors in weights.modules.items():
        tensors[peft_key(module, Slot.A)] = factors.a
        tensors[peft_key(module, Slot.B)] = factors.b
    block = json.dumps(_peft_block(weights), sort_keys=True)
    _write(plain_tensors(tensors, dtype), path, card.header(weights) | {_PEFT_BLOCK: block})


def write_kohya(weights: LoraWeights, path: Path, card: LoraCard, dtype: torch.dtype | None = None) -> None:
    """Write the Kohya layout; as :func:`write_peft`. Each alpha stays a float32 scalar."""
    tensors: dict[str, Tensor] = {}
    for module, factors in weights.modules.items():
        tensors[kohya_key(module, Slot.A)] = factors.a
        tensors[kohya_key(module, Slot.B)] = factors.b
    tensors = plain_tensors(tensors, dtype)
    for module, factors in weights.modules.items():
        tensors[kohya_key(module, Slot.ALPHA)] = torch.tensor(factors.alpha, dtype=torch.float32)
    _write(tensors, path, card.header(weights))


def read_lora(path: Path) -> LoraWeights:
    """Read a LoRA of any layout that `lora_names` lists.

    Args:
        path: a `.safetensors` file from anywhere.

    Returns:
        Its matrices in float32 on the CPU. Where a module has no alpha, it is the rank.

    Raises:
        BadInput: what is wrong with it, in one sentence.
    """
    try:
        return _read(path)
    except BadInput as error:
        raise BadInput(f"the LoRA cannot be used: {error}") from error


def _read(path: Path) -> LoraWeights:
    _check_envelope(path)
    tensors, metadata = _load(path)
    collected: dict[str, dict[Slot, Tensor]] = {}
    for key, tensor in tensors.items():
        module, slot = parse_key(key)
        slots = collected.setdefault(module, {})
        if slot in slots:
            raise BadInput(f"the tensor {shown(key)} is there a second time, under another name")
        slots[slot] = _checked_values(key, tensor)
    if not collected:
        raise BadInput("it holds no tensors")
    default_alpha = _alphas(metadata)
    modules = {name: _factors(name, slots, default_alpha) for name, slots in sorted(collected.items())}
    return LoraWeights(modules, metadata)


def _check_envelope(path: Path) -> None:
    """Refuse by size and first bytes, before any library reads the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise BadInput(f"it cannot be read: {error.strerror}") from error
    if size > MAX_FILE_BYTES:
        raise BadInput(f"it has {size} bytes, more than the {MAX_FILE_BYTES} allowed")
    header = int.from_bytes(start[:8], "little")
    if start[8:] != b"{":
        # A pickle's first byte may also be that of a header's length; only the ninth tells.
        pickled = start[:1] == b"\x80" or start[:2] == b"PK"
        kind = "a pickle, which can hold programs" if pickled else "no safetensors file"
        raise BadInput(f"it is {kind}; only safetensors are read")
    if header > MAX_HEADER_BYTES:
        raise BadInput(f"its header has {header} bytes, more than the {MAX_HEADER_BYTES} allowed")
    if header > size - 8:
        raise BadInput(f"it is cut off: {size} bytes with a header of {header}")


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            if len(keys) > MAX_TENSORS:
                raise BadInput(f"it holds {len(keys)} tensors, more than the {MAX_TENSORS} allowed")
            return {key: file.get_tensor(key) for key in keys}, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise BadInput(
            f"it is damaged: {shown((str(error) or type(error).__name__).splitlines()[0])}"
        ) from error


def _checked_values(key: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in _FLOATS:
        raise BadInput(f"the tensor {shown(key)} is {tensor.dtype}, not 16, 32 or 64-bit floating point")
    if not tensor.numel():
        raise BadInput(f"the tensor {shown(key)} is empty: {list(tensor.shape)}")
    tensor = tensor.to(torch.float32, copy=True)  # away from the file, which the library has mapped
    if not bool(torch.isfinite(tensor).all()):
        raise BadInput(f"the tensor {shown(key)} holds values that are not finite")
    return tensor


def _factors(name: str, slots: Mapping[Slot, Tensor], default_alpha: Callable[[str, int], float]) -> Factors:
    missing = [slot for slot in (Slot.A, Slot.B) if slot not in slots]
    if missing:
        raise BadInput(f"{shown(name)} lacks its matrix {missing[0]}")
    a, b = slots[Slot.A], slots[Slot.B]
    rank, kernel = a.shape[0], a.shape[2:]
    if a.ndim not in (2, 4) or b.ndim not in (2, 4) or b.shape[1] != rank or b.shape[2:] not in ((), (1, 1)):
        raise BadInput(
            f"the matrices of {shown(name)} do not go together: A is {list(a.shape)}, B is {list(b.shape)}"
        )
    b = b.view(b.shape[0], rank, *(1 for _ in kernel))
    if Slot.ALPHA not in slots:
        return Factors(a, b, default_alpha(name, rank))
    alpha = slots[Slot.ALPHA]
    if alpha.numel() != 1:
        raise BadInput(f"the alpha of {shown(name)} is {list(alpha.shape)} instead of one number")
    return Factors(a, b, float(alpha))


def _alphas(metadata: Mapping[str, str]) -> Callable[[str, int], float]:
    """What alpha is where no tensor says so, as PEFT works it out from the header's block."""
    block = _parsed_block(metadata)

    def alpha(module: str, rank: int) -> float:
        part, _, path = module.partition(".")
        if not any(key.startswith(f"{part}.") for key in block):
            return float(rank)
        if block.get(f"{part}.use_dora"):
            raise BadInput(f"its block {_PEFT_BLOCK} says that it is a DoRA, which cannot be used")
        pattern = block.get(f"{part}.alpha_pattern") or {}
        number = _by_pattern(pattern, path, block.get(f"{part}.lora_alpha"))
        return number * math.sqrt(rank) if block.get(f"{part}.use_rslora") else number

    return alpha


def _parsed_block(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        block = json.loads(metadata.get(_PEFT_BLOCK, "{}"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"its block {_PEFT_BLOCK} is not JSON") from error
    if not isinstance(block, dict):
        raise BadInput(f"its block {_PEFT_BLOCK} is not an object")
    return block


def _by_pattern(pattern: Any, path: str, otherwise: Any) -> float:
    """PEFT's rule: the first pattern that the module's path ends with. Patterns that are no plain names are refused:
    a regular expression out of a file can take for ever.
    """
    if not isinstance(pattern, dict) or not all(_PLAIN_PATTERN.fullmatch(key) for key in pattern):
        raise BadInput(f"its block {_PEFT_BLOCK} has an alpha_pattern of something else than module names")
    paths = {path, path.removeprefix(TEXT_PREFIX)}
    found = otherwise
    for key, value in pattern.items():
        if any(one == key.removeprefix("^") or (f".{one}").endswith(f".{key}") for one in paths):
            found = value
            break
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise BadInput(f"its block {_PEFT_BLOCK} gives {shown(path)} no alpha")
    return float(found)


def _peft_block(weights: LoraWeights) -> dict[str, Any]:
    """The settings from which PEFT builds its layers, one set a part."""
    block: dict[str, Any] = {}
    for part in PARTS:
        modules = {
            # Without the prefix the path fits both generations of the text encoder, as PEFT compares endings.
            name.removeprefix(f"{part}.").removeprefix(TEXT_PREFIX): factors
            for name, factors in weights.of(part).items()
        }
        if not modules:
            continue
        rank = _commonest(factors.rank for factors in modules.values())
        alpha = _commonest(factors.alpha for factors in modules.values())
        block[f"{part}.r"] = rank
        block[f"{part}.lora_alpha"] = alpha
        block[f"{part}.target_modules"] = sorted(modules)
        block[f"{part}.rank_pattern"] = {
            path: factors.rank for path, factors in modules.items() if factors.rank != rank
        }
        block[f"{part}.alpha_pattern"] = {
            path: factors.alpha for path, factors in modules.items() if factors.alpha != alpha
        }
    return block


def _commonest(values: Any) -> Any:
    return Counter(values).most_common(1)[0][0]


def _write(tensors: Mapping[str, Tensor], path: Path, entries: Mapping[str, str]) -> None:
    if not tensors:
        raise ValueError("not written: the LoRA has no modules")
    content = save(dict(tensors))
    length = int.from_bytes(content[:8], "little")
    data = memoryview(content)[8 + length :]
    digest = hashlib.sha256(data).hexdigest()
    entries = {"format": "pt", **entries, "modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}
    header = {"__metadata__": dict(sorted(entries.items())), **json.loads(content[8 : 8 + length])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for tensors that begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        file.write(data)
