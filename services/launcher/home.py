"""The data folder of one embedded platform: who uses it, where things lie, what runs."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InUse(Exception):
    """Another launcher runs on this folder."""


class Home:
    """A data folder, locked by one launcher at a time."""

    def __init__(self, path: Path) -> None:
        """Names the folder; nothing is made before :meth:`locked`.

        Args:
            path: the folder, relative to the working directory or absolute.
        """
        self.path = path.resolve()
        self.logs = self.path / "logs"
        self.streams = self.path / "nats"
        self.nats_config = self.path / "nats-server.conf"
        self.api_key = self.path / "api-key"
        self.state = self.path / "platform.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for this process; the kernel gives it back when the process ends, however it ends.

        Raises:
            InUse: another process has it.
        """
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self.path / "lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read().strip()
                raise InUse(f"{self.path} is in use by another launcher (process {holder})") from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            self.clear_state()
            yield

    def write_state(self, url: str, pids: dict[str, int]) -> None:
        """Says what runs, for those who want to look at it or disturb it.

        Args:
            url: where the gateway answers.
            pids: process ids by name.
        """
        text = json.dumps({"launcher": os.getpid(), "url": url, "pids": pids}, indent=2)
        waiting = self.state.with_suffix(".new")
        waiting.write_text(text + "\n")
        waiting.replace(self.state)

    def clear_state(self) -> None:
        """Says that nothing runs."""
        self.state.unlink(missing_ok=True)
