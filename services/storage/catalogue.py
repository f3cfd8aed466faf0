"""The catalogue: models that every project may use, as a TOML file names them.

    [pocket]
    source = "embedded"                     # the model that ships with this distribution: models/pocket/weights
    native_size_px = 512

    [sd-v1-5]
    source = "hf:REPO@REVISION"             # or file:PATH of a diffusers folder
    license = "openrail"
    aliases = ["sd15"]
    [sd-v1-5.training_defaults]
    lora_rank = 8

    [one-file]
    source = "file:/models/x.safetensors"   # the original layout, and for what it does not hold
    config = "file:/models/sd15"            # a diffusers folder: configs, tokenizer, scheduler

    [film-grain]
    kind = "lora"                           # or "embedding": what drawings may add to a model
    source = "file:/models/grain.safetensors"
    family = "sd1"                          # empty: the shapes decide at the time of drawing

Local models are imported at the start, and again only when their files or their entry changed; models of the hub are
downloaded when they are first asked for. Only the catalogue writes shared models.
"""

import asyncio
import hashlib
import logging
import shutil
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Self

from likeness.storage.v1.model_pb2 import (
    MODEL_FORMAT_DIFFUSERS,
    MODEL_FORMAT_EMBEDDING,
    MODEL_FORMAT_LORA,
    MODEL_FORMAT_SINGLE_FILE,
    Model,
    ModelComponent,
    ModelFormat,
    ModelManifest,
    TrainingDefaults,
)
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from services.adapters.settings import EMBEDDED_MODEL
from services.domain.artifacts import adapter_name, is_ref_name, media_type_of
from services.domain.errors import BadInput, InvalidSpec, LikenessError, NotFound, Violation
from services.storage import hub
from services.storage.blobs import Blobs
from services.storage.documents import CATALOGUE, Documents
from services.storage.model_files import WEIGHTS, ModelFiles, ModelTraits, describe, fingerprint, list_files
from services.storage.registry import ModelRegistry

logger = logging.getLogger(__name__)

EMBEDDED_WEIGHTS: Final = Path(__file__).resolve().parents[2] / "models" / EMBEDDED_MODEL / "weights"
"""The released folder: beside the services in a checkout and in an installed wheel alike."""


_ADD_ONS: Final[Mapping[str, ModelFormat]] = {
    "lora": MODEL_FORMAT_LORA,
    "embedding": MODEL_FORMAT_EMBEDDING,
}


class EntryDefaults(BaseModel):
    """What suits trainings that start from a model, for clients and dialects to ask for; 0: no opinion."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    full_learning_rate: float = Field(default=0.0, ge=0)
    lora_learning_rate: float = Field(default=0.0, ge=0)
    lora_rank: int = Field(default=0, ge=0)
    lora_alpha: float = Field(default=0.0, ge=0)
    lora_conv_rank: int = Field(default=0, ge=0)
    lora_conv_alpha: float = Field(default=0.0, ge=0)
    num_class_images: int = Field(default=0, ge=0)


class CatalogueEntry(BaseModel):
    """One model of the catalogue.

    Attributes:
        source: `embedded` (the model that ships), `hf:REPO[@REV]` or `file:PATH`.
        kind: what it is; LoRAs and embeddings are files, and trigger words of an embedding begin with its word.
        config: of a model that is one file, `file:PATH` of a diffusers folder with configs, tokenizer and scheduler;
            weights in it are left alone. Empty for all others.
        family: whose add-ons fit; empty: told from the files.
        native_size_px: 0: told from the files.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(pattern=r"^(embedded|hf:[\w.-]+/[\w.-]+(@[\w./-]+)?|file:.+)$")
    kind: Literal["model", "lora", "embedding"] = "model"
    config: str = Field(default="", pattern=r"^(file:.+)?$")
    display_name: str = Field(default="", max_length=200)
    family: str = ""
    license: str = ""
    trigger_words: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    native_size_px: int = Field(default=0, ge=0)
    clip_skip: int = Field(default=0, ge=0)
    note: str = ""
    training_defaults: EntryDefaults = EntryDefaults()

    @model_validator(mode="after")
    def _names_are_names(self) -> Self:
        if not all(is_ref_name(alias) for alias in self.aliases):
            raise ValueError("an alias must be 1 to 128 letters, digits, '_', '.' or '-'")
        return self

    @model_validator(mode="after")
    def _single_files_have_a_config(self) -> Self:
        is_single = self.kind == "model" and self.source.startswith("file:") and self.source.endswith(WEIGHTS)
        if is_single and not self.config:
            raise ValueError(
                "a single .safetensors holds no configs, tokenizer and scheduler: "
                "`config` must name a diffusers folder that does, as file:PATH"
            )
        if self.config and not is_single:
            raise ValueError("`config` goes with a source that is a single .safetensors")
        return self

    @model_validator(mode="after")
    def _add_ons_are_files(self) -> Self:
        if self.kind != "model" and not self.source.startswith("file:"):
            raise ValueError(f"the source of a kind `{self.kind}` must be file:PATH")
        return self

    @property
    def config_path(self) -> Path | None:
        """The folder that `config` names."""
        return Path(self.config.removeprefix("file:")) if self.config else None

    @property
    def is_local(self) -> bool:
        """Its files are on this machine."""
        return not self.source.startswith("hf:")

    def digest(self) -> str:
        """Changes when the entry does."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


DEFAULT_CATALOGUE: Final[Mapping[str, CatalogueEntry]] = {
    EMBEDDED_MODEL: CatalogueEntry(
        source="embedded",
        display_name="Pocket",
        native_size_px=512,
        note="draws flat scenes of shapes and figures; its prompts are those of models/pocket/scenes.py",
        training_defaults=EntryDefaults(full_learning_rate=3e-4, num_class_images=48),
    )
}


def read_catalogue(path: Path) -> dict[str, CatalogueEntry]:
    """Reads the TOML file.

    Raises:
        InvalidSpec: with everything that is wrong in it.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidSpec(f"the catalogue {path.name} cannot be read: {error}") from error
    entries: dict[str, CatalogueEntry] = {}
    faults: list[Violation] = []
    for model, table in tables.items():
        if not is_ref_name(model):
            faults.append(Violation(model, "must be 1 to 128 letters, digits, '_', '.' or '-'"))
        try:
            entries[model] = CatalogueEntry.model_validate(table)
        except ValidationError as error:
            faults += [
                Violation(".".join([model, *map(str, detail["loc"])]), detail["msg"])
                for detail in error.errors(include_url=False, include_input=False)
            ]
    if faults:
        raise InvalidSpec(faults)
    return entries


