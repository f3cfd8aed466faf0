"""What the confined process can no longer do. Each test confines a process of its own."""

import platform
import signal
import subprocess
import sys

import pytest

from services.storage.sandbox import SandboxLimits

FILTERED = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
PREAMBLE = """
import os, resource, socket, subprocess, sys
from services.storage.sandbox import SandboxLimits, allow_cpu_seconds, confine
pair = socket.socketpair()
print(confine(SandboxLimits(memory_bytes=1 << 30, file_bytes=1000)), flush=True)
def outcome(action):
    try:
        action()
    except BaseException as error:
        return type(error).__name__
    return "done"
"""


def confined(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + code], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    "action",
    [
        "socket.socket()",
        "socket.socket(socket.AF_UNIX)",
        "socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)",
        "socket.socketpair()",
        "socket.create_connection(('127.0.0.1', 1))",
        "os.execv('/bin/true', ['true'])",
        "subprocess.run(['/bin/true'])",
        "os.kill(os.getppid(), 0)",
    ],
)
def test_no_socket_no_program_no_signal_where_calls_are_filtered(action: str) -> None:
    result = confined(f"print(outcome(lambda: {action}))")
    filtered, outcome = result.stdout.split()
    assert filtered == str(FILTERED)
    assert (outcome == "PermissionError") is FILTERED


def test_link_to_the_parent_stays_usable() -> None:
    result = confined("pair[0].sendall(b'x'); print(pair[1].recv(1))")
    assert result.stdout.split() == [str(FILTERED), "b'x'"]


def test_memory_is_limited() -> None:
    result = confined("print(outcome(lambda: bytes(1 << 20)), outcome(lambda: bytearray(2 << 30)))")
    assert result.stdout.split()[1:] == ["done", "MemoryError"]


def test_files_are_limited_in_length(tmp_path: object) -> None:
    code = f"f = open({str(tmp_path)!r} + '/f', 'wb', 0)\nprint(f.write(bytes(1000)), outcome(lambda: f.write(b'x')))"
    assert confined(code).stdout.split()[1:] == ["1000", "OSError"]


def test_computing_time_is_limited() -> None:
    result = confined("allow_cpu_seconds(1)\nwhile True: pass")
    assert result.returncode == -signal.SIGXCPU


def test_defaults_leave_room_for_the_largest_picture() -> None:
    assert SandboxLimits().memory_bytes >= 3 * 4 * 100_000_000
