"""One attempt at a training as a worker and its child make it: fetch a checkpoint, train, store, deliver, or die.

Storage is the real store in a folder, written by what stores blobs in the storage service; the way there over gRPC is
left out. What the attempt leaves behind for those who come after it are that store, a `record.json` with the newest
checkpoint it has reported, a line in `trace.jsonl` for every update, and, when it lived, a `result.json`.
"""

import asyncio
import json
import os
import shutil
from collections.abc import Coroutine
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any, cast

import torch
from likeness.storage.v1.artifact_pb2 import Blob

from services.adapters.folder_artifacts import FolderArtifactStore
from services.adapters.manifests import digest_of
from services.adapters.storage_client import StorageClient
from services.domain.artifacts import digest_of_key
from services.domain.errors import AlteredBytes
from services.jobs.worker_client import JobHandle
from services.storage.blobs import Blobs
from services.trainer import checkpoint as checkpoints
from services.trainer.checkpoint_uploads import CheckpointUploads, fetch_checkpoint
from services.trainer.child import RECIPES
from services.trainer.run import Outcome, Preview, Progress, Request, Run, Stage
from tests.chaos.points import Kill, Points, enter, phase
from tests.chaos.scenarios import SCENARIOS

PROJECT = "chaos"
CHECKPOINT_AFTER = (2, 4, 5, 7, 9)
"""Updates after which a checkpoint is asked for: the borders of epochs and places within them."""


class Shelf:
    """The store as the worker's client of it looks, for as much as checkpoints and models need."""

    def __init__(self, folder: Path) -> None:
        self._store = FolderArtifactStore(folder)
        self._blobs = Blobs(self._store, self._store.staging)

    async def upload_file(self, project: str, path: Path, media_type: str) -> Blob:
        with phase("upload"):
            return await self._blobs.put_file(project, path, media_type)

    async def upload_document(self, project: str, document: Any) -> Blob:
        with phase("upload"):
            data = json.dumps(document, sort_keys=True).encode()
            return await self._blobs.put_bytes(project, data, "application/json")

    async def read_document(self, key: str) -> Any:
        return json.loads(await self._read(key))

    async def download_blob(self, key: str, path: Path) -> int:
        return path.write_bytes(await self._read(key))

    async def _read(self, key: str) -> bytes:
        data = b"".join([piece async for piece in self._store.read(key)])
        if digest_of(data) != digest_of_key(key):
            raise AlteredBytes("storage sent other bytes than the digest promises")
        return data


class Job:
    """The job's record, as far as checkpoints matter: the newest one that was reported."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "record.json"
        self.handle = SimpleNamespace(project_id=PROJECT, job_id="job", checkpoint=self._report)

    @property
    def newest(self) -> str:
        return str(json.loads(self.path.read_text())["key"]) if self.path.exists() else ""

    async def _report(self, key: str, step: int) -> None:
        with phase("upload"):
            replace_document(self.path, {"key": key, "step": step})


def replace_document(path: Path, document: Any) -> None:
    """Writes a file whole or not at all."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(document))
    new.replace(path)


class Courier:
    """Stores checkpoints in a thread of its own, as the worker does beside its child."""

    def __init__(self, storage: StorageClient, job: Job, folder: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._uploads = CheckpointUploads(storage, cast(JobHandle, job.handle), folder, job.newest)
        Thread(target=self._loop.run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(self._uploads.run(), self._loop)

    def add(self, checkpoint: Path, step: int) -> None:
        self.wait(self._uploads.add(checkpoint, step))

    def drain(self) -> None:
        self.wait(self._uploads.drain())

    def wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class Watcher:
    """Asks for checkpoints, passes them on, and writes every update down."""

    def __init__(self, trace: Path, courier: Courier) -> None:
        self._trace = trace
        self._courier = courier
        self._step = 0
        self.written = Event()
        self.written.set()

    def stage(self, stage: Stage, detail: str = "") -> None:
        enter({Stage.TRAINING: "step", Stage.EXPORTING: "export"}.get(stage, ""))

    def progress(self, progress: Progress) -> None:
        self._step = progress.step
        numbers = {
            "step": progress.step,
            "loss": progress.loss.hex(),
            "learning_rate": progress.learning_rate.hex(),
            "gradient_norm": progress.gradient_norm.hex(),
        }
        with self._trace.open("a") as file:
            file.write(json.dumps(numbers) + "\n")

    def checkpoint_saved(self, folder: Path, step: int) -> None:
        self._courier.add(folder, step)

    def version_saved(self, folder: Path, step: int) -> None:
        pass

    def preview_drawn(self, preview: Preview) -> None:
        pass

    def request(self) -> Request:
        # The next checkpoint is taken only when the last is written, so that all attempts take the same ones.
        self.written.wait()
        return Request.CHECKPOINT if self._step in CHECKPOINT_AFTER else Request.NOTHING


def note_writes(watcher: Watcher) -> None:
    """Makes the writing of checkpoints a phase, and lets the watcher know when it is over."""
    real = checkpoints.write

    def write(folder: Path, checkpoint: checkpoints.Checkpoint) -> Path:
        try:
            with phase("checkpoint"):
                return real(folder, checkpoint)
        finally:
            watcher.written.set()

    def start(self: checkpoints.BackgroundWriter, checkpoint: checkpoints.Checkpoint) -> None:
        watcher.written.clear()
        begin(self, checkpoint)

    begin = checkpoints.BackgroundWriter.start
    checkpoints.write = write
    checkpoints.BackgroundWriter.start = start  # type: ignore[method-assign]


def make_attempt(order: dict[str, Any]) -> None:
    """Makes one attempt; the process is for nothing else.

    Args:
        order: `scenario`, `model_folder`, `data_folder`; `folder`, which all attempts share; `workdir`, whose
            checkpoints count when `stays` says that the machine is the one of the attempt before; `kill`.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    folder, workdir = Path(order["folder"]), Path(order["workdir"])
    job, shelf = Job(folder), cast(StorageClient, Shelf(folder / "store"))
    courier = Courier(shelf, job, workdir / "upload")
    watcher = Watcher(folder / "trace.jsonl", courier)
    note_writes(watcher)
    kill = Kill(**order["kill"]) if order["kill"] else None
    points = Points(kill)
    scenario = SCENARIOS[order["scenario"]](Path(order["data_folder"]))
    resume_from = None
    if not order["stays"] and job.newest:
        shutil.rmtree(workdir / "resume", ignore_errors=True)
        resume_from = courier.wait(fetch_checkpoint(shelf, job.newest, workdir / "resume"))
    run = Run(
        spec=scenario.spec,
        model_folder=Path(order["model_folder"]),
        model_digest="tiny",
        concepts=scenario.concepts,
        captioned=scenario.captioned,
        workdir=workdir,
        device=torch.device("cpu"),
        resume_from=resume_from,
        checkpoint_interval_s=3600.0,
    )
    points.watch()
    outcome = RECIPES[scenario.spec.recipe](run, watcher)
    enter("")
    courier.drain()
    result = courier.wait(_delivered(shelf, outcome))
    replace_document(folder / "result.json", {"files": result, "moments": dict(points.passed)})
    os._exit(0)


async def _delivered(storage: StorageClient, outcome: Outcome) -> dict[str, str]:
    """Stores the files of the model; returns their digests. The report, which tells times, is left out."""
    digests = {}
    for file in outcome.files[:-1]:
        blob = await storage.upload_file(PROJECT, outcome.export_folder / file, "application/octet-stream")
        digests[str(file)] = blob.digest
    return digests
