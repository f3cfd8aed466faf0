"""Projects and keys: who may come in, and as whom.

    shared/refs/projects/<project>               the project
    <project>/refs/keys/<key id>                 the key's record; never changes
    <project>/refs/key_revocations/<key id>      written once; from then on the key is dead
    <project>/refs/key_uses/<key id>             when it was used last, to the minute
    shared/refs/key_hashes/<sha256 of secret>    whose key this is

Since no document is both changed and decisive, replicas cannot undo each other: noting a use can never bring a
revoked key back. Secrets are 256 random bits, so a plain SHA-256 is enough to keep them from being read back.
"""

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.timestamp_pb2 import Timestamp
from likeness.access.v1.access_service_pb2 import (
    CheckKeyRequest,
    CheckKeyResponse,
    CreateKeyRequest,
    CreateKeyResponse,
    CreateProjectRequest,
    CreateProjectResponse,
    Key,
    ListKeysRequest,
    ListKeysResponse,
    ListProjectsRequest,
    ListProjectsResponse,
    Project,
    RevokeKeyRequest,
    RevokeKeyResponse,
)
from likeness.access.v1.access_service_pb2_grpc import AccessServiceServicer

from services.domain.artifacts import is_ref_name, scope
from services.domain.errors import AlreadyExists, InvalidSpec, NotFound, Unauthenticated, Unavailable
from services.domain.rules import page_length
from services.storage.documents import (
    KEY_HASHES,
    KEY_REVOCATIONS,
    KEY_USES,
    KEYS,
    PROJECTS,
    Documents,
)

logger = logging.getLogger(__name__)

SECRET_PREFIX: Final = "lk_"
SECRET_BYTES: Final = 32
CACHE_S: Final = 5.0
"""So long a replica may trust what it read; a key revoked through another replica lives so much longer."""
CACHED_KEYS: Final = 10_000
NOTE_USES_EVERY_S: Final = 30.0
MAX_NAME: Final = 200
_SECRET: Final = re.compile(rf"{SECRET_PREFIX}[A-Za-z0-9_-]{{43}}")
_MINUTE_MS: Final = 60_000


@dataclass(frozen=True, slots=True)
class _Checked:
    """A key as it was read, and until when that may be trusted."""

    key: Key
    project: Project
    trusted_until: float


