"""Pictures drawn while training, from the child into storage, over two attempts of one job."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from likeness.training.v1 import training_job_pb2 as training
from PIL import Image

from services.domain.training_spec import resolve_training_spec
from services.trainer.preview_uploads import from_document
from tests.integration.trainer.platform import WEIGHTS, Platform, open_platform

FAKE = "tests.integration.trainer.fake_child"
PROMPTS = ("a photo of sks dog", "sks dog on the moon")


@pytest.fixture(autouse=True)
def single_threaded_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
async def platform(tmp_path: Path) -> AsyncIterator[Platform]:
    async with open_platform(tmp_path) as opened:
        yield opened


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[list[Path], list[Path]]:
    path = tmp_path / "picture.png"
    Image.new("RGB", (24, 16), (40, 90, 9)).save(path)
    return [path], [path]


def spec_of(max_train_steps: int, preview_steps: int) -> training.TrainingSpec:
    concept = training.Concept(instance_prompt="a photo of sks dog", class_prompt="a photo of a dog")
    concept.instance_data.dataset_key = concept.class_data.dataset_key = "given"
    asked = training.TrainingSpec(
        concepts=[concept],
        base_model="base",
        max_train_steps=max_train_steps,
        preview_prompts=PROMPTS,
        preview_steps=preview_steps,
    )
    spec = resolve_training_spec(asked)
    spec.resolution = 16
    return spec


async def test_previews_of_all_attempts_are_stored_reported_and_listed(
    platform: Platform, pictures: tuple[list[Path], list[Path]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    await platform.add_base_model(tiny_model_dir)
    spec, api = spec_of(max_train_steps=20, preview_steps=8), platform.api
    async with platform.worker() as worker:
        api.waiting.append(await platform.assignment(spec, pictures))
        await api.until(lambda: "previews" in api.kinds())
        worker.stopping.set()
        await api.until(lambda: "yielded" in api.kinds())
    checkpoint = [report.checkpoint.checkpoint for report in api.reports if report.HasField("checkpoint")][-1]
    told = len(api.reports)
    async with platform.worker():
        api.waiting.append(await platform.assignment(spec, pictures, checkpoint=checkpoint))
        await api.until(lambda: api.kinds()[-1] in ("trained", "failed"))
    result = api.last.trained.result
    assert not result.previews, "the list may be long: it is a document"
    previews = from_document(await platform.storage.read_document(result.previews_key))
    assert [(preview.step, preview.prompt_index) for preview in previews] == [
        (step, prompt) for step in (8, 16, 20) for prompt in (0, 1)
    ]
    reported = {preview.name for report in api.reports for preview in report.previews.previews}
    assert reported == {preview.name for preview in previews}
    again = [preview.step for report in api.reports[told:] for preview in report.previews.previews]
    assert min(again) >= checkpoint.step, "what was drawn before the checkpoint is not drawn again"
    for preview in previews:
        await platform.storage.download_blob(preview.image.key, tmp_path / preview.name)
        with Image.open(tmp_path / preview.name) as picture:
            assert picture.size == (preview.image.width_px, preview.image.height_px) == (16, 16)
        assert (preview.image.seed, preview.image.media_type) == (1337, "image/png")


async def test_a_preview_that_cannot_be_stored_does_not_end_the_training(
    platform: Platform, pictures: tuple[list[Path], list[Path]], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    for name in ("model_index.json", WEIGHTS, "vae/diffusion_pytorch_model.safetensors"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(f"base {name}".encode())
    await platform.add_base_model(base)
    async with platform.worker("tells of a preview that is not there", module=FAKE):
        platform.api.waiting.append(await platform.assignment(spec_of(12, 3), pictures))
        await platform.api.until(lambda: platform.api.kinds()[-1:] in (["trained"], ["failed"]))
    assert platform.api.kinds() == ["training", "uploading", "trained"]
    assert platform.api.last.trained.result.previews_key == ""
