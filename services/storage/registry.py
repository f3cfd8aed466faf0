"""The model registry: ids and names over manifests, manifests over blobs.

    <project>/refs/models/<id>             the entry: which manifest, since when, called how; written last
    <project>/refs/model_names/<name>      other names of an entry: its manifest's digest, its aliases
    <project>/blobs/sha256/<digest>        the manifest, immutable

A model is there when its entry is; names without an entry lead nowhere. A project sees its own models and the shared
catalogue's, its own first.
"""

import base64
import binascii
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

from google.protobuf.timestamp_pb2 import Timestamp
from likeness.storage.v1.model_pb2 import (
    MODEL_FORMAT_UNSPECIFIED,
    Model,
    ModelComponent,
    ModelManifest,
)

from services.adapters.manifests import digest_of, from_json, to_json
from services.domain.artifacts import blob_key, digest_of_key, is_blob_key, is_ref_name, project_of_key
from services.domain.errors import AlreadyExists, InvalidSpec, NotFound, Violation
from services.domain.rules import page_length
from services.storage.blobs import Blobs
from services.storage.documents import MODEL_NAMES, MODELS, Documents

MAX_MANIFEST_BYTES: Final = 64 << 20
KEPT_MANIFESTS: Final = 256


@dataclass(frozen=True, slots=True)
class _Entry:
    """What the registry keeps of a model."""

    project: str
    model: str
    manifest_key: str
    create_ms: int
    display_name: str = ""
    aliases: tuple[str, ...] = ()

    @classmethod
    def read(cls, project: str, model: str, document: dict[str, Any]) -> "_Entry":
        names = {"manifest_key", "create_ms", "display_name", "aliases"} & document.keys()
        values = {name: document[name] for name in names}
        return cls(project, model, **{**values, "aliases": tuple(values.get("aliases", ()))})

    def document(self) -> dict[str, Any]:
        return {
            "manifest_key": self.manifest_key,
            "create_ms": self.create_ms,
            "display_name": self.display_name,
            "aliases": list(self.aliases),
        }


