"""What the services need of the outside, as narrow protocols.

Each has a real adapter (:mod:`services.adapters`) and an in-memory twin (:mod:`services.adapters.memory`); one
conformance suite runs over both.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from services.domain.job import JobKind, JobRecord, JobRef


@dataclass(frozen=True, slots=True)
class Revision:
    """A record as the log holds it.

    Attributes:
        sequence: position in the log; the number to expect in the next compare-and-set.
        time_ms: when the log stored it, milliseconds since 1970, by the log's clock.
    """

    record: JobRecord
    sequence: int
    time_ms: int


class JobLog(Protocol):
    """Every revision of every job, one compare-and-set chain a job."""

    async def write(self, record: JobRecord, expected: int) -> int:
        """Stores a revision after the one with sequence `expected` (0: the job must not exist yet).

        The record gets a fresh write id. An unknown outcome is resolved by reading the log.

        Returns:
            The sequence of the new revision.

        Raises:
            Conflict: another revision came after `expected` first.
            QueueFull: the log has no room.
            OutcomeUnknown: the log did not answer until the deadline.
        """
        ...

    async def read(self, ref: JobRef) -> Revision | None:
        """The newest revision, read where decisions may rest on it; None when there is none."""
        ...

    async def next_revision(self, ref: JobRef, after: int) -> Revision | None:
        """The first revision of the job with a sequence above `after`; None when there is none."""
        ...

    async def read_many(self, refs: Sequence[JobRef]) -> list[Revision]:
        """The newest revisions of several jobs, for listings; may be stale, absent ones are left out."""
        ...

    async def purge(self, ref: JobRef, keep_last: bool) -> None:
        """Removes all revisions of a job, or all but the newest."""
        ...

    async def fill(self) -> float:
        """Share of the log's room that is used, 0..1."""
        ...

    def now_ms(self) -> int:
        """The present by the log's clock, milliseconds since 1970."""
        ...


@dataclass(frozen=True, slots=True)
class CaughtUp:
    """The feed has delivered everything that was stored when following began."""

    sequence: int


class JobFeed(Protocol):
    """The revisions as they come."""

    def follow(self, kind: JobKind | None = None) -> AsyncIterator[Revision | CaughtUp]:
        """Newest revision of every job, then :class:`CaughtUp`, then every new revision in order, for ever.

        A revision may come more than once; no revision written after the start is skipped. Survives restarts of
        the log. Ended jobs of the replay may come with an empty `spec`.
        """
        ...


@dataclass(frozen=True, slots=True)
class Beat:
    """A worker's sign of life as the replicas of an api tell each other.

    Attributes:
        jobs: (project, job id, epoch) of each job it works on.
        leaving: the worker takes no more work and is about to end.
    """

    kind: JobKind
    worker: str
    jobs: tuple[tuple[str, str, int], ...] = ()
    warm_models: tuple[str, ...] = ()
    free_slots: int = 0
    device: str = ""
    device_memory_bytes: int = 0
    leaving: bool = False


class BeatFeed(Protocol):
    """Beats of all workers of a kind, whichever replica received them. Loss is harmless."""

    async def publish_beat(self, beat: Beat) -> None:
        """Tells the other replicas; returns without waiting for them."""
        ...

    def follow_beats(self, kind: JobKind) -> AsyncIterator[Beat]:
        """Beats published from now on, one's own included."""
        ...


@dataclass(frozen=True, slots=True)
class ProgressEntry:
    """One stored progress message: its position, and the JSON of likeness.job.v1.Progress (or an image event)."""

    sequence: int
    body: Mapping[str, Any] = field(default_factory=dict)


