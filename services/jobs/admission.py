"""What an owner may do with a job: admit it once, cancel, start again, delete, let go earlier.

Admission is one write, and idempotent in every form: a repeat of the same request gives the same job, however often
and through whichever replica it comes; the same name for another request is refused.
"""

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from likeness.job.v1.job_pb2 import JobOptions, JobPolicy, JobPriority

from services.domain import life_cycle as life
from services.domain.errors import AlreadyExists, Conflict, InvalidSpec, QueueFull, Violation
from services.domain.job import (
    LONGEST_RETENTION_MS,
    PRIORITY_HIGH,
    PRIORITY_LOW,
    PRIORITY_NORMAL,
    RETENTION_WORDS,
    SHORTEST_RETENTION_MS,
    JobKind,
    JobRecord,
    JobRef,
    JobState,
    Limits,
)
from services.domain.ports import Revision, SmallLog
from services.jobs.documents import DocumentStore
from services.jobs.records import Records
from services.jobs.removal import Removal

MAX_SPEC_BYTES: Final = 12 * 1024
"""Longest specification, as JSON, that a record carries itself."""
MAX_INLINE_BYTES: Final = 16 * 1024
"""Most that specification and options may take together; the rest of a record is for what happens later."""
MAX_FILL: Final = 0.8
FILL_MS: Final = 1000
"""Age up to which the log's fill is taken for its present one."""
MAX_REQUEST_ID_CHARS: Final = 255

DAY_MS: Final = 24 * 3600 * 1000
_SPANS: Final = {
    "execution_timeout": (5_000, 7 * DAY_MS, "5 s to 7 days"),
    "ttl": (10_000, 7 * DAY_MS, "10 s to 7 days"),
    "retention": (SHORTEST_RETENTION_MS, LONGEST_RETENTION_MS, RETENTION_WORDS),
}
_RANKS: Final = {
    JobPriority.JOB_PRIORITY_UNSPECIFIED: PRIORITY_NORMAL,
    JobPriority.JOB_PRIORITY_LOW: PRIORITY_LOW,
    JobPriority.JOB_PRIORITY_NORMAL: PRIORITY_NORMAL,
    JobPriority.JOB_PRIORITY_HIGH: PRIORITY_HIGH,
}


