"""The life of a job: every legal move from one revision of its record to the next.

Pure rules. A move takes the record as it was read and returns the record to write next, or raises
:class:`~services.domain.errors.WrongState` when the life cycle does not allow it. Who writes it, with which
compare-and-set, is the business of :mod:`services.jobs` and of the job log's adapter.

    training   QUEUED/prepare -> RUNNING/prepare -> RUNNING/train ready -> RUNNING/train taken
               -> RUNNING/finish -> SUCCEEDED
    drawing    QUEUED/draw ready -> RUNNING/draw taken -> SUCCEEDED

A revision with ``ready`` set is the queue entry: whoever takes it by compare-and-set owns the job under the epoch,
which is the log sequence of that revision.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from services.domain.errors import StaleEpoch, WrongState
from services.domain.job import (
    MAX_ERROR_BYTES,
    MAX_WHY_BYTES,
    RETRYABLE_STATES,
    Checkpoint,
    JobFailure,
    JobKind,
    JobRecord,
    JobRef,
    JobState,
    Limits,
    Phase,
    Stage,
    Times,
    clipped,
)


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
        why=clipped(why, MAX_WHY_BYTES),
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


def report_meanwhile(record: JobRecord, epoch: int, what: str) -> JobRecord:
    """The owner stored something of the training that goes on: pictures, or a version of the model."""
    check_epoch(record, epoch)
    _require(record, record.phase is Phase.TRAIN, "have previews or versions")
    return replace(
        record,
        why=clipped(what, MAX_WHY_BYTES),
        event=True,
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
        why=clipped(why, MAX_WHY_BYTES),
        event=True,
        times=replace(record.times, waiting_since=now_ms),
    )


def _fail(record: JobRecord, failure: JobFailure, now_ms: int) -> JobRecord:
    cut = replace(failure, message=clipped(failure.message, MAX_ERROR_BYTES))
    return _end(replace(record, error=cut), JobState.FAILED, cut.message, now_ms)


def _end(record: JobRecord, state: JobState, why: str, now_ms: int) -> JobRecord:
    times = replace(
        record.times,
        ended=now_ms,
        waited_ms=record.times.waited_by(now_ms),
        waiting_since=0,
        keep_until=now_ms + record.limits.retention_ms,
    )
    why = clipped(why, MAX_WHY_BYTES)
    return replace(record, state=state, ready=False, worker="", why=why, event=True, times=times)
