"""What requests add to the model that they draw with: LoRAs and embeddings, checked against that model.

LoRAs are parsed once and kept in host memory up to a budget; embeddings are small and read each time.
"""

import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import nn

from services.diffusion.embeddings import Embedding, read_embedding
from services.diffusion.loading import Components
from services.diffusion.lora import Part
from services.diffusion.lora_files import read_lora
from services.diffusion.lora_rows import FittedLora, PackedLora, Worn, fit, pack
from services.domain.errors import BadInput


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA that a request wants.

    Attributes:
        name: what the request calls it, for errors.
        digest: SHA-256 of the file; its name here.
        path: the file; only read where the LoRA is not in memory.
        strength: any finite number; 1 is what was trained, 0 nothing.
    """

    name: str
    digest: str
    path: Path
    strength: float


@dataclass(frozen=True, slots=True)
class WornLoras:
    """What a request's pictures wear, by the part of the model that it changes."""

    unet: Worn = ()
    text_encoder: Worn = ()


NO_LORAS: Final = WornLoras()


class AdapterStore:
    """Parsed LoRAs, up to a budget; the least recently used leave first.

    Args:
        budget_bytes: matrices that may stay in host memory; what slots in progress wear stays even above it.
        dtype: precision that the device computes with.
    """

    def __init__(self, budget_bytes: int, dtype: torch.dtype) -> None:
        self._budget_bytes = budget_bytes
        self._dtype = dtype
        self._packed: OrderedDict[str, PackedLora] = OrderedDict()
        # As long as a slot wears it on a model, others wear the same matrices.
        self._fitted: weakref.WeakValueDictionary[tuple[str, int, Part], FittedLora] = (
            weakref.WeakValueDictionary()
        )

    @property
    def held(self) -> list[str]:
        """Digests of the LoRAs in host memory, the least recently used first."""
        return list(self._packed)

    @property
    def used_bytes(self) -> int:
        """Host memory that they take."""
        return sum(lora.size_bytes for lora in self._packed.values())

    def fitted(self, components: Components, files: Sequence[LoraFile]) -> WornLoras:
        """Make a request's LoRAs ready on the model that it draws with; those of strength 0 are left out.

        Raises:
            BadInput: naming the LoRA that cannot be read, or does not fit the model.
        """
        wanted = [(file, self._packed_of(file)) for file in files if file.strength]
        parts: Mapping[Part, nn.Module] = {"unet": components.unet, "text_encoder": components.text_encoder}
        worn = {
            part: tuple((self._fitted_to(module, part, file, lora), file.strength) for file, lora in wanted)
            for part, module in parts.items()
        }
        return WornLoras(**{part: _effective(pairs) for part, pairs in worn.items()})

    def _fitted_to(self, module: nn.Module, part: Part, file: LoraFile, lora: PackedLora) -> FittedLora:
        # A fitted LoRA keeps its model, whose id therefore means no other one while this entry is here.
        key = (file.digest, id(module), part)
        fitted = self._fitted.get(key)
        if fitted is None:
            try:
                fitted = self._fitted[key] = fit(module, lora, part)
            except BadInput as error:
                raise _named(file, error) from error
        return fitted

    def _packed_of(self, file: LoraFile) -> PackedLora:
        packed = self._packed.get(file.digest)
        if packed is None:
            try:
                packed = self._packed[file.digest] = pack(read_lora(file.path), self._dtype)
            except BadInput as error:
                raise _named(file, error) from error
        self._packed.move_to_end(file.digest)
        while self._packed and self.used_bytes > self._budget_bytes:
            self._packed.popitem(last=False)
        return packed


@dataclass(frozen=True, slots=True)
class EmbeddingFile:
    """An embedding that a request wants.

    Attributes:
        name: what the request calls it, for errors; its word where neither `token` nor the file says one.
        path: the file.
        token: its word; empty: the file's own.
        negative: its word belongs into the negative prompt.
    """

    name: str
    path: Path
    token: str = ""
    negative: bool = False


def embeddings_for(components: Components, files: Sequence[EmbeddingFile]) -> list[Embedding]:
    """Read a request's embeddings.

    Raises:
        BadInput: naming the one that cannot be read, or was made for a text encoder of another width.
    """
    width = components.text_encoder.config.hidden_size
    found = []
    for file in files:
        try:
            one = read_embedding(file.path, file.token, otherwise=file.name, negative=file.negative)
        except BadInput as error:
            raise BadInput(f"'{file.name}': {error}", "embeddings") from error
        if one.vectors.shape[1] != width:
            raise BadInput(
                f"'{file.name}' was made for text encoders of width {one.vectors.shape[1]}, this model's has {width}",
                "embeddings",
            )
        found.append(one)
    return found


def _effective(worn: Worn) -> Worn:
    """Without LoRAs that change nothing of this part."""
    return tuple((lora, strength) for lora, strength in worn if lora.matrices)


def _named(file: LoraFile, error: BadInput) -> BadInput:
    return BadInput(f"'{file.name}': {error}", "loras")