class Access:
    """Makes, checks and ends keys."""

    def __init__(
        self, documents: Documents, now_ms: Callable[[], int], monotonic: Callable[[], float]
    ) -> None:
        """Takes what it works with.

        Args:
            documents: where projects and keys are kept.
            now_ms: the present, milliseconds since 1970.
            monotonic: seconds that never jump.
        """
        self._documents = documents
        self._now_ms = now_ms
        self._monotonic = monotonic
        self._cache: OrderedDict[str, _Checked] = OrderedDict()
        self._uses: dict[tuple[str, str], int] = {}
        self._noted: dict[tuple[str, str], int] = {}

    async def create_project(self, project: Project) -> Project:
        """Makes a project.

        Returns:
            The project; the one that is there already when it has the same name.

        Raises:
            InvalidSpec: id or name is malformed.
            AlreadyExists: the id belongs to a project of another name.
        """
        if not project.project_id:
            raise InvalidSpec("must be given", "project.project_id")
        scope(project.project_id)
        _check_name(project.display_name, "project.display_name")
        made = Project()
        made.CopyFrom(project)
        made.create_time.CopyFrom(_timestamp(self._now_ms()))
        kept = await self._documents.put_if_absent("", PROJECTS, project.project_id, _document(made))
        found = ParseDict(kept, Project(), ignore_unknown_fields=True)
        if found.display_name != project.display_name:
            raise AlreadyExists(f"the project {project.project_id} has another name")
        return found

    async def list_projects(self, page_size: int, page_token: str) -> tuple[list[Project], str]:
        """One page of the projects, by id, and the next page's token."""
        names = [name async for name in self._documents.names("", PROJECTS) if name > page_token]
        page, token = _page(names, page_size)
        return [await self.project(name) for name in page], token

    async def project(self, project_id: str) -> Project:
        """A project; raises NotFound."""
        scope(project_id)
        found = await self._documents.get("", PROJECTS, project_id) if project_id else None
        if found is None:
            raise NotFound(f"there is no project {project_id}")
        return ParseDict(found, Project(), ignore_unknown_fields=True)

    async def create_key(
        self,
        project_id: str,
        *,
        display_name: str = "",
        scopes: Sequence[str] = (),
        expire_ms: int | None = None,
        secret: str = "",
    ) -> tuple[Key, str]:
        """Makes a key.

        Args:
            project_id: the project.
            display_name: for people.
            scopes: what it may do; empty: everything in its project.
            expire_ms: when it stops working, milliseconds since 1970; None: never.
            secret: one that exists already; empty: a new one.

        Returns:
            Its record and its secret, which is kept nowhere.

        Raises:
            NotFound: no such project.
            InvalidSpec: the name is too long, or the expiry has passed.
        """
        await self.project(project_id)
        _check_name(display_name, "display_name")
        if expire_ms is not None and expire_ms <= self._now_ms():
            raise InvalidSpec("must be in the future", "expire_time")
        secret = secret or new_secret()
        hashed = _hash(secret)
        key = Key(
            key_id=secrets.token_hex(8),
            project_id=project_id,
            display_name=display_name,
            scopes=scopes,
            create_time=_timestamp(self._now_ms()),
        )
        if expire_ms is not None:
            key.expire_time.CopyFrom(_timestamp(expire_ms))
        record = {"key": _document(key), "secret_sha256": hashed}
        await self._documents.put(project_id, KEYS, key.key_id, record)
        # The hash comes last: it is what makes the key work.
        place = {"project_id": project_id, "key_id": key.key_id}
        await self._documents.put("", KEY_HASHES, hashed, place)
        return key, secret

    async def list_keys(self, project_id: str, page_size: int, page_token: str) -> tuple[list[Key], str]:
        """One page of a project's keys, newest first, and the next page's token; raises NotFound."""
        await self.project(project_id)
        keys = [await self.key(project_id, name) async for name in self._documents.names(project_id, KEYS)]
        places = {f"{2**63 - key.create_time.ToMilliseconds():020d}-{key.key_id}": key for key in keys}
        page, token = _page(sorted(place for place in places if place > page_token), page_size)
        return [places[place] for place in page], token

    async def key(self, project_id: str, key_id: str) -> Key:
        """A key's record with its last use and its revocation; raises NotFound."""
        record = await self._documents.get(project_id, KEYS, key_id) if is_ref_name(key_id) else None
        if record is None:
            raise NotFound(f"there is no key {key_id}")
        key = ParseDict(record["key"], Key(), ignore_unknown_fields=True)
        revoked = await self._documents.get(project_id, KEY_REVOCATIONS, key_id)
        if revoked is not None:
            key.revoke_time.CopyFrom(_timestamp(revoked["revoke_ms"]))
        used = await self._documents.get(project_id, KEY_USES, key_id)
        last = max(used["use_ms"] if used else 0, self._uses.get((project_id, key_id), 0))
        if last:
            key.last_use_time.CopyFrom(_timestamp(last))
        return key

    async def revoke_key(self, project_id: str, key_id: str) -> Key:
        """Ends a key at once; ending it again changes nothing. Raises NotFound."""
        await self.project(project_id)
        await self.key(project_id, key_id)
        now = {"revoke_ms": self._now_ms()}
        await self._documents.put_if_absent(project_id, KEY_REVOCATIONS, key_id, now)
        for hashed, checked in list(self._cache.items()):
            if checked.key.key_id == key_id:
                del self._cache[hashed]
        return await self.key(project_id, key_id)

    async def check_key(self, secret: str) -> tuple[Key, Project]:
        """Says whose key this is, and notes the use.

        Raises:
            Unauthenticated: unknown, revoked or expired; the answer is the same.
        """
        if not is_secret(secret):
            raise Unauthenticated("the key is not known")
        checked = await self._known(_hash(secret))
        if checked.key.HasField("expire_time") and checked.key.expire_time.ToMilliseconds() <= self._now_ms():
            raise Unauthenticated("the key is not known")
        use_ms = self._now_ms() // _MINUTE_MS * _MINUTE_MS
        self._uses[(checked.key.project_id, checked.key.key_id)] = use_ms
        return checked.key, checked.project

    async def is_registered(self, secret: str) -> bool:
        """Whether a key with this secret was ever made, revoked ones included."""
        return await self._documents.get("", KEY_HASHES, _hash(secret)) is not None

    async def note_uses(self) -> int:
        """Writes down the uses since the last time; returns of how many keys."""
        changed = {place: ms for place, ms in self._uses.items() if self._noted.get(place) != ms}
        for (project_id, key_id), use_ms in changed.items():
            await self._documents.put(project_id, KEY_USES, key_id, {"use_ms": use_ms}, replace=True)
        self._noted |= changed
        return len(changed)

    async def run(self) -> None:
        """Writes down uses now and then, for ever; what the store did not take is written the next time."""
        while True:
            await asyncio.sleep(NOTE_USES_EVERY_S)
            try:
                await self.note_uses()
            except Unavailable as error:
                logger.warning("uses of keys not noted", extra={"why": str(error)})

    async def _known(self, hashed: str) -> _Checked:
        found = self._cache.get(hashed)
        if found is None or found.trusted_until <= self._monotonic():
            found = await self._read(hashed)
            self._cache[hashed] = found
            if len(self._cache) > CACHED_KEYS:
                self._cache.popitem(last=False)
        return found

    async def _read(self, hashed: str) -> _Checked:
        until = self._monotonic() + CACHE_S
        place = await self._documents.get("", KEY_HASHES, hashed)
        if place is None:
            raise Unauthenticated("the key is not known")
        project_id, key_id = place["project_id"], place["key_id"]
        record = await self._documents.get(project_id, KEYS, key_id) or {}
        key = await self.key(project_id, key_id)
        if not hmac.compare_digest(record.get("secret_sha256", ""), hashed) or key.HasField("revoke_time"):
            raise Unauthenticated("the key is not known")
        return _Checked(key, await self.project(project_id), until)


