"""What the embedded platform consists of: its programs, their order, their environment, the addresses they need."""

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from services.adapters.settings import PREFIX, LauncherSettings
from services.launcher import nats_server
from services.launcher.home import Home
from services.launcher.http_probe import get
from services.launcher.supervisor import Program

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
EXAMPLE_ARCHIVE = "robot.zip"
BUCKET_PREFIX = PREFIX + "S3_"
"""Begins the variables of the bucket, its keys among them, which storage alone gets."""


def program_environ(settings: LauncherSettings, home: Home, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of every service: the launcher's own, with what it decides written over it.

    Args:
        settings: the launcher's settings.
        home: the data folder.
        environ: the launcher's environment.

    Returns:
        Variables for a child; a service reads the ones it knows.
    """
    decided = {
        "HOME": str(home.path),
        "NATS_URL": settings.nats_url or f"nats://{settings.nats_addr}",
        "NATS_MONITOR_URL": (
            settings.nats_monitor_url if settings.nats_url else f"http://{settings.nats_monitor_addr}"
        ),
        "HTTP_ADDR": settings.http_addr,
        "STORAGE_ADDR": settings.storage_addr,
        "TRAINING_ADDR": settings.training_addr,
        "INFERENCE_ADDR": settings.inference_addr,
        "BASE_MODEL": settings.base_model,
        "GRACE_S": str(settings.grace_s),
    }
    own = PREFIX + "READY_FD"  # a number that means another file in a child
    inherited = {name: value for name, value in environ.items() if name != own}
    return inherited | {PREFIX + name: value for name, value in decided.items()}


def stages(settings: LauncherSettings, home: Home, environ: Mapping[str, str]) -> list[list[Program]]:
    """All programs, in the order of their dependencies.

    Args:
        settings: the launcher's settings.
        home: the data folder, locked.
        environ: the launcher's environment.

    Returns:
        Stages; each needs the ones before it.
    """
    bucket = {name: value for name, value in environ.items() if name.startswith(BUCKET_PREFIX)}
    environ = {name: value for name, value in environ.items() if name not in bucket}
    base = program_environ(settings, home, environ)
    # The bundled pictures are the one private address that the embedded storage may reach without being told.
    allowed = [str(network) for network in settings.egress_allow] + (
        [_examples_host(settings)] if has_examples() else []
    )
    for_storage = {
        **base,
        **bucket,
        "LIKENESS_BOOTSTRAP_KEY_FILE": str(home.api_key),
        "LIKENESS_EGRESS_ALLOW": ",".join(allowed),
    }
    ground = [] if settings.nats_url else [_nats(settings, home, environ)]
    if has_examples():
        ground.append(_examples(settings, environ))
    return [
        ground,
        [_service("storage", ["services.storage"], for_storage)],
        [
            _service("trainer-api", ["services.trainer", "api"], base),
            _service("inference-api", ["services.inference", "api"], base),
        ],
        [
            _service("trainer-worker", ["services.trainer", "worker"], base),
            _service("inference-worker", ["services.inference", "worker"], base),
            _gateway(settings, base),
        ],
    ]


def has_examples() -> bool:
    """Whether the example pictures are served: they lie in the source tree, and the address exists on Linux only."""
    return sys.platform == "linux" and (EXAMPLES / EXAMPLE_ARCHIVE).is_file()


def _examples_host(settings: LauncherSettings) -> str:
    return settings.examples_address.rpartition(":")[0]


def _service(name: str, module: list[str], environ: Mapping[str, str]) -> Program:
    command = [sys.executable, "-m", *module]
    return Program(name, command, environ, ready_variable="LIKENESS_READY_FD")


def _gateway(settings: LauncherSettings, environ: Mapping[str, str]) -> Program:
    async def probe() -> bool:
        return (await get(settings.http_addr, "/readyz"))[0] == 200

    return Program("gateway", [sys.executable, "-m", "services.gateway"], environ, probe=probe)


def _nats(settings: LauncherSettings, home: Home, environ: Mapping[str, str]) -> Program:
    home.nats_config.write_text(
        nats_server.configuration(settings.nats_addr, settings.nats_monitor_addr, home.streams)
    )

    async def probe() -> bool:
        return await nats_server.is_ready(settings.nats_monitor_addr)

    return Program("nats", [nats_server.binary(), "-c", str(home.nats_config)], environ, probe=probe)


def _examples(settings: LauncherSettings, environ: Mapping[str, str]) -> Program:
    host, _, port = settings.examples_address.rpartition(":")
    command = [sys.executable, "-m", "http.server", port, "--bind", host, "--directory", str(EXAMPLES)]

    async def probe() -> bool:
        return (await get(settings.examples_address, "/" + EXAMPLE_ARCHIVE))[0] == 200

    return Program("examples", command, environ, probe=probe)


def addresses(settings: LauncherSettings) -> dict[str, str]:
    """The addresses that the platform listens on, by the variable that sets them."""
    names = ["http_addr", "storage_addr", "training_addr", "inference_addr"]
    if not settings.nats_url:
        names += ["nats_addr", "nats_monitor_addr"]
    wanted = {PREFIX + name.upper(): getattr(settings, name) for name in names}
    if has_examples():
        wanted["LIKENESS_EXAMPLES_ADDR"] = settings.examples_address
    return wanted


def taken(wanted: Mapping[str, str]) -> list[str]:
    """Which addresses another process listens on.

    Args:
        wanted: addresses by variable.

    Returns:
        One sentence for each that cannot be used.
    """
    faults = []
    for variable, address in wanted.items():
        fault = _fault_of(address)
        if fault:
            faults.append(f"{address} ({variable}) {fault}")
    return faults


def _fault_of(address: str) -> str:
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, int(port)))
            listener.listen()
        except OSError as error:
            return (
                "is in use by another process"
                if error.errno == 98
                else f"cannot be used: {os.strerror(error.errno or 0)}"
            )
    return ""
