"""gRPC server and client over loopback: errors both ways, deadlines, repeats, trace, health, stop."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf import wrappers_pb2

from services.adapters import grpc_errors
from services.adapters.grpc_client import Channel, is_serving
from services.adapters.grpc_server import GrpcServer
from services.adapters.telemetry import continued_trace, current_trace
from services.domain import errors

Text = wrappers_pb2.StringValue
NAME = "likeness.test.v1.EchoService"


class Echo:
    """Answers with what `act` says; knows how often it was called."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.failures = 0
        self.pause_s = 0.0
        self.calls = 0
        self.more_chars = 0

    async def say(self, request: Text, context: grpc.aio.ServicerContext) -> Text:
        self.calls += 1
        await asyncio.sleep(self.pause_s)
        if self.error is not None and (self.failures == 0 or self.calls <= self.failures):
            raise self.error
        trace = current_trace()
        return Text(value=f"{request.value} {trace.trace_id if trace else ''}" + "x" * self.more_chars)

    async def count(self, request: Text, context: grpc.aio.ServicerContext) -> AsyncIterator[Text]:
        for number in range(int(request.value)):
            yield Text(value=str(number))
        if self.error is not None:
            raise self.error

    async def join(self, requests: AsyncIterator[Text], context: grpc.aio.ServicerContext) -> Text:
        if self.error is not None:
            raise self.error
        return Text(value="".join([request.value async for request in requests]))


def add_echo(servicer: Any, server: Any) -> None:
    codec = (Text.FromString, Text.SerializeToString)
    handlers = {
        "Say": grpc.unary_unary_rpc_method_handler(servicer.say, *codec),
        "Count": grpc.unary_stream_rpc_method_handler(servicer.count, *codec),
        "Join": grpc.stream_unary_rpc_method_handler(servicer.join, *codec),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))


class Stub:
    """What protoc would write."""

    def __init__(self, channel: Any) -> None:
        codec = {"request_serializer": Text.SerializeToString, "response_deserializer": Text.FromString}
        self.say = channel.unary_unary(f"/{NAME}/Say", **codec, _registered_method=True)
        self.count = channel.unary_stream(f"/{NAME}/Count", **codec, _registered_method=True)
        self.join = channel.stream_unary(f"/{NAME}/Join", **codec, _registered_method=True)
        self.missing = channel.unary_unary(f"/{NAME}/Missing", **codec, _registered_method=True)


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
async def server(echo: Echo) -> AsyncIterator[GrpcServer]:
    server = GrpcServer("127.0.0.1:0", grace_s=1, default_deadline_s=0.2)
    server.add(add_echo, echo, NAME)
    async with server:
        yield server


@pytest.fixture
async def channel(server: GrpcServer) -> AsyncIterator[Channel]:
    async with Channel(server.address, timeout_s=5) as channel:
        yield channel


@pytest.fixture
def stub(channel: Channel) -> Stub:
    return Stub(channel)


async def test_an_answer_of_many_megabytes_arrives(echo: Echo, stub: Stub) -> None:
    echo.more_chars = 20 << 20
    assert len((await stub.say(Text(value="a"), timeout=30)).value) > 20 << 20


CLASSES = [kind for kind in errors.ERROR_TABLE if kind is not errors.LikenessError]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
async def test_every_error_arrives_as_the_class_that_was_raised(
    kind: type[errors.LikenessError], echo: Echo, stub: Stub
) -> None:
    echo.error = kind("because")
    with pytest.raises(errors.LikenessError) as caught:
        await stub.say(Text(value="a"), timeout=0.05 if issubclass(kind, errors.Unavailable) else None)
    assert type(caught.value) is kind
    assert caught.value.message == ("internal error" if kind is errors.Internal else "because")


async def test_all_broken_rules_arrive_with_their_fields(echo: Echo, stub: Stub) -> None:
    violations = [
        errors.Violation("samples[0].seed", "must be positive"),
        errors.Violation("url", "is missing"),
    ]
    echo.error = errors.InvalidSpec(violations)
    with pytest.raises(errors.InvalidSpec) as caught:
        await stub.say(Text())
    assert list(caught.value.violations) == violations


async def test_a_thousand_broken_rules_still_arrive(echo: Echo, stub: Stub) -> None:
    echo.error = errors.InvalidSpec([errors.Violation(f"field_{n}", "is wrong ü" * 9) for n in range(1000)])
    with pytest.raises(errors.InvalidSpec) as caught:
        await stub.say(Text())
    assert caught.value.violations[0].field == "field_0"


async def test_a_foreign_exception_shows_nothing_of_itself(
    echo: Echo, stub: Stub, caplog: pytest.LogCaptureFixture
) -> None:
    echo.error = ValueError("canary")
    with pytest.raises(errors.Internal) as caught:
        await stub.say(Text())
    assert "canary" not in str(caught.value)
    assert "canary" in caplog.text


async def test_an_error_in_a_stream_comes_after_its_messages(echo: Echo, stub: Stub) -> None:
    echo.error = errors.NotFound("gone")
    seen = []
    with pytest.raises(errors.NotFound, match="gone"):
        async for message in stub.count(Text(value="3")):
            seen.append(message.value)
    assert seen == ["0", "1", "2"]


