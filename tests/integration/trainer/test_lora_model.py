"""A LoRA from its training to a picture: registered by a real worker, drawn with by a real child."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from likeness.storage.v1.model_pb2 import ModelFormat
from likeness.training.v1 import training_job_pb2 as training
from PIL import Image

from services.diffusion.lora_files import read_lora
from tests.integration.trainer.platform import PROJECT, Platform, open_platform
from tests.integration.trainer.test_single_file_base import drawn
from tests.integration.trainer.test_worker import spec_of
from tests.single_file_folder import write_single_file_folder


@pytest.fixture(autouse=True)
def single_threaded_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny tensors gain nothing from threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def bases(sd1_model_dir: Path, tmp_path: Path) -> str:
    single = write_single_file_folder(sd1_model_dir, tmp_path / "single")
    return (
        f'[folder]\nsource = "file:{sd1_model_dir}"\nlicense = "mit"\n'
        f'[one-file]\nsource = "file:{single}/model.safetensors"\nconfig = "file:{single}/config"\n'
    )


@pytest.fixture
async def platform(bases: str, tmp_path: Path) -> AsyncIterator[Platform]:
    catalogue = tmp_path / "models.toml"
    catalogue.write_text(bases)
    async with open_platform(tmp_path, catalogue) as opened:
        yield opened


@pytest.mark.parametrize("base", ["folder", "one-file"])
async def test_a_lora_is_its_base_and_a_small_file_and_is_drawn_with(
    base: str, platform: Platform, tmp_path: Path
) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for number, path in enumerate(paths):
        Image.new("RGB", (16, 16), (90 * number, 40, 200)).save(path)
    model = await platform.storage.get_model(PROJECT, base)
    platform.base_manifest_key = model.manifest_key
    spec = spec_of(max_train_steps=3)
    spec.base_model, spec.method, spec.learning_rate = base, training.TRAINING_METHOD_LORA, 0.1
    spec.lora.CopyFrom(training.LoraSettings(rank=2, alpha=4))
    async with platform.worker():
        platform.api.waiting.append(await platform.assignment(spec, (paths[:1], paths[1:])))
        await platform.api.until(lambda: platform.api.kinds()[-1:] in (["trained"], ["failed"]))
    assert platform.api.kinds()[-1] == "trained", platform.api.last

    manifest = (await platform.storage.get_model(PROJECT, "job-1")).manifest
    assert manifest.format == ModelFormat.MODEL_FORMAT_LORA
    lent = {component.path: component.key for component in model.manifest.components}
    own = {component.path: component for component in manifest.components if component.path not in lent}
    assert lent.items() <= {component.path: component.key for component in manifest.components}.items()
    place = "" if base == "folder" else "config/"
    adapters = [f"{place}{part}/lora-000.safetensors" for part in ("text_encoder", "unet")]
    assert sorted(own) == sorted([*adapters, "training.json"])
    assert own[adapters[0]].digest == own[adapters[1]].digest, "one blob"

    exports = {export.format: export for export in manifest.exports}
    assert set(exports) == {"lora_diffusers", "lora_kohya"}
    assert exports["lora_diffusers"].key == own[adapters[0]].key
    copies = []
    for export in exports.values():
        copies.append(tmp_path / export.file_name)
        await platform.storage.download_blob(export.key, copies[-1])
        assert copies[-1].stat().st_size == export.size_bytes
    one, other = map(read_lora, copies)
    assert one.modules.keys() == other.modules.keys()
    for weights in (one, other):
        assert weights.metadata.get("modelspec.license") == ("mit" if base == "folder" else None)

    before, after = await drawn(platform, tmp_path, base, "job-1")
    assert before.startswith(b"\x89PNG")
    assert after.startswith(b"\x89PNG")
    assert before != after