class AccessServicer(AccessServiceServicer):
    """The RPCs over :class:`Access`."""

    def __init__(self, access: Access) -> None:
        """Serves an :class:`Access`."""
        self._access = access

    async def CreateProject(self, request: CreateProjectRequest, context: Any) -> CreateProjectResponse:
        """Makes a project."""
        return CreateProjectResponse(project=await self._access.create_project(request.project))

    async def ListProjects(self, request: ListProjectsRequest, context: Any) -> ListProjectsResponse:
        """Lists the projects, by id."""
        projects, token = await self._access.list_projects(request.page_size, request.page_token)
        return ListProjectsResponse(projects=projects, next_page_token=token)

    async def CreateKey(self, request: CreateKeyRequest, context: Any) -> CreateKeyResponse:
        """Makes a key."""
        expires = request.HasField("expire_time")
        key, secret = await self._access.create_key(
            request.project_id,
            display_name=request.display_name,
            scopes=request.scopes,
            expire_ms=request.expire_time.ToMilliseconds() if expires else None,
        )
        return CreateKeyResponse(key=key, secret=secret)

    async def ListKeys(self, request: ListKeysRequest, context: Any) -> ListKeysResponse:
        """Lists a project's keys, newest first."""
        keys, token = await self._access.list_keys(request.project_id, request.page_size, request.page_token)
        return ListKeysResponse(keys=keys, next_page_token=token)

    async def RevokeKey(self, request: RevokeKeyRequest, context: Any) -> RevokeKeyResponse:
        """Ends a key at once."""
        return RevokeKeyResponse(key=await self._access.revoke_key(request.project_id, request.key_id))

    async def CheckKey(self, request: CheckKeyRequest, context: Any) -> CheckKeyResponse:
        """Says whose key this is."""
        key, project = await self._access.check_key(request.secret)
        return CheckKeyResponse(key=key, project=project)


def is_secret(text: str) -> bool:
    """The text has the form of a key."""
    return _SECRET.fullmatch(text) is not None


def new_secret() -> str:
    """A key's secret: a prefix that says what it is, and 256 random bits."""
    return SECRET_PREFIX + secrets.token_urlsafe(SECRET_BYTES)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _timestamp(ms: int) -> Timestamp:
    made = Timestamp()
    made.FromMilliseconds(ms)
    return made


def _document(message: Any) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True)


def _check_name(name: str, field: str) -> None:
    if len(name) > MAX_NAME:
        raise InvalidSpec(f"must not be longer than {MAX_NAME} characters", field)


def _page(names: list[str], page_size: int) -> tuple[list[str], str]:
    page = names[: page_length(page_size)]
    return page, page[-1] if len(names) > len(page) else ""
