import asyncio
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from likeness.inference.v1.generation_job_pb2 import GenerationSpec
from likeness.job.v1.job_pb2 import JobOptions, JobOrigin, JobPolicy, JobPriority

from services.adapters.memory import ManualClock, MemoryPlatform
from services.domain import life_cycle as life
from services.domain.errors import AlreadyExists, InvalidSpec, NotFound, QueueFull, Unavailable, WrongState
from services.domain.job import (
    MAX_RECORD_BYTES,
    PRIORITY_HIGH,
    JobFailure,
    JobRecord,
    JobState,
    Limits,
    Stage,
)
from services.jobs.admission import limits_of
from services.jobs.core import JobCore
from services.jobs.documents import CachedDocuments
from tests.unit.jobs.harness import MemoryDocuments, application, drawing, make_core


@pytest.fixture
def documents() -> MemoryDocuments:
    return MemoryDocuments()


@pytest.fixture
def core(platform: MemoryPlatform, documents: MemoryDocuments) -> JobCore:
    return make_core(platform, documents=documents)


async def test_an_admitted_job_is_queued_with_its_limits(core: JobCore) -> None:
    revision = await core.admission.admit(application(job_id="a"))
    record = revision.record
    assert (record.id, record.state, record.ready) == ("a", JobState.QUEUED, True)
    assert record.limits == Limits()


async def test_a_hundred_equal_requests_at_once_make_one_job(core: JobCore, platform: MemoryPlatform) -> None:
    other = make_core(platform)
    requests = [
        (core if number % 2 else other).admission.admit(application(job_id=f"j{number}", request_id="key"))
        for number in range(100)
    ]
    revisions = await asyncio.gather(*requests)
    assert len({revision.record.id for revision in revisions}) == 1
    assert platform.job_log.last_sequence == 1


async def test_a_key_without_an_id_gives_the_same_id_through_every_replica(
    core: JobCore, platform: MemoryPlatform
) -> None:
    first = await core.admission.admit(application(request_id="key"))
    again = await make_core(platform).admission.admit(application(request_id="key"))
    other_project = await core.admission.admit(application(request_id="key", project="q"))
    assert again.record.id == first.record.id
    assert other_project.record.id != first.record.id
    assert platform.job_log.last_sequence == 2


async def test_a_repeat_finds_the_job_as_it_is_now(core: JobCore) -> None:
    first = await core.admission.admit(application(job_id="a"))
    await core.admission.cancel(first.record.ref)
    again = await core.admission.admit(application(job_id="a"))
    assert again.record.state is JobState.CANCELLED


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param({"job_id": "a"}, {"job_id": "a", "prompt": "another"}, id="same id"),
        pytest.param({"request_id": "k"}, {"request_id": "k", "prompt": "another"}, id="same key"),
        pytest.param(
            {"job_id": "a", "request_id": "k"},
            {"job_id": "b", "request_id": "k", "prompt": "another"},
            id="same key, ids given",
        ),
        pytest.param(
            {"job_id": "a"},
            {"job_id": "a", "options": JobOptions(origin=JobOrigin(endpoint="e"))},
            id="same id, other options",
        ),
    ],
)
async def test_a_name_cannot_stand_for_two_requests(
    core: JobCore, first: dict[str, Any], second: dict[str, Any]
) -> None:
    await core.admission.admit(application(**first))
    with pytest.raises(AlreadyExists):
        await core.admission.admit(application(**second))


async def test_a_key_whose_job_was_never_stored_still_stands_for_its_request(
    core: JobCore, platform: MemoryPlatform
) -> None:
    first = application(job_id="a", request_id="k")
    platform.job_log.write = _crash  # type: ignore[method-assign]
    with pytest.raises(Unavailable):
        await core.admission.admit(first)
    del platform.job_log.write
    with pytest.raises(AlreadyExists):
        await core.admission.admit(application(job_id="b", request_id="k", prompt="another"))
    again = await core.admission.admit(application(job_id="c", request_id="k"))
    assert again.record.id == "a"


