"""One suite for the job core's ports, over the log in memory and over a real server: they must not differ."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from services.adapters.jetstream import JetStreamPlatform
from services.adapters.memory import MemoryPlatform
from services.domain import life_cycle as job
from services.domain.errors import Conflict, InvalidSpec
from services.domain.job import Checkpoint, JobKind, JobRecord, JobRef, JobState, Limits, Stage
from services.domain.ports import Beat, CaughtUp, Revision

Platform = MemoryPlatform | JetStreamPlatform


@pytest.fixture(params=["memory", "jetstream"])
async def platform(request: pytest.FixtureRequest) -> AsyncIterator[Platform]:
    if request.param == "memory":
        yield MemoryPlatform()
        return
    server = request.getfixturevalue("nats_server")
    async with await JetStreamPlatform.open([server.url], monitor_url=server.monitor_url) as opened:
        yield opened


@pytest.fixture
def project() -> str:
    return f"project-{uuid.uuid4().hex[:12]}"


def drawing(project: str, name: str = "one", **changes: Any) -> JobRecord:
    ref = JobRef(JobKind.GEN, project, name)
    spec = {"prompt": "ein Bild von sks, größer", "n": 1}
    admitted = job.admit_drawing(ref, spec=spec, options={}, limits=Limits(), request="r", now_ms=1)
    return replace(admitted, **changes)


def training(project: str, name: str = "one") -> JobRecord:
    ref = JobRef(JobKind.TRAIN, project, name)
    return job.admit_training(ref, spec={"s": 1}, options={}, limits=Limits(), request="r", now_ms=1)


async def until_caught_up(feed: AsyncIterator[Revision | CaughtUp], project: str) -> list[Revision]:
    found: list[Revision] = []
    async for item in feed:
        if isinstance(item, CaughtUp):
            return found
        if item.record.project == project:
            found.append(item)
    raise AssertionError("the feed ended")


async def next_of(feed: AsyncIterator[Revision | CaughtUp], project: str, number: int) -> list[Revision]:
    found: list[Revision] = []
    async with asyncio.timeout(20):
        async for item in feed:
            if isinstance(item, Revision) and item.record.project == project:
                found.append(item)
            if len(found) == number:
                return found
    raise AssertionError("the feed ended")


class TestJobLog:
    async def test_a_stored_revision_is_read_back_under_a_fresh_write_id(
        self, platform: Platform, project: str
    ) -> None:
        record = drawing(project, checkpoint=Checkpoint("key", 7), why="it's a test: ü\r\nX")

        sequence = await platform.job_log.write(record, 0)

        found = await platform.job_log.read(record.ref)
        assert found is not None
        assert found.sequence == sequence
        assert replace(found.record, write="") == record
        assert len(found.record.write) == 32

    async def test_a_job_that_is_not_there_reads_as_none(self, platform: Platform, project: str) -> None:
        assert await platform.job_log.read(drawing(project).ref) is None
        assert await platform.job_log.next_revision(drawing(project).ref, 0) is None

    async def test_a_second_creation_and_a_stale_change_lose(self, platform: Platform, project: str) -> None:
        record = drawing(project)
        first = await platform.job_log.write(record, 0)
        await platform.job_log.write(replace(record, why="second"), first)

        with pytest.raises(Conflict):
            await platform.job_log.write(record, 0)
        with pytest.raises(Conflict):
            await platform.job_log.write(replace(record, why="third"), first)

        newest = await platform.job_log.read(record.ref)
        assert newest is not None
        assert newest.record.why == "second"

    async def test_a_change_of_what_is_not_there_loses(self, platform: Platform, project: str) -> None:
        with pytest.raises(Conflict):
            await platform.job_log.write(drawing(project), 10**9)

    async def test_of_many_writers_one_wins(self, platform: Platform, project: str) -> None:
        record = drawing(project)
        writes = [platform.job_log.write(replace(record, why=f"{n}"), 0) for n in range(20)]

        outcomes = await asyncio.gather(*writes, return_exceptions=True)

        won = [n for n, outcome in enumerate(outcomes) if isinstance(outcome, int)]
        newest = await platform.job_log.read(record.ref)
        assert len(won) == 1
        assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 19
        assert newest is not None
        assert newest.record.why == str(won[0])

    async def test_the_chain_of_a_job_can_be_walked(self, platform: Platform, project: str) -> None:
        record, sequence = drawing(project), 0
        for number in range(5):
            await platform.job_log.write(drawing(project, f"other-{number}"), 0)
            sequence = await platform.job_log.write(replace(record, why=f"{number}"), sequence)

        walked, position = [], 0
        while (found := await platform.job_log.next_revision(record.ref, position)) is not None:
            walked.append(found.record.why)
            position = found.sequence

        assert walked == ["0", "1", "2", "3", "4"]
        assert position == sequence

    async def test_many_jobs_are_read_in_the_order_asked_for(self, platform: Platform, project: str) -> None:
        for number in range(12):
            await platform.job_log.write(drawing(project, f"job-{number}"), 0)
        names = ["job-7", "absent", "job-2", "job-11"]

        found = await platform.job_log.read_many([JobRef(JobKind.GEN, project, name) for name in names])

        assert [revision.record.id for revision in found] == ["job-7", "job-2", "job-11"]
        assert await platform.job_log.read_many([]) == []

    async def test_a_purge_that_keeps_the_last_lets_the_chain_go_on(
        self, platform: Platform, project: str
    ) -> None:
        record, sequence = drawing(project), 0
        for number in range(4):
            sequence = await platform.job_log.write(replace(record, why=f"{number}"), sequence)

        await platform.job_log.purge(record.ref, keep_last=True)

        oldest = await platform.job_log.next_revision(record.ref, 0)
        assert oldest is not None
        assert oldest.sequence == sequence
        assert await platform.job_log.write(record, sequence) > sequence
        with pytest.raises(Conflict):
            await platform.job_log.write(record, 0)

    async def test_a_whole_purge_leaves_nothing(self, platform: Platform, project: str) -> None:
        record = drawing(project)
        sequence = await platform.job_log.write(record, 0)

        await platform.job_log.purge(record.ref, keep_last=False)

        assert await platform.job_log.read(record.ref) is None
        with pytest.raises(Conflict):
            await platform.job_log.write(record, sequence)
        assert await platform.job_log.write(record, 0) > sequence

    async def test_a_record_beyond_the_limit_is_refused(self, platform: Platform, project: str) -> None:
        with pytest.raises(InvalidSpec, match="larger than 32768 bytes"):
            await platform.job_log.write(drawing(project, spec={"prompt": "x" * 40_000}), 0)

    async def test_revisions_carry_the_logs_own_time(self, platform: Platform, project: str) -> None:
        before = platform.job_log.now_ms()
        await platform.job_log.write(drawing(project), 0)
        after = platform.job_log.now_ms()

        found = await platform.job_log.read(drawing(project).ref)

        assert found is not None
        assert before - 50 <= found.time_ms <= after + 50

    async def test_the_fill_grows_with_what_is_written(self, platform: Platform, project: str) -> None:
        before = await platform.job_log.fill()
        for number in range(5):
            await platform.job_log.write(drawing(project, f"{number}", spec={"prompt": "x" * 30_000}), 0)

        assert 0 <= before < await platform.job_log.fill() < 1


class TestJobFeed:
    async def test_the_replay_brings_the_newest_of_each_job_and_then_what_is_new(
        self, platform: Platform, project: str
    ) -> None:
        waiting = drawing(project, "waiting")
        sequence = await platform.job_log.write(replace(waiting, why="old"), 0)
        sequence = await platform.job_log.write(waiting, sequence)
        async with aclosing(platform.job_feed.follow()) as feed:
            replayed = await until_caught_up(feed, project)
            taken = job.take(waiting, sequence, "worker", 2)
            taken_at = await platform.job_log.write(taken, sequence)
            news = await next_of(feed, project, 1)

        assert [(item.sequence, replace(item.record, write="")) for item in replayed] == [(sequence, waiting)]
        assert [(item.sequence, replace(item.record, write="")) for item in news] == [(taken_at, taken)]

    async def test_an_ended_job_is_replayed_without_its_body(self, platform: Platform, project: str) -> None:
        admitted = drawing(project, options={"origin": {"endpoint": "e"}})
        sequence = await platform.job_log.write(admitted, 0)
        taken = job.take(admitted, sequence, "worker", 2)
        at = await platform.job_log.write(taken, sequence)
        ended = job.report_finished(taken, sequence, {"images": [1]}, 3)
        await platform.job_log.write(ended, at)

        async with aclosing(platform.job_feed.follow(JobKind.GEN)) as feed:
            (found,) = await until_caught_up(feed, project)

        assert found.record.state is JobState.SUCCEEDED
        assert (found.record.spec, found.record.result) == ({}, None)
        assert found.record.endpoint == "e"
        assert found.record.times == ended.times

    async def test_a_feed_of_one_kind_brings_no_other(self, platform: Platform, project: str) -> None:
        await platform.job_log.write(drawing(project), 0)
        async with aclosing(platform.job_feed.follow(JobKind.TRAIN)) as feed:
            replayed = await until_caught_up(feed, project)
            await platform.job_log.write(drawing(project, "two"), 0)
            await platform.job_log.write(training(project), 0)
            news = await next_of(feed, project, 1)

        assert replayed == []
        assert news[0].record.kind is JobKind.TRAIN

    async def test_a_purged_job_is_not_replayed(self, platform: Platform, project: str) -> None:
        await platform.job_log.write(drawing(project, "gone"), 0)
        await platform.job_log.write(drawing(project, "there"), 0)
        await platform.job_log.purge(drawing(project, "gone").ref, keep_last=False)

        async with aclosing(platform.job_feed.follow()) as feed:
            replayed = await until_caught_up(feed, project)

        assert [item.record.id for item in replayed] == ["there"]

    async def test_a_slow_reader_gets_every_revision_in_order(self, platform: Platform, project: str) -> None:
        record = drawing(project)
        written: list[int] = []
        async with aclosing(platform.job_feed.follow(JobKind.GEN)) as feed:
            await until_caught_up(feed, project)
            for _ in range(450):
                written.append(await platform.job_log.write(record, written[-1] if written else 0))
            news = await next_of(feed, project, 450)

        assert [item.sequence for item in news] == written

    async def test_two_readers_get_the_same(self, platform: Platform, project: str) -> None:
        async with aclosing(platform.job_feed.follow()) as one, aclosing(platform.job_feed.follow()) as two:
            await until_caught_up(one, project)
            await until_caught_up(two, project)
            await platform.job_log.write(drawing(project), 0)

            assert await next_of(one, project, 1) == await next_of(two, project, 1)


class TestBeats:
    async def test_a_follower_hears_every_worker_of_its_kind(self, platform: Platform, project: str) -> None:
        heard: list[Beat] = []

        async def listen() -> None:
            async with aclosing(platform.beats.follow_beats(JobKind.GEN)) as beats:
                async for beat in beats:
                    if beat.worker.startswith(project):
                        heard.append(beat)

        listening = asyncio.create_task(listen())
        await asyncio.sleep(0.1)
        beat = Beat(
            JobKind.GEN, f"{project}-a", ((project, "one", 7),), ("model",), 3, "cpu", 10, leaving=True
        )
        await platform.beats.publish_beat(replace(beat, kind=JobKind.TRAIN))
        await platform.beats.publish_beat(beat)
        await platform.beats.publish_beat(Beat(JobKind.GEN, f"{project}-b"))
        await wait_for(lambda: len(heard) == 2)
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)

        assert heard == [beat, Beat(JobKind.GEN, f"{project}-b")]

    async def test_a_worker_whose_name_would_be_another_subject_is_refused(self, platform: Platform) -> None:
        for name in ("", "a.b", "*", ">", "a b", "x" * 65, "a\n"):
            with pytest.raises(InvalidSpec):
                await platform.beats.publish_beat(Beat(JobKind.GEN, name))


async def wait_for(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


class TestProgress:
    async def publish(self, platform: Platform, project: str, name: str, number: int) -> None:
        """Publishes bodies 1 to `number`, and waits until the last is stored."""
        for step in range(1, number + 1):
            await platform.progress.publish_progress(project, name, {"step": step})
        async with asyncio.timeout(10):
            while True:
                last = await platform.progress.last_progress(project, name)
                if last is not None and last.body == {"step": number}:
                    return
                await asyncio.sleep(0.01)

    async def test_progress_is_read_from_any_point(self, platform: Platform, project: str) -> None:
        await self.publish(platform, project, "one", 5)
        await self.publish(platform, project, "two", 1)

        whole = await platform.progress.progress_after(project, "one", 0)
        rest = await platform.progress.progress_after(project, "one", whole[1].sequence, limit=2)

        assert [entry.body["step"] for entry in whole] == [1, 2, 3, 4, 5]
        assert rest == whole[2:4]
        assert await platform.progress.progress_after(project, "one", whole[-1].sequence) == []

    async def test_a_job_without_progress_has_none(self, platform: Platform, project: str) -> None:
        assert await platform.progress.last_progress(project, "one") is None
        assert await platform.progress.progress_after(project, "one", 0) == []

    async def test_only_the_last_five_hundred_stay(self, platform: Platform, project: str) -> None:
        await self.publish(platform, project, "one", 510)

        kept = await platform.progress.progress_after(project, "one", 0, limit=1000)

        assert [entry.body["step"] for entry in kept] == list(range(11, 511))

    async def test_a_readers_position_moves_by_compare_and_set(
        self, platform: Platform, project: str
    ) -> None:
        assert await platform.progress.read_cursor(project, "one") == ({}, 0)
        first = await platform.progress.write_cursor(project, "one", {"next": 1}, 0)
        second = await platform.progress.write_cursor(project, "one", {"next": 2}, first)

        with pytest.raises(Conflict):
            await platform.progress.write_cursor(project, "one", {"next": 9}, first)
        with pytest.raises(Conflict):
            await platform.progress.write_cursor(project, "one", {"next": 9}, 0)

        assert await platform.progress.read_cursor(project, "one") == ({"next": 2}, second)


class TestSmallDocuments:
    async def test_an_idempotency_key_is_taken_once(self, platform: Platform, project: str) -> None:
        key = "0" * 64
        assert await platform.small.read_idempotency(project, key) is None
        await platform.small.create_idempotency(project, key, {"id": "a"})

        with pytest.raises(Conflict):
            await platform.small.create_idempotency(project, key, {"id": "b"})

        assert await platform.small.read_idempotency(project, key) == {"id": "a"}

    async def test_of_many_equal_keys_at_once_one_is_stored(self, platform: Platform, project: str) -> None:
        creations = [platform.small.create_idempotency(project, "k", {"id": n}) for n in range(20)]

        outcomes = await asyncio.gather(*creations, return_exceptions=True)

        stored = await platform.small.read_idempotency(project, "k")
        assert stored == {"id": outcomes.index(None)}
        assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 19

    async def test_a_webhooks_cursor_moves_by_compare_and_set(self, platform: Platform, project: str) -> None:
        position = 0
        for number in range(20):  # more than the log keeps of it
            position = await platform.small.write_hook(project, "one", {"next": number}, position)

        with pytest.raises(Conflict):
            await platform.small.write_hook(project, "one", {"next": 99}, position - 1)

        assert await platform.small.read_hook(project, "one") == ({"next": 19}, position)
        assert await platform.small.read_hook(project, "two") == ({}, 0)

    async def test_a_name_that_would_be_another_subject_is_refused(
        self, platform: Platform, project: str
    ) -> None:
        with pytest.raises(InvalidSpec):
            await platform.small.read_hook(project, "*")
        with pytest.raises(InvalidSpec):
            await platform.small.create_idempotency("a.b", "key", {})
        with pytest.raises(InvalidSpec):
            JobRef(JobKind.GEN, project, "one.two")


class TestWholeLives:
    async def test_a_training_goes_through_all_its_phases(self, platform: Platform, project: str) -> None:
        log, record, now = platform.job_log, training(project), 10
        sequence = await log.write(record, 0)
        sequence = await log.write(record := job.begin_preparing(record, now), sequence)
        ready_at = await log.write(record := job.make_ready(record, {"p": 1}, "m", now), sequence)
        sequence = await log.write(record := job.take(record, ready_at, "w", now), ready_at)
        record = job.report_stage(record, ready_at, Stage.TRAINING, "training")
        sequence = await log.write(record, sequence)
        sequence = await log.write(record := job.report_trained(record, ready_at, {"m": 1}), sequence)
        await log.write(job.finish(record, {"images": []}, "", now), sequence)

        found = await log.read(record.ref)

        assert found is not None
        assert (found.record.state, found.record.epoch) == (JobState.SUCCEEDED, ready_at)
        assert found.record.trained == {"m": 1}
