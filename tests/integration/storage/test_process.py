"""The process itself: started from its environment, stopped by a signal, started again."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from likeness.access.v1.access_service_pb2 import CheckKeyRequest
from likeness.access.v1.access_service_pb2_grpc import AccessServiceStub

from services.adapters.grpc_client import Channel
from services.adapters.storage_client import StorageClient
from services.domain.errors import Unavailable
from tests.unit.storage.model_folders import write_catalogue

ROOT = Path(__file__).parents[3]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def started(home: Path, port: int, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """The process, serving; ended in the end whatever happens."""
    readable, writable = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "services.storage"],
        cwd=ROOT,
        pass_fds=(writable,),
        stderr=subprocess.DEVNULL,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}",
            "LIKENESS_HOME": str(home),
            "LIKENESS_STORAGE_ADDR": f"127.0.0.1:{port}",
            "LIKENESS_BOOTSTRAP_KEY_FILE": str(home / "api-key"),
            "LIKENESS_READY_FD": str(writable),
            **environ,
        },
    )
    os.close(writable)
    try:
        with os.fdopen(readable, "rb") as ready:
            assert ready.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.wait()


def ended(process: subprocess.Popen[bytes]) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(timeout=10)


async def test_what_was_stored_survives_a_restart_and_a_kill(tmp_path: Path) -> None:
    catalogue = str(write_catalogue(tmp_path / "models.toml"))
    port = free_port()
    async with Channel(f"127.0.0.1:{port}") as channel:
        client = StorageClient(channel)
        access: Any = AccessServiceStub(channel)
        with started(tmp_path, port, LIKENESS_MODELS=catalogue) as process:
            secret = (tmp_path / "api-key").read_text().strip()
            assert (await access.CheckKey(CheckKeyRequest(secret=secret))).project.project_id == "dev"
            model = await client.get_model("dev")
            blob = await client.upload_bytes("dev", b"kept", "text/plain")
            link = await client.create_file_link("dev", blob.key, "a.txt")
            assert await asyncio.to_thread(ended, process) == 0
        with started(tmp_path, port, LIKENESS_MODELS=catalogue) as process:
            assert await client.get_model("dev") == model
            process.kill()
            await asyncio.to_thread(process.wait)
        with started(tmp_path, port, LIKENESS_MODELS=catalogue):
            assert (tmp_path / "api-key").read_text().strip() == secret
            assert await client.read_bytes(blob.key) == b"kept"
            token = link.path.split("/")[2]
            assert b"".join([part.data async for part in client.read_file(token, "a.txt")]) == b"kept"


async def test_a_transfer_waits_for_a_storage_that_restarts(tmp_path: Path) -> None:
    port = free_port()
    async with Channel(f"127.0.0.1:{port}") as channel:
        client = StorageClient(channel)
        with started(tmp_path / "home", port):
            blob = await client.upload_bytes("dev", b"x" * 3_000_000, "text/plain")
        download = asyncio.create_task(client.download_blob(blob.key, tmp_path / "copy"))
        upload = asyncio.create_task(client.upload_bytes("dev", b"later", "text/plain"))
        await asyncio.sleep(0.3)
        assert not download.done()
        assert not upload.done()
        with started(tmp_path / "home", port):
            assert await download == 3_000_000
            assert (await upload).size_bytes == 5


async def test_a_storage_that_stays_away_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.adapters.storage_client.FIRST_PAUSE_S", 0.001)
    async with Channel(f"127.0.0.1:{free_port()}", timeout_s=0.2) as channel:
        client = StorageClient(channel)
        with pytest.raises(Unavailable):
            await client.download_blob("shared/blobs/sha256/" + "0" * 64, tmp_path / "x")
        with pytest.raises(Unavailable):
            await client.upload_bytes("dev", b"x", "text/plain")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_catalogue_keeps_the_process_from_starting(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text('[m]\nsource = "nowhere"\n')
    result = subprocess.run(
        [sys.executable, "-m", "services.storage"],
        cwd=ROOT,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}",
            "LIKENESS_HOME": str(tmp_path),
            "LIKENESS_STORAGE_ADDR": "127.0.0.1:0",
            "LIKENESS_MODELS": str(tmp_path / "models.toml"),
        },
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert result.returncode == 78
    assert "m.source" in result.stderr
    assert "Traceback" not in result.stderr
