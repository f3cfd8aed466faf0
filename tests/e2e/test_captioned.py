"""Captioned training as an HTTP user meets it: pictures with captions in, a model and new pictures out."""

import io
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.e2e import running
from tests.e2e.running import Platform

EVERYDREAM = "everydream-v1"
EPOCHS = 3


@pytest.fixture(scope="module")
def quick(deep_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A platform with a base whose updates take milliseconds."""
    base = running.on_base(deep_model_dir, tmp_path_factory.mktemp("catalogue") / "models.toml")
    started = Platform(tmp_path_factory.mktemp("home"), base)
    started.start()
    yield started
    started.stop_and_check()


def png(width_px: int, height_px: int, colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width_px, height_px), colour).save(buffer, "PNG")
    return buffer.getvalue()


def opened(url: str) -> Image.Image:
    answer = httpx.get(url, timeout=15)
    assert answer.status_code == 200
    picture = Image.open(io.BytesIO(answer.content))
    picture.load()
    return picture


def bikes() -> bytes:
    """Three shapes, and a caption from each kind of place."""
    return running.zip_of(
        {
            "bikes/wide.png": png(320, 192, "red"),
            "bikes/wide.txt": b"a red bike, on a road",
            "bikes/tall.png": png(192, 320, "blue"),
            "bikes/tall.yaml": b"main_prompt: a blue bike\ntags: [in snow, at night]\n",
            "bikes/a green bike_1.png": png(256, 256, "green"),
        }
    )


def test_captioned_pictures_go_in_and_a_model_and_new_pictures_come_out(quick: Platform) -> None:
    asked = {
        "prompt": "a red bike in snow", "width": 256, "height": 128, "num_outputs": 2, "num_inference_steps": 4,
        "seed": 7, "passback": "bike-1",
    }  # fmt: skip
    train = {
        "max_epochs": EPOCHS, "resolution": 256, "lr": 1e-4, "shuffle_tags": True, "flip_p": 0.5,
        "sample_prompts": ["a blue bike"], "sample_steps": 6, "ckpt_every_n_minutes": 0,
    }  # fmt: skip
    with running.served({"bikes.zip": bikes()}) as url, running.receiver() as (hook, calls):
        given = {"train": train | {"data_url": f"{url}/bikes.zip"}, "inference": asked}
        job_id = quick.submit({"input": given, "webhook": hook}, "v1", EVERYDREAM)
        ended = quick.wait(job_id, endpoint=EVERYDREAM)
        _, told = calls.get(timeout=20)
    assert ended["status"] == "COMPLETED", f"{ended}\n{quick.logs()}"
    assert quick.status(job_id, "v1", EVERYDREAM)["input"] == given

    output = ended["output"]
    assert [picture["seed"] for picture in output["inference"]] == [7, 8]
    echoed = {"prompt", "width", "height", "num_inference_steps", "passback"}
    for picture in output["inference"]:
        assert {key: picture[key] for key in echoed} == {key: asked[key] for key in echoed}
        assert (picture["scheduler"], picture["guidance_scale"]) == ("K-LMS", 7.5)
    pictures = [opened(picture["image"]) for picture in output["inference"]]
    assert [picture.size for picture in pictures] == [(256, 128)] * 2
    assert pictures[0].tobytes() != pictures[1].tobytes()

    drawn_while_training = [opened(address) for address in output["train"]["samples"]]
    assert [picture.size for picture in drawn_while_training] == [(256, 256)] * 2
    assert [address.rpartition("/")[2] for address in output["train"]["samples"]] == [
        "preview-000006-1.png",
        "preview-000009-1.png",
    ]
    assert (told["status"], told["id"]) == ("COMPLETED", job_id)
    assert [picture["seed"] for picture in told["output"]["inference"]] == [7, 8]

    trained, base = quick.model("dev", job_id).manifest, quick.model("", "").manifest
    assert trained.lineage.steps == EPOCHS * 3, "each shape is a batch of its own"
    digests = {part.path: part.digest for part in base.components}
    for part in trained.components:
        if part.path in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
            assert part.digest != digests[part.path]


def test_data_that_cannot_be_used_is_told_by_the_callers_name(quick: Platform) -> None:
    with running.served({"empty.zip": running.zip_of({"notes.txt": b"nothing to see"})}) as url:
        job_id = quick.submit({"input": {"train": {"data_url": f"{url}/empty.zip"}}}, endpoint=EVERYDREAM)
        ended = quick.wait(job_id, endpoint=EVERYDREAM)
    assert ended["status"] == "FAILED"
    assert ended["error"].startswith("train.data_url: ")
    assert "no readable image" in ended["error"]
