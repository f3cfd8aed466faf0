"""What a job is: its names, states, stages and its record, which is one revision of it in the job log.

Pure data. The legal moves from one revision to the next are in :mod:`services.domain.life_cycle`. All times are
milliseconds since 1970 by the job log's clock.
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any, Final, Self

from services.domain.errors import InvalidSpec

SCHEMA_VERSION: Final = 1
MAX_RECORD_BYTES: Final = 32 * 1024
ID_PATTERN: Final = re.compile(r"^[A-Za-z0-9_-]{1,64}\Z")
MAX_ERROR_BYTES: Final = 2000
MAX_WHY_BYTES: Final = 500
MAX_REMARKS: Final = 20
MAX_REMARK_CHARS: Final = 200
MAX_REMARKS_BYTES: Final = 3 * 1024
SHORTEST_RETENTION_MS: Final = 1_000
LONGEST_RETENTION_MS: Final = 30 * 24 * 3600 * 1000
RETENTION_WORDS: Final = "1 s to 30 days"


class JobKind(StrEnum):
    """What a job makes."""

    TRAIN = "train"
    GEN = "gen"


class JobState(StrEnum):
    """States of a job; QUEUED and RUNNING pass, the others rest. DELETED is the stripped record before its purge."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"
    DELETED = "DELETED"


FINAL_STATES: Final = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.TIMED_OUT})
TOLD_STATES: Final = FINAL_STATES - {JobState.CANCELLED}
"""What a webhook tells of; a cancellation is its owner's own doing."""
RETRYABLE_STATES: Final = frozenset({JobState.FAILED, JobState.TIMED_OUT})


class Phase(StrEnum):
    """Who leads the job: the api (prepare, finish) or a worker (train, draw)."""

    PREPARE = "prepare"
    TRAIN = "train"
    FINISH = "finish"
    DRAW = "draw"


class Stage(StrEnum):
    """What is being done, in order; the names of JobStage in the protos."""

    QUEUED = "QUEUED"
    FETCHING = "FETCHING"
    CLASS_IMAGES = "CLASS_IMAGES"
    TRAINING = "TRAINING"
    EXPORTING = "EXPORTING"
    UPLOADING = "UPLOADING"
    DEPLOYING = "DEPLOYING"
    SAMPLING = "SAMPLING"
    LOADING = "LOADING"
    DRAWING = "DRAWING"


# Where each stage of a training lies within the whole, for the fraction that people see: start and width.
_SHARE_OF_WHOLE: Final[Mapping[Stage, tuple[float, float]]] = {
    Stage.QUEUED: (0.0, 0.0),
    Stage.FETCHING: (0.0, 0.02),
    Stage.CLASS_IMAGES: (0.02, 0.13),
    Stage.TRAINING: (0.15, 0.70),
    Stage.EXPORTING: (0.85, 0.02),
    Stage.UPLOADING: (0.87, 0.03),
    Stage.DEPLOYING: (0.90, 0.02),
    Stage.SAMPLING: (0.92, 0.08),
    Stage.LOADING: (0.0, 0.05),
    Stage.DRAWING: (0.05, 0.95),
}


def whole_fraction(stage: Stage, step: int, total_steps: int) -> float:
    """Share of a whole job that is done, 0..1, from the place within one stage.

    Args:
        stage: the stage under way.
        step: units done in it.
        total_steps: units it has; 0 when unknown.
    """
    start, width = _SHARE_OF_WHOLE[stage]
    within = min(1.0, step / total_steps) if total_steps > 0 else 0.0
    return start + width * within


def bounded_remarks(remarks: Iterable[str]) -> list[str]:
    """The first remarks on a job, shortened to what its record has room for beside its specification."""
    kept: list[str] = []
    left = MAX_REMARKS_BYTES
    for remark in remarks:
        short = remark[:MAX_REMARK_CHARS]
        left -= len(short.encode())
        if left < 0 or len(kept) == MAX_REMARKS:
            break
        kept.append(short)
    return kept


def clipped(text: str, max_bytes: int) -> str:
    """The beginning of a text that fits into some bytes of UTF-8, never cut within a character."""
    return text.encode()[:max_bytes].decode(errors="ignore")


@dataclass(frozen=True, slots=True)
class JobRef:
    """Names one job: the parts of its subject."""

    kind: JobKind
    project: str
    id: str

    def __post_init__(self) -> None:
        for name, value in (("project_id", self.project), ("job_id", self.id)):
            if not ID_PATTERN.match(value):
                raise InvalidSpec("must be 1 to 64 letters, digits, '_' or '-'", name)


