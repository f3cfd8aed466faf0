"""Confines the process that decodes users' files: memory, time, files, and no way to the network.

Only that process calls this, on itself, before it reads the first byte. What the platform offers is used: resource
limits everywhere, a seccomp filter on Linux (x86-64 and arm64). The filter needs no privileges. Sockets that are open
already, the link to the parent, stay usable; no new one can be made, and no other program started.
"""

import ctypes
import errno
import platform
import resource
import struct
import sys
from dataclasses import dataclass
from typing import Final

_PR_SET_SECCOMP: Final = 22
_PR_SET_NO_NEW_PRIVS: Final = 38
_SECCOMP_MODE_FILTER: Final = 2

# Classic BPF as seccomp(2) runs it: load a word of the call's data, compare, return a verdict.
_LOAD_WORD: Final = 0x20
_JUMP_IF_EQUAL: Final = 0x15
_JUMP_IF_AT_LEAST: Final = 0x35
_RETURN: Final = 0x06
_OFFSET_OF_NUMBER: Final = 0
_OFFSET_OF_ARCHITECTURE: Final = 4
_ALLOW: Final = 0x7FFF0000
_REFUSE: Final = 0x00050000 | errno.EPERM
_X32_CALLS: Final = 0x40000000

_ARCHITECTURES: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# socket connect accept bind listen socketpair fork vfork execve kill ptrace tkill accept4 process_vm_readv
# process_vm_writev bpf execveat userfaultfd pidfd_send_signal io_uring_setup; arm64 has no fork and no vfork.
_REFUSED_CALLS: Final = {
    "x86_64": (41, 42, 43, 49, 50, 53, 57, 58, 59, 62, 101, 200, 288, 310, 311, 321, 322, 323, 424, 425),
    "aarch64": (198, 203, 202, 200, 201, 199, 221, 129, 117, 130, 242, 270, 271, 280, 281, 282, 424, 425),
}


@dataclass(frozen=True, slots=True)
class SandboxLimits:
    """What the process may use.

    Attributes:
        memory_bytes: address space, the interpreter's own (about 0.3 GB) included.
        file_bytes: longest file it may write.
        open_files: files open at a time.
    """

    memory_bytes: int = 3 << 30
    file_bytes: int = 1 << 30
    open_files: int = 64


def confine(limits: SandboxLimits) -> bool:
    """Confines the calling process, for good.

    Args:
        limits: resource limits, lowered once and never raised again.

    Returns:
        Whether system calls are filtered too; False where the platform has no filter.
    """
    _lower(resource.RLIMIT_AS, limits.memory_bytes)
    _lower(resource.RLIMIT_FSIZE, limits.file_bytes)
    _lower(resource.RLIMIT_NOFILE, limits.open_files)
    _lower(resource.RLIMIT_CORE, 0)
    return sys.platform == "linux" and _filter_calls()


def allow_cpu_seconds(seconds: int) -> None:
    """Lets the process use so many more seconds of computing time; beyond them the kernel ends it.

    Args:
        seconds: from now on; at least 1.
    """
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used_s = int(usage.ru_utime + usage.ru_stime)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (used_s + 1 + seconds, hard))


def _lower(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (limit, limit))


def _filter_calls() -> bool:
    program = _program(platform.machine())
    if not program:
        return False
    instructions = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(instructions))
    pointer = ctypes.create_string_buffer(header, len(header))
    return _prctl(_PR_SET_NO_NEW_PRIVS, 1, 0) and _prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(pointer)
    )


def _program(machine: str) -> bytes:
    """The filter: another architecture's calls and the listed ones fail with EPERM, all others pass."""
    architecture = _ARCHITECTURES.get(machine)
    if architecture is None:
        return b""
    calls = _REFUSED_CALLS[machine]
    to_refusal = len(calls) + 1
    lines = [
        (_LOAD_WORD, 0, 0, _OFFSET_OF_ARCHITECTURE),
        (_JUMP_IF_EQUAL, 0, to_refusal + 2, architecture),
        (_LOAD_WORD, 0, 0, _OFFSET_OF_NUMBER),
        (_JUMP_IF_AT_LEAST, to_refusal, 0, _X32_CALLS),
    ]
    lines += [(_JUMP_IF_EQUAL, len(calls) - place, 0, call) for place, call in enumerate(calls)]
    lines += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def _prctl(option: int, first: int, second: int) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    return bool(libc.prctl(option, ctypes.c_ulong(first), ctypes.c_ulong(second), zero, zero) == 0)
