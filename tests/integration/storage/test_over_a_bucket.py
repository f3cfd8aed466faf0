"""Storage as it runs over a bucket: large blobs go straight to and from it, and through storage where they cannot."""

import asyncio
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.adapters.grpc_client import Channel
from services.adapters.settings import StorageSettings
from services.adapters.storage_client import StorageClient
from services.domain.errors import BadInput, InvalidSpec
from services.storage.server import running
from tests.integration.s3_proxy import Fault, S3Proxy
from tests.integration.s3_server import BUCKET, SECRET_KEY, S3Server
from tests.integration.storage.test_process import ROOT, ended, free_port, started

LARGE = random.Random(2).randbytes(6_000_000)
SIGNED = "X-Amz-Signature"


@pytest.fixture
async def proxy(bucket_server: S3Server) -> AsyncIterator[S3Proxy]:
    async with S3Proxy(bucket_server.port) as made:
        yield made


@pytest.fixture
async def client(bucket_server: S3Server, proxy: S3Proxy, tmp_path: Path) -> AsyncIterator[StorageClient]:
    bucket = bucket_server.storage_settings(proxy.endpoint, s3_part_bytes=5 << 20, s3_direct_bytes=1 << 20)
    settings = StorageSettings(home=tmp_path / "home", storage_addr="127.0.0.1:0", grace_s=1.0, **bucket)
    async with running(settings) as storage, Channel(storage.server.address) as channel:
        yield StorageClient(channel)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(LARGE)
    return path


def straight(proxy: S3Proxy) -> list[str]:
    return [method for method, path in proxy.carried if SIGNED in path]


async def test_a_large_file_goes_straight_both_ways(
    client: StorageClient, proxy: S3Proxy, source: Path, tmp_path: Path
) -> None:
    blob = await client.upload_file("dev", source, "application/octet-stream")
    assert straight(proxy) == ["PUT", "PUT"]
    assert await client.download_blob(blob.key, tmp_path / "copy") == len(LARGE)
    assert straight(proxy) == ["PUT", "PUT", "GET"]
    assert (tmp_path / "copy").read_bytes() == LARGE
    assert (await client.get_blob(blob.key)).size_bytes == len(LARGE)


async def test_a_small_file_goes_through_storage(
    client: StorageClient, proxy: S3Proxy, tmp_path: Path
) -> None:
    (tmp_path / "small").write_bytes(LARGE[:1000])
    blob = await client.upload_file("dev", tmp_path / "small", "image/png")
    assert await client.read_bytes(blob.key) == LARGE[:1000]
    assert straight(proxy) == []


@pytest.mark.parametrize("fault", [Fault.BUSY, Fault.LOSE_REQUEST, Fault.FLIP_REQUEST])
async def test_a_straight_upload_is_repeated_when_a_request(
    client: StorageClient, proxy: S3Proxy, source: Path, tmp_path: Path, fault: Fault
) -> None:
    proxy.mark = SIGNED
    proxy.faults.append(fault)
    blob = await client.upload_file("dev", source, "application/octet-stream")
    assert await client.download_blob(blob.key, tmp_path / "copy") == len(LARGE)


@pytest.mark.parametrize("fault", [Fault.BUSY, Fault.CUT_ANSWER, Fault.FLIP_ANSWER])
async def test_a_straight_download_is_whole_although_a_request(
    client: StorageClient, proxy: S3Proxy, source: Path, tmp_path: Path, fault: Fault
) -> None:
    blob = await client.upload_file("dev", source, "application/octet-stream")
    proxy.method, proxy.mark = "GET", SIGNED
    proxy.faults.append(fault)
    assert await client.download_blob(blob.key, tmp_path / "copy") == len(LARGE)
    assert (tmp_path / "copy").read_bytes() == LARGE
    assert not proxy.faults


async def test_bytes_go_through_storage_where_the_bucket_is_out_of_reach(
    client: StorageClient,
    proxy: S3Proxy,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("services.adapters.direct_transfer.FIRST_PAUSE_S", 0.001)
    proxy.mark, proxy.always = SIGNED, Fault.FORBID
    blob = await client.upload_file("dev", source, "application/octet-stream")
    proxy.method = "GET"
    assert await client.download_blob(blob.key, tmp_path / "copy") == len(LARGE)
    assert (tmp_path / "copy").read_bytes() == LARGE
    assert straight(proxy) == []
    assert "blobs go through storage for a while" in caplog.text
    assert "Signature" not in caplog.text


async def test_a_file_that_changes_on_its_way_is_not_stored(
    client: StorageClient, proxy: S3Proxy, source: Path
) -> None:
    upload = asyncio.create_task(client.upload_file("dev", source, "application/octet-stream"))
    while not any("uploads" in path for _, path in proxy.carried):  # it was hashed before
        await asyncio.sleep(0)
    source.write_bytes(LARGE[::-1])
    with pytest.raises(BadInput, match="changed while it was sent"):
        await upload


async def test_the_process_keeps_what_it_stored_in_the_bucket(
    bucket_server: S3Server, proxy: S3Proxy, tmp_path: Path
) -> None:
    settings, port = bucket_server.storage_settings(), free_port()
    (tmp_path / "secret").write_text(f"{SECRET_KEY}\n")
    environ = {
        "LIKENESS_ARTIFACTS": settings["artifacts"],
        "LIKENESS_S3_ACCESS_KEY": settings["s3_access_key"],
        "LIKENESS_S3_SECRET_KEY_FILE": str(tmp_path / "secret"),
    }
    async with Channel(f"127.0.0.1:{port}") as channel:
        with started(tmp_path / "one", port, **environ) as process:
            blob = await StorageClient(channel).upload_bytes("dev", b"kept", "text/plain")
            assert await asyncio.to_thread(ended, process) == 0
        with started(tmp_path / "two", port, **environ):
            assert await StorageClient(channel).read_bytes(blob.key) == b"kept"


async def test_a_bucket_without_a_key_is_refused(bucket_server: S3Server, tmp_path: Path) -> None:
    settings = StorageSettings(
        home=tmp_path, storage_addr="127.0.0.1:0", artifacts=f"s3:{bucket_server.endpoint}/{BUCKET}"
    )
    with pytest.raises(
        InvalidSpec, match="LIKENESS_S3_ACCESS_KEY: must be set, or LIKENESS_S3_ACCESS_KEY_FILE"
    ):
        async with running(settings):
            pytest.fail("it serves")


def test_a_process_that_cannot_use_its_bucket_says_why_and_ends(
    bucket_server: S3Server, tmp_path: Path
) -> None:
    settings = bucket_server.storage_settings()
    environ = {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}",
        "LIKENESS_HOME": str(tmp_path),
        "LIKENESS_STORAGE_ADDR": "127.0.0.1:0",
        "LIKENESS_ARTIFACTS": settings["artifacts"],
        "LIKENESS_S3_ACCESS_KEY": settings["s3_access_key"],
        "LIKENESS_S3_SECRET_KEY": "canary-wrong",
    }
    result = subprocess.run(
        [sys.executable, "-m", "services.storage"],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 78
    assert "mend LIKENESS_S3_SECRET_KEY" in result.stderr
    assert "Traceback" not in result.stderr
    assert "canary" not in result.stderr
