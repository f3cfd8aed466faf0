"""Versions of a model beside its training, and the life of a published state; with real and with fake children."""

import asyncio
import logging
from collections.abc import AsyncIterator
from ipaddress import IPv4Network
from pathlib import Path
from typing import cast

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from likeness.storage.v1.model_pb2 import Model
from likeness.training.v1 import training_job_pb2 as training
from PIL import Image
from safetensors.numpy import load_file

from services.adapters.storage_client import StorageClient
from services.domain.training_spec import resolve_training_spec
from services.jobs.worker_client import JobHandle
from services.trainer.checkpoint_uploads import CheckpointUploads
from services.trainer.version_uploads import BEGUN, version_id
from tests.integration.trainer.platform import PROJECT, WEIGHTS, Platform, open_platform

FAKE = "tests.integration.trainer.fake_child"
TEXT_ENCODER = "text_encoder/model.safetensors"


@pytest.fixture(autouse=True)
def single_threaded_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
async def platform(tmp_path: Path) -> AsyncIterator[Platform]:
    async with open_platform(tmp_path, reachable=(IPv4Network("127.0.0.1/32"),)) as opened:
        yield opened


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[list[Path], list[Path]]:
    path = tmp_path / "picture.png"
    Image.new("RGB", (24, 16), (40, 90, 9)).save(path)
    return [path], [path]


