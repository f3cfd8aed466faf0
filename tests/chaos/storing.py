"""`python -m tests.chaos.storing`: storage and its S3 server killed in the middle of uploads.

A writer uploads files and registers models made of them, over and over, while storage or the server is killed at random
moments and started again. In the end every model whose registration was answered must be there with all its bytes,
every blob that can be seen must have the digest in its key, and nothing unfinished may be left after a sweep.
"""

import argparse
import asyncio
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from likeness.storage.v1.model_pb2 import MODEL_FORMAT_DIFFUSERS, ModelComponent, ModelManifest

from services.adapters.grpc_client import Channel
from services.adapters.s3_artifacts import S3ArtifactStore, S3Options
from services.adapters.s3_requests import S3Requests
from services.adapters.storage_client import StorageClient
from services.domain.errors import OUTAGES, LikenessError
from tests.integration.nats_server import free_ports
from tests.integration.s3_server import BUCKET, S3Server

ROOT = Path(__file__).parents[2]
PROJECT = "dev"
PART_BYTES = 5 << 20
LARGE_BYTES, SMALL_BYTES = PART_BYTES + 200_000, 200_000
"""Two parts, sent straight to the bucket; and a file that goes through storage."""
FIRST_CYCLE_S = 2.0
OUTAGE_PAUSE_S = 0.2


@dataclass
class Outcome:
    """What a campaign found.

    Attributes:
        committed: models whose registration was answered.
        seen: blobs in the bucket at the end.
        orphans: unfinished uploads and staged files that the sweep removed.
        faults: sentences; empty: all is well.
    """

    committed: list[str] = field(default_factory=list)
    seen: int = 0
    orphans: int = 0
    faults: list[str] = field(default_factory=list)


class StorageProcess:
    """Storage over the bucket of a server; its port and its folder outlive its restarts."""

    def __init__(self, server: S3Server, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "models.toml").touch()
        self.address = f"127.0.0.1:{free_ports(1)[0]}"
        self._process: subprocess.Popen[bytes] | None = None
        settings = server.storage_settings(s3_part_bytes=PART_BYTES, s3_direct_bytes=1 << 20)
        self._environ = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}",
            "LIKENESS_HOME": str(folder),
            "LIKENESS_MODELS": str(folder / "models.toml"),
            "LIKENESS_STORAGE_ADDR": self.address,
            **{f"LIKENESS_{name.upper()}": str(value) for name, value in settings.items()},
        }

    def start(self) -> None:
        """Starts it and waits until it serves."""
        readable, writable = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "services.storage"],
            cwd=ROOT,
            pass_fds=(writable,),
            stderr=subprocess.DEVNULL,
            env={**self._environ, "LIKENESS_READY_FD": str(writable)},
        )
        os.close(writable)
        with os.fdopen(readable, "rb") as ready:
            if ready.readline() != b"ready\n":
                raise RuntimeError("storage did not start")

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class Writer:
    """Uploads and registers until it is told to stop.

    Attributes:
        committed: models whose registration was answered.
        cycle_s: how long the last model took that nothing disturbed.
    """

    def __init__(self, channel: Channel, folder: Path, dice: random.Random) -> None:
        self.committed: list[str] = []
        self.cycle_s = FIRST_CYCLE_S
        self.begun = asyncio.Event()
        self._channel = channel
        self._folder = folder
        self._dice = dice

    async def run(self) -> None:
        """Writes models for ever."""
        while True:
            self.begun.set()
            started, name = time.monotonic(), f"model-{len(self.committed)}"
            paths = [self._folder / f"{name}-{part}" for part in ("large", "small")]
            for path, size in zip(paths, (LARGE_BYTES, SMALL_BYTES), strict=True):
                await asyncio.to_thread(path.write_bytes, self._dice.randbytes(size))
            await self._until_done(name, paths)
            self.cycle_s = min(time.monotonic() - started, FIRST_CYCLE_S)
            self.committed.append(name)

    async def _until_done(self, name: str, paths: list[Path]) -> None:
        while True:
            with contextlib.suppress(*OUTAGES):
                return await self._write(name, paths)
            await asyncio.sleep(OUTAGE_PAUSE_S)

    async def _write(self, name: str, paths: list[Path]) -> None:
        client = StorageClient(self._channel)  # a new one takes the straight way again
        blobs = [await client.upload_file(PROJECT, path, "application/octet-stream") for path in paths]
        components = [
            ModelComponent(path=path.name, key=blob.key, digest=blob.digest, size_bytes=blob.size_bytes)
            for path, blob in zip(paths, blobs, strict=True)
        ]
        manifest = ModelManifest(format=MODEL_FORMAT_DIFFUSERS, family="tiny", components=components)
        await client.register_model(PROJECT, name, manifest)