async def _crash(record: JobRecord, expected: int) -> int:
    raise Unavailable("died between the key and the job")


async def test_trace_and_log_ids_do_not_make_another_request(core: JobCore) -> None:
    options = [JobOptions(traceparent=name, caller_request_id=name) for name in ("one", "two")]
    first, second = [await core.admission.admit(application(job_id="a", options=given)) for given in options]
    assert first.sequence == second.sequence


async def test_what_was_drawn_at_admission_does_not_make_another_request(core: JobCore) -> None:
    asked = GenerationSpec(prompt="a robot")
    for seed in (1, 2):
        resolved = GenerationSpec(prompt="a robot", seed=seed)
        revision = await core.admission.admit(application(job_id="a", asked=asked, spec=resolved))
    assert revision.record.spec["seed"] == "1"


async def test_known_jobs_are_found_without_making_one(core: JobCore, platform: MemoryPlatform) -> None:
    wanted = application(job_id="a", request_id="k")
    assert await core.admission.known(wanted) is None
    assert await core.admission.known(application()) is None
    admitted = await core.admission.admit(wanted)
    assert await core.admission.known(application(job_id="b", request_id="k")) == (
        await platform.job_log.read(admitted.record.ref)
    )


async def test_without_any_name_every_request_is_a_job_of_its_own(core: JobCore) -> None:
    one, two = [await core.admission.admit(application()) for _ in range(2)]
    assert one.record.id != two.record.id


@pytest.mark.parametrize("fields", [{"job_id": "a b"}, {"project": ""}, {"request_id": "x" * 256}])
async def test_malformed_names_are_refused(core: JobCore, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidSpec):
        await core.admission.admit(application(**fields))


async def test_a_full_log_refuses_new_jobs_and_answers_repeats(clock: ManualClock) -> None:
    platform = MemoryPlatform(clock, max_bytes=20_000)
    core = make_core(platform)
    with pytest.raises(QueueFull):
        for number in range(100):
            await core.admission.admit(application(job_id=f"j{number}"))
    again = await core.admission.admit(application(job_id="j0"))
    assert again.record.id == "j0"
    for number in range(3):  # what is under way can still end
        await core.admission.cancel(drawing(f"j{number}").ref)


async def test_no_job_is_admitted_into_a_log_that_is_four_fifths_full(
    core: JobCore, platform: MemoryPlatform, clock: ManualClock
) -> None:
    await core.admission.admit(application(job_id="before"))
    await clock.advance(2)
    platform.job_log.fill = _four_fifths  # type: ignore[method-assign]
    with pytest.raises(QueueFull):
        await core.admission.admit(application(job_id="after"))
    again = await core.admission.admit(application(job_id="before"))
    assert again.record.id == "before"


async def _four_fifths() -> float:
    return 0.8


async def test_a_long_specification_goes_to_storage_and_comes_back(
    core: JobCore, documents: MemoryDocuments
) -> None:
    long = application(job_id="a", prompt="é" * 9000)
    revision = await core.admission.admit(long)
    assert revision.record.spec == {}
    assert len(revision.record.to_json()) < MAX_RECORD_BYTES
    assert list(documents.held) == [revision.record.spec_key]
    assert (await core.views.generation_spec(revision.record)) == long.spec


async def test_a_long_request_goes_to_storage_and_comes_back(core: JobCore) -> None:
    text = '{"input": "' + "x" * 16_300 + '"}'
    options = JobOptions(origin=JobOrigin(dialect="d", request_json=text))
    revision = await core.admission.admit(application(job_id="a", options=options))
    assert len(revision.record.to_json()) < MAX_RECORD_BYTES
    shown = await core.views.options(revision.record)
    assert shown.origin.request_json == text


async def test_options_that_fit_nowhere_are_refused(core: JobCore) -> None:
    options = JobOptions(origin=JobOrigin(labels={f"k{number}": "x" * 300 for number in range(64)}))
    with pytest.raises(InvalidSpec, match="too long"):
        await core.admission.admit(application(options=options))


