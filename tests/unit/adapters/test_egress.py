"""The way out, against real servers on loopback and a resolver that answers what a test wants."""

import asyncio
import gzip
import hashlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_network
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.test_utils import TestServer

from services.adapters.egress import Egress, EgressPolicy, with_field
from services.domain.errors import BadInput, EgressRefused, Unavailable

LOOPBACK = (ip_network("127.0.0.1"),)
POLICY = EgressPolicy(allow=LOOPBACK, connect_timeout_s=2.0, read_timeout_s=1.0, retry_pause_s=0.01)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ScriptedResolver(AbstractResolver):
    """Answers each question with the next of some prepared lists of addresses."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        self.asked.append(host)
        addresses = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return [_entry(host, address, port) for address in addresses]

    async def close(self) -> None:
        """Nothing is held."""


def _entry(host: str, address: str, port: int) -> ResolveResult:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return ResolveResult(
        hostname=host, host=address, port=port, family=family, proto=0, flags=socket.AI_NUMERICHOST
    )


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    """A real HTTP server on a free port of loopback; yields its origin."""
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", handler)
    async with TestServer(app, host="127.0.0.1") as server:
        yield f"http://127.0.0.1:{server.port}"


@asynccontextmanager
async def answering(raw: bytes, pause_s: float = 0.0, pieces: int = 1) -> AsyncIterator[str]:
    """A server that sends prepared bytes, whatever is asked, then closes; yields its origin."""

    connections: list[asyncio.Task[None] | None] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(asyncio.current_task())
        size = max(1, -(-len(raw) // pieces))
        try:
            await reader.read(65536)
            for start in range(0, len(raw), size):
                writer.write(raw[start : start + size])
                await writer.drain()
                await asyncio.sleep(pause_s)
        except (ConnectionError, asyncio.CancelledError):
            return
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        for task in filter(None, connections):
            task.cancel()
            await task


async def fetch(
    egress: Egress, url: str, folder: Path, max_bytes: int = 1 << 20, timeout_s: float = 5.0
) -> bytes:
    fetched = await egress.fetch_to_file(url, folder / "body", max_bytes=max_bytes, total_timeout_s=timeout_s)
    data = fetched.path.read_bytes()
    assert fetched.size_bytes == len(data)
    assert fetched.digest == hashlib.sha256(data).hexdigest()
    return data


async def refused(
    kind: type[Exception],
    egress: Egress,
    url: str,
    folder: Path,
    max_bytes: int = 1 << 20,
    timeout_s: float = 5.0,
) -> str:
    """Fetches, expects the failure, checks that no file is left, returns the sentence."""
    with pytest.raises(kind) as caught:
        await fetch(egress, url, folder, max_bytes, timeout_s)
    assert os.listdir(folder) == []
    return str(caught.value)


async def ok(request: web.Request) -> web.StreamResponse:
    return web.Response(body=b"pictures" * 1000)


async def test_file_arrives_whole_with_its_digest(tmp_path: Path) -> None:
    async with serving(ok) as origin:
        assert await fetch(Egress(POLICY), f"{origin}/a.zip", tmp_path) == b"pictures" * 1000


async def test_signed_query_reaches_the_server_exactly_as_written(tmp_path: Path) -> None:
    async def echo(request: web.Request) -> web.StreamResponse:
        return web.Response(text=request.raw_path)

    path = "/b%C3%BC/k%2Fx.zip?X-Sig=a%2Bb%2F==&t=1+2&empty="
    async with serving(echo) as origin:
        assert await fetch(Egress(POLICY), origin + path, tmp_path) == path.encode()


async def test_request_carries_no_cookie_no_credentials_and_asks_for_plain_bytes(tmp_path: Path) -> None:
    async def headers(request: web.Request) -> web.StreamResponse:
        names = sorted(name.lower() for name in request.headers)
        answer = web.Response(text=",".join(names) + request.headers["Accept-Encoding"])
        answer.set_cookie("session", "x")
        return answer

    names = b"accept,accept-encoding,connection,host,user-agentidentity"
    async with serving(headers) as origin:
        egress = Egress(POLICY)
        for _ in range(2):
            assert await fetch(egress, origin, tmp_path) == names


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "localhost",
        "LOCALHOST",
        "localhost.",
        "\uff4c\uff4f\uff43\uff41\uff4c\uff48\uff4f\uff53\uff54",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "0.0.0.0",
        "0",
        "[::]",
    ],
)
async def test_server_on_this_machine_cannot_be_reached_by_any_spelling(host: str, tmp_path: Path) -> None:
    seen: list[str] = []

    async def remember(request: web.Request) -> web.StreamResponse:
        seen.append(request.path)
        return web.Response(text="secret")

    async with serving(remember) as origin:
        port = origin.rpartition(":")[2]
        egress = Egress(EgressPolicy(retry_pause_s=0.01))
        sentence = await refused(EgressRefused, egress, f"http://{host}:{port}/x?token=hunter2", tmp_path)
        with pytest.raises(EgressRefused):
            await egress.post_json(f"http://{host}:{port}/x", b"{}", {}, 2.0)
    assert seen == []
    assert "not reachable from this service" in sentence
    assert "hunter2" not in sentence


async def test_sentence_names_a_written_address_and_its_kind(tmp_path: Path) -> None:
    sentence = await refused(EgressRefused, Egress(), "http://10.0.0.1/x.zip", tmp_path)
    assert sentence == "the address 10.0.0.1 is not reachable from this service (private)"


async def test_sentence_does_not_tell_what_an_inner_name_resolves_to(tmp_path: Path) -> None:
    egress = Egress(EgressPolicy(), ScriptedResolver(["10.20.30.40"]))
    sentence = await refused(EgressRefused, egress, "http://vault.inner.example/x.zip", tmp_path)
    assert sentence == "the address vault.inner.example is not reachable from this service (private)"


@pytest.mark.parametrize(
    "answer", [["127.0.0.1", "10.0.0.1"], ["10.0.0.1", "127.0.0.1"], ["127.0.0.1", "::1"]]
)
async def test_name_with_one_forbidden_address_among_several_is_refused(
    answer: list[str], tmp_path: Path
) -> None:
    async with serving(ok) as origin:
        url = origin.replace("127.0.0.1", "mixed.example")
        await refused(EgressRefused, Egress(POLICY, ScriptedResolver(answer)), url, tmp_path)


async def test_checked_answer_is_the_one_connected_to(tmp_path: Path) -> None:
    resolver = ScriptedResolver(["127.0.0.1"], ["169.254.169.254"])
    async with serving(ok) as origin:
        url = origin.replace("127.0.0.1", "rebinding.example")
        assert await fetch(Egress(POLICY, resolver), url, tmp_path) == b"pictures" * 1000
        assert resolver.asked == ["rebinding.example"]
        assert "link-local" in await refused(EgressRefused, Egress(POLICY, resolver), url, _empty(tmp_path))


async def test_name_that_changes_its_answer_between_redirects_is_refused(tmp_path: Path) -> None:
    async def onwards(request: web.Request) -> web.StreamResponse:
        raise web.HTTPFound("/second")

    resolver = ScriptedResolver(["127.0.0.1"], ["169.254.169.254"])
    async with serving(onwards) as origin:
        url = origin.replace("127.0.0.1", "rebinding.example")
        assert "link-local" in await refused(EgressRefused, Egress(POLICY, resolver), url, tmp_path)
    assert resolver.asked == ["rebinding.example"] * 2


async def test_no_socket_is_made_for_an_address_that_slipped_past_the_resolver() -> None:
    info = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("10.0.0.1", 80))
    with pytest.raises(PermissionError):
        Egress(POLICY)._checked_socket(info)


@pytest.mark.parametrize(
    "location",
    [
        "http://10.0.0.1/",
        "http://[::ffff:169.254.169.254]/latest/meta-data/",
        "//0x0a000001/",
        "http://user:pw@127.0.0.1/",
        "file:///etc/passwd",
        "gopher://127.0.0.1:6379/_x",
        "http://127.0.0.1:22/",
        "http://[::1",
        "http://[fe80::1%25lo]/",
    ],
)
async def test_redirect_is_checked_like_a_new_address(location: str, tmp_path: Path) -> None:
    async def onwards(request: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": location})

    async with serving(onwards) as origin:
        assert (await refused(EgressRefused, Egress(POLICY), origin, tmp_path)).startswith(
            "redirect refused: "
        )


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_relative_redirect_is_followed(status: int, tmp_path: Path) -> None:
    async def onwards(request: web.Request) -> web.StreamResponse:
        if request.path == "/a/b":
            return web.Response(status=status, headers={"Location": "../c?x=1"})
        return web.Response(text=request.path_qs)

    async with serving(onwards) as origin:
        assert await fetch(Egress(POLICY), f"{origin}/a/b", tmp_path) == b"/c?x=1"


async def test_redirects_are_followed_only_so_many_times(tmp_path: Path) -> None:
    seen: list[str] = []

    async def around(request: web.Request) -> web.StreamResponse:
        seen.append(request.path)
        raise web.HTTPFound("/again")

    async with serving(around) as origin:
        assert (
            await refused(BadInput, Egress(POLICY), origin, tmp_path)
            == "the address redirects more than 5 times"
        )
    assert len(seen) == 6


async def test_redirect_without_a_location_is_a_fault(tmp_path: Path) -> None:
    async with answering(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n") as origin:
        assert "redirects to nowhere" in await refused(BadInput, Egress(POLICY), origin, tmp_path)


@pytest.mark.parametrize("port", [0, 1, 21, 22, 23, 25, 53, 110, 143, 445, 587, 990])
async def test_ports_of_other_protocols_are_refused(port: int, tmp_path: Path) -> None:
    await refused(EgressRefused, Egress(POLICY), f"http://127.0.0.1:{port}/", tmp_path)


async def test_declared_size_over_the_limit_is_refused_before_the_body(tmp_path: Path) -> None:
    async with answering(b"HTTP/1.1 200 OK\r\nContent-Length: 5000000000\r\n\r\n") as origin:
        assert (
            await refused(BadInput, Egress(POLICY), origin, tmp_path)
            == "the file is larger than 1048576 bytes"
        )


async def test_real_size_over_the_limit_is_refused_when_nothing_was_declared(tmp_path: Path) -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            for _ in range(1000):
                await response.write(b"x" * 65536)
        except ConnectionError:
            pass
        return response

    async with serving(endless) as origin:
        assert "larger than 300000 bytes" in await refused(
            BadInput, Egress(POLICY), origin, tmp_path, 300_000
        )


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n50\r\nshort",
        b"",
    ],
    ids=["content length", "missing last chunk", "short chunk", "no answer"],
)
async def test_transfer_that_breaks_off_is_a_fault(raw: bytes, tmp_path: Path) -> None:
    async with answering(raw) as origin:
        assert "broke off" in await refused(BadInput, Egress(POLICY), origin, tmp_path)


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n",
    ],
    ids=["another protocol", "two lengths", "negative length", "huge header", "bad chunk"],
)
async def test_answer_that_is_not_valid_http_is_a_fault(raw: bytes, tmp_path: Path) -> None:
    async with answering(raw) as origin:
        sentence = await refused(BadInput, Egress(POLICY), origin, tmp_path)
    assert "valid HTTP" in sentence or "broke off" in sentence


async def test_bytes_after_the_declared_length_are_ignored(tmp_path: Path) -> None:
    async with answering(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello") as origin:
        assert await fetch(Egress(POLICY), origin, tmp_path) == b"hello"


@pytest.mark.parametrize(
    "encoding", ["gzip", "deflate", "br", "zstd", "gzip, gzip", "identity, gzip", "GZIP"]
)
async def test_encoded_body_is_refused_although_plain_bytes_were_asked_for(
    encoding: str, tmp_path: Path
) -> None:
    bomb = gzip.compress(bytes(1_000_000))

    async def encoded(request: web.Request) -> web.StreamResponse:
        return web.Response(body=bomb, headers={"Content-Encoding": encoding})

    async with serving(encoded) as origin:
        assert "encoded body" in await refused(BadInput, Egress(POLICY), origin, tmp_path)


async def test_trickling_server_is_given_up(tmp_path: Path) -> None:
    policy = EgressPolicy(allow=LOOPBACK, min_bytes_per_s=100_000, rate_window_s=0.3)
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000
    async with answering(raw, pause_s=0.02, pieces=200) as origin:
        assert "sends too slowly" in await refused(BadInput, Egress(policy), origin, tmp_path)


async def test_silent_server_is_given_up(tmp_path: Path) -> None:
    policy = EgressPolicy(allow=LOOPBACK, read_timeout_s=0.2, attempts=1)
    async with answering(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nx", pause_s=3.0, pieces=2) as origin:
        assert "in time" in await refused(BadInput, Egress(policy), origin, tmp_path)


async def test_whole_fetch_has_a_deadline(tmp_path: Path) -> None:
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000
    async with answering(raw, pause_s=0.05, pieces=500) as origin:
        sentence = await refused(BadInput, Egress(POLICY), origin, tmp_path, timeout_s=0.4)
    assert sentence.endswith("did not deliver within 0.4 s")


@pytest.mark.parametrize("status", [204, 206, 304, 400, 401, 403, 404, 410])
async def test_answer_without_the_file_is_named_and_not_tried_again(status: int, tmp_path: Path) -> None:
    seen: list[str] = []

    async def absent(request: web.Request) -> web.StreamResponse:
        seen.append(request.path)
        return web.Response(status=status)

    async with serving(absent) as origin:
        sentence = await refused(BadInput, Egress(POLICY), f"{origin}/a?token=hunter2", tmp_path)
        assert sentence == f"{origin} answered {status}"
    assert len(seen) == 1


async def test_passing_fault_is_tried_again(tmp_path: Path) -> None:
    statuses = [503, 429]

    async def recovering(request: web.Request) -> web.StreamResponse:
        return web.Response(status=statuses.pop()) if statuses else web.Response(text="at last")

    async with serving(recovering) as origin:
        assert await fetch(Egress(POLICY), origin, tmp_path) == b"at last"


async def test_closed_port_and_unknown_name_are_plain_sentences(tmp_path: Path) -> None:
    class Unknown(ScriptedResolver):
        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
        ) -> list[ResolveResult]:
            raise socket.gaierror(-2, "Name or service not known")

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        origin = f"http://127.0.0.1:{held.getsockname()[1]}"
        assert await refused(BadInput, Egress(POLICY), origin, tmp_path) == f"{origin} cannot be reached"
    sentence = await refused(BadInput, Egress(POLICY, Unknown([])), "http://gone.example/x?s=1", tmp_path)
    assert sentence == "the host gone.example is not known"


async def test_plain_text_where_tls_was_asked_for_is_a_fault(tmp_path: Path) -> None:
    async with answering(b"HTTP/1.1 200 OK\r\n\r\n") as origin:
        sentence = await refused(BadInput, Egress(POLICY), origin.replace("http:", "https:"), tmp_path)
    assert "no secure connection" in sentence


async def test_proxy_settings_of_the_environment_are_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    async with serving(ok) as origin:
        assert await fetch(Egress(POLICY), origin, tmp_path) == b"pictures" * 1000


async def test_webhook_posts_the_exact_body_with_its_headers() -> None:
    seen: list[tuple[str, str, str, bytes]] = []

    async def hook(request: web.Request) -> web.StreamResponse:
        headers = request.headers
        seen.append((request.method, headers["Content-Type"], headers["X-Job-Id"], await request.read()))
        return web.Response(status=202)

    async with serving(hook) as origin:
        assert await Egress(POLICY).post_json(f"{origin}/h", b'{"a":1}', {"X-Job-Id": "j1"}, 2.0) == 202
    assert seen == [("POST", "application/json", "j1", b'{"a":1}')]


async def test_webhook_follows_no_redirect() -> None:
    seen: list[str] = []

    async def onwards(request: web.Request) -> web.StreamResponse:
        seen.append(request.path)
        raise web.HTTPTemporaryRedirect("/other")

    async with serving(onwards) as origin:
        assert await Egress(POLICY).post_json(f"{origin}/h", b"{}", {}, 2.0) == 307
    assert seen == ["/h"]


async def test_webhook_without_an_answer_is_unavailable_and_not_repeated() -> None:
    async with answering(b"HTTP/1.1 200 OK\r\n", pause_s=5.0) as origin:
        with pytest.raises(Unavailable, match=r"did not answer within 0\.3 s"):
            await Egress(POLICY).post_json(origin, b"{}", {}, 0.3)
    async with answering(b"") as origin:
        with pytest.raises(Unavailable, match="broke off"):
            await Egress(POLICY).post_json(origin, b"{}", {}, 2.0)


def test_bad_url_is_refused_at_submit_without_resolving() -> None:
    resolver = ScriptedResolver(["127.0.0.1"])
    egress = Egress(POLICY, resolver)
    assert egress.check_url("https://hooks.example.org/rp?x=1").origin == "https://hooks.example.org"
    for url in (
        "http://10.0.0.1/",
        "http://u:p@hooks.example.org/",
        "ftp://hooks.example.org/",
        "http://a:25/",
    ):
        with pytest.raises(EgressRefused):
            egress.check_url(url)
    assert resolver.asked == []


def test_refusal_can_be_given_the_name_of_the_field() -> None:
    error = with_field(BadInput("not a zip archive"), "concepts[0].instance_data")
    assert isinstance(error, BadInput)
    assert str(error) == "concepts[0].instance_data: not a zip archive"


def _empty(folder: Path) -> Path:
    fresh = folder / "fresh"
    fresh.mkdir()
    return fresh
