"""The life of a job under random moves, against the table of what is legal and a model of its times."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.domain import life_cycle as job
from services.domain.errors import InvalidSpec, StaleEpoch, WrongState
from services.domain.job import (
    FINAL_STATES,
    MAX_ERROR_BYTES,
    MAX_RECORD_BYTES,
    MAX_WHY_BYTES,
    Checkpoint,
    JobFailure,
    JobKind,
    JobRecord,
    JobRef,
    JobState,
    Limits,
    Phase,
    Stage,
    bounded_remarks,
    whole_fraction,
)

S = JobState
LEGAL_STATES = {
    S.QUEUED: {S.RUNNING, S.FAILED, S.CANCELLED, S.TIMED_OUT},
    S.RUNNING: {S.RUNNING, S.QUEUED, *FINAL_STATES},
    S.SUCCEEDED: {S.SUCCEEDED, S.DELETED},
    S.CANCELLED: {S.CANCELLED, S.DELETED},
    S.FAILED: {S.FAILED, S.QUEUED, S.DELETED},
    S.TIMED_OUT: {S.TIMED_OUT, S.QUEUED, S.DELETED},
    S.DELETED: set(),
}
FAILURE = JobFailure("UNAVAILABLE", "the store was away")


@dataclass(frozen=True)
class Move:
    """A move, and when the life cycle allows it.

    Attributes:
        apply: (record, sequence it was read at, present, a free number) to the next record.
        allowed: whether it must succeed.
    """

    apply: Callable[[JobRecord, int, int, int], JobRecord]
    allowed: Callable[[JobRecord], bool]


def lives(record: JobRecord) -> bool:
    return record.state in (S.QUEUED, S.RUNNING)


def owned(record: JobRecord) -> bool:
    return record.state is S.RUNNING and record.worker != ""


def led(record: JobRecord, *phases: Phase) -> bool:
    return record.state is S.RUNNING and record.phase in phases


MOVES: dict[str, Move] = {
    "begin_preparing": Move(
        lambda r, s, now, n: job.begin_preparing(r, now),
        lambda r: r.state is S.QUEUED and r.phase is Phase.PREPARE,
    ),
    "enter_stage": Move(
        lambda r, s, now, n: job.enter_stage(r, Stage.CLASS_IMAGES, "class images"),
        lambda r: led(r, Phase.PREPARE, Phase.FINISH),
    ),
    "make_ready": Move(
        lambda r, s, now, n: job.make_ready(r, {"data": n}, "model", now), lambda r: led(r, Phase.PREPARE)
    ),
    "take": Move(lambda r, s, now, n: job.take(r, s, f"w{n % 3}", now), lambda r: r.ready),
    "heard": Move(lambda r, s, now, n: job.heard(r), owned),
    "report_stage": Move(lambda r, s, now, n: job.report_stage(r, r.epoch, Stage.EXPORTING, "x"), owned),
    "report_checkpoint": Move(
        lambda r, s, now, n: job.report_checkpoint(r, r.epoch, Checkpoint("key", n)), owned
    ),
    "report_trained": Move(
        lambda r, s, now, n: job.report_trained(r, r.epoch, {"model": n}),
        lambda r: owned(r) and r.phase is Phase.TRAIN,
    ),
    "report_finished": Move(
        lambda r, s, now, n: job.report_finished(r, r.epoch, {"images": n}, now),
        lambda r: owned(r) and r.phase is Phase.DRAW,
    ),
    "report_failed": Move(
        lambda r, s, now, n: job.report_failed(r, r.epoch, FAILURE, retryable=n % 4 > 0, now_ms=now), owned
    ),
    "report_yielded": Move(lambda r, s, now, n: job.report_yielded(r, r.epoch, "", now), owned),
    "lose_lease": Move(lambda r, s, now, n: job.lose_lease(r, r.epoch, now), owned),
    "finish": Move(
        lambda r, s, now, n: job.finish(r, {"images": n}, "", now), lambda r: led(r, Phase.FINISH)
    ),
    "fail": Move(lambda r, s, now, n: job.fail(r, FAILURE, now), lambda r: lives(r) and not r.worker),
    "cancel": Move(lambda r, s, now, n: job.cancel(r, now), lambda r: lives(r) or r.is_final),
    "time_out": Move(lambda r, s, now, n: job.time_out(r, "too late", now), lives),
    "retry": Move(lambda r, s, now, n: job.retry(r, now), lambda r: r.state in (S.FAILED, S.TIMED_OUT)),
    "shorten": Move(lambda r, s, now, n: job.shorten_retention(r, now + n), lambda r: r.is_final),
    "delete": Move(lambda r, s, now, n: job.delete(r), lambda r: r.is_final),
}
# What ends a life is rare, so that a sequence gets somewhere.
LIKELY = [name for name in MOVES if name not in {"cancel", "time_out", "delete", "fail", "shorten"}]
steps = st.tuples(
    st.one_of(st.sampled_from(LIKELY), st.sampled_from(LIKELY), st.sampled_from(list(MOVES))),
    st.integers(0, 5_000),
    st.integers(0, 40),
)
lives_of_jobs = st.tuples(
    st.sampled_from(JobKind), st.integers(1, 3), st.lists(steps, min_size=1, max_size=60)
)
many = settings(max_examples=250, deadline=None)


@dataclass(frozen=True)
class Event:
    """One revision of a life: the record, when it was written, and the move that led to it."""

    record: JobRecord
    now_ms: int
    move: str
    sequence: int


def admitted(kind: JobKind = JobKind.GEN, **limits: int) -> JobRecord:
    admit = job.admit_training if kind is JobKind.TRAIN else job.admit_drawing
    return admit(
        JobRef(kind, "project", "id"),
        spec={"prompt": "größer"},
        options={"origin": {"endpoint": "e"}, "webhook": {"url": "https://x"}},
        limits=Limits(**limits),
        request="digest",
        now_ms=1_000,
    )


def live(life: tuple[JobKind, int, list[tuple[str, int, int]]]) -> list[Event]:
    """Applies the moves that are allowed; the others must be refused, without exception."""
    kind, max_attempts, moves = life
    events = [Event(admitted(kind, max_attempts=max_attempts), 1_000, "admit", 1)]
    for name, passed_ms, number in moves:
        last, move = events[-1], MOVES[name]
        now_ms = last.now_ms + passed_ms
        if move.allowed(last.record):
            moved = move.apply(last.record, last.sequence, now_ms, number)
            events.append(Event(moved, now_ms, name, last.sequence + 3))
        else:
            with pytest.raises(WrongState):
                move.apply(last.record, last.sequence, now_ms, number)
    return events


@many
@given(lives_of_jobs)
def test_only_legal_moves_happen(life: tuple[JobKind, int, list[tuple[str, int, int]]]) -> None:
    for before, after in pairwise(live(life)):
        if after.record is before.record:  # a cancel of what has ended
            continue
        assert after.record.state in LEGAL_STATES[before.record.state]
        if before.record.kind is JobKind.TRAIN and before.record.state is S.RUNNING:
            assert after.record.state is not S.QUEUED


@many
@given(lives_of_jobs)
def test_every_run_ends_once(life: tuple[JobKind, int, list[tuple[str, int, int]]]) -> None:
    events = live(life)
    for before, after in pairwise(events):
        if before.record.is_final and after.record.state is not S.DELETED:
            again = after.record.round == before.record.round + 1 and after.record.state is S.QUEUED
            assert again or after.record.state is before.record.state
        else:
            assert after.record.round == before.record.round


@many
@given(lives_of_jobs)
def test_the_epoch_is_the_ready_revision_that_was_taken(
    life: tuple[JobKind, int, list[tuple[str, int, int]]],
) -> None:
    for before, after in pairwise(live(life)):
        if after.move == "take":
            assert after.record.epoch == before.sequence
            assert (after.record.reported, after.record.ready, after.record.beaten) == (0, False, False)
        elif after.move != "delete":
            assert after.record.epoch == before.record.epoch


@many
@given(lives_of_jobs)
def test_a_job_is_ready_exactly_when_nobody_works_on_it_and_anybody_may(
    life: tuple[JobKind, int, list[tuple[str, int, int]]],
) -> None:
    for event in live(life):
        record = event.record
        if record.phase in (Phase.TRAIN, Phase.DRAW) and lives(record):
            assert record.ready == (record.worker == "")
        else:
            assert not record.ready
            assert record.worker == ""


@many
@given(lives_of_jobs)
def test_an_owners_reports_checkpoint_and_specification_are_carried_over(
    life: tuple[JobKind, int, list[tuple[str, int, int]]],
) -> None:
    for before, after in pairwise(live(life)):
        if after.move == "delete":
            continue
        assert after.record.spec == before.record.spec
        assert after.record.request == before.record.request
        if after.move not in ("report_checkpoint", "retry"):
            assert after.record.checkpoint == before.record.checkpoint
        if after.move not in ("take", "retry"):
            is_report = after.move.startswith("report_")
            assert after.record.reported == before.record.reported + is_report


@many
@given(lives_of_jobs)
def test_waiting_and_execution_add_up_to_the_whole_run(
    life: tuple[JobKind, int, list[tuple[str, int, int]]],
) -> None:
    waited = executed = 0
    for before, after in pairwise(live(life)):
        record, passed = before.record, after.now_ms - before.now_ms
        waiting = record.ready or record.state is S.QUEUED
        if lives(record):
            waited, executed = (waited + passed, executed) if waiting else (waited, executed + passed)
        if after.move == "retry":
            waited = executed = 0
        times = after.record.times
        assert times.waited_by(after.now_ms) == waited
        assert times.executed_by(after.now_ms) == executed
        if after.record.is_final:
            assert times.ended - times.queued == waited + executed
            assert times.waited_by(after.now_ms + 99) == waited
            assert times.executed_by(after.now_ms + 99) == executed


@many
@given(lives_of_jobs)
def test_attempts_count_what_was_begun_and_fruitless_ones_are_limited(
    life: tuple[JobKind, int, list[tuple[str, int, int]]],
) -> None:
    attempts = fruitless = 0
    beaten = False
    for before, after in pairwise(live(life)):
        match after.move:
            case "take":
                attempts, beaten = attempts + 1, False
            case "heard" | "report_stage":
                beaten = True
            case "report_checkpoint":
                beaten = True
                last = before.record.checkpoint
                assert after.record.checkpoint is not None
                fruitless = 0 if last is None or after.record.checkpoint.step > last.step else fruitless
            case "report_yielded":
                attempts -= 1
            case "report_failed":
                fruitless += 1
            case "lose_lease":
                attempts, fruitless = (attempts, fruitless + 1) if beaten else (attempts - 1, fruitless)
            case "retry" | "delete":
                attempts = fruitless = 0
        assert (after.record.attempt, after.record.fruitless) == (attempts, fruitless)
        assert fruitless < after.record.limits.max_attempts or after.record.state in FINAL_STATES


@many
@given(lives_of_jobs)
def test_every_revision_survives_its_json(life: tuple[JobKind, int, list[tuple[str, int, int]]]) -> None:
    for event in live(life):
        stamped = event.record.stamped()
        assert JobRecord.from_json(stamped.to_json()) == stamped
        assert len(stamped.write) == 32


@many
@given(lives_of_jobs, st.integers(-2, 2))
def test_whoever_does_not_own_the_job_is_refused(
    life: tuple[JobKind, int, list[tuple[str, int, int]]], off: int
) -> None:
    record = live(life)[-1].record
    epoch = record.epoch + off
    if owned(record) and off == 0:
        job.check_epoch(record, epoch, record.worker)
        with pytest.raises(StaleEpoch):
            job.check_epoch(record, epoch, "somebody-else")
        return
    reports: list[Callable[[], JobRecord]] = [
        lambda: job.report_stage(record, epoch, Stage.DRAWING, ""),
        lambda: job.report_checkpoint(record, epoch, Checkpoint("k", 1)),
        lambda: job.report_trained(record, epoch, {}),
        lambda: job.report_finished(record, epoch, {}, 1),
        lambda: job.report_failed(record, epoch, FAILURE, True, 1),
        lambda: job.report_yielded(record, epoch, "", 1),
        lambda: job.lose_lease(record, epoch, 1),
    ]
    for report in reports:
        with pytest.raises(StaleEpoch):
            report()


def test_keys_of_a_newer_version_are_ignored() -> None:
    record = admitted()
    raw = json.loads(record.to_json()) | {"later": 1}
    raw["times"]["later"] = 2

    assert JobRecord.from_json(json.dumps(raw).encode()) == record


def test_a_retry_starts_from_the_same_input_and_nothing_else() -> None:
    begun = job.begin_preparing(admitted(JobKind.TRAIN), 2_000)
    failed = job.fail(begun, FAILURE, 3_000)

    again = job.retry(failed, 9_000)

    assert again == replace(
        admitted(JobKind.TRAIN),
        round=1,
        why="queued again by its owner",
        times=replace(
            admitted(JobKind.TRAIN).times,
            queued=9_000,
            waiting_since=9_000,
            ttl_at=9_000 + failed.limits.ttl_ms,
        ),
    )


def test_a_deleted_record_holds_nothing_of_its_owner() -> None:
    text = job.delete(job.cancel(admitted(), 5)).to_json().decode()

    assert "größer" not in text
    assert "https://x" not in text


def test_a_long_error_is_cut_to_what_a_record_holds() -> None:
    failed = job.fail(admitted(), JobFailure("INTERNAL", "x" * 50_000), 5)

    assert failed.error is not None
    assert len(failed.error.message) == MAX_ERROR_BYTES
    assert len(failed.why) == MAX_WHY_BYTES
    assert len(failed.to_json()) < MAX_RECORD_BYTES


@pytest.mark.parametrize("letter", ["x", "\N{GRINNING FACE}"])
def test_no_text_that_a_job_collects_makes_its_record_too_large(letter: str) -> None:
    text = letter * 5000
    key = "projects/" + "p" * 64 + "/blobs/sha256/" + "0" * 64
    datasets = [
        {
            "concept_index": index,
            "instance_key": key,
            "class_key": key,
            "instance_images": 99,
            "class_images": 99,
        }
        for index in range(8)
    ]
    inputs = {"datasets": datasets, "warnings": bounded_remarks([text] * 30)}
    spec = {"text": "x" * 15_000}
    record = job.admit_training(
        JobRef(JobKind.TRAIN, "p" * 64, "j" * 64),
        spec=spec,
        options={},
        limits=Limits(),
        request="",
        now_ms=1,
    )
    record = job.make_ready(job.begin_preparing(record, 1), inputs, "0" * 64, 1)
    record = job.take(record, 5, "w" * 64, 1)
    record = job.report_stage(record, 5, Stage.EXPORTING, text)
    failure = JobFailure("INTERNAL", text)
    tried_again = job.report_failed(record, 5, failure, True, 1)
    ended = job.fail(job.report_trained(record, 5, inputs), failure, 1)
    assert max(len(each.to_json()) for each in (record, tried_again, ended)) <= MAX_RECORD_BYTES


def test_a_job_within_its_limits_is_not_overdue() -> None:
    record = admitted(ttl_ms=100, execution_timeout_ms=50)

    assert job.overdue(record, 1_100) == ""
    assert job.overdue(record, 1_101) == "ttl of 100 ms passed before a worker was free"


def test_only_execution_counts_for_the_execution_timeout() -> None:
    record = admitted(ttl_ms=10_000, execution_timeout_ms=50)
    taken = job.take(record, 1, "w", 5_000)

    assert job.overdue(taken, 5_050) == ""
    assert job.overdue(taken, 5_051) == "execution timeout of 50 ms exceeded"
    assert job.overdue(job.cancel(taken, 6_000), 10**9) == ""


def test_a_later_wish_does_not_lengthen_retention() -> None:
    ended = job.cancel(admitted(retention_ms=1_000), 5_000)

    assert job.shorten_retention(ended, 5_500).times.keep_until == 5_500
    assert job.shorten_retention(ended, 99_999).times.keep_until == 6_000


def test_the_fraction_of_the_whole_never_falls_from_stage_to_stage() -> None:
    order = [Stage.FETCHING, Stage.CLASS_IMAGES, Stage.TRAINING, Stage.EXPORTING, Stage.UPLOADING]
    order += [Stage.DEPLOYING, Stage.SAMPLING]
    fractions = [whole_fraction(stage, step, 4) for stage in order for step in range(6)]

    assert fractions == sorted(fractions)
    assert fractions[0] == 0.0
    assert fractions[-1] == pytest.approx(1.0)
    assert whole_fraction(Stage.DRAWING, 3, 0) == 0.05


@pytest.mark.parametrize("name", ["", "a.b", "*", ">", "a b", "ä", "x" * 65, "line\n", "a/b"])
def test_names_that_would_be_another_subject_are_refused(name: str) -> None:
    with pytest.raises(InvalidSpec):
        JobRef(JobKind.GEN, name, "id")
    with pytest.raises(InvalidSpec):
        JobRef(JobKind.GEN, "project", name)
