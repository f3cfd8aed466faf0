"""A whole platform as a user starts it, on free ports, with the means to ask and to hurt it."""

import contextlib
import http.server
import io
import json
import queue
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
from likeness.storage.v1 import model_pb2, storage_service_pb2, storage_service_pb2_grpc

from services.launcher import platform as launcher

FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"}
PROGRAMS = {
    "nats",
    "storage",
    "trainer-api",
    "inference-api",
    "gateway",
    "trainer-worker",
    "inference-worker",
}
QUICK = {
    "LIKENESS_LEASE_S": "3",
    "LIKENESS_BEAT_S": "0.5",
    "LIKENESS_CHECKPOINT_S": "0.5",
    "LIKENESS_EGRESS_ALLOW": "127.0.0.1/32",
}
"""Settings that make faults show within seconds, and let the platform reach the test's own servers."""


def wait_until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Polls until something is true and returns it; fails with a sentence when it does not come."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {timeout_s:.0f} s")


class Platform(launcher.Platform):
    """The launcher and everything below it, with what a user of its HTTP side does."""

    def __init__(self, home: Path, environ: Mapping[str, str] | None = None) -> None:
        super().__init__(home, launcher.free_addresses() | QUICK | dict(environ or {}), free_ports=False)
        self.http = httpx.Client(base_url=self.url, timeout=15.0)

    def address(self, name: str) -> str:
        """gRPC address of TRAINING, INFERENCE or STORAGE."""
        return self.settings[f"LIKENESS_{name}_ADDR"]

    def is_ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return self.http.get("/readyz").status_code == 200
        return False

    def logs(self) -> str:
        """The end of every log, for the message of a failed test."""
        texts = [f"--- {path.name}\n{path.read_text()[-3000:]}" for path in self.home.glob("logs/*.log")]
        return "\n".join(texts)

    def child(self, name: str) -> psutil.Process:
        """A child of the launcher by its name."""
        return psutil.Process(self.pids()[name])

    def call(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        """An HTTP call with the development key."""
        return self.http.request(method, path, headers={"Authorization": f"Bearer {self.api_key}"}, **kwargs)

    def submit(
        self, request: Mapping[str, Any], version: str = "v2", endpoint: str = "dream-booth-v1"
    ) -> str:
        answer = self.call("POST", f"/{version}/{endpoint}/run", json=request)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def status(self, job_id: str, version: str = "v2", endpoint: str = "dream-booth-v1") -> dict[str, Any]:
        answer = self.call("GET", f"/{version}/{endpoint}/status/{job_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def wait(self, job_id: str, timeout_s: float = 120.0, endpoint: str = "dream-booth-v1") -> dict[str, Any]:
        """Polls until the job has ended, through refused connections; returns its last status."""
        last: dict[str, Any] = {}

        def ended() -> bool:
            nonlocal last
            with contextlib.suppress(httpx.HTTPError, AssertionError):
                last = self.status(job_id, endpoint=endpoint)
            return last.get("status") in FINAL

        try:
            wait_until(ended, timeout_s, f"the end of job {job_id}")
        except AssertionError as error:
            raise AssertionError(f"{error}; last seen: {last}\n{self.logs()}") from None
        return last

    def wait_for_stage(self, job_id: str, stage: str, step: int = 0, timeout_s: float = 90.0) -> None:
        """Polls until the job has reached a stage, or a step in it."""

        def reached() -> bool:
            body = self.status(job_id)
            assert body["status"] not in FINAL, f"the job ended before {stage}: {body}\n{self.logs()}"
            output = body.get("output")
            progress = output.get("progress", {}) if isinstance(output, dict) else {}
            return progress.get("stage") == stage and progress.get("step", 0) >= step

        wait_until(reached, timeout_s, f"stage {stage} of job {job_id}")

    def model(self, project: str, name: str) -> model_pb2.Model:
        """A model of the registry; the project of the development key is `dev`."""
        with grpc.insecure_channel(self.address("STORAGE")) as channel:
            stub = storage_service_pb2_grpc.StorageServiceStub(channel)
            request = storage_service_pb2.GetModelRequest(project_id=project, model=name)
            return stub.GetModel(request, timeout=10).model

    def stop_and_check(self) -> None:
        """Asks the launcher to stop, and proves that nothing is left."""
        family = psutil.Process(self.pid).children(recursive=True)
        self.http.close()
        assert self.stop() == 0
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive, f"left behind: {[process.cmdline() for process in alive]}"


@contextlib.contextmanager
def served(files: Mapping[str, bytes]) -> Iterator[str]:
    """Serves some files on loopback; gives the base URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = files.get(self.path.lstrip("/"))
            self.send_response(200 if body is not None else 404)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *args: Any) -> None:
            pass

    with _serving(Handler) as url:
        yield url


@contextlib.contextmanager
def receiver() -> Iterator[tuple[str, "queue.Queue[tuple[dict[str, str], dict[str, Any]]]"]]:
    """A webhook's other end; gives its URL and the calls as (headers, body)."""
    calls: queue.Queue[tuple[dict[str, str], dict[str, Any]]] = queue.Queue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            calls.put((dict(self.headers), json.loads(body)))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with _serving(Handler) as url:
        yield f"{url}/hook", calls


@contextlib.contextmanager
def _serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def on_base(model_folder: Path, catalogue: Path) -> dict[str, str]:
    """Settings with which a platform trains from a model folder instead of the embedded model.

    Args:
        model_folder: a diffusers folder.
        catalogue: file to write.
    """
    catalogue.write_text(f'[quick]\nsource = "file:{model_folder}"\n')
    return {"LIKENESS_MODELS": str(catalogue), "LIKENESS_BASE_MODEL": "quick"}


def zip_of(files: Mapping[str, bytes]) -> bytes:
    """A zip archive in memory."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def small_request(archive: str, **overrides: Any) -> dict[str, Any]:
    """A training of a few seconds: 256 px, few updates, two class pictures, one sample."""
    concept = {
        "instance_data": archive,
        "instance_prompt": "a photo of a sks robot",
        "class_prompt": "a robot",
        "num_class_images": 2,
    }
    body: dict[str, Any] = {
        "concepts": [concept],
        "samples": [{"prompt": "a sks robot on the beach", "seed": 7, "infer_steps": 4, "num_outputs": 2}],
        "max_train_steps": 12,
        "learning_rate": 1e-4,
        "resolution": 256,
    }
    return {"input": body | overrides}