def test_limits_come_from_the_policy_and_the_defaults() -> None:
    policy = JobPolicy(execution_timeout=Duration(seconds=5), priority=JobPriority.JOB_PRIORITY_HIGH)
    limits = limits_of(policy, Limits(ttl_ms=77))
    assert (limits.execution_timeout_ms, limits.ttl_ms, limits.priority) == (5000, 77, PRIORITY_HIGH)


def test_all_limits_out_of_range_are_named() -> None:
    policy = JobPolicy(execution_timeout=Duration(seconds=4), ttl=Duration(seconds=8 * 24 * 3600))
    with pytest.raises(InvalidSpec) as refusal:
        limits_of(policy, Limits())
    assert [violation.field for violation in refusal.value.violations] == [
        "options.policy.execution_timeout",
        "options.policy.ttl",
    ]


STATES = {
    "queued": drawing("a"),
    "taken": life.take(drawing("a"), 1, "w", 0),
    "begun": life.heard(life.take(drawing("a"), 1, "w", 0)),
    "drawing": life.report_stage(life.take(drawing("a"), 1, "w", 0), 1, Stage.DRAWING, ""),
}


@pytest.mark.parametrize("record", STATES.values(), ids=STATES)
async def test_a_job_is_cancelled_in_every_state(
    core: JobCore, platform: MemoryPlatform, record: JobRecord
) -> None:
    await platform.job_log.write(record, 0)
    revision = await core.admission.cancel(record.ref)
    assert (revision.record.state, revision.record.ready) == (JobState.CANCELLED, False)


@pytest.mark.parametrize("state", ["succeeded", "failed", "timed out", "cancelled"])
async def test_a_job_that_has_ended_is_cancelled_without_change(
    core: JobCore, platform: MemoryPlatform, state: str
) -> None:
    taken = life.take(drawing("a"), 1, "w", 0)
    ended = {
        "succeeded": life.report_finished(taken, 1, {}, 0),
        "failed": life.report_failed(taken, 1, JobFailure("X", "x"), False, 0),
        "timed out": life.time_out(taken, "late", 0),
        "cancelled": life.cancel(taken, 0),
    }[state]
    sequence = await platform.job_log.write(ended, 0)
    revision = await core.admission.cancel(ended.ref)
    assert (revision.sequence, revision.record.state) == (sequence, ended.state)


async def test_only_failed_jobs_start_again(core: JobCore, platform: MemoryPlatform) -> None:
    await platform.job_log.write(drawing("a"), 0)
    with pytest.raises(WrongState):
        await core.admission.retry(drawing("a").ref)
    await core.records.change(drawing("a").ref, lambda record: life.time_out(record, "late", 0))
    again = await core.admission.retry(drawing("a").ref)
    assert (again.record.state, again.record.round, again.record.spec) == (
        JobState.QUEUED,
        1,
        {"prompt": "a robot"},
    )


async def test_retention_is_shortened_and_never_lengthened(core: JobCore, platform: MemoryPlatform) -> None:
    await platform.job_log.write(drawing("a"), 0)
    with pytest.raises(WrongState):
        await core.admission.shorten_retention(drawing("a").ref, 5)
    ended = await core.admission.cancel(drawing("a").ref)
    until = ended.record.times.keep_until
    same = await core.admission.shorten_retention(ended.record.ref, until + 1)
    sooner = await core.admission.shorten_retention(ended.record.ref, until - 1)
    assert (same.record.times.keep_until, same.sequence) == (until, ended.sequence)
    assert sooner.record.times.keep_until == until - 1


async def test_unknown_jobs_are_not_found(core: JobCore) -> None:
    with pytest.raises(NotFound):
        await core.admission.cancel(drawing("never").ref)


async def test_documents_read_lately_are_not_fetched_again(documents: MemoryDocuments) -> None:
    cached = CachedDocuments(documents, max_bytes=100)
    keys = [await cached.put("p", bytes([number]) * 20) for number in range(6)]
    kept = dict(documents.held)
    documents.held.clear()
    assert await cached.get(keys[5]) == kept[keys[5]]
    with pytest.raises(KeyError):
        await cached.get(keys[0])
