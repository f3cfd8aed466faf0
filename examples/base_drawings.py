"""Pictures drawn by a base model as it is, over gRPC: HTTP offers trainings and their samples only."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from likeness.inference.v1.generation_job_pb2 import GenerationSpec
from likeness.inference.v1.inference_service_pb2 import (
    CreateGenerationJobRequest,
    GetGenerationJobRequest,
    WatchGenerationJobRequest,
)
from likeness.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from likeness.job.v1.job_pb2 import JOB_STATE_SUCCEEDED, JobState

from services.adapters.grpc_client import Channel
from services.adapters.storage_client import StorageClient


class DrawingFailed(Exception):
    """A picture was not drawn; the text says why."""


def draw_all(
    inference: str, storage: str, project: str, specs: Sequence[GenerationSpec], folder: Path
) -> list[Path]:
    """Draws one picture for each specification and saves it as `<number>-seed-<seed>.png`.

    Args:
        inference: gRPC address of the inference api.
        storage: gRPC address of storage.
        project: who asks.
        specs: what to draw, one picture each.
        folder: where to save; made if missing.

    Returns:
        The files, in the order of `specs`.

    Raises:
        DrawingFailed: one of them could not be drawn.
        LikenessError: a specification was refused, or a service does not answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return asyncio.run(_draw_all(inference, storage, project, specs, folder))


async def _draw_all(
    inference: str, storage: str, project: str, specs: Sequence[GenerationSpec], folder: Path
) -> list[Path]:
    async with Channel(inference) as drawers, Channel(storage) as stores:
        keys = await asyncio.gather(
            *(_key_of(InferenceServiceStub(drawers), project, spec) for spec in specs)
        )
        client = StorageClient(stores)
        paths = []
        for number, (spec, key) in enumerate(zip(specs, keys, strict=True)):
            paths.append(folder / f"{number:02d}-seed-{spec.seed}.png")
            await client.download_blob(key, paths[-1])
    return paths


async def _key_of(stub: InferenceServiceStub, project: str, spec: GenerationSpec) -> str:
    """Artifact key of the one picture of a drawing, when it is done."""
    created = await stub.CreateGenerationJob(CreateGenerationJobRequest(project_id=project, spec=spec))
    job_id = created.job.job_id
    async for _ in stub.WatchGenerationJob(WatchGenerationJobRequest(project_id=project, job_id=job_id)):
        pass
    job = (await stub.GetGenerationJob(GetGenerationJobRequest(project_id=project, job_id=job_id))).job
    if job.state != JOB_STATE_SUCCEEDED:
        raise DrawingFailed(f'"{spec.prompt}" ended {JobState.Name(job.state)}: {job.error.message}')
    return str(job.result.images[0].key)
