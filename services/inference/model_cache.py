"""Models in the device's memory: loaded once, shared by parts, the least recently used leave first.

A fine-tune usually changes the UNet and the text encoder only; its VAE is the very object its base has loaded,
because parts are found by the digests of their files. A model that was trained as a LoRA is its base here.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from services.diffusion.loading import Components, open_model

_log = logging.getLogger(__name__)
_SHARED_PARTS = ("unet", "vae", "text_encoder", "tokenizer")
MAX_MODELS = 256
"""Models that are kept however little memory they take: thousands of LoRAs may share the parts of one base."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on disk.

    Attributes:
        digest: of its manifest; the model's name here.
        folder: the files, in any form that :func:`open_model` knows.
        parts: part name (`unet`, `vae`, `text_encoder`, `tokenizer`, `scheduler`) to a digest of all its files;
            a part that has no files of its own is shared with no other model.
    """

    digest: str
    folder: Path
    parts: Mapping[str, str]


@dataclass(slots=True)
class _Part:
    """A loaded module or tokenizer, and the bytes of its weights."""

    module: Any
    size_bytes: int


class ModelCache:
    """Loaded models, up to a budget.

    Args:
        budget_bytes: weights that may stay loaded; a model in use stays even above it.
        device: where models go.
        dtype: precision of their weights.
    """

    def __init__(self, budget_bytes: int, device: torch.device, dtype: torch.dtype) -> None:
        self._budget_bytes = budget_bytes
        self._device = device
        self._dtype = dtype
        self._models: OrderedDict[str, tuple[Components, dict[str, str]]] = OrderedDict()
        self._parts: dict[str, _Part] = {}
        self._users: Counter[str] = Counter()

    @property
    def held(self) -> list[str]:
        """Digests of the loaded models, the least recently used first."""
        return list(self._models)

    @property
    def used_bytes(self) -> int:
        """Weights that are loaded, shared parts counted once."""
        return sum(part.size_bytes for part in self._parts.values())

    def acquire(self, files: ModelFiles) -> Components:
        """Load a model or find it loaded, and keep it from eviction until :meth:`release`.

        Raises:
            BadInput: its files cannot be used.
            torch.OutOfMemoryError: it does not fit even with all idle models evicted.
        """
        if files.digest not in self._models:
            self._load(files)
        self._models.move_to_end(files.digest)
        self._users[files.digest] += 1
        self._shrink()
        return self._models[files.digest][0]

    def release(self, digest: str) -> None:
        """Undo one :meth:`acquire`."""
        self._users[digest] -= 1
        if self._users[digest] <= 0:
            del self._users[digest]
        self._shrink()

    def evict(self, digest: str) -> bool:
        """Unload a model unless it is in use; returns whether it is gone."""
        if self._users[digest] > 0:
            return False
        self._models.pop(digest, None)
        self._drop_unused_parts()
        return True

    def _load(self, files: ModelFiles) -> None:
        try:
            components, keys = self._loaded(files)
        except torch.OutOfMemoryError:
            _log.warning("no memory for another model: all idle ones are unloaded")
            for digest in self.held:
                self.evict(digest)
            components, keys = self._loaded(files)
        self._models[files.digest] = (components, keys)

    def _loaded(self, files: ModelFiles) -> tuple[Components, dict[str, str]]:
        # LoRAs in the folder are worn by the pictures (`adapters`), so that the weights stay those of the base.
        folder = open_model(files.folder, self._dtype, self._device, merges_adapters=False)
        keys = {part: f"{part}:{files.parts.get(part, files.digest)}" for part in _SHARED_PARTS}
        try:
            components = Components(
                unet=self._part(keys["unet"], folder.load_unet),
                vae=self._part(keys["vae"], folder.load_vae),
                text_encoder=self._part(keys["text_encoder"], folder.load_text_encoder),
                tokenizer=self._part(keys["tokenizer"], folder.load_tokenizer),
                scheduler_config=folder.scheduler_config(),
            )
        except Exception:
            self._drop_unused_parts()
            raise
        return components, keys

    def _part(self, key: str, load: Callable[[], Any]) -> Any:
        if key not in self._parts:
            module = load()
            weights = module.state_dict().values() if isinstance(module, torch.nn.Module) else ()
            size = sum(tensor.nbytes for tensor in weights)
            self._parts[key] = _Part(module, size)
        return self._parts[key].module

    def _shrink(self) -> None:
        for digest in self.held:
            if self.used_bytes <= self._budget_bytes and len(self._models) <= MAX_MODELS:
                return
            self.evict(digest)

    def _drop_unused_parts(self) -> None:
        wanted = {key for _, keys in self._models.values() for key in keys.values()}
        self._parts = {key: part for key, part in self._parts.items() if key in wanted}
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
