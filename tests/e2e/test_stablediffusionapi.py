"""The whole cycle of a client of stablediffusionapi.com: train from links, poll, draw, fetch, delete."""

import base64
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image, ImageOps

from services.gateway.dialects.sdapi.training import STATUSES
from tests.e2e import running
from tests.e2e.running import Platform

BASE = """
[{name}]
source = "file:{folder}"
native_size_px = 256
[{name}.training_defaults]
full_learning_rate = 1e-4
num_class_images = 2
"""


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory, deep_model_dir: Path) -> Iterator[Platform]:
    """A platform whose base is tiny."""
    catalogue = tmp_path_factory.mktemp("catalogue") / "models.toml"
    settings = running.on_base(deep_model_dir, catalogue) | {"LIKENESS_SDAPI_SYNC_WAIT_S": "0"}
    names = ("quick", "pocket")  # the second is what the sandbox trains on
    catalogue.write_text("".join(BASE.format(name=name, folder=deep_model_dir) for name in names))
    platform = Platform(tmp_path_factory.mktemp("home"), settings)
    platform.start()
    yield platform
    platform.stop_and_check()


@pytest.fixture(scope="module")
def links() -> Iterator[list[str]]:
    """Three pictures behind addresses."""
    files = {}
    for number in range(3):
        buffer = io.BytesIO()
        Image.radial_gradient("L").resize((300, 280)).convert("RGB").rotate(30 * number).save(buffer, "PNG")
        files[f"{number}.png"] = buffer.getvalue()
    with running.served(files) as url:
        yield [f"{url}/{name}" for name in files]


