"""The life of a job: its record, and every legal move from one revision to the next.

Pure rules. A move takes the record as it was read and returns the record to write next, or raises
:class:`~services.domain.errors.WrongState` when the life cycle does not allow it. Who writes it, with which
compare-and-set, is the business of :mod:`services.jobs` and of the job log's adapter.

    training   QUEUED/prepare -> RUNNING/prepare -> RUNNING/train ready -> RUNNING/train taken
               -> RUNNING/finish -> SUCCEEDED
    drawing    QUEUED/draw ready -> RUNNING/draw taken -> SUCCEEDED

A revision with ``ready`` set is the queue entry: whoever takes it by compare-and-set owns the job under the epoch,
which is the log sequence of that revision. All times are milliseconds since 1970 by the job log's clock.
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any, Final, Self

from services.domain.errors import InvalidSpec, StaleEpoch, WrongState

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


def _clipped(text: str, max_bytes: int) -> str:
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


def admit_training(
    ref: JobRef,
    *,
    spec: Mapping[str, Any],
    options: Mapping[str, Any],
    limits: Limits,
    request: str,
    now_ms: int,
    spec_key: str = "",
) -> JobRecord:
    """The first revision of a training: QUEUED, led by the api, not takeable yet."""
    return JobRecord(
        kind=JobKind.TRAIN,
        id=ref.id,
        project=ref.project,
        state=JobState.QUEUED,
        phase=Phase.PREPARE,
        stage=Stage.QUEUED,
        spec=spec,
        spec_key=spec_key,
        options=options,
        limits=limits,
        request=request,
        why="admitted",
        event=True,
        times=_fresh_times(now_ms, now_ms, limits),
    )


def admit_drawing(
    ref: JobRef,
    *,
    spec: Mapping[str, Any],
    options: Mapping[str, Any],
    limits: Limits,
    request: str,
    now_ms: int,
    model: str = "",
    parent: str = "",
    spec_key: str = "",
) -> JobRecord:
    """The first revision of a drawing: QUEUED and ready to be taken."""
    return JobRecord(
        kind=JobKind.GEN,
        id=ref.id,
        project=ref.project,
        state=JobState.QUEUED,
        phase=Phase.DRAW,
        stage=Stage.QUEUED,
        ready=True,
        spec=spec,
        spec_key=spec_key,
        options=options,
        limits=limits,
        request=request,
        why="admitted",
        event=True,
        parent=parent,
        model=model,
        times=_fresh_times(now_ms, now_ms, limits),
    )


def _fresh_times(created_ms: int, now_ms: int, limits: Limits) -> Times:
    return Times(created=created_ms, queued=now_ms, waiting_since=now_ms, ttl_at=now_ms + limits.ttl_ms)


def begin_preparing(record: JobRecord, now_ms: int) -> JobRecord:
    """Starts phase `prepare` of a training."""
    _require(record, record.state is JobState.QUEUED and record.phase is Phase.PREPARE, "be prepared")
    return replace(
        record,
        state=JobState.RUNNING,
        stage=Stage.FETCHING,
        why="fetching the pictures",
        event=True,
        times=_working(replace(record.times, started=now_ms), now_ms),
    )


def enter_stage(record: JobRecord, stage: Stage, why: str) -> JobRecord:
    """Moves a job that the api leads to another stage."""
    led = record.state is JobState.RUNNING and record.phase in (Phase.PREPARE, Phase.FINISH)
    _require(record, led, f"enter {stage.value.lower()}")
    return replace(record, stage=stage, why=why, event=True)


def make_ready(record: JobRecord, prepared: Mapping[str, Any], model: str, now_ms: int) -> JobRecord:
    """Ends phase `prepare`: from now on a trainer can take the job."""
    _require(record, record.state is JobState.RUNNING and record.phase is Phase.PREPARE, "wait for a trainer")
    return replace(
        record,
        phase=Phase.TRAIN,
        stage=Stage.TRAINING,
        ready=True,
        prepared=prepared,
        model=model,
        why="waiting for a trainer",
        event=True,
        times=replace(record.times, waiting_since=now_ms),
    )


def take(record: JobRecord, sequence: int, worker: str, now_ms: int, device_memory: int = 0) -> JobRecord:
    """Gives a ready job to a worker; the epoch is the sequence of the revision that was ready."""
    _require(record, record.ready and record.state in (JobState.QUEUED, JobState.RUNNING), "be taken")
    times = replace(record.times, started=record.times.started or now_ms)
    stage = Stage.LOADING if record.phase is Phase.DRAW else record.stage
    return replace(
        record,
        state=JobState.RUNNING,
        stage=stage,
        ready=False,
        epoch=sequence,
        worker=worker,
        last_worker=worker,
        device_memory=device_memory,
        beaten=False,
        attempt=record.attempt + 1,
        reported=0,
        why=f"taken by {worker}",
        event=False,
        times=_working(times, now_ms),
    )


def check_epoch(record: JobRecord, epoch: int, worker: str = "") -> None:
    """Refuses whoever does not own the job.

    Raises:
        StaleEpoch: the job has moved on, ended, or belongs to somebody else.
    """
    owned = (
        record.state is JobState.RUNNING
        and not record.ready
        and record.worker != ""
        and record.epoch == epoch
    )
    if not owned or (worker and record.worker != worker):
        raise StaleEpoch(f"job {record.id} does not belong to epoch {epoch} any more")


def heard(record: JobRecord) -> JobRecord:
    """Notes that the owner has been heard of, so that losing it counts as an attempt."""
    check_epoch(record, record.epoch)
    return replace(record, beaten=True, why="the worker has begun", event=False)


def report_stage(record: JobRecord, epoch: int, stage: Stage, why: str) -> JobRecord:
    """The owner entered another stage."""
    check_epoch(record, epoch)
    return replace(
        record,
        stage=stage,
        why=_clipped(why, MAX_WHY_BYTES),
        event=True,
        beaten=True,
        reported=record.reported + 1,
    )


def report_checkpoint(record: JobRecord, epoch: int, checkpoint: Checkpoint) -> JobRecord:
    """The owner stored a checkpoint. One with no more updates than the last is kept out of the count of progress."""
    check_epoch(record, epoch)
    advanced = record.checkpoint is None or checkpoint.step > record.checkpoint.step
    return replace(
        record,
        checkpoint=checkpoint,
        fruitless=0 if advanced else record.fruitless,
        why=f"checkpoint at update {checkpoint.step}",
        event=False,
        beaten=True,
        reported=record.reported + 1,
    )


def report_trained(record: JobRecord, epoch: int, trained: Mapping[str, Any]) -> JobRecord:
    """The trainer is done and its model registered; the api leads from here."""
    check_epoch(record, epoch)
    _require(record, record.phase is Phase.TRAIN, "finish a training")
    return replace(
        record,
        phase=Phase.FINISH,
        stage=Stage.DEPLOYING,
        worker="",
        trained=trained,
        why="trained and registered",
        event=True,
        reported=record.reported + 1,
    )


def report_finished(record: JobRecord, epoch: int, result: Mapping[str, Any], now_ms: int) -> JobRecord:
    """The owner of a drawing is done: the only moment at which its pictures become visible."""
    check_epoch(record, epoch)
    _require(record, record.phase is Phase.DRAW, "finish a drawing")
    done = replace(record, result=result, reported=record.reported + 1)
    return _end(done, JobState.SUCCEEDED, "done", now_ms)


def report_failed(
    record: JobRecord, epoch: int, failure: JobFailure, retryable: bool, now_ms: int
) -> JobRecord:
    """The owner could not do it: tried again while attempts are left and it may help, else FAILED."""
    check_epoch(record, epoch)
    counted = replace(record, fruitless=record.fruitless + 1, reported=record.reported + 1)
    if retryable and counted.fruitless < record.limits.max_attempts:
        return _give_back(counted, f"failed and will be tried again: {failure.message}", now_ms)
    return _fail(counted, failure, now_ms)


def report_yielded(record: JobRecord, epoch: int, why: str, now_ms: int) -> JobRecord:
    """The owner leaves and gives the job back; the attempt does not count."""
    check_epoch(record, epoch)
    back = replace(record, attempt=record.attempt - 1, reported=record.reported + 1)
    return _give_back(back, why or "given back by its worker", now_ms)


def lose_lease(record: JobRecord, epoch: int, now_ms: int) -> JobRecord:
    """The owner has not been heard of for a lease: somebody else may have the job.

    A taking that was never followed by a beat does not count as an attempt.
    """
    check_epoch(record, epoch)
    if not record.beaten:
        return _give_back(replace(record, attempt=record.attempt - 1), "its worker never began", now_ms)
    counted = replace(record, fruitless=record.fruitless + 1)
    if counted.fruitless >= record.limits.max_attempts:
        return _fail(counted, JobFailure("WORKER_LOST", "the worker was lost and no attempt is left"), now_ms)
    return _give_back(counted, "its worker was lost", now_ms)


def finish(record: JobRecord, result: Mapping[str, Any] | None, result_key: str, now_ms: int) -> JobRecord:
    """Ends a training with its result: the only moment at which it becomes visible."""
    _require(record, record.state is JobState.RUNNING and record.phase is Phase.FINISH, "succeed")
    return _end(replace(record, result=result, result_key=result_key), JobState.SUCCEEDED, "done", now_ms)


def fail(record: JobRecord, failure: JobFailure, now_ms: int) -> JobRecord:
    """Ends a job that the api leads with an error."""
    lives = record.state in (JobState.QUEUED, JobState.RUNNING)
    _require(record, lives and record.worker == "", "fail")
    return _fail(record, failure, now_ms)


def cancel(record: JobRecord, now_ms: int) -> JobRecord:
    """Ends a job for its owner; one that has ended already is returned as it is."""
    if record.is_final:
        return record
    _require(record, record.state in (JobState.QUEUED, JobState.RUNNING), "be cancelled")
    return _end(record, JobState.CANCELLED, "cancelled", now_ms)


def overdue(record: JobRecord, now_ms: int) -> str:
    """The sentence that says which limit a job has passed; "" while it is within all of them."""
    if record.is_final or record.state is JobState.DELETED:
        return ""
    if record.times.executed_by(now_ms) > record.limits.execution_timeout_ms:
        return f"execution timeout of {record.limits.execution_timeout_ms} ms exceeded"
    if now_ms > record.times.ttl_at:
        tail = "before the job ended" if record.times.started else "before a worker was free"
        return f"ttl of {record.limits.ttl_ms} ms passed {tail}"
    return ""


def time_out(record: JobRecord, why: str, now_ms: int) -> JobRecord:
    """Ends a job because a limit of its policy has passed."""
    _require(record, record.state in (JobState.QUEUED, JobState.RUNNING), "time out")
    late = replace(record, error=JobFailure("DEADLINE_EXCEEDED", why))
    return _end(late, JobState.TIMED_OUT, why, now_ms)


def retry(record: JobRecord, now_ms: int) -> JobRecord:
    """Starts a FAILED or TIMED_OUT job again: a new run from the same input, output and error erased."""
    if record.state not in RETRYABLE_STATES:
        raise WrongState(f"only FAILED or TIMED_OUT jobs can be retried; this one is {record.state.value}")
    drawing = record.kind is JobKind.GEN
    return replace(
        record,
        state=JobState.QUEUED,
        phase=Phase.DRAW if drawing else Phase.PREPARE,
        stage=Stage.QUEUED,
        ready=drawing,
        round=record.round + 1,
        attempt=0,
        fruitless=0,
        worker="",
        last_worker="",
        device_memory=0,
        beaten=False,
        reported=0,
        checkpoint=None,
        prepared=None,
        trained=None,
        result=None,
        result_key="",
        error=None,
        why="queued again by its owner",
        event=True,
        times=_fresh_times(record.times.created, now_ms, record.limits),
    )


def shorten_retention(record: JobRecord, keep_until_ms: int) -> JobRecord:
    """Lets an ended job go earlier than its policy says; never later."""
    _require(record, record.is_final, "be given a shorter retention")
    sooner = min(record.times.keep_until, keep_until_ms)
    return replace(
        record, times=replace(record.times, keep_until=sooner), why="retention shortened", event=False
    )


def delete(record: JobRecord) -> JobRecord:
    """Strips an ended job of everything its owner gave it; the last revision before the purge."""
    _require(record, record.is_final, "be deleted")
    return JobRecord(
        kind=record.kind,
        id=record.id,
        project=record.project,
        state=JobState.DELETED,
        phase=record.phase,
        stage=record.stage,
        round=record.round,
        times=record.times,
        why="deleted",
    )


def _require(record: JobRecord, allowed: bool, what: str) -> None:
    if not allowed:
        where = f"{record.state.value} in phase {record.phase.value}"
        raise WrongState(f"job {record.id} cannot {what}: it is {where}")


def _working(times: Times, now_ms: int) -> Times:
    return replace(times, waited_ms=times.waited_by(now_ms), waiting_since=0)


def _give_back(record: JobRecord, why: str, now_ms: int) -> JobRecord:
    drawing = record.phase is Phase.DRAW
    return replace(
        record,
        state=JobState.QUEUED if drawing else JobState.RUNNING,
        stage=Stage.QUEUED if drawing else Stage.TRAINING,
        ready=True,
        worker="",
        beaten=False,
        why=_clipped(why, MAX_WHY_BYTES),
        event=True,
        times=replace(record.times, waiting_since=now_ms),
    )


def _fail(record: JobRecord, failure: JobFailure, now_ms: int) -> JobRecord:
    cut = replace(failure, message=_clipped(failure.message, MAX_ERROR_BYTES))
    return _end(replace(record, error=cut), JobState.FAILED, cut.message, now_ms)


def _end(record: JobRecord, state: JobState, why: str, now_ms: int) -> JobRecord:
    times = replace(
        record.times,
        ended=now_ms,
        waited_ms=record.times.waited_by(now_ms),
        waiting_since=0,
        keep_until=now_ms + record.limits.retention_ms,
    )
    why = _clipped(why, MAX_WHY_BYTES)
    return replace(record, state=state, ready=False, worker="", why=why, event=True, times=times)