async def test_a_stream_of_requests_is_answered_or_refused(echo: Echo, stub: Stub) -> None:
    async def letters() -> AsyncIterator[Text]:
        for letter in "abc":
            yield Text(value=letter)

    assert (await stub.join(letters())).value == "abc"
    echo.error = errors.QueueFull("full")
    for _ in range(20):  # the refusal must not lose against requests that are still being sent
        with pytest.raises(errors.QueueFull):
            await stub.join(letters())


async def test_unavailable_is_tried_again(echo: Echo, stub: Stub) -> None:
    echo.error, echo.failures = errors.Unavailable("a moment"), 2
    assert (await stub.say(Text(value="a"))).value.startswith("a")
    assert echo.calls == 3


@pytest.mark.parametrize(
    "kind", [errors.Conflict, errors.QueueFull, errors.Internal], ids=lambda kind: kind.__name__
)
async def test_nothing_else_is_tried_again(kind: type[errors.LikenessError], echo: Echo, stub: Stub) -> None:
    echo.error = kind("no")
    with pytest.raises(kind):
        await stub.say(Text())
    assert echo.calls == 1


async def test_a_server_that_is_not_there_is_unavailable_within_the_timeout() -> None:
    async with Channel(f"127.0.0.1:{free_port()}") as channel:
        began = time.monotonic()
        with pytest.raises(errors.Unavailable):
            await Stub(channel).say(Text(), timeout=0.3)
        assert time.monotonic() - began < 2


async def test_a_call_without_a_deadline_ends_at_the_servers_default(echo: Echo, server: GrpcServer) -> None:
    echo.pause_s = 5
    async with grpc.aio.insecure_channel(server.address) as plain:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await Stub(plain).say(Text())
    assert isinstance(grpc_errors.from_rpc_error(caught.value), errors.DeadlineExceeded)


async def test_the_callers_deadline_is_kept(echo: Echo, stub: Stub) -> None:
    echo.pause_s = 5
    began = time.monotonic()
    with pytest.raises(errors.DeadlineExceeded):
        await stub.say(Text(), timeout=0.1)
    assert time.monotonic() - began < 2


async def test_a_trace_crosses_the_call(stub: Stub) -> None:
    with continued_trace() as trace:
        assert trace.trace_id in (await stub.say(Text(value="a"))).value


async def test_an_unknown_method_is_an_internal_error(stub: Stub) -> None:
    with pytest.raises(errors.Internal, match="UNIMPLEMENTED"):
        await stub.missing(Text())


async def test_health_follows_the_server(server: GrpcServer, channel: Channel) -> None:
    assert await is_serving(channel)
    assert await is_serving(channel, NAME)
    await server.set_serving(False)
    assert not await is_serving(channel, NAME)
    assert not await is_serving(channel, "likeness.absent.v1.NoService")


async def test_a_port_in_use_is_reported(server: GrpcServer) -> None:
    with pytest.raises(OSError, match="another process"):
        await GrpcServer(server.address).__aenter__()


async def test_readiness_is_written_once_the_server_listens() -> None:
    reading, writing = os.pipe()
    async with GrpcServer("127.0.0.1:0", ready_fd=writing):
        assert os.read(reading, 100) == b"ready\n"
        assert os.read(reading, 100) == b""
    os.close(reading)


async def test_a_running_call_may_end_after_the_signal(echo: Echo) -> None:
    echo.pause_s = 0.3
    server = GrpcServer("127.0.0.1:0", grace_s=3)
    server.add(add_echo, echo, NAME)
    async with server, Channel(server.address) as channel:
        call = asyncio.create_task(Stub(channel).say(Text(value="kept")))
        asyncio.get_running_loop().call_later(0.1, os.kill, os.getpid(), signal.SIGTERM)
        await server.run_until_signalled()
        await server.__aexit__(None, None, None)
        assert (await call).value.startswith("kept")


async def test_work_gets_its_grace_before_it_is_cancelled(server: GrpcServer) -> None:
    stopping, done = asyncio.Event(), []

    async def polite() -> None:
        await stopping.wait()
        done.append("checkpoint")

    async def stubborn() -> None:
        await asyncio.Event().wait()

    asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(server.run_until_signalled(polite(), stubborn(), stopping=stopping), 5)
    assert done == ["checkpoint"]


async def test_work_that_is_done_ends_the_process_when_none_is_left(server: GrpcServer) -> None:
    done: list[str] = []

    async def work(name: str, pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        done.append(name)

    await asyncio.wait_for(server.run_until_signalled(work("first", 0), work("second", 0.05)), 5)
    assert done == ["first", "second"]


async def test_failed_work_ends_the_process_with_its_error(server: GrpcServer) -> None:
    async def broken() -> None:
        raise ValueError("lost")

    with pytest.raises(ValueError, match="lost"):
        await asyncio.wait_for(server.run_until_signalled(broken(), asyncio.sleep(60)), 5)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