def post(platform: Platform, path: str, **body: Any) -> dict[str, Any]:
    answer = platform.http.post(path, json={"key": platform.api_key} | body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def wait_for_model(platform: Platform, path: str) -> list[str]:
    """The status words on the way to a model, each once."""
    words: list[str] = []
    end = time.monotonic() + 150
    while not words or words[-1] != "model_ready":
        body = post(platform, path)
        assert body["status"] == "success", (body, platform.logs())
        words += [body["messege"]] if body["messege"] not in words else []
        assert time.monotonic() < end, (body, platform.logs())
        time.sleep(0.1)
    return words


def fetch(platform: Platform, url: str) -> dict[str, Any]:
    """Asks at `fetch_result` until there are pictures."""
    end = time.monotonic() + 90
    while (body := post(platform, url))["status"] == "processing":
        assert time.monotonic() < end, (body, platform.logs())
        time.sleep(0.1)
    return body


def picture_of(url: str) -> Image.Image:
    answer = httpx.get(url, timeout=15)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    assert httpx.head(url, timeout=15).status_code == 200
    picture = Image.open(io.BytesIO(answer.content))
    picture.load()
    return picture


def text_of(picture: Image.Image) -> str:
    """A picture in base64."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_client_trains_draws_and_deletes(quick: Platform, links: list[str]) -> None:
    training: dict[str, Any] = {
        "instance_prompt": "photo of adhik person",
        "class_prompt": "photo of person",
        "base_model_id": "quick",
        "images": links,
        "seed": "0",
        "training_type": "men",
        "max_train_steps": "12",
    }
    with running.receiver() as (hook, calls):
        started = post(quick, "/api/v3/fine_tune", **training, webhook=hook)
        assert started["status"] == "success", started
        training_id = started["training_id"]
        words = wait_for_model(quick, f"/api/v3/fine_tune_status/{training_id}")
        told = [calls.get(timeout=20)[1] for _ in STATUSES]
    assert words == [word for word in STATUSES if word in words], "never backwards"
    assert [body["training_status"] for body in told] == list(STATUSES)
    assert {body["model_id"] for body in told} == {training_id}
    assert picture_of(told[-1]["test_image"]).size == (256, 256)
    assert post(quick, "/api/v3/finetune_list")["data"] == [training_id]

    drawing = {
        "model_id": training_id,
        "prompt": "photo of adhik person on the beach",
        "width": "64",
        "height": "64",
        "samples": "2",
        "num_inference_steps": "3",
        "seed": "7",
    }
    with running.receiver() as (hook, calls):
        asked = post(quick, "/api/v4/dreambooth", **drawing, track_id="order-17", webhook=hook)
        assert asked["status"] == "processing", asked
        done = fetch(quick, asked["fetch_result"])
        _, called = calls.get(timeout=20)
    assert (done["status"], done["output"]) == ("success", asked["future_links"])
    assert (called["status"], called["output"], called["track_id"]) == ("success", done["output"], "order-17")
    first, second = [picture_of(url) for url in done["output"]]
    assert first.size == second.size == (64, 64)
    assert first.tobytes() != second.tobytes()
    alone = post(quick, "/api/v3/dreambooth", **drawing | {"samples": 1, "seed": 8})
    [again] = fetch(quick, alone["fetch_result"])["output"]
    assert picture_of(again).tobytes() == second.tobytes(), "picture i is that of seed + i"

    half = Image.new("L", (64, 64))
    half.paste(255, (32, 0, 64, 64))
    repainting = drawing | {"samples": 1, "init_image": links[0], "mask_image": text_of(half)}
    [link] = fetch(quick, post(quick, "/api/v4/dreambooth/inpaint", **repainting)["fetch_result"])["output"]
    given = Image.open(io.BytesIO(httpx.get(links[0]).content))
    kept = ImageOps.fit(given, (64, 64), Image.Resampling.LANCZOS)
    painted, left, right = picture_of(link), (0, 0, 32, 64), (32, 0, 64, 64)
    assert painted.crop(left).tobytes() == kept.crop(left).tobytes(), "black is kept to the bit"
    assert painted.crop(right).tobytes() != kept.crop(right).tobytes()

    post(quick, f"/api/v3/finetune/delete/{training_id}")
    assert post(quick, "/api/v3/finetune_list")["data"] == []
    assert post(quick, "/api/v4/dreambooth", **drawing)["message"] == "Model id not found"


def test_adapters_and_the_sandbox_make_models_that_draw(quick: Platform, links: list[str]) -> None:
    common = {"instance_prompt": "photo of adhik person", "images": links, "max_train_steps": 3}
    lora = post(quick, "/api/v3/lora_fine_tune", **common, lora_type="lycoris", training_type="null")
    sandbox = post(quick, "/api/sandbox/v3/fine_tune", **common)
    doomed = post(quick, "/api/v3/fine_tune", **common)["training_id"]
    assert post(quick, f"/api/v3/cancle_training/{doomed}")["status"] == "success"
    for root, started in (("/api/v3", lora), ("/api/sandbox/v3", sandbox)):
        training_id = started["training_id"]
        wait_for_model(quick, f"{root}/fine_tune_status/{training_id}")
        drawing = {"model_id": training_id, "prompt": "a robot", "width": 64, "height": 64, "steps": 2}
        [link] = fetch(quick, post(quick, "/api/v4/dreambooth", **drawing)["fetch_result"])["output"]
        assert picture_of(link).size == (64, 64)
        if started is lora:
            added = drawing | {"model_id": "quick", "lora_model": training_id, "seed": 5}
            shown = [
                fetch(quick, post(quick, "/api/v4/dreambooth", **asked)["fetch_result"])["output"][0]
                for asked in (drawing | {"seed": 5}, added, added | {"lora_strength": "0"})
            ]
            own, worn, without = [picture_of(link).tobytes() for link in shown]
            assert own == worn, "a LoRA's model is its base with the LoRA"
            assert worn != without
    assert post(quick, f"/api/v3/fine_tune_status/{doomed}")["messege"] == "training_cancelled"


def test_a_training_from_links_that_hold_no_pictures_says_so(quick: Platform) -> None:
    with running.served({"page.html": b"<html>" * 100}) as url:
        started = post(
            quick, "/api/v3/fine_tune", instance_prompt="photo of adhik person", images=f"{url}/page.html"
        )
        path = f"/api/v3/fine_tune_status/{started['training_id']}"
        body = running.wait_until(
            lambda: (shown := post(quick, path))["status"] == "failed" and shown, 60, "the failure"
        )
    assert body["messege"] == "training_failed"
    assert "images" in body["data"]
    assert "\n" not in body["data"]
