import asyncio
import contextlib
import hashlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from likeness.inference.v1 import generation_job_pb2 as pb
from likeness.job.v1.job_pb2 import Progress
from likeness.storage.v1.artifact_pb2 import Blob
from likeness.storage.v1.model_pb2 import Model, ModelComponent, ModelFormat, ModelManifest
from likeness.worker.v1.worker_service_pb2 import Assignment

from services.adapters.blob_cache import BlobCache, FetchedModel
from services.adapters.manifests import to_json
from services.domain.artifacts import blob_key, digest_of_key
from services.domain.errors import LikenessError, NotFound, PermissionDenied, StaleEpoch, Unavailable, row_of
from services.domain.job import JobFailure, Stage
from services.inference.device_process import DeviceProcess
from services.inference.worker import InferenceWorker, ModelShelf, part_digests

FAKE = "tests.unit.inference.fake_child"


class MemoryStorage:
    """Blobs and models as storage would give them to a worker."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.models: dict[str, Model] = {}
        self.downloads: list[str] = []
        self.is_down = False

    def keep(self, content: bytes) -> str:
        key = blob_key("p1", hashlib.sha256(content).hexdigest())
        self.blobs[key] = content
        return key

    def keep_model(self, name: str, files: dict[str, bytes], **facts: Any) -> Model:
        keys = {path: self.keep(content) for path, content in sorted(files.items())}
        fields: dict[str, Any] = {"format": ModelFormat.MODEL_FORMAT_DIFFUSERS} | facts
        manifest = ModelManifest(**fields)
        manifest.components.extend(
            ModelComponent(path=path, key=key, digest=digest_of_key(key), size_bytes=len(self.blobs[key]))
            for path, key in keys.items()
        )
        key = self.keep(to_json(manifest))
        self.models[name] = Model(
            model=name, manifest_key=key, manifest_digest=digest_of_key(key), manifest=manifest
        )
        return self.models[name]

    async def get_model(self, project: str, model: str) -> Model:
        if self.is_down:
            raise Unavailable("storage does not answer")
        found = [entry for name, entry in self.models.items() if model in (name, entry.manifest_digest)]
        if not found or project != "p1":
            raise NotFound("no such model")
        return found[0]

    async def read_manifest(self, key: str) -> ModelManifest:
        return next(model.manifest for model in self.models.values() if model.manifest_key == key)

    async def download_blob(self, key: str, path: Path) -> int:
        self.downloads.append(key)
        return await asyncio.to_thread(path.write_bytes, self.blobs[key])

    async def upload_file(self, project: str, path: Path, media_type: str) -> Blob:
        content = await asyncio.to_thread(path.read_bytes)
        key = blob_key(project, hashlib.sha256(content).hexdigest())
        self.blobs[key] = content
        return Blob(key=key, size_bytes=len(content), media_type=media_type)


@dataclass
class FakeHandle:
    """A job as the client gives it, with everything that was reported on it."""

    spec: pb.GenerationSpec
    job_id: str = "j1"
    project_id: str = "p1"
    epoch: int = 5
    attempt: int = 1
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    reports: list[tuple[str, Any]] = field(default_factory=list)
    numbers: list[Progress] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def assignment(self) -> Assignment:
        return Assignment(
            job_id=self.job_id, project_id=self.project_id, generation=self.spec, time_left=Duration()
        )

    def progress(self, progress: Progress) -> None:
        self.numbers.append(progress)

    async def stage(self, stage: Stage, message: str = "") -> None:
        self._refuse_if_stopped()
        self.reports.append(("stage", stage))

    async def finished(self, result: pb.GenerationResult) -> None:
        self._end("finished", result)

    async def failed(self, error: BaseException | JobFailure, *, retryable: bool | None = None) -> None:
        if isinstance(error, JobFailure):
            self._end("failed", (error.reason, error.field, retryable))
        else:
            self._end("failed", (row_of(error).reason, "", row_of(error).retry_job))

    async def yielded(self, message: str = "") -> None:
        self._end("yielded", message)

    def _end(self, kind: str, what: Any) -> None:
        self._refuse_if_stopped()
        self.reports.append((kind, what))
        self.ended.set()

    def _refuse_if_stopped(self) -> None:
        if self.stopped.is_set():
            raise StaleEpoch("gone")


class FakeClient:
    """Hands out what the test puts in, one job a free slot."""

    def __init__(self) -> None:
        self.waiting: list[FakeHandle] = []
        self.leaving = asyncio.Event()
        self.refusal: Exception | None = None
        self.warm: list[str] = []

    def leave(self) -> None:
        self.leaving.set()

    async def jobs(
        self, free_slots: Callable[[], int], warm_models: Callable[[], Iterable[str]]
    ) -> AsyncIterator[FakeHandle]:
        while not self.leaving.is_set():
            if self.refusal is not None:
                raise self.refusal
            self.warm = list(warm_models())
            if self.waiting and free_slots() > 0:
                yield self.waiting.pop(0)
            else:
                await asyncio.sleep(0.005)


class Bench:
    """A running worker with its fakes."""

    def __init__(self, worker: InferenceWorker, client: FakeClient, storage: MemoryStorage, cache: BlobCache):
        self.client, self.storage, self.cache = client, storage, cache
        self.stopping = asyncio.Event()
        self.running = asyncio.create_task(worker.run(self.stopping))

    def give(self, prompt: str, job_id: str = "j1", model: str = "m", **changes: Any) -> FakeHandle:
        fields: dict[str, Any] = {"prompt": prompt, "num_images": 2, "model": model} | changes
        spec = pb.GenerationSpec(**fields)
        handle = FakeHandle(spec, job_id)
        self.client.waiting.append(handle)
        return handle

    async def end_of(self, handle: FakeHandle) -> tuple[str, Any]:
        async with asyncio.timeout(20):
            await handle.ended.wait()
        return handle.reports[-1]

    async def stop(self) -> None:
        self.stopping.set()
        with contextlib.suppress(LikenessError):  # which the test has seen
            async with asyncio.timeout(20):
                await self.running

    def folders(self) -> list[Path]:
        return [path for path in (self.cache.root / "holders").glob("*/*") if path.is_dir()]


async def running_bench(tmp_path: Path, device: DeviceProcess, max_jobs: int = 2) -> Bench:
    storage, cache, client = MemoryStorage(), BlobCache(tmp_path / "cache", 1 << 40), FakeClient()
    storage.keep_model("m", {"unet/w.safetensors": b"unet", "vae/w.safetensors": b"vae"}, clip_skip=2)
    parts: tuple[Any, ...] = (client, storage, cache, device)
    worker = InferenceWorker(*parts, max_jobs=max_jobs, grace_s=0.2, outage_pause_s=0.3)
    await device.until_ready()
    return Bench(worker, client, storage, cache)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with DeviceProcess(module=FAKE, silence_s=2.0, loading_s=20.0) as device:
        bench = await running_bench(tmp_path, device)
        yield bench
        await bench.stop()
        bench.cache.close()


async def test_job_ends_with_its_pictures_stored(bench: Bench) -> None:
    handle = bench.give("x")
    kind, result = await bench.end_of(handle)
    assert kind == "finished"
    assert [image.seed for image in result.images] == [0, 1]
    assert all(bench.storage.blobs[image.key].startswith(b"\x89PNG") for image in result.images)
    assert result.device_seconds == 0.5


async def test_stage_and_progress_are_reported(bench: Bench) -> None:
    handle = bench.give("x")
    await bench.end_of(handle)
    assert [kind for kind, _ in handle.reports] == ["stage", "finished"]
    assert handle.reports[0] == ("stage", Stage.DRAWING)
    assert (handle.numbers[-1].step, handle.numbers[-1].total_steps) == (2, 2)


async def test_loaded_models_are_offered_as_warm(bench: Bench) -> None:
    await bench.end_of(bench.give("x"))
    await asyncio.sleep(0.05)
    assert bench.client.warm == [bench.storage.models["m"].manifest_digest]


async def test_model_is_fetched_once(bench: Bench) -> None:
    for number in range(2):
        await bench.end_of(bench.give("x", f"j{number}"))
    assert len(bench.storage.downloads) == 2


async def test_digest_fixed_at_admission_decides_the_model(bench: Bench) -> None:
    old = bench.storage.models.pop("m")
    bench.storage.models["old"] = old
    bench.storage.keep_model("m", {"unet/w.safetensors": b"newer"})
    await bench.end_of(bench.give("x", model_digest=old.manifest_digest))
    await asyncio.sleep(0.05)
    assert bench.client.warm == [old.manifest_digest]


@pytest.mark.parametrize(("asked", "drawn"), [(0, "2"), (1, "1"), (3, "3")])
async def test_layer_of_the_training_is_used_unless_another_is_asked_for(
    bench: Bench, asked: int, drawn: str
) -> None:
    _, result = await bench.end_of(bench.give("x", clip_skip=asked))
    assert list(result.warnings) == [drawn]


async def test_request_with_a_lora_gets_the_file_of_that_lora_alone(bench: Bench) -> None:
    lora = {"format": ModelFormat.MODEL_FORMAT_LORA}
    files = {"unet/w.safetensors": b"base", "unet/lora-000.safetensors": b"older"}
    bench.storage.keep_model("rex", files | {"text_encoder/lora-001.safetensors": b"rex's"}, **lora)
    kind, result = await bench.end_of(bench.give("x", loras=[pb.LoraWeight(model="rex", strength=0.5)]))
    assert (kind, list(result.warnings)) == ("finished", ["2", "rex 0.5 rex's"])
    fetched = {bench.storage.blobs[key] for key in bench.storage.downloads}
    assert fetched == {b"unet", b"vae", b"rex's"}
    held = [path for path in (bench.cache.root / "holders").glob("*/*") if path.is_file()]
    assert [path.name for path in held] == ["lock"], "given back"


async def test_model_that_is_a_lora_is_its_base_with_its_loras_worn_in_order(bench: Bench) -> None:
    lora = {"format": ModelFormat.MODEL_FORMAT_LORA}
    files = {"unet/w.safetensors": b"unet", "text_encoder/lora-001.safetensors": b"younger"}
    files |= {f"{part}/lora-000.safetensors": b"older" for part in ("unet", "text_encoder")}
    bench.storage.keep_model("rex", files, **lora)
    _, result = await bench.end_of(bench.give("x", model="rex"))
    assert list(result.warnings) == ["0", "model 1.0 older", "model 1.0 younger"]
    parts = [part_digests(bench.storage.models[name].manifest.components) for name in ("m", "rex")]
    assert parts[0]["unet"] == parts[1]["unet"], "the base's weights are loaded once for both"


async def test_request_with_an_embedding_gets_its_file_and_its_word(bench: Bench) -> None:
    facts: dict[str, Any] = {"format": ModelFormat.MODEL_FORMAT_EMBEDDING, "trigger_words": ["<rex>"]}
    bench.storage.keep_model("word", {"embedding.bin": b"vectors"}, **facts)
    _, result = await bench.end_of(bench.give("x", embeddings=[pb.Embedding(model="word", negative=True)]))
    assert list(result.warnings) == ["2", "word <rex> True vectors"]


@pytest.mark.parametrize("name", ["m", "nobody"])
async def test_request_with_what_is_no_lora_fails(name: str, bench: Bench) -> None:
    reason = {"m": "BAD_INPUT", "nobody": "NOT_FOUND"}[name]
    kind, told = await bench.end_of(bench.give("x", loras=[pb.LoraWeight(model=name)]))
    assert (kind, told[0]) == ("failed", reason)


async def test_refusal_by_the_child_fails_the_job_with_its_field(bench: Bench) -> None:
    assert await bench.end_of(bench.give("refuse")) == ("failed", ("INVALID_SPEC", "clip_skip", False))


async def test_unknown_model_fails_the_job(bench: Bench) -> None:
    assert await bench.end_of(bench.give("x", model="nope")) == ("failed", ("NOT_FOUND", "", False))


async def test_model_of_another_format_fails_the_job(bench: Bench) -> None:
    bench.storage.keep_model("token", {"token.safetensors": b"t"}, format=ModelFormat.MODEL_FORMAT_EMBEDDING)
    assert (await bench.end_of(bench.give("x", model="token")))[1][0] == "BAD_INPUT"


async def test_storage_outage_gives_the_job_back_and_counts_no_attempt(bench: Bench) -> None:
    bench.storage.is_down = True
    assert await bench.end_of(bench.give("x")) == ("yielded", "storage does not answer")


async def test_place_of_a_job_given_back_stays_empty_for_a_while(bench: Bench) -> None:
    bench.storage.is_down = True
    handles = [bench.give("x", f"j{number}") for number in range(3)]
    await bench.end_of(handles[0])
    await bench.end_of(handles[1])
    await asyncio.sleep(0.05)
    assert handles[2].reports == []
    assert (await bench.end_of(handles[2]))[0] == "yielded"


async def test_refusal_to_give_work_ends_the_worker(bench: Bench) -> None:
    bench.client.refusal = PermissionDenied("not a worker of this installation")
    with pytest.raises(PermissionDenied):
        async with asyncio.timeout(5):
            await bench.running


class SlowCache:
    """Hands out folders that are only names, and takes its time to give them up."""

    def __init__(self) -> None:
        self.released: list[str] = []
        self.may_release = asyncio.Event()

    async def fetch_model(self, storage: Any, model: Model) -> FetchedModel:
        return FetchedModel(Path(digest_of_key(model.manifest_key)), model.manifest, model.manifest_key)

    async def release(self, folder: Path) -> None:
        self.released.append(folder.name)
        await self.may_release.wait()


class Holding:
    """A device that holds models."""

    def __init__(self) -> None:
        self.held: tuple[str, ...] = ()


async def test_model_that_came_into_use_again_while_another_was_given_up_stays() -> None:
    storage, cache, device = MemoryStorage(), SlowCache(), Holding()
    digests = [
        storage.keep_model(name, {"unet/w": name.encode()}).manifest_digest for name in ("a", "b", "c")
    ]
    parts: tuple[Any, ...] = (storage, cache, device)
    shelf, device.held = ModelShelf(*parts), tuple(digests[:2])
    for name in ("a", "b"):
        async with shelf.borrowed("p1", name):
            pass
    device.held = ()

    async def use_another() -> None:
        async with shelf.borrowed("p1", "c"):
            pass

    tidying = asyncio.create_task(use_another())
    while not cache.released:
        await asyncio.sleep(0)
    async with shelf.borrowed("p1", "b"):
        cache.may_release.set()
        await tidying
        assert digests[1] not in cache.released
    assert sorted(cache.released) == sorted(digests)


async def test_death_of_the_child_gives_its_jobs_another_try_and_later_jobs_are_drawn(bench: Bench) -> None:
    assert await bench.end_of(bench.give("crash")) == ("failed", ("INTERNAL", "", True))
    assert (await bench.end_of(bench.give("x", "j2")))[0] == "finished"


async def test_job_that_was_taken_away_is_dropped_without_a_report(bench: Bench) -> None:
    handle = bench.give("wait")
    await asyncio.sleep(0.1)
    handle.stopped.set()
    await asyncio.sleep(0.1)
    assert handle.reports == []
    assert (await bench.end_of(bench.give("x", "j2")))[0] == "finished"


async def test_slow_job_does_not_hold_up_the_next(bench: Bench) -> None:
    bench.give("wait", "slow")
    assert (await bench.end_of(bench.give("x", "quick")))[0] == "finished"


async def test_no_more_jobs_are_taken_than_fit(bench: Bench) -> None:
    handles = [bench.give("wait", f"j{number}") for number in range(3)]
    await asyncio.sleep(0.1)
    assert bench.client.waiting == handles[2:]


async def test_leaving_worker_gives_back_what_does_not_end_in_time(bench: Bench) -> None:
    handle = bench.give("wait")
    await asyncio.sleep(0.1)
    started = time.monotonic()
    await bench.stop()
    assert handle.reports == [("yielded", "the worker leaves")]
    assert time.monotonic() - started < 2


async def test_leaving_worker_lets_jobs_end_within_the_grace(bench: Bench) -> None:
    handle = bench.give("x")
    while not handle.reports and bench.client.waiting:
        await asyncio.sleep(0.001)
    await bench.stop()
    assert handle.reports[-1][0] == "finished"


async def test_files_of_models_that_the_child_dropped_are_given_up(bench: Bench) -> None:
    bench.storage.keep_model("n", {"unet/w.safetensors": b"other"})
    await bench.end_of(bench.give("x"))
    # The fake child holds only the model it drew with last.
    await bench.end_of(bench.give("x", "j2", "n"))
    await asyncio.sleep(0.05)
    assert [folder.name for folder in bench.folders()] == [bench.storage.models["n"].manifest_digest]


def test_equal_files_give_equal_parts_and_shared_ones_are_recognised() -> None:
    base = [ModelComponent(path="vae/w", digest="1"), ModelComponent(path="unet/w", digest="2")]
    tuned = [ModelComponent(path="unet/w", digest="3"), ModelComponent(path="vae/w", digest="1")]
    assert part_digests(base)["vae"] == part_digests(tuned)["vae"]
    assert part_digests(base)["unet"] != part_digests(tuned)["unet"]
    assert part_digests([*base, ModelComponent(path="model_index.json", digest="4")]) == part_digests(base)


def test_parts_of_a_model_of_one_file_are_that_file_and_their_configs() -> None:
    single = [
        ModelComponent(path="model.safetensors", digest="1"),
        ModelComponent(path="config/unet/c", digest="2"),
    ]
    adapted = [*single, ModelComponent(path="config/unet/lora-000.safetensors", digest="3")]
    other = [ModelComponent(path="model.safetensors", digest="4"), single[1]]
    assert part_digests(single) == part_digests(adapted)
    assert part_digests(single)["unet"] != part_digests(other)["unet"]


def files_in(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


async def test_real_child_draws_the_job(tiny_model_dir: Path, tmp_path: Path) -> None:
    async with DeviceProcess("--device=cpu") as device:
        bench = await running_bench(tmp_path, device)
        bench.storage.keep_model("tiny", files_in(tiny_model_dir))
        handle = bench.give("a robot", model="tiny", num_inference_steps=2, guidance_scale=7.5, seed=3)
        kind, result = await bench.end_of(handle)
        await bench.stop()
        bench.cache.close()
    assert kind == "finished"
    assert [(image.seed, image.width_px) for image in result.images] == [(3, 16), (4, 16)]
    assert all(
        hashlib.sha256(bench.storage.blobs[image.key]).hexdigest() == image.digest for image in result.images
    )


def test_worker_starts_without_torch() -> None:
    code = "import sys, services.inference.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
