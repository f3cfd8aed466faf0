"""A base model that is one file: imported by a real storage server, drawn with and trained from by real children."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
from likeness.inference.v1 import generation_job_pb2 as inference
from likeness.storage.v1.model_pb2 import ModelFormat, ModelManifest
from PIL import Image
from safetensors.numpy import load_file

from services.adapters.blob_cache import BlobCache
from services.domain.artifacts import project_of_key
from services.domain.generation_spec import resolve_generation_spec
from services.inference.device_process import DeviceProcess, Event
from services.inference.worker import ModelShelf, draw_command
from tests.integration.trainer.platform import PROJECT, WEIGHTS, Platform, open_platform
from tests.integration.trainer.test_worker import spec_of
from tests.single_file_folder import write_single_file_folder

TEXT_WEIGHTS = "text_encoder/model.safetensors"
VAE_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def single_threaded_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny tensors gain nothing from threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
async def platform(sd1_model_dir: Path, tmp_path: Path) -> AsyncIterator[Platform]:
    made = write_single_file_folder(sd1_model_dir, tmp_path / "single")
    catalogue = tmp_path / "models.toml"
    catalogue.write_text(
        f'[one-file]\nsource = "file:{made}/model.safetensors"\nconfig = "file:{made}/config"\n'
    )
    async with open_platform(tmp_path, catalogue) as opened:
        yield opened


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[list[Path], list[Path]]:
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for number, path in enumerate(paths):
        Image.new("RGB", (16, 16), (90 * number, 40, 200)).save(path)
    return paths[:1], paths[1:]


async def drawn(platform: Platform, folder: Path, *models: str) -> list[bytes]:
    """One picture of each model, by one child."""
    spec = inference.GenerationSpec(prompt="a robot", num_inference_steps=2, seed=3)
    cache = BlobCache(folder / "drawing-cache", 10**9)
    images = []
    async with DeviceProcess("--device=cpu") as device:
        shelf = ModelShelf(platform.storage, cache, device)
        for name in models:
            target = folder / f"drawn-{name}"
            target.mkdir()
            async with shelf.borrowed(PROJECT, name) as model:
                command = draw_command(resolve_generation_spec(spec), model, str(target))
                async with aclosing(device.draw(name, command)) as events:
                    told: list[Event] = [event async for event in events]
            assert told[-1]["event"] == "finished", told[-1]
            images.append((target / "0").read_bytes())
    cache.close()
    return images


async def trained(
    platform: Platform, pictures: tuple[list[Path], list[Path]], *, train_text_encoder: bool
) -> ModelManifest:
    base = await platform.storage.get_model(PROJECT, "one-file")
    assert base.manifest.format == ModelFormat.MODEL_FORMAT_SINGLE_FILE
    platform.base_manifest_key = base.manifest_key
    spec = spec_of(max_train_steps=2)
    spec.base_model, spec.train_text_encoder, spec.save_full_precision = "one-file", train_text_encoder, True
    async with platform.worker():
        platform.api.waiting.append(await platform.assignment(spec, pictures))
        await platform.api.until(lambda: platform.api.kinds()[-1:] in (["trained"], ["failed"]))
    assert platform.api.kinds()[-1] == "trained", platform.api.last
    return (await platform.storage.get_model(PROJECT, "job-1")).manifest


async def test_a_single_file_is_drawn_with_and_its_fine_tune_is_a_diffusers_folder(
    platform: Platform, pictures: tuple[list[Path], list[Path]], sd1_model_dir: Path, tmp_path: Path
) -> None:
    manifest = await trained(platform, pictures, train_text_encoder=True)
    before, after = await drawn(platform, tmp_path, "one-file", "job-1")
    assert before.startswith(b"\x89PNG")
    assert after.startswith(b"\x89PNG")

    assert manifest.format == ModelFormat.MODEL_FORMAT_DIFFUSERS
    keys = {component.path: component.key for component in manifest.components}
    folder_files = {
        path.relative_to(sd1_model_dir).as_posix() for path in sd1_model_dir.rglob("*") if path.is_file()
    }
    assert keys.keys() == folder_files | {"training.json"}
    base = (await platform.storage.get_model(PROJECT, "one-file")).manifest
    lent = {component.key for component in base.components}
    shared = {path for path in keys if path.startswith(("tokenizer/", "scheduler/"))}
    assert {keys[path] for path in shared} <= lent
    assert {project_of_key(keys[path]) for path in (WEIGHTS, TEXT_WEIGHTS, VAE_WEIGHTS)} == {PROJECT}
    by_digest = {component.digest: component.key for component in base.components}
    for component in manifest.components:
        assert component.key == by_digest.get(component.digest, component.key)


async def test_the_fine_tune_of_a_single_file_opens_with_diffusers(
    platform: Platform, pictures: tuple[list[Path], list[Path]], tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    await trained(platform, pictures, train_text_encoder=True)
    cache = BlobCache(tmp_path / "opening", 10**9)
    model = await cache.fetch_model(platform.storage, await platform.storage.get_model(PROJECT, "job-1"))
    pipeline = StableDiffusionPipeline.from_pretrained(model.folder, local_files_only=True)
    assert (pipeline.safety_checker, pipeline.vae.config.latent_channels) == (None, 4)
    cache.close()


async def test_frozen_parts_of_a_single_file_are_exported_as_they_are(
    platform: Platform, pictures: tuple[list[Path], list[Path]], sd1_model_dir: Path, tmp_path: Path
) -> None:
    manifest = await trained(platform, pictures, train_text_encoder=False)
    keys = {component.path: component.key for component in manifest.components}

    async def is_as_before(path: str) -> bool:
        copy = tmp_path / path.replace("/", "-")
        await platform.storage.download_blob(keys[path], copy)
        now, before = load_file(copy), load_file(sd1_model_dir / path)
        return now.keys() == before.keys() and all((now[name] == before[name]).all() for name in now)

    assert await is_as_before(VAE_WEIGHTS)
    assert await is_as_before(TEXT_WEIGHTS)
    assert not await is_as_before(WEIGHTS)
