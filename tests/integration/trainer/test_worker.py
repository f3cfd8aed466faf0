"""The trainer worker between a real storage server and a scripted api, with a real child and with a fake one."""

import asyncio
import io
import os
import signal
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
from likeness.job.v1.job_pb2 import JobStage
from likeness.training.v1 import training_job_pb2 as training
from likeness.worker.v1 import worker_service_pb2 as pb
from PIL import Image
from safetensors.numpy import load_file

from services.adapters.storage_client import StorageClient
from services.domain.errors import DeadlineExceeded, InvalidSpec, NotFound, StaleEpoch, Unavailable
from services.domain.training_spec import resolve_training_spec
from services.jobs.worker_client import JobHandle
from services.trainer.checkpoint_uploads import CheckpointUploads, fetch_checkpoint
from tests.integration.trainer.platform import PROJECT, WEIGHTS, Platform, open_platform

FAKE = "tests.integration.trainer.fake_child"


@pytest.fixture(autouse=True)
def single_threaded_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny tensors gain nothing from threads, and on a busy machine threads that wait for each other lose much."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
async def platform(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Platform]:
    settings = {}
    if getattr(request, "param", "folder") == "bucket":
        settings = request.getfixturevalue("bucket_server").storage_settings(s3_direct_bytes=1)
    async with open_platform(tmp_path, **settings) as opened:
        yield opened


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[list[Path], list[Path]]:
    def saved(kind: str, count: int) -> list[Path]:
        paths = []
        for number in range(count):
            paths.append(tmp_path / f"{kind}-{number}.png")
            Image.new("RGB", (24, 16), (40 * number, 90, len(kind) * 9)).save(paths[-1])
        return paths

    return saved("instance", 3), saved("class", 2)


