"""The job core on a real server when the wire, the server or its configuration misbehaves."""

import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.adapters import jetstream_connection, subjects
from services.adapters.jetstream import JetStreamPlatform
from services.adapters.jetstream_connection import WRITE_IN_FLIGHT, Connection, NoAnswer, NotSent, Refused
from services.adapters.jetstream_streams import ServerRefused, stream_configs
from services.domain import life_cycle as job
from services.domain.errors import Conflict, OutcomeUnknown, QueueFull, Unavailable
from services.domain.job import JobKind, JobRecord, JobRef, JobState, Limits
from services.domain.ports import CaughtUp, Revision
from tests.integration.jobcore.checker import whole_chain
from tests.integration.jobcore.proxy import Proxy
from tests.integration.nats_server import NatsCluster, NatsServer


async def opened(server: NatsServer, url: str = "", **options: Any) -> JetStreamPlatform:
    return await JetStreamPlatform.open([url or server.url], monitor_url=server.monitor_url, **options)


@pytest.fixture
async def platform(nats_server: NatsServer) -> AsyncIterator[JetStreamPlatform]:
    async with await opened(nats_server) as found:
        yield found


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost answers are noticed after a quarter of a second."""
    monkeypatch.setattr(jetstream_connection, "REQUEST_TIMEOUT_S", 0.25)


def drawing(name: str | None = None, **changes: Any) -> JobRecord:
    ref = JobRef(JobKind.GEN, "project", name or uuid.uuid4().hex)
    admitted = job.admit_drawing(ref, spec={"n": 1}, options={}, limits=Limits(), request="r", now_ms=1)
    return replace(admitted, **changes)


@pytest.mark.usefixtures("impatient")
class TestTheOneWrite:
    @pytest.fixture
    async def proxy(self, nats_server: NatsServer) -> AsyncIterator[Proxy]:
        async with Proxy(nats_server.port) as proxy:
            yield proxy

    @pytest.fixture
    async def through(self, nats_server: NatsServer, proxy: Proxy) -> AsyncIterator[JetStreamPlatform]:
        async with await opened(nats_server, proxy.url, write_patience_s=15) as found:
            yield found

    async def test_a_write_whose_acknowledgement_is_lost_is_found_in_the_log(
        self, platform: JetStreamPlatform, through: JetStreamPlatform, proxy: Proxy
    ) -> None:
        record = drawing()
        first = await through.job_log.write(record, 0)
        proxy.eats_answers = True
        writing = asyncio.create_task(through.job_log.write(replace(record, why="second"), first))
        await asyncio.sleep(0.4)
        assert not writing.done()
        proxy.cut()

        sequence = await writing

        chain = await whole_chain(platform.job_log, record.ref)
        assert [(item.sequence, item.record.why) for item in chain[1:]] == [(sequence, "second")]

    async def test_a_write_that_never_arrived_is_sent_again(
        self, platform: JetStreamPlatform, through: JetStreamPlatform, proxy: Proxy
    ) -> None:
        record = drawing()
        first = await through.job_log.write(record, 0)
        proxy.eats_requests = True
        writing = asyncio.create_task(through.job_log.write(replace(record, why="second"), first))
        await asyncio.sleep(0.4)
        assert len(await whole_chain(platform.job_log, record.ref)) == 1
        proxy.cut()

        sequence = await writing

        chain = await whole_chain(platform.job_log, record.ref)
        assert [(item.sequence, item.record.why) for item in chain[1:]] == [(sequence, "second")]

    async def test_a_write_that_was_stored_and_then_followed_by_a_cancel_is_still_known_as_stored(
        self, platform: JetStreamPlatform, through: JetStreamPlatform, proxy: Proxy
    ) -> None:
        record = drawing()
        first = await through.job_log.write(record, 0)
        proxy.eats_answers = True
        writing = asyncio.create_task(through.job_log.write(job.take(record, first, "w", 2), first))
        await asyncio.sleep(0.2)
        taken = await platform.job_log.read(record.ref)
        assert taken is not None
        assert taken.record.worker == "w"
        await platform.job_log.write(job.cancel(taken.record, 3), taken.sequence)
        proxy.cut()

        assert await writing == taken.sequence
        states = [item.record.state for item in await whole_chain(platform.job_log, record.ref)]
        assert states == [JobState.QUEUED, JobState.RUNNING, JobState.CANCELLED]

    async def test_a_write_that_never_arrived_loses_to_a_cancel_meanwhile(
        self, platform: JetStreamPlatform, through: JetStreamPlatform, proxy: Proxy
    ) -> None:
        record = drawing()
        first = await through.job_log.write(record, 0)
        proxy.eats_requests = True
        writing = asyncio.create_task(through.job_log.write(job.take(record, first, "w", 2), first))
        await asyncio.sleep(0.2)
        await platform.job_log.write(job.cancel(record, 3), first)
        proxy.cut()

        with pytest.raises(Conflict):
            await writing
        states = [item.record.state for item in await whole_chain(platform.job_log, record.ref)]
        assert states == [JobState.QUEUED, JobState.CANCELLED]

    async def test_a_cancelled_caller_does_not_stop_a_write(
        self, platform: JetStreamPlatform, through: JetStreamPlatform, proxy: Proxy
    ) -> None:
        record = drawing()
        first = await through.job_log.write(record, 0)
        proxy.eats_requests = True
        writing = asyncio.create_task(through.job_log.write(record, first))
        await asyncio.sleep(0.1)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        proxy.cut()

        async with asyncio.timeout(10):
            while await platform.job_log.next_revision(record.ref, first) is None:
                await asyncio.sleep(0.05)


class ContestedConnection(Connection):
    """Answers the first writes as a cluster does while another write to the same subject is under way."""

    refusals = 3

    async def ask(
        self, subject: str, body: Mapping[str, Any] | bytes = b"", headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        if subject.startswith("job.") and self.refusals:
            self.refusals -= 1
            raise Refused(400, WRITE_IN_FLIGHT, "another write is in flight")
        return await super().ask(subject, body, headers)


async def test_a_contested_write_is_repeated_until_it_is_settled(nats_server: NatsServer) -> None:
    connection = await ContestedConnection.open([nats_server.url])
    async with JetStreamPlatform(connection, stream_configs(1), write_patience_s=5) as platform:
        record = drawing()

        sequence = await platform.job_log.write(record, 0)

        assert connection.refusals == 0
        assert [item.sequence for item in await whole_chain(platform.job_log, record.ref)] == [sequence]


class CountingConnection(Connection):
    """Counts how many writes are under way."""

    under_way = 0
    most = 0

    async def ask(
        self, subject: str, body: Mapping[str, Any] | bytes = b"", headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        counted = subject.startswith("job.")
        self.under_way += counted
        self.most = max(self.most, self.under_way)
        try:
            return await super().ask(subject, body, headers)
        finally:
            self.under_way -= counted


async def test_a_single_server_gets_one_write_at_a_time(nats_server: NatsServer) -> None:
    connection = await CountingConnection.open([nats_server.url])
    async with JetStreamPlatform(connection, stream_configs(1), write_patience_s=5) as platform:
        await asyncio.gather(*(platform.job_log.write(drawing(), 0) for _ in range(50)))

    assert connection.most == 1


async def test_a_write_made_while_the_server_is_away_is_never_stored_later(
    own_nats_server: NatsServer,
) -> None:
    async with await opened(own_nats_server, write_patience_s=0.6) as platform:
        record = drawing()
        own_nats_server.kill()
        await until(lambda: not platform.connection.connected)
        with pytest.raises(NotSent):
            await platform.connection.ask("job.gen.project.x", b"{}")
        with pytest.raises(OutcomeUnknown):
            await platform.job_log.write(record, 0)
        await asyncio.to_thread(own_nats_server.start)
        await until(lambda: platform.connection.connected)
        await asyncio.sleep(0.3)

        assert await platform.job_log.read(record.ref) is None
        assert await platform.job_log.write(record, 0) == 1


async def test_a_write_outlasts_a_restart_of_the_server(own_nats_server: NatsServer) -> None:
    async with await opened(own_nats_server) as platform:
        record = drawing()
        own_nats_server.kill()
        writing = asyncio.create_task(platform.job_log.write(record, 0))
        await asyncio.sleep(0.5)
        await asyncio.to_thread(own_nats_server.start)

        assert await writing == 1


async def test_an_open_request_ends_with_the_connection(own_nats_server: NatsServer) -> None:
    connection = await Connection.open([own_nats_server.url])
    own_nats_server.pause()
    asking = asyncio.create_task(connection.ask(subjects.stream_api("INFO", subjects.JOBS)))
    await asyncio.sleep(0.2)
    assert not asking.done()
    own_nats_server.kill()
    started = time.monotonic()

    with pytest.raises(NoAnswer):
        await asking
    assert time.monotonic() - started < 1.0, "it waited for an answer that cannot come"
    await connection.close()


async def until(condition: Any) -> None:
    async with asyncio.timeout(15):
        while not condition():
            await asyncio.sleep(0.02)


async def test_no_cancellation_is_lost_between_a_request_and_its_answer(platform: JetStreamPlatform) -> None:
    async def read_for_ever() -> None:
        while True:
            await platform.job_log.read(JobRef(JobKind.GEN, "project", "absent"))

    chance = random.Random(1)
    for _ in range(150):
        reading = asyncio.create_task(read_for_ever())
        await asyncio.sleep(chance.uniform(0, 0.003))
        reading.cancel()
        done, _pending = await asyncio.wait({reading}, timeout=5)
        assert done, "the task went on after it was cancelled"


class TestTheFeed:
    async def test_two_hundred_unread_revisions_and_two_kills_lose_nothing(
        self, own_nats_server: NatsServer
    ) -> None:
        async with await opened(own_nats_server) as platform:
            record = drawing()
            written = [await platform.job_log.write(record, 0)]
            async with aclosing(platform.job_feed.follow()) as feed:
                await until_caught_up(feed)
                for number in range(200):
                    if number in (70, 140):
                        await own_nats_server.restart_after_kill()
                    written.append(await platform.job_log.write(record, written[-1]))
                got = [await next_revision(feed) for _ in range(200)]

        assert [item.sequence for item in got] == written[1:]

    async def test_a_replay_goes_on_through_kills(self, own_nats_server: NatsServer) -> None:
        async with await opened(own_nats_server) as platform:
            refs = set()
            for number in range(1_200):
                record = drawing(f"job-{number}", state=JobState.CANCELLED if number % 2 else JobState.QUEUED)
                await platform.job_log.write(record, 0)
                refs.add(record.ref)
            seen = set()
            async with aclosing(platform.job_feed.follow(JobKind.GEN)) as feed:
                async for item in feed:
                    if isinstance(item, CaughtUp):
                        break
                    seen.add(item.record.ref)
                    if len(seen) in (1, 600):
                        await own_nats_server.restart_after_kill()

        assert seen == refs

    async def test_a_feed_goes_on_when_its_consumer_is_removed(self, platform: JetStreamPlatform) -> None:
        record = drawing()
        async with aclosing(platform.job_feed.follow()) as feed:
            await until_caught_up(feed)
            listed = await platform.connection.ask(f"$JS.API.CONSUMER.NAMES.{subjects.JOBS}")
            for name in listed["consumers"]:
                await platform.connection.ask(subjects.delete_consumer(subjects.JOBS, name))
            sequence = await platform.job_log.write(record, 0)
            started = time.monotonic()

            found = await next_revision(feed)

        assert found.sequence == sequence
        assert time.monotonic() - started < 3

    async def test_a_closed_feed_leaves_no_consumer_behind(self, own_nats_server: NatsServer) -> None:
        async with await opened(own_nats_server) as platform:
            async with aclosing(platform.job_feed.follow()) as feed:
                await until_caught_up(feed)
            listed = await platform.connection.ask(f"$JS.API.CONSUMER.NAMES.{subjects.JOBS}")

        assert not listed["consumers"]

    async def test_a_message_that_is_no_revision_does_not_stop_the_feed(
        self, own_nats_server: NatsServer
    ) -> None:
        async with await opened(own_nats_server) as platform:
            await platform.connection.ask("job.gen.project.foreign", b"not a record")
            first = drawing("first")
            await platform.job_log.write(first, 0)
            async with aclosing(platform.job_feed.follow()) as feed:
                replayed = await until_caught_up(feed)
                await platform.connection.ask("job.gen.project.foreign", b"{}")
                await platform.job_log.write(drawing("second"), 0)
                found = await next_revision(feed)

        assert [item.record.id for item in replayed] == ["first"]
        assert found.record.id == "second"


async def until_caught_up(feed: AsyncIterator[Revision | CaughtUp]) -> list[Revision]:
    found: list[Revision] = []
    async for item in feed:
        if isinstance(item, CaughtUp):
            return found
        found.append(item)
    raise AssertionError("the feed ended")


async def next_revision(feed: AsyncIterator[Revision | CaughtUp]) -> Revision:
    async with asyncio.timeout(30):
        async for item in feed:
            if isinstance(item, Revision):
                return item
    raise AssertionError("the feed ended")


class TestTheServer:
    async def test_one_that_does_not_sync_every_write_is_refused(self, tmp_path: Path) -> None:
        server = NatsServer(tmp_path, sync_always=False).start()
        try:
            with pytest.raises(ServerRefused, match="sync_interval: always"):
                await opened(server)
        finally:
            server.kill()

    async def test_one_that_is_not_there_is_unavailable(self, tmp_path: Path) -> None:
        server = NatsServer(tmp_path)
        with pytest.raises(Unavailable, match="no job log answers"):
            await Connection.open([server.url], timeout_s=0.5)

    async def test_a_platform_that_cannot_check_is_not_opened(self, nats_server: NatsServer) -> None:
        with pytest.raises(ValueError, match="nothing can tell"):
            await JetStreamPlatform.open([nats_server.url])

    @pytest.mark.parametrize(
        ("stream", "field", "value"),
        [
            (subjects.JOBS, "discard", "old"),
            (subjects.JOBS, "max_msgs_per_subject", 64),
            (subjects.JOBS, "max_age", 3600 * 10**9),
            (subjects.JOBS, "deny_delete", False),
            (subjects.JOBS, "allow_msg_ttl", True),
            (subjects.HOOKS, "max_msgs_per_subject", 1),
            (subjects.LIVE, "persist_mode", "default"),
        ],
    )
    async def test_a_stream_that_differs_is_refused_by_name(
        self, own_nats_server: NatsServer, stream: str, field: str, value: Any
    ) -> None:
        connection = await Connection.open([own_nats_server.url])
        config = stream_configs(1)[stream] | {field: value}
        await connection.ask(subjects.stream_api("CREATE", stream), config)
        await connection.close()

        with pytest.raises(ServerRefused, match=f"stream {stream}: {field} is .* must"):
            await opened(own_nats_server)

    async def test_every_difference_is_named_at_once(self, own_nats_server: NatsServer) -> None:
        async with await opened(own_nats_server, jobs_max_bytes=2**20):
            pass

        with pytest.raises(ServerRefused) as refusal:
            await opened(own_nats_server, jobs_max_bytes=2**21)

        assert str(refusal.value) == "stream JOBS: max_bytes is 1048576 and must be 2097152"

    async def test_a_stream_that_was_lost_is_made_again(self, own_nats_server: NatsServer) -> None:
        async with await opened(own_nats_server) as platform:
            await platform.connection.ask(subjects.stream_api("DELETE", subjects.LIVE))

            await platform.progress.write_cursor("project", "job", {"next": 1}, 0)

            assert (await platform.progress.read_cursor("project", "job"))[0] == {"next": 1}


class TestACluster:
    async def test_streams_are_kept_three_times_and_the_check_wants_all_servers(self, tmp_path: Path) -> None:
        cluster = NatsCluster(tmp_path)
        options: dict[str, Any] = {"replicas": 3, "jobs_max_bytes": 2**26}
        try:
            cluster.start()
            async with await JetStreamPlatform.open(
                cluster.urls, system_servers=cluster.system_urls, **options
            ) as platform:
                record = drawing()
                await asyncio.gather(*(platform.job_log.write(drawing(), 0) for _ in range(100)))
                sequence = await platform.job_log.write(record, 0)
                async with aclosing(platform.job_feed.follow()) as feed:
                    assert len(await until_caught_up(feed)) == 101
                    await platform.job_log.write(replace(record, why="second"), sequence)
                    assert (await next_revision(feed)).record.why == "second"

            cluster.servers["c"].kill()
            with pytest.raises(ServerRefused, match="2 of 3 servers of the job log answered: a, b"):
                await JetStreamPlatform.open(cluster.urls, system_servers=cluster.system_urls, **options)
        finally:
            cluster.kill()

    async def test_one_server_that_does_not_sync_every_write_is_named(self, tmp_path: Path) -> None:
        cluster = NatsCluster(tmp_path, unsynced=["b"])
        try:
            cluster.start()
            with pytest.raises(ServerRefused, match="server b does not sync every write"):
                await JetStreamPlatform.open(cluster.urls, system_servers=cluster.system_urls, replicas=3)
        finally:
            cluster.kill()


class TestAFullLog:
    async def test_new_jobs_are_refused_while_running_ones_can_end(self, own_nats_server: NatsServer) -> None:
        async with await opened(own_nats_server, jobs_max_bytes=400_000, write_patience_s=1) as platform:
            log = platform.job_log
            running = drawing("running")
            ready_at = await log.write(running, 0)
            taken = job.take(running, ready_at, "w", 2)
            sequence = await log.write(taken, ready_at)
            admitted = 0
            with pytest.raises(QueueFull):
                async with asyncio.timeout(20):
                    while True:
                        await log.write(drawing(spec={"prompt": "x" * 20_000}), 0)
                        admitted += 1
                        await asyncio.sleep(0.1)  # the fill is read once a second

            assert admitted > 10
            assert await log.fill() >= 0.8
            ended = job.report_finished(taken, ready_at, {"images": []}, 3)
            assert await log.write(ended, sequence) > sequence

    async def test_a_log_without_any_room_says_so(self, own_nats_server: NatsServer) -> None:
        async with await opened(own_nats_server, jobs_max_bytes=400_000, write_patience_s=0.3) as platform:
            log = platform.job_log
            record = drawing("running", spec={"prompt": "x" * 30_000})
            sequence = await log.write(record, 0)
            with pytest.raises(QueueFull, match="the job log is full"):
                while True:
                    sequence = await log.write(record, sequence)

            with pytest.raises(QueueFull):
                await log.write(drawing("new"), 0)
            await log.purge(record.ref, keep_last=True)
            assert await log.write(record, sequence) > sequence
