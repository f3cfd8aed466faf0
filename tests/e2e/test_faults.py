"""What users do not notice: processes that are killed, stopped, or left alone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e import running
from tests.e2e.running import Platform

DEV = "dev"
UPDATES = 300
WEIGHTS = ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")


@pytest.fixture(scope="module")
def quick_base(deep_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Settings for a base whose updates take milliseconds: what is killed here is long, and its pictures nothing."""
    return running.on_base(deep_model_dir, tmp_path_factory.mktemp("catalogue") / "models.toml")


@pytest.fixture(scope="module")
def hurt(quick_base: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A platform of its own for the tests that kill."""
    started = running.Platform(tmp_path_factory.mktemp("home"), quick_base)
    started.start()
    yield started
    started.stop_and_check()


def weights_of(platform: Platform, job_id: str) -> dict[str, str]:
    parts = platform.model(DEV, job_id).manifest.components
    return {part.path: part.digest for part in parts if part.path in WEIGHTS}


def test_a_killed_trainer_changes_no_bit_of_the_result(hurt: Platform, archive: str) -> None:
    request = running.small_request(archive, max_train_steps=UPDATES)
    undisturbed = hurt.submit(request)
    assert hurt.wait(undisturbed)["status"] == "COMPLETED"
    disturbed = hurt.submit(request)
    hurt.wait_for_stage(disturbed, "training", step=60)
    hurt.kill("trainer-worker")
    ended = hurt.wait(disturbed)
    assert ended["status"] == "COMPLETED", ended
    assert len(weights_of(hurt, disturbed)) == len(WEIGHTS)
    assert weights_of(hurt, disturbed) == weights_of(hurt, undisturbed)
    log = (hurt.home / "logs" / "trainer-worker.log").read_text()
    assert "resum" in log.lower(), "it must have gone on from a checkpoint"


@pytest.mark.parametrize("name", ["nats", "storage", "trainer-api", "inference-api", "gateway"])
def test_a_job_survives_the_death_of_any_process_in_training(hurt: Platform, archive: str, name: str) -> None:
    job_id = hurt.submit(running.small_request(archive, max_train_steps=UPDATES))
    hurt.wait_for_stage(job_id, "training", step=5)
    before = hurt.kill(name)
    ended = hurt.wait(job_id)
    assert ended["status"] == "COMPLETED", f"{ended}\n{hurt.logs()}"
    assert len(ended["output"]) == 2
    assert hurt.wait_for_restart(name, before) != before
    running.wait_until(hurt.is_ready, 30, "readiness after the kill")


def test_a_job_survives_the_death_of_the_inference_worker(hurt: Platform, archive: str) -> None:
    samples = [{"prompt": "sks robot", "seed": 3, "infer_steps": 150}]
    job_id = hurt.submit(running.small_request(archive, max_train_steps=2, samples=samples))
    hurt.wait_for_stage(job_id, "sampling")
    hurt.kill("inference-worker")
    ended = hurt.wait(job_id)
    assert ended["status"] == "COMPLETED", ended
    assert [image["seed"] for image in ended["output"]] == [3]


@pytest.mark.parametrize(("name", "stage"), [("trainer-api", "sampling"), ("trainer-worker", "training")])
def test_a_job_survives_that_a_process_is_asked_to_leave(
    hurt: Platform, archive: str, name: str, stage: str
) -> None:
    samples = [{"prompt": "sks robot", "seed": 3, "infer_steps": 150}]
    updates = UPDATES if stage == "training" else 2
    job_id = hurt.submit(running.small_request(archive, max_train_steps=updates, samples=samples))
    hurt.wait_for_stage(job_id, stage)
    leaving = hurt.child(name).pid
    os.kill(leaving, signal.SIGTERM)
    ended = hurt.wait(job_id)
    assert ended["status"] == "COMPLETED", f"{ended}\n{hurt.logs()}"
    assert [image["seed"] for image in ended["output"]] == [3]
    assert hurt.wait_for_restart(name, leaving) != leaving


def test_a_worker_that_slept_past_its_lease_never_becomes_visible(hurt: Platform, archive: str) -> None:
    job_id = hurt.submit(running.small_request(archive, max_train_steps=UPDATES))
    hurt.wait_for_stage(job_id, "training", step=5)
    sleeper = hurt.child("trainer-worker")
    family = [sleeper, *sleeper.children(recursive=True)]
    first = hurt.status(job_id)["workerId"]
    for process in family:
        process.send_signal(signal.SIGSTOP)
    second = subprocess.Popen(
        [sys.executable, "-m", "services.trainer", "worker"],
        env=os.environ | hurt.settings | {"LIKENESS_HOME": str(hurt.home / "second")},
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        ended = hurt.wait(job_id)
        assert ended["status"] == "COMPLETED", ended
        assert ended["workerId"] != first
        result = weights_of(hurt, job_id)
        for process in family:
            process.send_signal(signal.SIGCONT)
        time.sleep(4)
        assert hurt.status(job_id) | {"output": None} == ended | {"output": None}
        assert weights_of(hurt, job_id) == result
    finally:
        for process in family:
            if process.is_running():
                process.send_signal(signal.SIGCONT)
        second.terminate()
        assert second.wait(30) == 0, "a worker that is asked to leave leaves with status 0"


def test_a_killed_launcher_leaves_no_orphan_and_its_home_serves_again(
    tmp_path: Path, archive: str, quick_base: dict[str, str]
) -> None:
    platform = running.Platform(tmp_path, quick_base)
    platform.start()
    key = platform.api_key
    job_id = platform.submit(running.small_request(archive, max_train_steps=UPDATES))
    platform.wait_for_stage(job_id, "training", step=2)
    assert platform.pids().keys() >= running.PROGRAMS
    family = psutil.Process(platform.pid).children(recursive=True)
    platform.kill_launcher()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive, [process.cmdline() for process in alive]
    platform.start()
    try:
        assert platform.api_key == key
        assert platform.wait(job_id)["status"] == "COMPLETED"
    finally:
        platform.stop_and_check()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{platform.url}/healthz")
