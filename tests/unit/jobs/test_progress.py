import pytest
from likeness.job.v1.job_pb2 import Progress

from services.adapters.memory import ManualClock, MemoryPlatform
from services.domain import life_cycle as life
from services.domain.job import JobRecord, Stage
from services.jobs.progress import FORGOTTEN_S, ProgressBoard, stage_of
from tests.unit.jobs.harness import drawing


@pytest.fixture
def record(clock: ManualClock) -> JobRecord:
    return life.take(drawing("a", now_ms=clock.now_ms()), 1, "w", clock.now_ms())


@pytest.fixture
def board(platform: MemoryPlatform, clock: ManualClock) -> ProgressBoard:
    return ProgressBoard(platform.progress, clock)


async def fractions(platform: MemoryPlatform) -> list[float]:
    return [
        float(entry.body["fraction"]) for entry in await platform.progress.progress_after("p", "a", 0, 500)
    ]


def drawn(step: int, total: int = 100) -> Progress:
    return Progress(stage="JOB_STAGE_DRAWING", step=step, total_steps=total)


async def test_at_most_one_message_a_second_goes_out(
    board: ProgressBoard, record: JobRecord, platform: MemoryPlatform, clock: ManualClock
) -> None:
    for step in range(20):
        await board.tell(record, drawn(step))
        await clock.advance(0.1)
    assert len(await fractions(platform)) == 2


async def test_small_steps_of_a_long_job_are_held_back(
    board: ProgressBoard, record: JobRecord, platform: MemoryPlatform, clock: ManualClock
) -> None:
    for step in range(2000):
        await board.tell(record, drawn(step, 2000))
        await clock.advance(1)
    assert 300 <= len(await fractions(platform)) <= 400


async def test_the_last_numbers_of_a_stage_go_out_with_a_later_tick(
    board: ProgressBoard, record: JobRecord, platform: MemoryPlatform, clock: ManualClock
) -> None:
    await board.tell(record, drawn(50))
    await board.tell(record, drawn(100))
    await board.flush()
    assert await fractions(platform) == [pytest.approx(0.525)]
    await clock.advance(1)
    await board.flush()
    assert (await fractions(platform))[-1] == pytest.approx(1.0)


async def test_the_fraction_never_falls_within_a_run(
    board: ProgressBoard, record: JobRecord, platform: MemoryPlatform, clock: ManualClock
) -> None:
    await board.tell(record, drawn(80))
    await clock.advance(2)
    await board.tell(record, drawn(10))  # another attempt, from its checkpoint
    await clock.advance(2)
    other_replica = ProgressBoard(platform.progress, clock)
    await other_replica.tell(record, drawn(20))
    seen = await fractions(platform)
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(0.05 + 0.95 * 0.8)


async def test_a_new_run_begins_from_zero(
    board: ProgressBoard, record: JobRecord, platform: MemoryPlatform, clock: ManualClock
) -> None:
    await board.tell(record, drawn(80))
    await clock.advance(2)
    again = life.retry(life.time_out(record, "late", clock.now_ms()), clock.now_ms())
    await board.tell(again, drawn(10))
    assert (await fractions(platform))[-1] == pytest.approx(0.05 + 0.95 * 0.1)


async def test_a_job_that_nobody_tells_of_any_more_is_forgotten(
    board: ProgressBoard, record: JobRecord, platform: MemoryPlatform, clock: ManualClock
) -> None:
    await board.tell(record, drawn(80))
    await clock.advance(FORGOTTEN_S + 1)
    await board.flush()
    assert board._jobs == {}
    await board.tell(record, drawn(10))
    assert (await fractions(platform))[-1] == pytest.approx(0.05 + 0.95 * 0.8), "the fraction never falls"


def test_unknown_stages_of_the_wire_give_the_records_own() -> None:
    assert stage_of(10, Stage.LOADING) is Stage.DRAWING
    assert stage_of(0, Stage.LOADING) is Stage.LOADING
    assert stage_of(99, Stage.LOADING) is Stage.LOADING
