"""A whole platform as a user starts it, on free ports, with the means to hurt it."""

import contextlib
import http.server
import io
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
from likeness.storage.v1 import model_pb2, storage_service_pb2, storage_service_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"}
READY_TIMEOUT_S = 60.0
PORTS = ("HTTP", "TRAINING", "INFERENCE", "STORAGE", "NATS", "NATS_MONITOR")
COMMANDS = {
    "nats-server": "nats-server",
    "storage": "services.storage",
    "trainer api": "services.trainer api",
    "inference api": "services.inference api",
    "gateway": "services.gateway",
    "trainer worker": "services.trainer worker",
    "inference worker": "services.inference worker",
}
"""Name of each child of the launcher -> what its command line holds."""

QUICK = {"LIKENESS_LEASE_S": "3", "LIKENESS_BEAT_S": "0.5", "LIKENESS_CHECKPOINT_S": "0.5"}
"""Settings that make faults show within seconds."""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at this moment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Polls until something is true and returns it; fails with a sentence when it does not come."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {timeout_s:.0f} s")


@dataclass
class Platform:
    """The launcher and everything below it."""

    home: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes]
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=15.0)

    @property
    def url(self) -> str:
        return "http://" + self.environment["LIKENESS_HTTP_ADDR"]

    @property
    def key(self) -> str:
        return (self.home / "api-key").read_text().strip()

    def address(self, name: str) -> str:
        """gRPC address of TRAINING, INFERENCE or STORAGE."""
        return self.environment[f"LIKENESS_{name}_ADDR"]

    def is_ready(self) -> bool:
        assert self.process.poll() is None, f"the launcher ended: {self.logs()}"
        with contextlib.suppress(httpx.HTTPError):
            return self.http.get("/readyz").status_code == 200
        return False

    def logs(self) -> str:
        """The end of every log, for the message of a failed test."""
        texts = [f"--- {path.name}\n{path.read_text()[-3000:]}" for path in self.home.glob("logs/*.log")]
        return "\n".join(texts)

    def child(self, name: str) -> psutil.Process:
        """A child of the launcher by its name."""
        return wait_until(lambda: self._find(name), 15.0, f"a process '{name}'")

    def _find(self, name: str) -> psutil.Process | None:
        wanted = COMMANDS[name]
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self.process.pid).children():
                with contextlib.suppress(psutil.Error):
                    if wanted in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                        return process
        return None

    def kill(self, name: str) -> None:
        """kill -9 of one child."""
        self.child(name).send_signal(signal.SIGKILL)

    def call(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        """An HTTP call with the development key."""
        return self.http.request(method, path, headers={"Authorization": f"Bearer {self.key}"}, **kwargs)

    def submit(self, request: Mapping[str, Any], version: str = "v2") -> str:
        answer = self.call("POST", f"/{version}/dream-booth-v1/run", json=request)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def status(self, job_id: str, version: str = "v2") -> dict[str, Any]:
        answer = self.call("GET", f"/{version}/dream-booth-v1/status/{job_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def wait(self, job_id: str, timeout_s: float = 120.0) -> dict[str, Any]:
        """Polls until the job has ended, through refused connections; returns its last status."""
        last: dict[str, Any] = {}

        def ended() -> bool:
            nonlocal last
            with contextlib.suppress(httpx.HTTPError, AssertionError):
                last = self.status(job_id)
            return last.get("status") in FINAL

        try:
            wait_until(ended, timeout_s, f"the end of job {job_id}")
        except AssertionError as error:
            raise AssertionError(f"{error}; last seen: {last}\n{self.logs()}") from None
        return last

    def wait_for_stage(self, job_id: str, stage: str, step: int = 0, timeout_s: float = 90.0) -> None:
        """Polls until the job has reached a stage, or a step in it."""

        def reached() -> bool:
            try:
                body = self.status(job_id)
            except httpx.HTTPError:
                return False
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

    def stop(self) -> None:
        """Ctrl-C, and proof that nothing is left."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGINT)
        self.process.wait(40)
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive, f"left behind: {[process.cmdline() for process in alive]}"


def start(home: Path, **settings: str) -> Platform:
    """Starts a platform and waits until it is ready."""
    ports = free_ports(len(PORTS))
    environment = dict(os.environ)
    environment |= {
        f"LIKENESS_{name}_ADDR": f"127.0.0.1:{port}" for name, port in zip(PORTS, ports, strict=True)
    }
    environment |= {
        "LIKENESS_HOME": str(home),
        "LIKENESS_EGRESS_ALLOW": "127.0.0.1/32",
        "OMP_NUM_THREADS": "1",
    }
    environment |= settings
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "gen")])
    process = subprocess.Popen(
        [sys.executable, "-m", "services.launcher"], env=environment, stdout=subprocess.DEVNULL, cwd=ROOT
    )
    platform = Platform(home, environment, process)
    try:
        wait_until(platform.is_ready, READY_TIMEOUT_S, "readiness")
    except AssertionError as error:
        process.kill()
        raise AssertionError(f"{error}\n{platform.logs()}") from None
    return platform


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
        "instance_prompt": "a photo of sks robot",
        "class_prompt": "a photo of a robot",
        "num_class_images": 2,
    }
    body: dict[str, Any] = {
        "concepts": [concept],
        "samples": [{"prompt": "sks robot on the beach", "seed": 7, "infer_steps": 4, "num_outputs": 2}],
        "max_train_steps": 12,
        "learning_rate": 1e-4,
        "resolution": 256,
    }
    return {"input": body | overrides}