@dataclass(frozen=True, slots=True)
class Times:
    """Moments of the present run, in milliseconds since 1970; 0 means not yet.

    Attributes:
        created: admission of the first run.
        queued: start of this run: admission, or the last client retry.
        started: the first phase was taken.
        ended: the final state was recorded.
        ttl_at: the job must have ended by then.
        keep_until: the record may be removed after this.
        waiting_since: since when the job waits for somebody to take it; 0 while somebody works on it.
        waited_ms: waiting of this run that is over.
    """

    created: int = 0
    queued: int = 0
    started: int = 0
    ended: int = 0
    ttl_at: int = 0
    keep_until: int = 0
    waiting_since: int = 0
    waited_ms: int = 0

    def waited_by(self, now_ms: int) -> int:
        """All waiting of this run up to a moment, in milliseconds."""
        open_wait = max(0, now_ms - self.waiting_since) if self.waiting_since else 0
        return self.waited_ms + open_wait

    def executed_by(self, now_ms: int) -> int:
        """All execution of this run up to a moment, in milliseconds; 0 before the start."""
        if not self.started:
            return 0
        until = self.ended or now_ms
        return max(0, until - self.queued - self.waited_by(until))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A stored checkpoint: artifact key of its manifest, and the updates done."""

    manifest_key: str
    step: int


@dataclass(frozen=True, slots=True)
class JobFailure:
    """Why a job ended without a result."""

    reason: str
    message: str
    field: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """The policy of a job, resolved at admission; milliseconds."""

    execution_timeout_ms: int = 6 * 3600 * 1000
    ttl_ms: int = 24 * 3600 * 1000
    retention_ms: int = 24 * 3600 * 1000
    priority: int = 1
    max_attempts: int = 2


PRIORITY_HIGH: Final = 0
PRIORITY_NORMAL: Final = 1
PRIORITY_LOW: Final = 2


@dataclass(frozen=True, slots=True)
class JobRecord:
    """One revision of one job.

    Attributes:
        round: client retries; the first run is 0.
        attempt: times a worker has begun in this run.
        fruitless: attempts in a row that ended without a new checkpoint; the limit counts these.
        epoch: log sequence of the ready revision that was taken; 0 before the first taking.
        worker: the worker that owns the job; "" while the api or nobody does.
        last_worker: the worker that had it last.
        device_memory: memory of that worker's device in bytes; 0 on a CPU.
        beaten: the present owner has been heard of since it took the job.
        reported: reports accepted in this epoch.
        spec: the canonical specification as JSON of its proto; {} when it lies in storage under `spec_key`.
        options: policy, origin and webhook as JSON of JobOptions.
        request: digest of the admitted request, which makes a repeated admission recognisable.
        write: random id of the write that stored this revision.
        why: one sentence on what this revision is about.
        event: this revision is an event for the job's owner.
        prepared: JSON of PreparedInputs, once phase `prepare` is over.
        trained: JSON of TrainingResult as the trainer reported it.
        result: JSON of the result, when it fits; else `result_key` names the document.
        parent: training that a drawing belongs to.
        model: manifest digest of the model that is needed, for matching with warm workers; "" when any will do.
    """

    kind: JobKind
    id: str
    project: str
    state: JobState
    phase: Phase
    stage: Stage
    ready: bool = False
    round: int = 0
    attempt: int = 0
    fruitless: int = 0
    epoch: int = 0
    worker: str = ""
    last_worker: str = ""
    device_memory: int = 0
    beaten: bool = False
    reported: int = 0
    spec: Mapping[str, Any] = field(default_factory=dict)
    spec_key: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    request: str = ""
    write: str = ""
    why: str = ""
    event: bool = False
    times: Times = field(default_factory=Times)
    limits: Limits = field(default_factory=Limits)
    checkpoint: Checkpoint | None = None
    prepared: Mapping[str, Any] | None = None
    trained: Mapping[str, Any] | None = None
    result: Mapping[str, Any] | None = None
    result_key: str = ""
    error: JobFailure | None = None
    parent: str = ""
    model: str = ""
    v: int = SCHEMA_VERSION

    @property
    def ref(self) -> JobRef:
        """The job's name."""
        return JobRef(self.kind, self.project, self.id)

    @property
    def is_final(self) -> bool:
        """The job has ended, in whatever way."""
        return self.state in FINAL_STATES

    @property
    def endpoint(self) -> str:
        """The dialect endpoint the job came from; "" for direct callers."""
        return str(self.options.get("origin", {}).get("endpoint", ""))

    @property
    def webhook_url(self) -> str:
        """Whom to tell; "" for nobody."""
        return str(self.options.get("webhook", {}).get("url", ""))

    def to_json(self) -> bytes:
        """The bytes of this revision."""
        return json.dumps(asdict(self), separators=(",", ":"), ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Reads a revision; unknown keys of a newer version are ignored."""
        raw = json.loads(data)
        known = {name: raw[name] for name in cls.__dataclass_fields__ if name in raw}
        return cls(
            **known
            | {
                "kind": JobKind(raw["kind"]),
                "state": JobState(raw["state"]),
                "phase": Phase(raw["phase"]),
                "stage": Stage(raw["stage"]),
                "times": _read(Times, raw["times"]),
                "limits": _read(Limits, raw["limits"]),
                "checkpoint": _read(Checkpoint, raw["checkpoint"]) if raw.get("checkpoint") else None,
                "error": _read(JobFailure, raw["error"]) if raw.get("error") else None,
            }
        )

    def stamped(self) -> "JobRecord":
        """The same revision with a fresh random write id."""
        return replace(self, write=secrets.token_hex(16))


def _read(kind: type[Any], raw: Mapping[str, Any]) -> Any:
    fields = kind.__dataclass_fields__
    return kind(**{name: value for name, value in raw.items() if name in fields})
