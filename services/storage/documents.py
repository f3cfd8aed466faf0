"""Small JSON documents under names: the references other services keep here, and storage's own books.

Storage's own kinds (models, keys, secrets) are closed to the RPCs that write and read references.
"""

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from google.protobuf.timestamp_pb2 import Timestamp
from likeness.storage.v1.artifact_pb2 import Ref

from services.domain.artifacts import MAX_DOCUMENT_BYTES, ref_key, ref_prefix
from services.domain.errors import AlreadyExists, InvalidSpec, NotFound, PermissionDenied
from services.domain.ports import ArtifactStore

MODELS: Final = "models"
MODEL_NAMES: Final = "model_names"
CATALOGUE: Final = "catalogue"
PROJECTS: Final = "projects"
KEYS: Final = "keys"
KEY_HASHES: Final = "key_hashes"
KEY_USES: Final = "key_uses"
KEY_REVOCATIONS: Final = "key_revocations"
SECRETS: Final = "secrets"
OWN_KINDS: Final = frozenset(
    {MODELS, MODEL_NAMES, CATALOGUE, PROJECTS, KEYS, KEY_HASHES, KEY_USES, KEY_REVOCATIONS, SECRETS}
)


class Documents:
    """JSON objects by project, kind and name; project "" is the shared scope."""

    def __init__(self, store: ArtifactStore) -> None:
        """Keeps them in an artifact store."""
        self._store = store

    async def get(self, project: str, kind: str, name: str) -> dict[str, Any] | None:
        """The document; None when there is none."""
        data = await self._store.get_document(ref_key(project, kind, name))
        return None if data is None else json.loads(data)

    async def put(
        self, project: str, kind: str, name: str, document: Mapping[str, Any], *, replace: bool = False
    ) -> None:
        """Writes a document.

        Raises:
            AlreadyExists: there is one, and not `replace`.
        """
        data = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        await self._store.put_document(ref_key(project, kind, name), data, create_only=not replace)

    async def put_if_absent(
        self, project: str, kind: str, name: str, document: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Writes a document unless there is one; returns what is there afterwards."""
        try:
            await self.put(project, kind, name, document)
        except AlreadyExists:
            return await self.get(project, kind, name) or dict(document)
        return dict(document)

    async def delete(self, project: str, kind: str, name: str) -> None:
        """Removes a document; nothing happens when there is none."""
        await self._store.delete(ref_key(project, kind, name))

    async def names(self, project: str, kind: str) -> AsyncIterator[str]:
        """Names of all documents of a kind, sorted."""
        prefix = ref_prefix(project, kind)
        async for info in self._store.list(prefix):
            yield info.key.removeprefix(prefix)


class References:
    """The references of other services."""

    def __init__(self, store: ArtifactStore) -> None:
        """Keeps them in an artifact store."""
        self._store = store

    async def put(self, ref: Ref, *, replace: bool) -> Ref:
        """Writes a reference; writing the same document again changes nothing.

        Raises:
            AlreadyExists: another document has this name, and not `replace`.
            InvalidSpec: names or document are malformed, or the document is too large.
            PermissionDenied: a kind of storage's own.
        """
        key = _open_key(ref.project_id, ref.kind, ref.name)
        data = _checked_document(ref.document_json)
        try:
            await self._store.put_document(key, data, create_only=not replace)
        except AlreadyExists:
            if await self._store.get_document(key) != data:
                raise
        return await self.get(ref.project_id, ref.kind, ref.name)

    async def get(self, project: str, kind: str, name: str) -> Ref:
        """Reads a reference.

        Raises:
            NotFound: there is none.
            PermissionDenied: a kind of storage's own.
        """
        key = _open_key(project, kind, name)
        info, data = await self._store.stat(key), await self._store.get_document(key)
        if info is None or data is None:
            raise NotFound(f"no {kind} named {name}")
        written = Timestamp()
        written.FromMilliseconds(info.modified_ms)
        return Ref(project_id=project, kind=kind, name=name, document_json=data.decode(), update_time=written)


def _open_key(project: str, kind: str, name: str) -> str:
    key = ref_key(project, kind, name)
    if kind in OWN_KINDS:
        raise PermissionDenied(f"references of kind {kind} are storage's own")
    return key


def _checked_document(text: str) -> bytes:
    data = text.encode()
    if len(data) > MAX_DOCUMENT_BYTES:
        raise InvalidSpec(f"must not be larger than {MAX_DOCUMENT_BYTES} bytes", "ref.document_json")
    try:
        json.loads(text)
    except ValueError as error:
        raise InvalidSpec("must be JSON", "ref.document_json") from error
    return data
