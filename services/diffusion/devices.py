"""Which device and precision models run on, and how a device that is too small is recognised."""

import os

import torch

from services.domain.errors import InvalidSpec, OutOfDeviceMemory

_CPU_ALLOCATION_FAULT = "DefaultCPUAllocator"


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; `auto` is the first accelerator, else the CPU.

    Raises:
        InvalidSpec: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidSpec(f"{name} is not a device of this machine", "device") from error
    return device


def use_cpu_threads(count: int = 0) -> int:
    """Sets how many threads compute on the CPU.

    Args:
        count: threads; 0: half of the cores that this process may use, at least one, since a trainer and a drawer
            share the machine and threads that wait for each other's cores are slower than one.

    Returns:
        The number set.
    """
    threads = count or max(1, len(os.sched_getaffinity(0)) // 2)
    torch.set_num_threads(threads)
    return threads


def inference_dtype(device: torch.device) -> torch.dtype:
    """Precision that pictures are drawn in: half on accelerators, single on the CPU, where half is slower."""
    return torch.float32 if device.type == "cpu" else torch.float16


def device_name(device: torch.device) -> str:
    """The device in words for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def device_memory_bytes(device: torch.device) -> int:
    """Memory of an accelerator in bytes; 0 on the CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def as_device_memory_error(error: BaseException) -> OutOfDeviceMemory | None:
    """The error to report when `error` says that the memory was too small, else None."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or _CPU_ALLOCATION_FAULT in str(error):
        return OutOfDeviceMemory("the device's memory is too small; ask for smaller or fewer pictures")
    return None
