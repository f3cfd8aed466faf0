"""`make demo`: the main job on this machine, from pictures to pictures, over HTTP.

Starts the embedded platform with data of its own, trains on the bundled robot, shows the progress, saves the pictures
to `out/`, and stops everything again. The archive is served on loopback by this process.
"""

import functools
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from services.cli.gateway_client import Gateway, GatewayError
from services.cli.show import save_pictures, show_progress

ROOT: Final = Path(__file__).resolve().parents[2]
EXAMPLES: Final = ROOT / "examples"
OUT: Final = Path("out")
HOME: Final = Path(".likeness") / "demo"
READY_TIMEOUT_S: Final = 120.0
STOP_TIMEOUT_S: Final = 30.0
ADDRESSES: Final = ("HTTP", "TRAINING", "INFERENCE", "STORAGE", "NATS", "NATS_MONITOR")

REQUEST_INPUT: Final = {
    "samples": [
        {"prompt": "sks robot on the beach", "seed": 11, "infer_steps": 20},
        {"prompt": "sks robot at night", "seed": 12, "infer_steps": 20, "scheduler": "DPMSolverMultistep"},
        {
            "prompt": "a drawing of sks robot in the snow",
            "seed": 13,
            "infer_steps": 20,
            "scheduler": "K_EULER",
        },
    ],
    "max_train_steps": 60,
    "learning_rate": 1e-4,
}
CONCEPT: Final = {
    "instance_prompt": "a photo of sks robot",
    "class_prompt": "a photo of a robot",
    "num_class_images": 4,
}


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        """Says nothing."""


@contextmanager
def served_examples() -> Iterator[str]:
    """Serves `examples/` on a free loopback port; gives the address of the archive."""
    handler = functools.partial(_Quiet, directory=str(EXAMPLES))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/robot.zip"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def running_platform() -> Iterator[Gateway]:
    """Runs the embedded platform on free ports; gives its gateway once everything serves."""
    ports = _free_ports(len(ADDRESSES))
    environment = dict(os.environ)
    for name, port in zip(ADDRESSES, ports, strict=True):
        environment[f"LIKENESS_{name}_ADDR"] = f"127.0.0.1:{port}"
    environment |= {"LIKENESS_HOME": str(HOME), "LIKENESS_EGRESS_ALLOW": "127.0.0.1/32"}
    process = subprocess.Popen(
        [sys.executable, "-m", "services.launcher"], env=environment, stdout=subprocess.DEVNULL
    )
    try:
        yield _ready_gateway(process, f"http://127.0.0.1:{ports[0]}")
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _ready_gateway(process: subprocess.Popen[bytes], url: str) -> Gateway:
    end = time.monotonic() + READY_TIMEOUT_S
    with Gateway(url) as probe:
        while not probe.is_ready():
            if process.poll() is not None:
                raise GatewayError(f"the platform stopped with status {process.returncode}; see {HOME}/logs")
            if time.monotonic() > end:
                raise GatewayError(
                    f"the platform was not ready within {READY_TIMEOUT_S:.0f} s; see {HOME}/logs"
                )
            time.sleep(0.2)
    return Gateway(url, (HOME / "api-key").read_text().strip())


def main() -> int:
    """Runs the demo.

    Returns:
        Exit status: 0 when the pictures are there.
    """
    console = Console()
    try:
        with served_examples() as archive:
            console.print("starting the platform (storage, trainer, inference, gateway, NATS) ...")
            with running_platform() as gateway, gateway:
                return _train_and_save(gateway, archive, console)
    except GatewayError as error:
        console.print(str(error), style="red", highlight=False)
        return 1


def _train_and_save(gateway: Gateway, archive: str, console: Console) -> int:
    console.print(f"training on five pictures of a robot: {EXAMPLES.relative_to(ROOT)}/robot")
    job_id = gateway.submit({"input": {"concepts": [CONCEPT | {"instance_data": archive}], **REQUEST_INPUT}})
    ended = show_progress(gateway.follow(job_id), console)
    if ended.status != "COMPLETED":
        console.print(f"the job ended {ended.status}: {ended.body.get('error', '')}", style="red")
        return 1
    for path in save_pictures(gateway, ended, OUT):
        console.print(f"  {path}")
    waited, worked = ended.body["delayTime"] / 1000, ended.body["executionTime"] / 1000
    console.print(f"waited {waited:.1f} s, worked {worked:.1f} s")
    console.print(
        "The embedded base model has random weights so far: these pictures are noise. They show that the whole way "
        "works, not what a trained base draws; name one with LIKENESS_BASE_MODEL and LIKENESS_MODELS."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