@dataclass(frozen=True, slots=True)
class Application:
    """A job as it was asked for.

    Attributes:
        project: its owner.
        job_id: the id wanted; "": one is made.
        request_id: key of idempotency; "": the job's id is the only one.
        asked: the specification as the caller gave it: what makes a repeat recognisable.
        spec: the specification with all defaults resolved.
        options: policy, origin, webhook.
        model: digest of the model that is needed; "" when any worker will do.
        parent: training that a drawing belongs to.
    """

    project: str
    job_id: str
    request_id: str
    asked: Message
    spec: Message
    options: JobOptions
    model: str = ""
    parent: str = ""

    @property
    def digest(self) -> str:
        """What was asked for, in 64 hexadecimal digits; names, trace and log ids do not count."""
        options = JobOptions()
        options.CopyFrom(self.options)
        options.ClearField("traceparent")
        options.ClearField("caller_request_id")
        parts = [as_json(self.asked), as_json(options), self.parent]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Admission:
    """Admits jobs of one kind and lets their owners steer them."""

    def __init__(
        self,
        kind: JobKind,
        records: Records,
        small: SmallLog,
        documents: DocumentStore,
        removal: Removal,
        defaults: Limits | None = None,
    ) -> None:
        """Joins what admission needs.

        Args:
            kind: the jobs admitted.
            records: their log and index.
            small: where idempotency keys are.
            documents: where long specifications go.
            removal: what removes jobs.
            defaults: limits of jobs that name none.
        """
        self._kind = kind
        self._records = records
        self._small = small
        self._documents = documents
        self._removal = removal
        self._defaults = defaults or Limits()
        self._fill_read_ms = 0
        self._last_fill = 0.0

    async def known(self, application: Application) -> Revision | None:
        """The job that the same request made before; None when it is new.

        Lets callers skip work that only a new job needs. :meth:`admit` decides by itself.

        Raises:
            AlreadyExists: the name stands for another request.
        """
        self._check_names(application)
        job_id = await self._known_id(application)
        if not job_id:
            return None
        revision = await self._records.log.read(JobRef(self._kind, application.project, job_id))
        return _same(revision, application.digest) if revision is not None else None

    async def admit(self, application: Application) -> Revision:
        """Stores a job, or finds the one that the same request made before.

        Args:
            application: what is asked for.

        Returns:
            The revision that admitted it; of a repeat, the newest one.

        Raises:
            InvalidSpec: names, limits or sizes are out of range.
            AlreadyExists: the name stands for another request.
            QueueFull: there is no room for one more job.
            Unavailable: the log or storage does not answer.
        """
        self._check_names(application)
        limits = limits_of(application.options.policy, self._defaults)
        if await self._fill() >= MAX_FILL:
            return await self._known_or_full(application)
        ref = JobRef(self._kind, application.project, await self._settled_id(application))
        record = await self._record(ref, application, limits)
        try:
            return await self._records.write(record, 0)
        except QueueFull:
            return await self._known_or_full(application)
        except Conflict:
            revision = await self._records.log.read(ref)
        if revision is None:
            raise Conflict(f"job {ref.id} came and went")
        return _same(revision, application.digest)

    async def _fill(self) -> float:
        """How full the log is, asked at most once in a while: it is one more round trip before the one write."""
        now_ms = self._records.now_ms()
        if not 0 <= now_ms - self._fill_read_ms < FILL_MS:
            self._last_fill = await self._records.log.fill()
            self._fill_read_ms = now_ms
        return self._last_fill

    async def _known_or_full(self, application: Application) -> Revision:
        known = await self.known(application)
        if known is None:
            raise QueueFull("the queue has no room for one more job")
        return known

    def _check_names(self, application: Application) -> None:
        JobRef(self._kind, application.project, application.job_id or "x")
        if len(application.request_id) > MAX_REQUEST_ID_CHARS:
            raise InvalidSpec(f"must be at most {MAX_REQUEST_ID_CHARS} characters", "request_id")

    async def _known_id(self, application: Application) -> str:
        """The id that a repeat would find, without settling anything."""
        if application.request_id and application.job_id:
            known = await self._small.read_idempotency(application.project, self._key(application))
            return self._same_id(known, application) if known is not None else ""
        return application.job_id or self._derived_id(application)

    async def _settled_id(self, application: Application) -> str:
        """The id of the job: what an idempotency key stands for already, or stands for from now on."""
        if not application.request_id or not application.job_id:
            return application.job_id or self._derived_id(application) or str(uuid.uuid4())
        key = self._key(application)
        value = {"kind": self._kind.value, "id": application.job_id, "request": application.digest}
        try:
            await self._small.create_idempotency(application.project, key, value)
            return application.job_id
        except Conflict:
            known = await self._small.read_idempotency(application.project, key)
        return self._same_id(known, application) if known is not None else application.job_id

    def _same_id(self, known: Mapping[str, Any], application: Application) -> str:
        if known.get("request") != application.digest:
            raise AlreadyExists("this request_id stands for another request")
        return str(known["id"])

    def _derived_id(self, application: Application) -> str:
        """An id that follows from the key alone; "" without a key."""
        if not application.request_id:
            return ""
        name = f"{self._kind.value}/{application.project}/{application.request_id}"
        return str(uuid.uuid5(uuid.NAMESPACE_OID, name))

    def _key(self, application: Application) -> str:
        return hashlib.sha256(f"{self._kind.value}/{application.request_id}".encode()).hexdigest()

    async def _record(self, ref: JobRef, application: Application, limits: Limits) -> JobRecord:
        spec, options = as_json(application.spec), as_json(application.options)
        spec_key = ""
        if _size(spec) > MAX_SPEC_BYTES or _size(spec) + _size(options) > MAX_INLINE_BYTES:
            spec_key = await self._documents.put(ref.project, _text(spec))
            spec = {}
        if _size(options) > MAX_INLINE_BYTES:
            options = await self._without_request(ref.project, application.options)
        common: dict[str, Any] = {
            "spec": spec,
            "spec_key": spec_key,
            "options": options,
            "limits": limits,
            "request": application.digest,
            "now_ms": self._records.now_ms(),
        }
        if self._kind is JobKind.TRAIN:
            return life.admit_training(ref, **common)
        return life.admit_drawing(ref, model=application.model, parent=application.parent, **common)

    async def _without_request(self, project: str, options: JobOptions) -> dict[str, Any]:
        """Options whose copy of the caller's request lies in storage."""
        lighter = JobOptions()
        lighter.CopyFrom(options)
        text = lighter.origin.request_json
        lighter.origin.request_json = ""
        if text:
            lighter.origin.request_key = await self._documents.put(project, text.encode())
        if _size(as_json(lighter)) > MAX_INLINE_BYTES:
            raise InvalidSpec("is too long", "options")
        return as_json(lighter)

    # After admission

    async def cancel(self, ref: JobRef) -> Revision:
        """Ends a job for its owner; one that has ended already is returned as it is."""
        return await self._records.change(ref, lambda record: life.cancel(record, self._records.now_ms()))

    async def retry(self, ref: JobRef) -> Revision:
        """Starts a FAILED or TIMED_OUT job again.

        Raises:
            NotFound: there is no such job.
            WrongState: it has not failed.
        """
        return await self._records.change(ref, lambda record: life.retry(record, self._records.now_ms()))

    async def delete(self, ref: JobRef) -> None:
        """Removes a job; one in progress is cancelled first.

        Raises:
            NotFound: there is no such job.
        """
        await self.cancel(ref)
        await self._removal.remove(ref)

    async def shorten_retention(self, ref: JobRef, keep_until_ms: int) -> Revision:
        """Lets an ended job go at this moment at the latest; milliseconds since 1970."""

        def move(record: JobRecord) -> JobRecord:
            earlier = not record.is_final or keep_until_ms < record.times.keep_until
            return life.shorten_retention(record, keep_until_ms) if earlier else record

        return await self._records.change(ref, move)


