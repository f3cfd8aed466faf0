"""Replicas of an api over one platform in memory, and short ways to put jobs into it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from likeness.inference.v1.generation_job_pb2 import GenerationSpec
from likeness.job.v1.job_pb2 import JobOptions
from likeness.training.v1.training_job_pb2 import TrainingSpec

from services.adapters.memory import MemoryPlatform
from services.domain import life_cycle as life
from services.domain.job import JobKind, JobRecord, JobRef, Limits
from services.domain.ports import Beat, Revision
from services.jobs.admission import Application
from services.jobs.core import JobCore

LEASE_S = 30.0


class MemoryDocuments:
    """Documents in a dictionary."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}

    async def put(self, project: str, data: bytes) -> str:
        key = f"{project}/{len(self.held)}"
        self.held[key] = data
        return key

    async def get(self, key: str) -> bytes:
        return self.held[key]


def make_core(
    platform: MemoryPlatform,
    kind: JobKind = JobKind.GEN,
    documents: MemoryDocuments | None = None,
    **options: Any,
) -> JobCore:
    options = {"lease_s": LEASE_S} | options
    return JobCore(kind, platform, platform.clock, documents or MemoryDocuments(), **options)


@asynccontextmanager
async def running(*cores: JobCore) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(core.run()) for core in cores]
    for core in cores:
        await core.wait_ready()
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results), results


def drawing(
    job_id: str, project: str = "p", model: str = "", limits: Limits | None = None, **fields: Any
) -> JobRecord:
    ref = JobRef(JobKind.GEN, project, job_id)
    return life.admit_drawing(
        ref,
        spec={"prompt": "a robot"},
        options=fields.pop("options", {}),
        limits=limits or Limits(),
        request=f"request of {job_id}",
        model=model,
        now_ms=fields.pop("now_ms", 1_700_000_000_000),
        **fields,
    )


def training(
    job_id: str, project: str = "p", limits: Limits | None = None, now_ms: int = 1_700_000_000_000
) -> JobRecord:
    ref = JobRef(JobKind.TRAIN, project, job_id)
    return life.admit_training(
        ref, spec={"base_model": "pocket"}, options={}, limits=limits or Limits(), request="r", now_ms=now_ms
    )


def application(kind: JobKind = JobKind.GEN, **fields: Any) -> Application:
    spec = GenerationSpec(prompt=fields.pop("prompt", "a robot")) if kind is JobKind.GEN else TrainingSpec()
    given = {
        "project": "p",
        "job_id": "",
        "request_id": "",
        "asked": spec,
        "spec": spec,
        "options": JobOptions(),
    }
    return Application(**(given | fields))


async def settle() -> None:
    """Lets followers and woken tasks run."""
    for _ in range(30):
        await asyncio.sleep(0)


async def take_one(core: JobCore, worker: str = "w1", warm: tuple[str, ...] = ()) -> Revision:
    [taken] = await core.dispatcher.take(worker, warm, 1, 0)
    return taken


def beat_of(worker: str, *revisions: Revision, **fields: Any) -> Beat:
    jobs = tuple((r.record.project, r.record.id, r.record.epoch) for r in revisions)
    kind = revisions[0].record.kind if revisions else JobKind.GEN
    return Beat(kind=kind, worker=worker, jobs=jobs, **fields)
