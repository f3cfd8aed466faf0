import shutil
from pathlib import Path

import pytest
import torch

from services.domain.errors import BadInput
from services.inference import model_cache
from services.inference.model_cache import ModelCache, ModelFiles
from tests.unit.inference.conftest import model_of

PLENTY = 1 << 40


def files_of(folder: Path, name: str, **parts: str) -> ModelFiles:
    model = model_of(folder, name, **parts)
    return ModelFiles(name, folder, model["parts"])


def cache_of(budget_bytes: int) -> ModelCache:
    return ModelCache(budget_bytes, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def model_bytes(tiny_model_dir: Path) -> int:
    cache = cache_of(PLENTY)
    cache.acquire(files_of(tiny_model_dir, "m"))
    return cache.used_bytes


def test_model_is_loaded_once(tiny_model_dir: Path) -> None:
    cache = cache_of(PLENTY)
    first = cache.acquire(files_of(tiny_model_dir, "m"))
    assert cache.acquire(files_of(tiny_model_dir, "m")) is first


def test_size_is_that_of_the_weights(tiny_model_dir: Path, model_bytes: int) -> None:
    weights = sum(path.stat().st_size for path in tiny_model_dir.rglob("*.safetensors"))
    assert model_bytes == pytest.approx(weights, rel=0.05)


def test_fine_tune_shares_the_parts_it_did_not_change(tiny_model_dir: Path, model_bytes: int) -> None:
    cache = cache_of(PLENTY)
    base = cache.acquire(files_of(tiny_model_dir, "base"))
    tuned = cache.acquire(files_of(tiny_model_dir, "tuned", vae="basevae", text_encoder="basetext_encoder"))
    assert tuned.vae is base.vae
    assert tuned.text_encoder is base.text_encoder
    assert tuned.unet is not base.unet
    assert cache.used_bytes < 2 * model_bytes


def test_models_that_are_loras_of_one_base_share_all_of_it_and_are_not_kept_without_end(
    tiny_model_dir: Path, model_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_cache, "MAX_MODELS", 2)
    cache = cache_of(PLENTY)
    shared = {part: f"base{part}" for part in ("unet", "vae", "text_encoder", "tokenizer")}
    base = cache.acquire(files_of(tiny_model_dir, "base"))
    cache.release("base")
    for name in ("rex", "noir"):
        adapted = cache.acquire(files_of(tiny_model_dir, name, **shared))
        cache.release(name)
        assert (adapted.unet, adapted.tokenizer) == (base.unet, base.tokenizer)
    assert cache.held == ["rex", "noir"]
    assert cache.used_bytes == model_bytes


def test_shared_part_stays_until_its_last_model_leaves(tiny_model_dir: Path) -> None:
    cache = cache_of(PLENTY)
    cache.acquire(files_of(tiny_model_dir, "base"))
    tuned = cache.acquire(files_of(tiny_model_dir, "tuned", vae="basevae"))
    for name in ("base", "tuned"):
        cache.release(name)
    assert cache.evict("base")
    again = cache.acquire(files_of(tiny_model_dir, "third", vae="basevae"))
    assert again.vae is tuned.vae
    cache.release("third")
    assert cache.evict("third")
    assert cache.evict("tuned")
    assert cache.used_bytes == 0


def test_least_recently_used_model_leaves_first(tiny_model_dir: Path, model_bytes: int) -> None:
    cache = cache_of(2 * model_bytes)
    for name in ("one", "two"):
        cache.acquire(files_of(tiny_model_dir, name))
        cache.release(name)
    cache.acquire(files_of(tiny_model_dir, "one"))
    cache.release("one")
    cache.acquire(files_of(tiny_model_dir, "three"))
    assert cache.held == ["one", "three"]


def test_model_in_use_stays_even_above_the_budget(tiny_model_dir: Path, model_bytes: int) -> None:
    cache = cache_of(model_bytes)
    cache.acquire(files_of(tiny_model_dir, "one"))
    cache.acquire(files_of(tiny_model_dir, "two"))
    assert cache.held == ["one", "two"]
    assert not cache.evict("one")
    cache.release("one")
    assert cache.held == ["two"]


def test_damaged_model_leaves_nothing_behind(tiny_model_dir: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny_model_dir, tmp_path / "broken"))
    shutil.rmtree(broken / "text_encoder")
    cache = cache_of(PLENTY)
    with pytest.raises(BadInput):
        cache.acquire(files_of(broken, "broken"))
    assert (cache.held, cache.used_bytes) == ([], 0)


def test_full_device_is_emptied_of_idle_models_for_a_new_one(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.diffusion.loading import ModelFolder

    cache = cache_of(PLENTY)
    cache.acquire(files_of(tiny_model_dir, "idle"))
    cache.release("idle")
    real = ModelFolder.load_unet

    def only_when_empty(folder: ModelFolder) -> object:
        if cache.held:
            raise torch.OutOfMemoryError("out of memory")
        return real(folder)

    monkeypatch.setattr(ModelFolder, "load_unet", only_when_empty)
    cache.acquire(files_of(tiny_model_dir, "new"))
    assert cache.held == ["new"]