class ProgressLog(Protocol):
    """Recent progress of jobs, at most 500 messages a job, and cursors over it. Loss is harmless."""

    async def publish_progress(self, project: str, job_id: str, body: Mapping[str, Any]) -> None:
        """Stores one message; returns without waiting for the acknowledgement."""
        ...

    async def last_progress(self, project: str, job_id: str) -> ProgressEntry | None:
        """The newest message."""
        ...

    async def progress_after(
        self, project: str, job_id: str, after: int, limit: int = 100
    ) -> list[ProgressEntry]:
        """Messages with a sequence above `after`, oldest first."""
        ...

    async def read_cursor(self, project: str, job_id: str) -> tuple[Mapping[str, Any], int]:
        """A reader's position and the sequence to expect when moving it; ({}, 0) when there is none."""
        ...

    async def write_cursor(self, project: str, job_id: str, value: Mapping[str, Any], expected: int) -> int:
        """Moves a reader's position by compare-and-set.

        Raises:
            Conflict: another reader moved it first.
        """
        ...


class SmallLog(Protocol):
    """Small documents with compare-and-set: idempotency keys and webhook cursors."""

    async def create_idempotency(self, project: str, key_hash: str, value: Mapping[str, Any]) -> None:
        """Stores what an idempotency key stands for, once.

        Raises:
            Conflict: the key is there already.
        """
        ...

    async def read_idempotency(self, project: str, key_hash: str) -> Mapping[str, Any] | None:
        """What an idempotency key stands for."""
        ...

    async def read_hook(self, project: str, job_id: str) -> tuple[Mapping[str, Any], int]:
        """A webhook's cursor and the sequence to expect when moving it; ({}, 0) when there is none."""
        ...

    async def write_hook(self, project: str, job_id: str, value: Mapping[str, Any], expected: int) -> int:
        """Moves a webhook's cursor by compare-and-set.

        Raises:
            Conflict: another sender moved it first.
        """
        ...


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a store knows of an object without reading it."""

    key: str
    size_bytes: int
    modified_ms: int


class ArtifactStore(Protocol):
    """Objects by key. Blobs are written once and never change; documents are small and may."""

    async def put_file(self, key: str, path: Path) -> None:
        """Stores a file's bytes under a key; whole or not at all. Storing what is there already changes nothing.

        Raises:
            Unavailable: the store does not answer or is full.
        """
        ...

    def read(self, key: str, offset: int = 0, limit: int | None = None) -> AsyncIterator[bytes]:
        """Streams an object's bytes in pieces of at most 1 MiB.

        Raises:
            NotFound: there is no such object.
        """
        ...

    async def stat(self, key: str) -> ObjectInfo | None:
        """Size and age of an object; None when it is not there."""
        ...

    async def put_document(self, key: str, data: bytes, *, create_only: bool) -> None:
        """Stores a small document.

        Raises:
            AlreadyExists: `create_only`, and there is one.
        """
        ...

    async def get_document(self, key: str) -> bytes | None:
        """A small document's bytes; None when it is not there."""
        ...

    async def delete(self, key: str) -> None:
        """Removes an object; nothing happens when it is not there."""
        ...

    def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """Every object whose key starts with `prefix`, in the order of keys."""
        ...


@dataclass(frozen=True, slots=True)
class DirectUpload:
    """An upload whose parts go straight to the store.

    Attributes:
        upload_id: the store's name for it.
        part_bytes: size of every part but the last.
        part_urls: where each part is PUT, in order; they need no keys and expire.
    """

    upload_id: str
    part_bytes: int
    part_urls: tuple[str, ...]


class DirectTransfers(Protocol):
    """What a store can do that others may read and write without its keys, by addresses that expire."""

    def download_url(self, key: str) -> str:
        """An address that reads one object."""
        ...

    async def begin_upload(self, key: str, size_bytes: int) -> DirectUpload:
        """Begins an upload; nothing is visible before it is finished.

        Raises:
            Unavailable: the store does not answer.
        """
        ...

    async def finish_upload(self, key: str, upload_id: str, size_bytes: int) -> None:
        """Makes the object of the parts that came; done again, it changes nothing.

        Raises:
            Unavailable: parts are missing, the upload is gone, or the store does not answer.
        """
        ...


class Clock(Protocol):
    """Time, for code that must be testable without waiting."""

    def now_ms(self) -> int:
        """Milliseconds since 1970."""
        ...

    def monotonic(self) -> float:
        """Seconds that never jump."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Waits."""
        ...