@pytest.fixture
async def fake_base(platform: Platform, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    for name in ("model_index.json", WEIGHTS, "vae/diffusion_pytorch_model.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"base {name}".encode())
    await platform.add_base_model(folder)


def spec_of(steps: int, **values: float) -> training.TrainingSpec:
    concept = training.Concept(instance_prompt="a photo of sks dog", class_prompt="a photo of a dog")
    concept.instance_data.dataset_key = concept.class_data.dataset_key = "given"
    asked = training.TrainingSpec(
        concepts=[concept], base_model="base", model_name="Rex", max_train_steps=steps, learning_rate=5e-4
    )
    spec = resolve_training_spec(asked)
    spec.resolution = 16
    for name, value in values.items():
        setattr(spec, name, value)
    return spec


async def ended(platform: Platform, count: int = 1) -> None:
    """Waits until so many jobs have had their last report."""
    ends = ("trained", "failed")
    await platform.api.until(lambda: sum(kind in ends for kind in platform.api.kinds()) == count)


async def weights_of(platform: Platform, model: Model, folder: Path) -> dict[str, bytes]:
    weights: dict[str, bytes] = {}
    for component in model.manifest.components:
        if component.path in (WEIGHTS, TEXT_ENCODER):
            path = folder / component.digest
            await platform.storage.download_blob(component.key, path)
            weights |= {f"{component.path}:{name}": t.tobytes() for name, t in load_file(path).items()}
    return weights


async def test_a_training_that_goes_on_from_an_imported_state_ends_with_the_bits_of_the_undisturbed_one(
    platform: Platform,
    pictures: tuple[list[Path], list[Path]],
    tiny_model_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    await platform.add_base_model(tiny_model_dir)
    steps, api = 2, platform.api
    async with platform.worker():
        spec = spec_of(steps, publish_every_minutes=1e-9, save_optimizer=True)
        api.waiting.append(await platform.assignment(spec, pictures))
        await ended(platform)
        [told] = [report.version for report in api.reports if report.HasField("version")]
        assert (told.model, told.step) == (version_id("job-1", 1), 1)
        version = await platform.storage.get_model(PROJECT, told.model)
        assert (version.manifest.lineage.job_id, version.manifest.lineage.steps) == ("job-1", 1)
        assert (version.manifest.base_model, version.display_name) == ("base", "Rex, after update 1")

        [state] = [export for export in version.manifest.exports if export.format == "checkpoint"]
        site = tmp_path / "site"
        site.mkdir()
        await platform.storage.download_blob(state.key, site / state.file_name)
        app = web.Application()
        app.router.add_static("/", site)
        async with TestServer(app, host="127.0.0.1") as server:
            address = str(server.make_url(f"/{state.file_name}"))
            imported = await platform.storage.import_model(PROJECT, address, base_model="base")
        assert imported.checkpoint.step == 1

        again = await platform.assignment(spec_of(steps), pictures, job="job-2")
        again.prepared.start_checkpoint.CopyFrom(imported.checkpoint)
        api.waiting.append(again)
        await ended(platform, 2)
    assert "training goes on from a checkpoint" in caplog.text, "it does not begin anew"
    assert api.last.trained.result.steps == steps
    assert list(api.last.trained.result.warnings) == ["a picture was skipped"]
    first, second = [await platform.storage.get_model(PROJECT, job) for job in ("job-1", "job-2")]
    whole = await weights_of(platform, first, tmp_path)
    assert await weights_of(platform, second, tmp_path) == whole
    assert await weights_of(platform, version, tmp_path) != whole


@pytest.mark.usefixtures("fake_base")
async def test_a_version_is_registered_while_its_training_goes_on(
    platform: Platform, pictures: tuple[list[Path], list[Path]]
) -> None:
    async with platform.worker("publishes", module=FAKE):
        platform.api.waiting.append(await platform.assignment(spec_of(9), pictures))
        await ended(platform)
    kinds = platform.api.kinds()
    assert sorted(kinds[1:3]) == ["checkpoint", "version"]
    assert [kinds[0], *kinds[3:]] == ["training", "uploading", "trained"]
    version = await platform.storage.get_model(PROJECT, "job-1-step-000003")
    [weights] = [component for component in version.manifest.components if component.path == WEIGHTS]
    assert await platform.storage.read_bytes(weights.key) == b"3"


@pytest.mark.usefixtures("fake_base")
async def test_a_version_that_cannot_be_made_is_told_and_ends_nothing(
    platform: Platform, pictures: tuple[list[Path], list[Path]]
) -> None:
    async with platform.worker("cannot publish", module=FAKE):
        platform.api.waiting.append(await platform.assignment(spec_of(9), pictures))
        await ended(platform)
    assert "version" not in platform.api.kinds()
    warnings = platform.api.last.trained.result.warnings
    assert warnings[-1] == "there is no version after 3 updates: it draws otherwise"


class Silent:
    """A job that takes reports."""

    project_id, job_id = PROJECT, "job-1"

    def __init__(self) -> None:
        self.manifest_key = ""

    async def checkpoint(self, key: str, step: int) -> None:
        self.manifest_key = key


async def stored_checkpoint(storage: StorageClient, folder: Path, begun: int) -> training.CheckpointRef:
    """Stores a checkpoint that knows of a version begun after so many updates."""

    async def known() -> dict[str, int]:
        return {BEGUN: begun}

    job = Silent()
    uploads = CheckpointUploads(storage, cast(JobHandle, job), folder / "upload", extra=known)
    (folder / "step-00000004").mkdir()
    (folder / "step-00000004" / "state.json").write_text("4")
    storing = asyncio.create_task(uploads.run())
    await uploads.add(folder / "step-00000004", 4)
    await uploads.drain()
    storing.cancel()
    return training.CheckpointRef(manifest_key=job.manifest_key, step=4)


@pytest.mark.usefixtures("fake_base")
@pytest.mark.parametrize("registered", [True, False])
async def test_the_next_attempt_is_told_whether_the_last_version_was_registered(
    registered: bool, platform: Platform, pictures: tuple[list[Path], list[Path]], tmp_path: Path
) -> None:
    checkpoint = await stored_checkpoint(platform.storage, tmp_path, begun=3)
    if registered:
        base = await platform.storage.get_model(PROJECT, "base")
        await platform.storage.register_model(PROJECT, version_id("job-1", 3), base.manifest)
    async with platform.worker("tells what is missing", module=FAKE):
        platform.api.waiting.append(await platform.assignment(spec_of(9), pictures, checkpoint=checkpoint))
        await ended(platform)
    assert platform.api.last.trained.result.warnings[-1] == str(not registered)