def _same(revision: Revision, digest: str) -> Revision:
    """The job of a repeated request.

    Raises:
        AlreadyExists: it is the job of another request.
    """
    record = revision.record
    if record.state is JobState.DELETED or record.request != digest:
        raise AlreadyExists(f"there is another job {record.id}")
    return revision


def limits_of(policy: JobPolicy, defaults: Limits) -> Limits:
    """The limits that a policy asks for.

    Args:
        policy: what the caller said.
        defaults: what holds where it said nothing.

    Raises:
        InvalidSpec: with every limit that is out of range.
    """
    given, faults = {}, []
    for name, (lowest, highest, words) in _SPANS.items():
        if not policy.HasField(name):
            continue
        span: Duration = getattr(policy, name)
        given[f"{name}_ms"] = span.ToMilliseconds()
        if not lowest <= span.ToMilliseconds() <= highest:
            faults.append(Violation(f"options.policy.{name}", f"must be {words}"))
    if policy.priority not in _RANKS:
        faults.append(Violation("options.policy.priority", "is not a known priority"))
    if faults:
        raise InvalidSpec(faults)
    return replace(defaults, priority=_RANKS[policy.priority], **given)


def as_json(message: Message) -> dict[str, Any]:
    """A message as records keep it: proto field names, defaults left out."""
    return dict(MessageToDict(message, preserving_proto_field_name=True))


def _text(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def _size(document: Mapping[str, Any]) -> int:
    return len(_text(document))
