import asyncio
from dataclasses import replace

import pytest

from services.adapters.memory import MemoryPlatform
from services.domain import life_cycle as life
from services.domain.errors import InvalidSpec
from services.domain.job import JobKind, JobRecord, JobState, Limits
from services.domain.ports import Revision
from services.jobs.index import JobIndex
from tests.unit.jobs.harness import drawing, make_core, running, settle, training

NOW = 1_700_000_000_000


@pytest.fixture
def index() -> JobIndex:
    return JobIndex(JobKind.GEN)


def put(index: JobIndex, sequence: int, record: JobRecord) -> Revision:
    revision = Revision(record, sequence, NOW)
    index.apply(revision)
    return revision


def cancelled(record: JobRecord) -> JobRecord:
    return life.cancel(record, NOW)


def test_an_older_revision_that_comes_late_changes_nothing(index: JobIndex) -> None:
    record = drawing("a")
    put(index, 5, life.take(record, 4, "w", NOW))
    assert not index.apply(Revision(record, 4, NOW))
    assert index.get(record.ref) is not None
    assert index.running_by_project == {"p": 1}
    assert not index.queues


def test_jobs_of_another_kind_are_left_out(index: JobIndex) -> None:
    assert not index.apply(Revision(training("t"), 1, NOW))


def test_an_ended_job_keeps_a_line_only(index: JobIndex) -> None:
    record = drawing("a")
    put(index, 1, record)
    put(index, 2, cancelled(record))
    line = index.line(record.ref)
    assert index.get(record.ref) is None
    assert line is not None
    assert line.state is JobState.CANCELLED
    assert index.live() == []


def test_a_job_being_taken_is_offered_to_nobody_else_until_the_mark_goes(index: JobIndex) -> None:
    record = drawing("a")
    put(index, 1, record)
    index.begin_taking(record.ref)
    assert not index.queues
    index.end_taking(record.ref)
    assert [job.id for jobs in index.queues.values() for job in jobs] == ["a"]


def test_a_job_given_back_while_marked_waits_once(index: JobIndex) -> None:
    record = drawing("a")
    put(index, 1, record)
    index.begin_taking(record.ref)
    taken = put(index, 2, life.take(record, 1, "w", NOW))
    put(index, 3, life.report_yielded(taken.record, 1, "", NOW))
    index.end_taking(record.ref)
    index.end_taking(record.ref)
    put(index, 4, cancelled(record))
    assert not index.queues


def test_jobs_led_by_the_api_are_listed_while_they_are() -> None:
    index, record = JobIndex(JobKind.TRAIN), training("t")
    put(index, 1, record)
    assert [r.record.id for r in index.led()] == ["t"]
    preparing = put(index, 2, life.begin_preparing(record, NOW))
    put(index, 3, life.make_ready(preparing.record, {}, "m", NOW))
    assert index.led() == []
    assert len(index.queues) == 1


def test_pages_go_from_the_newest_to_the_oldest_and_end(index: JobIndex) -> None:
    for number in range(7):
        put(index, number + 1, drawing(f"j{number}", now_ms=NOW + number // 2))
    put(index, 9, drawing("foreign", project="q"))
    seen, token = [], ""
    for _ in range(4):
        lines, token = index.page("p", 2, token)
        seen += [line.ref.id for line in lines]
    assert seen == ["j6", "j5", "j4", "j3", "j2", "j1", "j0"]
    assert token == ""


def test_a_page_that_ends_exactly_has_no_next(index: JobIndex) -> None:
    put(index, 1, drawing("a"))
    put(index, 2, drawing("b"))
    assert index.page("p", 2)[1] == ""


def test_a_page_can_be_narrowed_to_states_and_an_endpoint(index: JobIndex) -> None:
    put(index, 1, drawing("a", options={"origin": {"endpoint": "e"}}))
    put(index, 2, cancelled(drawing("b", options={"origin": {"endpoint": "e"}})))
    put(index, 3, drawing("c"))
    assert [line.ref.id for line in index.page("p", 9, states={JobState.QUEUED})[0]] == ["c", "a"]
    assert [line.ref.id for line in index.page("p", 9, endpoint="e")[0]] == ["b", "a"]


def test_a_foreign_page_token_is_refused(index: JobIndex) -> None:
    with pytest.raises(InvalidSpec):
        index.page("p", 2, "nonsense")


def test_counts_follow_every_change(index: JobIndex) -> None:
    record = drawing("a")
    put(index, 1, record)
    put(index, 2, replace(drawing("b"), round=1))
    put(index, 3, cancelled(record))
    put(index, 4, drawing("c", project="q"))
    counts = index.counts("p")
    assert counts.by_state[JobState.QUEUED] == 1
    assert counts.by_state[JobState.CANCELLED] == 1
    assert counts.retried == 1
    assert counts.ready == 1
    assert index.counts().ready == 2
    index.drop(record.ref)
    assert index.counts("p").by_state[JobState.CANCELLED] == 0


def test_deleted_jobs_are_neither_listed_nor_counted(index: JobIndex) -> None:
    record = cancelled(drawing("a", parent="t"))
    put(index, 1, record)
    put(index, 2, life.delete(record))
    assert index.page("p", 9) == ([], "")
    assert sum(index.counts().by_state.values()) == 0
    assert [line.ref.id for line in index.deleted()] == ["a"]
    assert index.children("p", "t") == []


def test_children_are_found_by_their_parent(index: JobIndex) -> None:
    put(index, 1, drawing("b", parent="t"))
    put(index, 2, cancelled(drawing("a", parent="t")))
    put(index, 3, drawing("c", parent="u"))
    assert [(line.ref.id, line.state.value) for line in index.children("p", "t")] == [
        ("a", "CANCELLED"),
        ("b", "QUEUED"),
    ]


def test_expiry_names_a_job_once_and_follows_a_shortened_retention(index: JobIndex) -> None:
    ended = put(index, 1, cancelled(drawing("a", limits=Limits(retention_ms=10_000))))
    assert list(index.expired(NOW + 9_999)) == []
    put(index, 2, life.shorten_retention(ended.record, NOW + 5_000))
    assert [ref.id for ref in index.expired(NOW + 5_000)] == ["a"]
    assert list(index.expired(NOW + 5_000)) == []
    index.remind(ended.record.ref, NOW + 7_000)
    assert [ref.id for ref in index.expired(NOW + 7_000)] == ["a"]


def test_a_job_started_again_does_not_expire(index: JobIndex) -> None:
    record = drawing("a")
    failed = life.time_out(record, "late", NOW)
    put(index, 1, failed)
    put(index, 2, life.retry(failed, NOW))
    assert list(index.expired(NOW + 10**12)) == []


async def test_waiting_for_a_change_ends_with_the_next_revision(index: JobIndex) -> None:
    record = drawing("a")
    put(index, 1, record)
    await index.changed(record.ref, 0)
    waiting = asyncio.create_task(index.changed(record.ref, 1))
    await settle()
    assert not waiting.done()
    put(index, 2, cancelled(record))
    await waiting


async def test_following_the_feed_catches_up_and_goes_on(platform: MemoryPlatform) -> None:
    await platform.job_log.write(drawing("before"), 0)
    core = make_core(platform)
    async with running(core):
        assert core.index.line(drawing("before").ref) is not None
        await platform.job_log.write(drawing("after"), 0)
        await settle()
        assert core.index.line(drawing("after").ref) is not None
