"""The main job as an HTTP user meets it: pictures in, a model and new pictures out."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.e2e import running
from tests.e2e.running import Platform

DEV = "dev"
UPDATES = 80

SDK_SCRIPT = """
import json, sys
import runpod
runpod.api_key = sys.argv[1]
request = json.loads(sys.argv[2])
endpoint = runpod.Endpoint("dream-booth-v1")
job = endpoint.run(request)
first = job.status()
output = job.output(timeout=100)
doomed = endpoint.run(request)
doomed.cancel()
synchronous = endpoint.run_sync(request, timeout=100)
print(json.dumps({
    "first": first, "last": job.status(), "output": output, "cancelled": doomed.status(),
    "health": endpoint.health(), "run_sync": synchronous,
}))
"""


def open_picture(url: str) -> Image.Image:
    answer = httpx.get(url, timeout=15)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    picture = Image.open(io.BytesIO(answer.content))
    picture.load()
    return picture


def test_pictures_go_in_and_a_model_and_new_pictures_come_out(platform: Platform, archive: str) -> None:
    request = running.small_request(archive, max_train_steps=UPDATES)
    with running.receiver() as (hook, calls):
        began = time.monotonic()
        job_id = platform.submit(request | {"webhook": hook}, version="v1")
        assert platform.status(job_id, "v1")["status"] in ("IN_QUEUE", "IN_PROGRESS")
        seen: list[dict[str, Any]] = []
        while not seen or seen[-1]["status"] not in running.FINAL:
            seen.append(platform.status(job_id, "v1"))
            time.sleep(0.1)
            assert time.monotonic() - began < 120, platform.logs()
        wall_ms = (time.monotonic() - began) * 1000
        headers, told = calls.get(timeout=20)

    last = seen[-1]
    assert last["status"] == "COMPLETED", last
    assert last["input"] == request["input"]
    progress = [body["progress"] for body in seen if "progress" in body]
    steps = [part["step"] for part in progress if part["stage"] == "training"]
    assert len(set(steps)) > 2, "progress must move"
    assert steps == sorted(steps)
    assert {part["total_steps"] for part in progress if part["stage"] == "training" and part["step"]} == {
        UPDATES
    }

    assert last["delayTime"] >= 0
    assert last["executionTime"] > 0
    assert abs(last["delayTime"] + last["executionTime"] - wall_ms) < 3000, "the times must be true"
    assert last["workerId"]
    assert last["gpu"] == "0"

    assert [image["seed"] for image in last["output"]] == [7, 8]
    assert {image["prompt"] for image in last["output"]} == {"a sks robot on the beach"}
    pictures = [open_picture(image["image"]) for image in last["output"]]
    assert all(picture.size == (512, 512) for picture in pictures)
    assert pictures[0].tobytes() != pictures[1].tobytes()

    assert told["status"] == "COMPLETED"
    assert told["id"] == job_id
    assert told["webhook"] == hook
    assert [image["seed"] for image in told["output"]] == [7, 8]
    assert headers["X-Webhook-Id"].startswith(job_id)
    time.sleep(1.0)
    assert calls.empty(), "one call when the job has ended"

    trained, base = platform.model(DEV, job_id), platform.model("", "")
    assert base.model == "pocket"
    ours = {part.path: part for part in trained.manifest.components}
    theirs = {part.path: part for part in base.manifest.components}
    assert ours.keys() - {"training.json"} == theirs.keys()
    for path in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert ours[path].digest != theirs[path].digest
        assert ours[path].key.startswith(f"projects/{DEV}/")
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert ours[vae].key == theirs[vae].key
    assert trained.manifest.base_manifest_key == base.manifest_key
    assert trained.manifest.lineage.steps == UPDATES


def test_a_second_job_draws_no_class_picture_again(platform: Platform, archive: str) -> None:
    stage_of_runs = []
    for _ in range(2):
        job_id = platform.submit(running.small_request(archive, max_train_steps=2))
        stages = set()
        while (body := platform.status(job_id))["status"] not in running.FINAL:
            output = body.get("output") or {}
            stages.add(output.get("progress", {}).get("stage"))
            time.sleep(0.02)
        assert body["status"] == "COMPLETED", body
        stage_of_runs.append(stages)
    assert "class_images" not in stage_of_runs[1]


def test_the_unmodified_python_sdk_works(platform: Platform, archive: str) -> None:
    request = running.small_request(archive, max_train_steps=3)
    environment = os.environ | {"RUNPOD_ENDPOINT_BASE_URL": f"{platform.url}/v2"}
    done = subprocess.run(
        [sys.executable, "-c", SDK_SCRIPT, platform.api_key, json.dumps(request)],
        env=environment, capture_output=True, text=True, timeout=170, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + platform.logs()
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["first"] in ("IN_QUEUE", "IN_PROGRESS")
    assert told["last"] == "COMPLETED"
    assert told["cancelled"] == "CANCELLED"
    assert [image["seed"] for image in told["run_sync"]] == [7, 8]
    assert all(open_picture(image["image"]) for image in told["run_sync"])
    assert told["health"]["jobs"]["completed"] >= 2
    assert set(told["health"]["workers"]) >= {"idle", "running", "unhealthy"}


def test_the_command_line_trains_and_saves_the_pictures(
    platform: Platform, archive: str, tmp_path: Path
) -> None:
    words = [
        "--prompt",
        "a photo of a sks robot",
        "--class-prompt",
        "a robot",
        "--sample",
        "a sks robot at night",
    ]
    words += ["--steps", "2", "--resolution", "256", "--class-images", "1", "--out", str(tmp_path)]
    environment = os.environ | {"LIKENESS_URL": platform.url, "LIKENESS_HOME": str(platform.home)}
    done = subprocess.run(
        [sys.executable, "-m", "services.cli.main", "train", archive, *words],
        env=environment, capture_output=True, text=True, timeout=170, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr + platform.logs()
    [picture] = tmp_path.glob("*.png")
    with Image.open(picture) as opened:
        assert opened.size == (512, 512)
    assert str(picture) in done.stdout


def test_cancel_in_training_ends_the_job_and_frees_the_trainer(platform: Platform, archive: str) -> None:
    long = platform.submit(running.small_request(archive, max_train_steps=5000))
    platform.wait_for_stage(long, "training", step=2)
    cancelled = platform.call("POST", f"/v2/dream-booth-v1/cancel/{long}").json()
    assert cancelled["status"] == "CANCELLED"
    following = platform.submit(running.small_request(archive, max_train_steps=2))
    assert platform.wait(following)["status"] == "COMPLETED"
    assert platform.status(long)["status"] == "CANCELLED"


def stored_files(platform: Platform) -> set[str]:
    """Every file that the platform keeps, but for the job log and the logs for people."""
    kept = (path for path in platform.home.rglob("*") if path.is_file())
    ours = (str(path.relative_to(platform.home)) for path in kept)
    return {name for name in ours if not name.startswith(("nats", "logs"))}


class TestBadInput:
    """What is wrong with a request is said at once, in full; what shows later ends the job with one sentence."""

    @pytest.mark.parametrize("key", ["", "Bearer wrong", "Bearer"], ids=["none", "unknown", "empty"])
    def test_without_a_key_nothing_is_served(self, platform: Platform, key: str) -> None:
        headers = {"Authorization": key} if key else {}
        answer = platform.http.post("/v2/dream-booth-v1/run", json={"input": {}}, headers=headers)
        assert answer.status_code == 401
        assert answer.json() == {"error": "unauthorized"}

    def test_what_is_not_json_is_refused(self, platform: Platform) -> None:
        answer = platform.call("POST", "/v2/dream-booth-v1/run", content=b"{nonsense")
        assert answer.status_code == 400
        assert "error" in answer.json()

    def test_every_fault_is_named_at_once(self, platform: Platform) -> None:
        body = {"samples": [{"prompt": 5, "num_outputs": 11}], "learning_rate": "fast", "resolution": 100}
        answer = platform.call("POST", "/v2/dream-booth-v1/run", json={"input": body})
        assert answer.status_code == 400
        details = " ".join(answer.json()["details"])
        for field in (
            "concepts",
            "samples[0].prompt",
            "samples[0].num_outputs",
            "learning_rate",
            "resolution",
        ):
            assert field in details

    def test_an_unknown_job_is_not_found(self, platform: Platform) -> None:
        answer = platform.call("GET", "/v2/dream-booth-v1/status/00000000-0000-4000-8000-000000000000")
        assert answer.status_code == 404
        assert answer.json() == {"error": "job not found"}

    @pytest.mark.parametrize(
        ("file", "said"),
        [
            ("missing.zip", "404"),
            ("text.zip", "not a zip"),
            ("empty.zip", "no readable image"),
            ("http://127.0.0.1:1/x.zip", "instance_data"),
            ("http://10.1.2.3/x.zip", "private"),
            ("http://[::ffff:169.254.169.254]/x.zip", "instance_data"),
        ],
        ids=["absent", "not a zip", "without images", "unreachable", "private", "metadata service"],
    )
    def test_unusable_data_fails_with_one_sentence_and_leaves_nothing(
        self, platform: Platform, file: str, said: str
    ) -> None:
        files = {"text.zip": b"x" * 100_000, "empty.zip": running.zip_of({"notes.txt": b"nothing to see"})}
        before = stored_files(platform)
        with running.served(files) as url:
            address = file if file.startswith("http") else f"{url}/{file}"
            body = platform.wait(platform.submit(running.small_request(address)))
        assert body["status"] == "FAILED"
        assert body["error"].startswith("concepts[0].instance_data")
        assert said in body["error"]
        assert "\n" not in body["error"]
        assert "Traceback" not in body["error"]
        assert stored_files(platform) - before == set()
