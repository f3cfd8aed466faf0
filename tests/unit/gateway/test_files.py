"""Files behind links: whole, in part, only their headers, not at all."""

import pytest

from services.gateway import files
from tests.unit.gateway.harness import World

DATA = bytes(range(256)) * 20


@pytest.fixture
async def path(world: World) -> str:
    world.storage.blobs["k"] = DATA
    world.storage.links["secret-token", "0-0.png"] = "k"
    return "/files/secret-token/0-0.png"


async def test_a_file_is_read_without_a_key(world: World, path: str) -> None:
    answer = await world.call("GET", path, None)
    assert (answer.status_code, answer.content) == (200, DATA)
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-length"] == str(len(DATA))
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "immutable" in answer.headers["cache-control"]


async def test_head_has_the_same_headers_and_no_body(world: World, path: str) -> None:
    head, get = await world.call("HEAD", path, None), await world.call("GET", path, None)
    assert head.content == b""
    assert {**head.headers} == {**get.headers}


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=10-1999", 10, 1999),
        ("bytes=5000-", 5000, 5119),
        ("bytes=-100", 5020, 5119),
        ("bytes=-9999", 0, 5119),
        ("bytes=5119-9999", 5119, 5119),
    ],
)
async def test_a_range_is_answered_with_just_that(
    world: World, path: str, asked: str, first: int, last: int
) -> None:
    answer = await world.call("GET", path, None, headers={"Range": asked})
    assert (answer.status_code, answer.content) == (206, DATA[first : last + 1])
    assert answer.headers["content-range"] == f"bytes {first}-{last}/{len(DATA)}"
    assert answer.headers["content-length"] == str(last - first + 1)


@pytest.mark.parametrize("asked", ["bytes=5120-", "bytes=9999-10000", "bytes=-0"])
async def test_a_range_beyond_the_end_is_416(world: World, path: str, asked: str) -> None:
    answer = await world.call("GET", path, None, headers={"Range": asked})
    assert (answer.status_code, answer.json()) == (416, {"error": "range not satisfiable"})
    assert answer.headers["content-range"] == f"bytes */{len(DATA)}"


NOT_A_RANGE = ["bytes=", "bytes=-", "bytes=2-1", "bytes=0-1,3-4", "lines=0-1", "x", f"bytes={'9' * 5000}-"]


@pytest.mark.parametrize("asked", NOT_A_RANGE, ids=lambda asked: asked[:20])
async def test_a_range_that_is_not_understood_gives_the_whole(world: World, path: str, asked: str) -> None:
    answer = await world.call("GET", path, None, headers={"Range": asked})
    assert (answer.status_code, answer.content) == (200, DATA)


async def test_a_known_version_is_not_sent_again(world: World, path: str) -> None:
    etag = (await world.call("HEAD", path, None)).headers["etag"]
    for header in (etag, f'"x", W/{etag}', "*"):
        answer = await world.call("GET", path, None, headers={"If-None-Match": header})
        assert (answer.status_code, answer.content) == (304, b"")
    assert (await world.call("GET", path, None, headers={"If-None-Match": '"x"'})).status_code == 200


async def test_a_range_of_another_version_gives_the_whole(world: World, path: str) -> None:
    headers = {"Range": "bytes=0-1", "If-Range": '"x"'}
    assert (await world.call("GET", path, None, headers=headers)).status_code == 200


async def test_an_unknown_or_expired_link_is_not_found(world: World, path: str) -> None:
    for wrong in ("/files/other/0-0.png", "/files/secret-token/0-1.png"):
        answer = await world.call("GET", wrong, None)
        assert (answer.status_code, answer.json()) == (404, {"error": "file not found"})


async def test_a_storage_that_hangs_is_503_and_not_a_request_that_hangs(
    world: World, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "STORAGE_TIMEOUT_S", 0.1)
    job_id = await world.submit()
    await world.succeed(job_id)
    world.storage.slow_s = 5.0
    for wanted in (path, f"/v2/dream-booth-v1/status/{job_id}"):
        answer = await world.call("GET", wanted)
        assert (answer.status_code, answer.json()) == (503, {"error": "service unavailable"})


async def test_the_token_is_never_logged(world: World, path: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="services")
    await world.call("GET", path, None)
    await world.call("GET", "/files/secret-token/none.png", None)
    lines = [str(vars(record)) for record in caplog.records if record.name.startswith("services")]
    assert not any("secret-token" in line for line in lines)