@dataclass(frozen=True, slots=True)
class CataloguePlaces:
    """Where the catalogue finds and puts files.

    Attributes:
        work: folder for downloads, on the store's file system where that can be.
        hub_endpoint: address of the model hub; None: its own.
        embedded: diffusers folder of the model that ships.
    """

    work: Path
    hub_endpoint: str | None = None
    embedded: Path = EMBEDDED_WEIGHTS


class Catalogue:
    """Imports what the entries name, each once at a time."""

    def __init__(
        self,
        entries: Mapping[str, CatalogueEntry],
        registry: ModelRegistry,
        blobs: Blobs,
        documents: Documents,
        places: CataloguePlaces,
    ) -> None:
        """Takes what it works with; :meth:`run` imports."""
        self._entries = dict(entries)
        self._names = {alias: model for model, entry in entries.items() for alias in entry.aliases}
        self._registry = registry
        self._blobs = blobs
        self._documents = documents
        self._places = places
        self._imports: dict[str, asyncio.Task[Model]] = {}
        self._locals_done = asyncio.Event()

    async def run(self) -> None:
        """Imports every local model, one after the other, and removes what left the catalogue."""
        try:
            await self._remove_departed()
            for model in [name for name, entry in self._entries.items() if entry.is_local]:
                await self._import_logged(model)
        finally:
            self._locals_done.set()

    async def wait_for_locals(self) -> None:
        """Returns once the local models were imported, or failed to be."""
        await self._locals_done.wait()

    async def ensure(self, name: str) -> None:
        """Imports a model that is asked for and not there yet.

        Args:
            name: id or alias; names that are not the catalogue's are left alone.

        Raises:
            BadInput: its files cannot be used.
            Unavailable: the hub does not answer.
        """
        model = self._names.get(name, name)
        if model in self._entries and not await self._is_registered(model):
            await self._import_or_keep(model)

    async def _is_registered(self, model: str) -> bool:
        """Registered by this process's entry: a local one is looked at once, whatever an earlier run left."""
        if self._entries[model].is_local and not self._locals_done.is_set():
            return False
        known = await self._documents.get("", CATALOGUE, model)
        if known is None or known["entry"] != self._entries[model].digest():
            return False
        try:
            registered = await self._registry.get("", model)
        except NotFound:
            return False
        return registered.manifest_key == str(known["manifest_key"])

    def _importing(self, model: str) -> "asyncio.Task[Model]":
        """The import under way, or a new one."""
        task = self._imports.get(model)
        if task is None:
            task = asyncio.create_task(self._import(model))
            self._imports[model] = task
            task.add_done_callback(lambda _: self._imports.pop(model, None))
        return task

    async def _import_or_keep(self, model: str) -> None:
        """Imports; where that fails, what was imported earlier goes on being served."""
        try:
            # A caller that gives up leaves the import to the next one.
            await asyncio.shield(self._importing(model))
        except LikenessError as error:
            if not await self._registry.has("", model):
                raise
            logger.warning("model kept as it was: %s", error, extra={"model": model})

    async def _import_logged(self, model: str) -> None:
        try:
            await self._import_or_keep(model)
        except LikenessError as error:
            logger.warning("model not imported: %s", error, extra={"model": model})

    async def _import(self, model: str) -> Model:
        try:
            return await self._imported(model)
        except OSError as error:
            raise BadInput(f"the model's files cannot be read: {error.strerror}") from error

    async def _imported(self, model: str) -> Model:
        entry = self._entries[model]
        if entry.is_local:
            return await self._import_folder(model, entry, self._local_path(entry), entry.source)
        folder = self._places.work / f"hub-{hashlib.sha256(entry.source.encode()).hexdigest()[:16]}"
        try:
            name = entry.source.removeprefix("hf:")
            revision = await hub.download(name, folder, self._places.hub_endpoint)
            return await self._import_folder(model, entry, folder, revision)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _import_folder(self, model: str, entry: CatalogueEntry, path: Path, source: str) -> Model:
        files = await asyncio.to_thread(_files_of, entry, path)
        marks = {"entry": entry.digest(), "fingerprint": await asyncio.to_thread(fingerprint, files)}
        known = await self._documents.get("", CATALOGUE, model)
        if known is not None and {name: known.get(name) for name in marks} == marks:
            found = await self._found_unchanged(model, known["manifest_key"])
            if found is not None:
                return found
        started = time.monotonic()
        manifest = await self._manifest(entry, files)
        registered = await self._registry.register(
            "",
            model,
            manifest,
            display_name=entry.display_name or model,
            aliases=entry.aliases,
            replace=True,
        )
        document = {**marks, "manifest_key": registered.manifest_key, "source": source}
        await self._documents.put("", CATALOGUE, model, document, replace=True)
        seconds = round(time.monotonic() - started, 3)
        logger.info("model imported", extra={"model": model, "source": source, "duration_s": seconds})
        return registered

    async def _found_unchanged(self, model: str, manifest_key: str) -> Model | None:
        try:
            found = await self._registry.get("", model)
        except NotFound:
            return None
        return found if found.manifest_key == manifest_key else None

    async def _manifest(self, entry: CatalogueEntry, files: ModelFiles) -> ModelManifest:
        traits = ModelTraits("", 0)
        if entry.kind == "model":
            traits = await asyncio.to_thread(describe, files)
        components = []
        for name, path in files.paths.items():
            blob = await self._blobs.put_file("", path, media_type_of(name))
            components.append(
                ModelComponent(path=name, key=blob.key, digest=blob.digest, size_bytes=blob.size_bytes)
            )
        return ModelManifest(
            format=_ADD_ONS.get(
                entry.kind, MODEL_FORMAT_SINGLE_FILE if files.is_single else MODEL_FORMAT_DIFFUSERS
            ),
            family=entry.family or traits.family,
            components=components,
            trigger_words=entry.trigger_words,
            license=entry.license,
            native_size_px=entry.native_size_px or traits.native_size_px,
            training_defaults=TrainingDefaults(**entry.training_defaults.model_dump()),
            clip_skip=entry.clip_skip,
            note=entry.note,
        )

    def _local_path(self, entry: CatalogueEntry) -> Path:
        """Raises BadInput when the model that ships was left out of the installation."""
        if entry.source != "embedded":
            return Path(entry.source.removeprefix("file:"))
        if not self._places.embedded.is_dir():
            raise BadInput(
                "the embedded model is missing: there is no folder models/pocket/weights beside the services; "
                "install the whole distribution, or name another model with LIKENESS_MODELS and LIKENESS_BASE_MODEL"
            )
        return self._places.embedded

    async def _remove_departed(self) -> None:
        """Takes models out of the registry that an earlier catalogue named and this one does not."""
        departed = [name async for name in self._documents.names("", CATALOGUE) if name not in self._entries]
        for model in departed:
            try:
                await self._registry.remove("", model)
            except NotFound:
                logger.debug("model was gone already", extra={"model": model})
            await self._documents.delete("", CATALOGUE, model)
            logger.info("model left the catalogue", extra={"model": model})


def _files_of(entry: CatalogueEntry, path: Path) -> ModelFiles:
    """The files of an entry by their paths in the model; what a LoRA or an embedding holds is read by who draws."""
    if entry.kind == "model":
        return list_files(path, entry.config_path)
    if not path.is_file() or (entry.kind == "lora" and path.suffix != WEIGHTS):
        raise BadInput(
            f"there is no {entry.kind} at {path.name}: it must be a file, a LoRA a .safetensors one"
        )
    name = adapter_name(0) if entry.kind == "lora" else f"embedding{path.suffix}"
    return ModelFiles({name: path}, is_single=False)