async def campaign(
    server: S3Server,
    folder: Path,
    kills: int,
    seed: int,
    show: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Writes while things die, then looks.

    Args:
        server: running, with an empty bucket; killed too.
        folder: for storage's own files and the uploaded ones.
        kills: how many times something dies, storage and the server in turns.
        seed: of the moments and the bytes.
        show: gets a line for each kill.
    """
    storage, dice = StorageProcess(server, folder / "home"), random.Random(seed)
    (folder / "sent").mkdir()
    await asyncio.to_thread(storage.start)
    try:
        async with Channel(storage.address) as channel:
            writer = Writer(channel, folder / "sent", dice)
            async with _writing(writer) as task:
                for number in range(kills):
                    moment_s = dice.uniform(0, writer.cycle_s)
                    await _next_begun(writer, task)
                    await asyncio.sleep(moment_s)
                    victim = ("storage", "server")[(number + seed) % 2]
                    await _kill(server if victim == "server" else storage)
                    show(f"{victim:<8} {moment_s:6.2f} s into {len(writer.committed)} models")
                await _next_begun(writer, task)
            return await _judged(StorageClient(channel), server, folder, writer.committed)
    finally:
        storage.kill()


async def _kill(victim: S3Server | StorageProcess) -> None:
    await asyncio.to_thread(victim.kill)
    await asyncio.to_thread(victim.start)


@asynccontextmanager
async def _writing(writer: Writer) -> AsyncIterator["asyncio.Task[None]"]:
    task = asyncio.create_task(writer.run())
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _next_begun(writer: Writer, task: "asyncio.Task[None]") -> None:
    """Waits until the model under way is finished and the next has begun; raises what ended the writer."""
    writer.begun.clear()
    waiting = asyncio.create_task(writer.begun.wait())
    await asyncio.wait({waiting, task}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        task.result()


async def _judged(client: StorageClient, server: S3Server, folder: Path, committed: list[str]) -> Outcome:
    outcome = Outcome(committed)
    for name in committed:
        try:
            model = await client.get_model(PROJECT, name)
            for component in (await client.read_manifest(model.manifest_key)).components:
                await client.download_blob(component.key, folder / "copy")
                if (folder / "copy").read_bytes() != (folder / "sent" / component.path).read_bytes():
                    outcome.faults.append(f"{name}: {component.path} is not what was sent")
        except LikenessError as error:
            outcome.faults.append(f"{name}: {error}")
    requests = S3Requests(server.bucket(BUCKET))
    store = S3ArtifactStore(requests, folder / "home" / "staging", S3Options(orphan_s=0.0))
    await asyncio.sleep(1.1)  # the server tells the time in seconds
    outcome.seen = await _check_seen(store, outcome)
    outcome.orphans = await store.sweep()
    if left := await store.sweep():
        outcome.faults.append(f"{left} unfinished writes are left after a sweep")
    await store.close()
    return outcome


async def _check_seen(store: S3ArtifactStore, outcome: Outcome) -> int:
    """Reads every visible blob, each against its digest; returns how many there are."""
    seen = [info async for info in store.list(f"projects/{PROJECT}/blobs/")]
    for info in seen:
        try:
            async for _ in store.read(info.key):
                pass
        except LikenessError as error:
            outcome.faults.append(f"{info.key}: {error}")
    return len(seen)


def main() -> None:
    """Print a line for every kill; the exit status is 1 when something is lost, half or left."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.storing", description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="how many, default 30")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the time")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}")
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        server = S3Server(Path(folder) / "s3").start()
        try:
            outcome = asyncio.run(
                campaign(server, Path(folder), arguments.kills, arguments.seed, lambda line: print(line))
            )
        finally:
            server.kill()
    print(f"{len(outcome.committed)} models, {outcome.seen} blobs, {outcome.orphans} orphans swept")
    print("\n".join(outcome.faults) or "every model is whole, nothing half is seen, nothing is left")
    raise SystemExit(bool(outcome.faults))


if __name__ == "__main__":
    main()