class ModelRegistry:
    """Registers, finds, lists and removes models."""

    def __init__(
        self, blobs: Blobs, documents: Documents, now_ms: Callable[[], int], base_model: str
    ) -> None:
        """Takes what it works with.

        Args:
            blobs: components and manifests.
            documents: entries and names.
            now_ms: the present, milliseconds since 1970.
            base_model: what an empty id means.
        """
        self._blobs = blobs
        self._documents = documents
        self._now_ms = now_ms
        self.base_model = base_model
        self._manifests: OrderedDict[str, ModelManifest] = OrderedDict()

    async def register(
        self,
        project: str,
        model: str,
        manifest: ModelManifest,
        *,
        display_name: str = "",
        aliases: Sequence[str] = (),
        replace: bool = False,
    ) -> Model:
        """Registers a model whose files are stored.

        Args:
            project: owner; empty for the shared catalogue.
            model: id.
            manifest: what it is made of; files are sorted by path before it is stored.
            display_name: for people.
            aliases: other names.
            replace: let the id stand for this manifest from now on.

        Returns:
            The model; the entry that is there already when it has the same manifest.

        Raises:
            InvalidSpec: with every fault of id and manifest, files that are not stored among them.
            AlreadyExists: the id stands for another manifest.
        """
        await self._check(project, model, manifest, aliases)
        data = to_json(_sorted(manifest))
        key = blob_key(project, digest_of(data))
        known = await self._entry(project, model)
        if (
            known is not None
            and known.manifest_key == key
            and (not replace or known.aliases == tuple(aliases))
        ):
            return await self._model(known)
        if known is not None and not replace:
            raise AlreadyExists(f"{model} stands for another model already")
        await self._blobs.put_bytes(project, data, "application/json")
        entry = _Entry(project, model, key, self._now_ms(), display_name, tuple(aliases))
        await self._write(entry, replace=replace)
        return await self._model(entry)

    @staticmethod
    def digest_of(manifest: ModelManifest) -> str:
        """The digest that a manifest has once it is registered."""
        return digest_of(to_json(_sorted(manifest)))

    async def get(self, project: str, model: str) -> Model:
        """Finds a model.

        Args:
            project: who asks; empty: the catalogue only.
            model: id, alias or manifest digest; empty: the deployment's default base.

        Raises:
            NotFound: neither the project nor the catalogue has it.
        """
        wanted = model or self.base_model
        if is_ref_name(wanted):
            for owner in dict.fromkeys((project, "")):
                entry = await self._entry(owner, wanted) or await self._named(owner, wanted)
                if entry is not None:
                    return await self._model(entry)
        raise NotFound(f"there is no model {wanted}")

    async def has(self, project: str, name: str) -> bool:
        """Whether a project itself (or, for "", the catalogue) has a model of this id or name."""
        if not is_ref_name(name):
            return False
        return (await self._entry(project, name) or await self._named(project, name)) is not None

    async def list_page(self, project: str, page_size: int, page_token: str) -> tuple[list[Model], str]:
        """One page: the project's models, newest first, then the catalogue's by id.

        Args:
            project: whose models; empty: the catalogue only.
            page_size: 1..200; 0: 50.
            page_token: what the page before gave; empty: the first page.

        Returns:
            The models, and the next page's token; empty on the last.

        Raises:
            InvalidSpec: page size or token is wrong.
        """
        length = page_length(page_size)
        last = _read_token(page_token)
        rest = [place for place in await self._places(project) if last is None or place > last]
        page = rest[:length]
        models = [await self._model(entry) for entry in [await self._at(place) for place in page] if entry]
        return models, _token(page[-1]) if len(rest) > len(page) else ""

    async def delete(self, project: str, model: str) -> None:
        """Removes a model from the registry; its files stay, since others may share them.

        Raises:
            InvalidSpec: the catalogue is not the callers' to change.
            NotFound: the project has no such model.
        """
        if not project:
            raise InvalidSpec("must name a project: the catalogue is not changed here", "project_id")
        await self.remove(project, model)

    async def remove(self, project: str, model: str) -> None:
        """Removes an entry and its names, of a project or of the catalogue; raises NotFound."""
        entry = await self._entry(project, model) if is_ref_name(model) else None
        if entry is None:
            raise NotFound(f"there is no model {model}")
        await self._documents.delete(project, MODELS, model)
        for name in (digest_of_key(entry.manifest_key), *entry.aliases):
            found = await self._documents.get(project, MODEL_NAMES, name)
            if found is not None and found["model"] == model:
                await self._documents.delete(project, MODEL_NAMES, name)

    async def read_manifest(self, key: str) -> ModelManifest:
        """A manifest by its key; the newest used are kept in memory. Raises NotFound."""
        if key in self._manifests:
            self._manifests.move_to_end(key)
            return self._manifests[key]
        manifest = from_json(await self._blobs.read_small(key, MAX_MANIFEST_BYTES), ModelManifest)
        self._manifests[key] = manifest
        if len(self._manifests) > KEPT_MANIFESTS:
            self._manifests.popitem(last=False)
        return manifest

    async def _write(self, entry: _Entry, *, replace: bool) -> None:
        """Names first, the entry last: it is what makes the model exist."""
        named = {"model": entry.model, "manifest_key": entry.manifest_key}
        digest = digest_of_key(entry.manifest_key)
        for name in (digest, *entry.aliases):
            await self._documents.put(entry.project, MODEL_NAMES, name, named, replace=True)
        await self._documents.put(entry.project, MODELS, entry.model, entry.document(), replace=replace)

    async def _entry(self, project: str, model: str) -> _Entry | None:
        document = await self._documents.get(project, MODELS, model)
        return None if document is None else _Entry.read(project, model, document)

    async def _named(self, project: str, name: str) -> _Entry | None:
        """The entry behind another name, with the very manifest that the name was given for."""
        found = await self._documents.get(project, MODEL_NAMES, name)
        entry = await self._entry(project, found["model"]) if found is not None else None
        if found is None or entry is None:
            return None
        return _Entry(
            project, entry.model, found["manifest_key"], entry.create_ms, entry.display_name, entry.aliases
        )

    async def _model(self, entry: _Entry) -> Model:
        created = Timestamp()
        created.FromMilliseconds(entry.create_ms)
        return Model(
            model=entry.model,
            project_id=entry.project,
            manifest_key=entry.manifest_key,
            manifest_digest=digest_of_key(entry.manifest_key),
            manifest=await self.read_manifest(entry.manifest_key),
            create_time=created,
            aliases=entry.aliases,
            display_name=entry.display_name,
        )

    async def _places(self, project: str) -> list["_Place"]:
        """Where each model stands in a listing, in order."""
        own = []
        if project:
            async for name in self._documents.names(project, MODELS):
                entry = await self._entry(project, name)
                if entry is not None:
                    own.append(_Place(0, -entry.create_ms, name, project))
        shared = [_Place(1, 0, name, "") async for name in self._documents.names("", MODELS)]
        return sorted(own + shared)

    async def _at(self, place: "_Place") -> _Entry | None:
        return await self._entry(place.project, place.model)

    async def _check(self, project: str, model: str, manifest: ModelManifest, aliases: Sequence[str]) -> None:
        """Raises InvalidSpec with all faults."""
        faults = [Violation("model", _NAME_RULE)] if not is_ref_name(model) else []
        faults += [Violation("aliases", _NAME_RULE) for alias in aliases if not is_ref_name(alias)]
        if manifest.format == MODEL_FORMAT_UNSPECIFIED:
            faults.append(Violation("manifest.format", "must be given"))
        if not manifest.components:
            faults.append(Violation("manifest.components", "must not be empty"))
        paths = [component.path for component in manifest.components]
        for index, component in enumerate(manifest.components):
            name = f"manifest.components[{index}]"
            if not _is_inner_path(component.path) or paths.count(component.path) > 1:
                faults.append(Violation(f"{name}.path", "must be a relative path, once"))
            faults += await self._component_faults(project, component, name)
        if manifest.base_manifest_key:
            faults += await self._key_faults(
                project, manifest.base_manifest_key, "manifest.base_manifest_key"
            )
        for index, export in enumerate(manifest.exports):
            faults += await self._key_faults(project, export.key, f"manifest.exports[{index}].key")
        if faults:
            raise InvalidSpec(faults)

    async def _component_faults(self, project: str, component: ModelComponent, name: str) -> list[Violation]:
        faults = await self._key_faults(project, component.key, f"{name}.key")
        if faults:
            return faults
        if component.digest != digest_of_key(component.key):
            faults.append(Violation(f"{name}.digest", "is not that of its key"))
        info = await self._blobs.find(component.key, project)
        if info is not None and info.size_bytes != component.size_bytes:
            faults.append(Violation(f"{name}.size_bytes", f"is not that of the stored {info.size_bytes}"))
        return faults

    async def _key_faults(self, project: str, key: str, name: str) -> list[Violation]:
        allowed = is_blob_key(key) and project_of_key(key) in (project, "")
        if not allowed:
            return [Violation(name, "must be an artifact of the project or of the catalogue")]
        return [] if await self._blobs.find(key, project) else [Violation(name, "is not stored")]


@dataclass(frozen=True, slots=True, order=True)
class _Place:
    """A model's place in a listing; orders as the listing does."""

    group: int
    age: int
    model: str
    project: str


_NAME_RULE: Final = "must be 1 to 128 letters, digits, '_', '.' or '-'"


def _sorted(manifest: ModelManifest) -> ModelManifest:
    copy = ModelManifest()
    copy.CopyFrom(manifest)
    copy.components.sort(key=lambda component: component.path)
    return copy


def _is_inner_path(text: str) -> bool:
    path = PurePosixPath(text)
    clean = bool(path.parts) and not path.is_absolute() and ".." not in path.parts and str(path) == text
    return clean and "\\" not in text and "\0" not in text and not text.startswith(".")


def _token(place: _Place) -> str:
    text = f"{place.group}/{place.age}/{place.model}/{place.project}"
    return base64.urlsafe_b64encode(text.encode()).decode()


def _read_token(token: str) -> _Place | None:
    if not token:
        return None
    try:
        group, age, model, project = base64.urlsafe_b64decode(token).decode().split("/")
        return _Place(int(group), int(age), model, project)
    except (ValueError, binascii.Error) as error:
        raise InvalidSpec("is not one that a page before gave", "page_token") from error