@pytest.fixture
def small_base(tmp_path: Path) -> Path:
    """Files that only look like a model, for children that do not load it."""
    folder = tmp_path / "base"
    for name in ("model_index.json", WEIGHTS, "vae/diffusion_pytorch_model.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"base {name}".encode())
    return folder


def spec_of(**changes: int) -> training.TrainingSpec:
    """A complete specification, shrunk to the tiny model after its defaults were resolved."""
    concept = training.Concept(instance_prompt="a photo of sks dog", class_prompt="a photo of a dog")
    concept.instance_data.dataset_key = concept.class_data.dataset_key = "given"
    spec = resolve_training_spec(
        training.TrainingSpec(concepts=[concept], base_model="base", model_name="Rex")
    )
    spec.resolution = 16
    spec.learning_rate = 5e-4
    for name, value in changes.items():
        setattr(spec, name, value)
    return spec


@pytest.mark.parametrize("platform", ["folder", "bucket"], indirect=True)
async def test_a_training_is_fetched_trained_stored_and_registered(
    platform: Platform, pictures: tuple[list[Path], list[Path]], tiny_model_dir: Path
) -> None:
    base = await platform.add_base_model(tiny_model_dir)
    async with platform.worker():
        platform.api.waiting.append(await platform.assignment(spec_of(max_train_steps=6), pictures))
        await platform.api.until(lambda: platform.api.kinds()[-1:] in (["trained"], ["failed"]))
    assert platform.api.kinds() == ["training", "exporting", "uploading", "trained"]
    assert [report.number for report in platform.api.reports] == [1, 2, 3, 4]
    result = platform.api.last.trained.result
    assert (result.model, result.steps, result.seed, result.device) == ("job-1", 6, 1337, "cpu")
    assert result.final_loss > 0
    assert result.execution_summary == "fp32, sdpa, AdamW 32-bit, deterministic"
    assert platform.api.reports[0].stage.message == f"training has begun: {result.execution_summary}"
    assert list(result.warnings) == ["a picture was skipped"]
    model = await platform.storage.get_model(PROJECT, "job-1")
    assert model.display_name == "Rex"
    assert (model.manifest_key, model.manifest_digest) == (result.manifest_key, result.manifest_digest)
    before = {component.path: component.key for component in base.components}
    after = {component.path: component.key for component in model.manifest.components}
    changed = {path for path in after if after[path] != before.get(path)}
    assert changed == {WEIGHTS, "text_encoder/model.safetensors", "training.json"} | (
        changed & {"unet/config.json", "text_encoder/config.json"}
    )
    assert model.manifest.lineage.steps == 6
    assert model.manifest.base_manifest_key == platform.base_manifest_key
    moving = [progress for progress in platform.api.progress if progress.stage == JobStage.JOB_STAGE_TRAINING]
    assert moving
    assert all(progress.total_steps == 6 for progress in moving)
    assert list((platform.folder / "work").iterdir()) == []


async def weights_of(platform: Platform, job: str, folder: Path) -> dict[str, bytes]:
    model = await platform.storage.get_model(PROJECT, job)
    weights: dict[str, bytes] = {}
    for component in model.manifest.components:
        if component.path in (WEIGHTS, "text_encoder/model.safetensors"):
            path = folder / f"{job}-{component.digest}"
            await platform.storage.download_blob(component.key, path)
            weights |= {f"{component.path}:{name}": t.tobytes() for name, t in load_file(path).items()}
    return weights


async def test_a_job_given_back_in_the_middle_ends_with_the_bits_of_an_undisturbed_one(
    platform: Platform, pictures: tuple[list[Path], list[Path]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    await platform.add_base_model(tiny_model_dir)
    spec, api = spec_of(max_train_steps=90), platform.api
    async with platform.worker() as worker:
        api.waiting.append(await platform.assignment(spec, pictures))
        await api.until(lambda: any(progress.step >= 5 for progress in api.progress))
        worker.stopping.set()
        await api.until(lambda: "yielded" in api.kinds())
    assert api.kinds() == ["training", "checkpoint", "yielded"]
    checkpoint = api.reports[1].checkpoint.checkpoint
    assert 5 <= checkpoint.step < 90
    async with platform.worker():
        api.waiting.append(await platform.assignment(spec, pictures, checkpoint=checkpoint))
        await api.until(lambda: api.kinds()[-1] in ("trained", "failed"))
        assert api.last.trained.result.steps == 90
        resumed_at = min(progress.step for progress in api.progress[1:] if progress.step > checkpoint.step)
        assert resumed_at > checkpoint.step
        api.waiting.append(await platform.assignment(spec, pictures, job="job-2"))
        await api.until(lambda: api.kinds().count("trained") == 2)
    assert await weights_of(platform, "job-1", tmp_path) == await weights_of(platform, "job-2", tmp_path)


async def test_checkpoints_are_stored_while_training_goes_on(
    platform: Platform, pictures: tuple[list[Path], list[Path]], tiny_model_dir: Path
) -> None:
    await platform.add_base_model(tiny_model_dir)
    async with platform.worker(checkpoint_interval_s=0.1):
        platform.api.waiting.append(await platform.assignment(spec_of(max_train_steps=120), pictures))
        await platform.api.until(lambda: platform.api.kinds()[-1:] in (["trained"], ["failed"]))
    kinds = platform.api.kinds()
    assert kinds[0] == "training"
    assert kinds[1] == "checkpoint"
    reference = platform.api.reports[1].checkpoint.checkpoint
    document = await platform.storage.read_document(reference.manifest_key)
    names = {file["name"] for file in document["files"]}
    assert names == {"manifest.json", "optimizer.safetensors", "state.json", "weights.safetensors"}


async def test_the_api_s_stop_kills_the_child_and_nothing_more_is_reported(
    platform: Platform, pictures: tuple[list[Path], list[Path]], small_base: Path
) -> None:
    await platform.add_base_model(small_base)
    async with platform.worker("trains for ever", module=FAKE) as worker:
        pid = worker.process.pid
        platform.api.waiting.append(await platform.assignment(spec_of(), pictures))
        await platform.api.until(lambda: len(platform.api.progress) > 2)
        platform.api.to_stop.add("job-1")
        async with asyncio.timeout(30):
            while worker.process.pid in (pid, None):
                await asyncio.sleep(0.05)
        assert pid is not None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert platform.api.kinds() == ["training"]


async def test_a_child_that_dies_fails_the_attempt_and_keeps_the_checkpoint(
    platform: Platform, pictures: tuple[list[Path], list[Path]], small_base: Path
) -> None:
    await platform.add_base_model(small_base)
    async with platform.worker("dies", module=FAKE):
        platform.api.waiting.append(await platform.assignment(spec_of(), pictures))
        await platform.api.until(lambda: "failed" in platform.api.kinds())
    assert platform.api.kinds() == ["training", "checkpoint", "failed"]
    failed = platform.api.last.failed
    assert (failed.error.reason, failed.retryable) == ("INTERNAL", True)


async def test_a_killed_child_is_replaced_and_the_next_job_is_done(
    platform: Platform, pictures: tuple[list[Path], list[Path]], small_base: Path
) -> None:
    await platform.add_base_model(small_base)
    async with platform.worker("trains", module=FAKE) as worker:
        assert worker.process.pid is not None
        os.kill(worker.process.pid, signal.SIGKILL)
        platform.api.waiting.append(await platform.assignment(spec_of(), pictures))
        await platform.api.until(lambda: platform.api.kinds()[-1:] in (["trained"], ["failed"]))
    assert platform.api.kinds() == ["training", "uploading", "trained"]


async def test_a_child_that_waited_long_for_work_is_not_taken_for_hung(
    platform: Platform, pictures: tuple[list[Path], list[Path]], small_base: Path
) -> None:
    await platform.add_base_model(small_base)
    silence_s = {"loading": 0.4, "training": 0.4, "exporting": 0.4}
    async with platform.worker("trains", module=FAKE, silence_s=silence_s) as worker:
        pid = worker.process.pid
        await asyncio.sleep(1.5)
        assert worker.process.pid == pid
        platform.api.waiting.append(await platform.assignment(spec_of(), pictures))
        await platform.api.until(lambda: platform.api.kinds()[-1:] in (["trained"], ["failed"]))
    assert platform.api.kinds()[-1] == "trained"


async def test_a_child_that_takes_no_command_is_given_up(
    platform: Platform, pictures: tuple[list[Path], list[Path]], small_base: Path
) -> None:
    await platform.add_base_model(small_base)
    async with platform.worker("is deaf", module=FAKE, silence_s={"starting": 2.0}):
        platform.api.waiting.append(await platform.assignment(spec_of(), pictures))
        await platform.api.until(lambda: "failed" in platform.api.kinds())
    assert platform.api.kinds() == ["failed"]
    assert platform.api.last.failed.retryable


async def test_a_silent_child_is_killed_by_the_watchdog_of_its_stage(
    platform: Platform, pictures: tuple[list[Path], list[Path]], small_base: Path
) -> None:
    await platform.add_base_model(small_base)
    async with platform.worker("hangs", module=FAKE, silence_s={"training": 0.5}):
        platform.api.waiting.append(await platform.assignment(spec_of(), pictures))
        await platform.api.until(lambda: "failed" in platform.api.kinds())
    assert platform.api.last.failed.retryable


@pytest.mark.parametrize("moment", ["fails", "fails at once"])
async def test_a_fault_of_the_input_is_final_whenever_the_child_finds_it(
    platform: Platform, pictures: tuple[list[Path], list[Path]], small_base: Path, moment: str
) -> None:
    await platform.add_base_model(small_base)
    async with platform.worker(moment, module=FAKE):
        platform.api.waiting.append(await platform.assignment(spec_of(), pictures))
        await platform.api.until(lambda: "failed" in platform.api.kinds())
    failed = platform.api.last.failed
    assert (failed.error.reason, failed.error.message, failed.error.field, failed.retryable) == (
        "BAD_INPUT",
        "the model is broken",
        "base_model",
        False,
    )


async def test_a_diverged_training_fails_and_its_last_good_weights_are_kept_with_a_note(
    platform: Platform, pictures: tuple[list[Path], list[Path]], small_base: Path
) -> None:
    await platform.add_base_model(small_base)
    async with platform.worker("diverges", module=FAKE):
        platform.api.waiting.append(await platform.assignment(spec_of(), pictures))
        await platform.api.until(lambda: "failed" in platform.api.kinds())
    failed = platform.api.last.failed
    assert (failed.error.reason, failed.retryable) == ("DIVERGED", False)
    model = await platform.storage.get_model(PROJECT, "job-1")
    assert model.manifest.note == "training diverged; these are its weights after 12 updates"


async def test_what_files_say_of_pictures_reaches_the_child_of_a_captioned_training(
    platform: Platform, pictures: tuple[list[Path], list[Path]], small_base: Path, tmp_path: Path
) -> None:
    await platform.add_base_model(small_base)
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for number in range(2):
            archive.writestr(f"{number}.png", _picture(number))
            archive.writestr(f"{number}.yaml", f"main_prompt: robot {number}")
    blob = await platform.storage.upload_file(PROJECT, tmp_path / "data.zip", "application/zip")
    source = training.ImageSource(artifacts=training.ArtifactKeys(keys=[blob.key]))
    dataset = await platform.storage.import_dataset(PROJECT, source, read_captions=True)
    spec = spec_of()
    spec.recipe = training.RECIPE_EVERYDREAM
    async with platform.worker("tells its data", module=FAKE):
        assignment = await platform.assignment(spec, pictures)
        assignment.prepared.datasets[0].instance_key = dataset.key
        assignment.prepared.datasets[0].class_key = ""
        platform.api.waiting.append(assignment)
        await platform.api.until(lambda: platform.api.kinds()[-1:] in (["trained"], ["failed"]))
    told = platform.api.last.trained.result.warnings
    assert list(told) == ["a picture was skipped", "robot 0 True", "robot 1 True"]


def _picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (80, 64), (90 * number, 40, 0)).save(buffer, "PNG")
    return buffer.getvalue()


async def test_a_training_that_diverged_at_once_registers_nothing(
    platform: Platform, pictures: tuple[list[Path], list[Path]], small_base: Path
) -> None:
    await platform.add_base_model(small_base)
    async with platform.worker("diverges at once", module=FAKE):
        platform.api.waiting.append(await platform.assignment(spec_of(), pictures))
        await platform.api.until(lambda: "failed" in platform.api.kinds())
    assert platform.api.last.failed.error.reason == "DIVERGED"
    with pytest.raises(NotFound):
        await platform.storage.get_model(PROJECT, "job-1", timeout_s=5)


async def test_what_an_earlier_attempt_registered_gives_way(
    platform: Platform, pictures: tuple[list[Path], list[Path]], small_base: Path
) -> None:
    manifest = await platform.add_base_model(small_base)
    manifest.note = "left by an earlier attempt"
    await platform.storage.register_model(PROJECT, "job-1", manifest)
    async with platform.worker("trains", module=FAKE):
        platform.api.waiting.append(await platform.assignment(spec_of(), pictures))
        await platform.api.until(lambda: platform.api.kinds()[-1:] in (["trained"], ["failed"]))
    model = await platform.storage.get_model(PROJECT, "job-1")
    assert model.manifest_key == platform.api.last.trained.result.manifest_key
    assert model.manifest.note == ""


@pytest.mark.parametrize("outage", [Unavailable("storage is away"), DeadlineExceeded("storage is frozen")])
@pytest.mark.parametrize("step", ["read_manifest", "upload_file", "register_model"])
async def test_an_outage_of_storage_gives_the_job_back_uncounted_and_it_is_done_later(
    platform: Platform,
    pictures: tuple[list[Path], list[Path]],
    small_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    outage: Exception,
    step: str,
) -> None:
    await platform.add_base_model(small_base)
    assignments = [await platform.assignment(spec_of(), pictures) for _ in range(2)]
    real, faults = getattr(StorageClient, step), [outage]

    async def away_once(*args: Any, **kwargs: Any) -> Any:
        if faults:
            raise faults.pop()
        return await real(*args, **kwargs)

    monkeypatch.setattr(StorageClient, step, away_once)
    async with platform.worker("trains", module=FAKE):
        platform.api.waiting += assignments
        await platform.api.until(lambda: platform.api.kinds()[-1:] in (["trained"], ["failed"]))
    assert [kind for kind in platform.api.kinds() if kind in ("yielded", "failed", "trained")] == [
        "yielded",
        "trained",
    ]


async def test_a_worker_that_lost_its_job_does_not_replace_its_successor_s_model(
    platform: Platform, pictures: tuple[list[Path], list[Path]], small_base: Path
) -> None:
    manifest = await platform.add_base_model(small_base)
    manifest.note = "the successor's"
    await platform.storage.register_model(PROJECT, "job-1", manifest)

    def after_uploading(report: pb.ReportRequest) -> Exception | None:
        return StaleEpoch("another has it") if "uploading" in platform.api.kinds() else None

    platform.api.refusal = after_uploading
    async with platform.worker("trains", module=FAKE) as worker:
        pid = worker.process.pid
        platform.api.waiting.append(await platform.assignment(spec_of(), pictures))
        async with asyncio.timeout(30):
            while worker.process.pid in (pid, None):
                await asyncio.sleep(0.05)
    assert (await platform.storage.get_model(PROJECT, "job-1")).manifest.note == "the successor's"


async def test_a_model_whose_deletion_was_answered_late_is_registered_all_the_same(
    platform: Platform,
    pictures: tuple[list[Path], list[Path]],
    small_base: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest = await platform.add_base_model(small_base)
    await platform.storage.register_model(PROJECT, "job-1", manifest)
    delete = StorageClient.delete_model

    async def twice(*args: Any) -> None:
        await delete(*args)
        await delete(*args)

    monkeypatch.setattr(StorageClient, "delete_model", twice)
    async with platform.worker("trains", module=FAKE):
        platform.api.waiting.append(await platform.assignment(spec_of(), pictures))
        await platform.api.until(lambda: platform.api.kinds()[-1:] in (["trained"], ["failed"]))
    assert platform.api.kinds()[-1] == "trained"


async def test_a_refused_last_report_ends_neither_the_worker_nor_its_next_job(
    platform: Platform, pictures: tuple[list[Path], list[Path]], small_base: Path
) -> None:
    await platform.add_base_model(small_base)

    def ends(report: pb.ReportRequest) -> Exception | None:
        over = report.job_id == "job-1" and report.WhichOneof("report") in ("trained", "failed")
        return InvalidSpec("the record is too large") if over else None

    platform.api.refusal = ends
    async with platform.worker("trains", module=FAKE):
        platform.api.waiting.append(await platform.assignment(spec_of(), pictures))
        platform.api.waiting.append(await platform.assignment(spec_of(), pictures, job="job-2"))
        await platform.api.until(lambda: platform.api.kinds()[-1:] == ["trained"])
    assert platform.api.last.job_id == "job-2"


async def test_an_unforeseen_fault_of_a_checkpoint_s_upload_holds_up_nothing(
    platform: Platform,
    pictures: tuple[list[Path], list[Path]],
    small_base: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def broken(self: CheckpointUploads, held: Path, step: int) -> None:
        raise KeyError("nobody thought of this")

    monkeypatch.setattr(CheckpointUploads, "_store", broken)
    await platform.add_base_model(small_base)
    async with platform.worker("saves and ends", module=FAKE):
        platform.api.waiting.append(await platform.assignment(spec_of(), pictures))
        await platform.api.until(lambda: platform.api.kinds()[-1:] == ["trained"])
    assert platform.api.kinds() == ["training", "uploading", "trained"]


async def test_a_checkpoint_that_is_gone_costs_time_and_not_the_job(
    platform: Platform, pictures: tuple[list[Path], list[Path]], small_base: Path
) -> None:
    await platform.add_base_model(small_base)
    gone = training.CheckpointRef(manifest_key=f"projects/{PROJECT}/blobs/sha256/{'0' * 64}", step=9)
    async with platform.worker("trains", module=FAKE):
        platform.api.waiting.append(await platform.assignment(spec_of(), pictures, checkpoint=gone))
        await platform.api.until(lambda: platform.api.kinds()[-1:] in (["trained"], ["failed"]))
    assert platform.api.kinds()[-1] == "trained"


class Reported:
    """A job that notes the checkpoints it is told of."""

    project_id, job_id = PROJECT, "job-1"

    def __init__(self) -> None:
        self.keys: list[str] = []

    async def checkpoint(self, key: str, step: int) -> None:
        self.keys.append(key)


async def stored_checkpoints(platform: Platform, folder: Path, count: int) -> list[str]:
    """Stores so many checkpoints one after the other; returns the keys of their manifests."""
    job = Reported()
    uploads = CheckpointUploads(platform.storage, cast(JobHandle, job), folder / "upload")
    storing = asyncio.create_task(uploads.run())
    for step in range(1, count + 1):
        checkpoint = folder / f"step-{step:08d}"
        checkpoint.mkdir()
        (checkpoint / "weights").write_text(f"weights of {step}")
        await uploads.add(checkpoint, step)
        await uploads.drain()
    storing.cancel()
    return job.keys


def blob_file(platform: Platform, key: str) -> Path:
    return platform.folder / "home" / "artifacts" / key


@pytest.mark.parametrize("damage", ["altered", "gone", "manifest gone", "whole", "two altered"])
async def test_a_stored_checkpoint_whose_bytes_are_damaged_gives_way_to_the_one_before(
    damage: str, platform: Platform, tmp_path: Path
) -> None:
    keys = await stored_checkpoints(platform, tmp_path, 3)
    documents = [await platform.storage.read_document(key) for key in keys]
    files = [blob_file(platform, document["files"][0]["key"]) for document in documents]
    for file in {"altered": files[2:], "two altered": files[1:]}.get(damage, []):
        file.chmod(0o600)
        file.write_text("other bytes")
    for file in {"gone": files[2:], "manifest gone": [blob_file(platform, keys[2])]}.get(damage, []):
        file.unlink()
    found = await fetch_checkpoint(platform.storage, keys[2], tmp_path / "resume")
    step = {"whole": 3, "altered": 2, "gone": 2}.get(damage)
    assert (found.name if found else None) == (f"step-{step:08d}" if step else None)
    if found:
        assert (found / "weights").read_text() == f"weights of {step}"


async def test_the_state_to_start_from_is_brought_to_the_child(
    platform: Platform, pictures: tuple[list[Path], list[Path]], small_base: Path, tmp_path: Path
) -> None:
    await platform.add_base_model(small_base)
    [key] = await stored_checkpoints(platform, tmp_path, 1)
    async with platform.worker("tells its start", module=FAKE):
        assignment = await platform.assignment(spec_of(), pictures)
        assignment.prepared.start_checkpoint.manifest_key = key
        platform.api.waiting.append(assignment)
        await platform.api.until(lambda: platform.api.kinds()[-1:] in (["trained"], ["failed"]))
    assert list(platform.api.last.trained.result.warnings)[1:] == ["weights: weights of 1"]


async def test_a_child_that_reaches_no_checkpoint_in_time_is_left_and_the_job_given_back(
    platform: Platform, pictures: tuple[list[Path], list[Path]], small_base: Path
) -> None:
    await platform.add_base_model(small_base)
    async with platform.worker("trains for ever", module=FAKE, grace_s=0.5) as worker:
        platform.api.waiting.append(await platform.assignment(spec_of(), pictures))
        await platform.api.until(lambda: len(platform.api.progress) > 2)
        worker.stopping.set()
        await platform.api.until(lambda: "yielded" in platform.api.kinds())
    assert platform.api.kinds() == ["training", "yielded"]
    assert worker.process.pid is None
