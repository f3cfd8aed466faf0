"""A handle on an embedded platform that runs as a process of its own, for the demo and the end-to-end tests."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from services.adapters.settings import LauncherSettings, load
from services.launcher.plan import EXAMPLE_ARCHIVE

ADDRESS_VARIABLES = (
    "LIKENESS_HTTP_ADDR",
    "LIKENESS_STORAGE_ADDR",
    "LIKENESS_TRAINING_ADDR",
    "LIKENESS_INFERENCE_ADDR",
    "LIKENESS_NATS_ADDR",
    "LIKENESS_NATS_MONITOR_ADDR",
)


class PlatformFailed(Exception):
    """The platform did not start, or ended; the text holds what it said."""


def free_addresses() -> dict[str, str]:
    """An address on a free port for each thing that listens, by its variable."""
    sockets = [socket.socket() for _ in ADDRESS_VARIABLES]
    try:
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        ports = [listener.getsockname()[1] for listener in sockets]
    finally:
        for listener in sockets:
            listener.close()
    return {name: f"127.0.0.1:{port}" for name, port in zip(ADDRESS_VARIABLES, ports, strict=True)}


class Platform:
    """Starts the launcher, waits until everything is ready, and stops it. A context manager."""

    def __init__(
        self,
        home: Path,
        environ: Mapping[str, str] | None = None,
        *,
        free_ports: bool = True,
        command: Sequence[str] = (sys.executable, "-m", "services.launcher"),
    ) -> None:
        """Prepares a platform; nothing runs before :meth:`start`.

        Args:
            home: its data folder; what an earlier run left there is used again.
            environ: `LIKENESS_` variables that differ from the defaults.
            command: what starts the launcher.
            free_ports: listen on free ports, the same ones at each start, instead of the default ones.
        """
        self.home = home
        self.settings = (free_addresses() if free_ports else {}) | dict(environ or {})
        self._command = command
        self._launcher: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Starts it."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops it."""
        self.stop()

    @property
    def url(self) -> str:
        """Where the gateway answers."""
        return "http://" + self.settings.get("LIKENESS_HTTP_ADDR", "127.0.0.1:8000")

    @property
    def api_key(self) -> str:
        """The development key."""
        return (self.home / "api-key").read_text().strip()

    @property
    def example_url(self) -> str:
        """An archive of pictures that the platform may fetch."""
        settings = load(LauncherSettings, self.settings)
        return f"http://{settings.examples_address}/{EXAMPLE_ARCHIVE}"

    @property
    def output(self) -> str:
        """What the launcher has said."""
        path = self.home / "launcher.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self, timeout_s: float = 180.0) -> None:
        """Starts the launcher and waits until the platform serves.

        Args:
            timeout_s: seconds to wait.

        Raises:
            PlatformFailed: it ended, or was not ready in time.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        reading, writing = os.pipe()
        try:
            with (self.home / "launcher.log").open("ab") as log:
                self._launcher = subprocess.Popen(
                    self._command,
                    env=self._environ(writing),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[writing],
                    start_new_session=True,
                )
            os.close(writing)
            self._await_ready(reading, timeout_s)
        finally:
            os.close(reading)

    def _environ(self, ready_fd: int) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("LIKENESS_")}
        own = {"LIKENESS_HOME": str(self.home), "LIKENESS_READY_FD": str(ready_fd)}
        return inherited | self.settings | own

    def _await_ready(self, reading: int, timeout_s: float) -> None:
        os.set_blocking(reading, False)
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            try:
                said = os.read(reading, 100)
            except BlockingIOError:
                time.sleep(0.05)
                continue
            if said:
                return
            break
        fault = "ended" if time.monotonic() < end else f"was not ready within {timeout_s:g} s"
        self.stop()
        raise PlatformFailed(f"the platform {fault}:\n{self.output[-4000:]}")

    @property
    def running(self) -> bool:
        """Whether the launcher runs."""
        return self._launcher is not None and self._launcher.poll() is None

    @property
    def pid(self) -> int:
        """Process id of the launcher."""
        if self._launcher is None:
            raise PlatformFailed("the platform was not started")
        return self._launcher.pid

    def pids(self) -> dict[str, int]:
        """Process ids of what runs now, by name; nothing while it is stopped."""
        try:
            state: dict[str, Any] = json.loads((self.home / "platform.json").read_text())
        except FileNotFoundError:
            return {}
        return {str(name): int(pid) for name, pid in state["pids"].items()}

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Sends a signal to one program; the launcher starts it again if that ends it.

        Args:
            name: for instance "trainer-worker" or "nats".
            number: the signal.

        Returns:
            The process id that was hit.
        """
        pid = self.pids()[name]
        os.kill(pid, number)
        return pid

    def wait_for_restart(self, name: str, old_pid: int, timeout_s: float = 30.0) -> int:
        """Waits until a program runs in another process; it may not be ready yet.

        Returns:
            The new process id.

        Raises:
            PlatformFailed: it did not come back in time.
        """
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            pid = self.pids().get(name, old_pid)
            if pid != old_pid:
                return pid
            time.sleep(0.05)
        raise PlatformFailed(f"{name} did not come back within {timeout_s:g} s")

    def kill_launcher(self) -> None:
        """Kills the launcher (SIGKILL); everything it started dies with it."""
        if self._launcher is not None:
            self._launcher.kill()
            self._launcher.wait()

    def stop(self, timeout_s: float = 60.0) -> int | None:
        """Stops everything: politely, and after a while not.

        Args:
            timeout_s: seconds before the launcher is killed.

        Returns:
            The launcher's exit status; None if it never ran.
        """
        if self._launcher is None:
            return None
        self._launcher.terminate()
        try:
            return self._launcher.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill_launcher()
            return self._launcher.returncode
