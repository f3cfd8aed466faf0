"""Starts a program that cannot outlive its parent: `python leash.py PARENT_PID PROGRAM ARGUMENTS...`.

It asks the kernel for SIGKILL at the parent's death (PR_SET_PDEATHSIG, kept by exec) and becomes the program. A
`preexec_fn` could do the same, but runs between fork and exec of a process that may have threads, where it can
deadlock. The kernel means the *thread* that forked: start such programs from a thread that lives as long as they.
Standard library only; run in isolation (`-I -S`) it adds about 15 ms.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1
PARENT_GONE = 76
"""Exit status of a leashed program whose parent died before the leash was tied."""


def leashed(*command: str) -> list[str]:
    """The command line that runs a command on a leash held by the calling process."""
    return [sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(os.getpid()), *command]


def _main(parent_pid: int, command: list[str]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent_pid:
        raise SystemExit(PARENT_GONE)
    os.execvp(command[0], command)


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2:])
