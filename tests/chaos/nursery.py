"""A process that has loaded everything an attempt needs and makes one in a fork each time it is told to.

Loading the libraries takes seconds, a fork milliseconds. It takes orders as JSON lines and answers each, when the
fork has ended, with a line that says how: its exit status, negative for a signal.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Nursery:
    """The other side: starts the process, gives orders."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def attempt(self, order: Mapping[str, Any]) -> int:
        """Has one attempt made; returns its exit status, negative for a signal."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())


@contextmanager
def open_nursery() -> Iterator[Nursery]:
    """Starts the process and ends it with the block; it computes on one thread, as all bitwise tests do."""
    path = os.pathsep.join(sys.path)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.nursery"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    ) as process:
        yield Nursery(process)


def _in_fork(order: dict[str, Any]) -> int:
    from tests.chaos.attempt import make_attempt

    child = os.fork()
    if child == 0:
        try:
            make_attempt(order)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    """Make an attempt for each line."""
    import tests.chaos.attempt  # noqa: F401  what every fork then has in memory
    from services.diffusion.loading import quiet_libraries

    quiet_libraries()
    for line in sys.stdin:
        print(_in_fork(json.loads(line)), flush=True)
    # The libraries take seconds to be taken down, and there is nothing to save.
    os._exit(0)


if __name__ == "__main__":
    main()
