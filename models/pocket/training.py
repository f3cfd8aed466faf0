"""What both training programs share: processes, schedules, averages, logs and checkpoints.

One process or several (`torchrun --nproc-per-node N`), CPU or GPU; gradients are averaged over the processes in one
flat all-reduce, which for models this small is all that distributed training needs.
"""

import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those that train together."""

    rank: int
    count: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process writes logs and checkpoints."""
        return self.rank == 0


def join_processes() -> Processes:
    """Reads torchrun's environment and connects the processes; one alone needs no environment."""
    count, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    if count > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    return Processes(rank, count, device)


def average_gradients(parameters: Iterable[nn.Parameter], processes: Processes) -> None:
    """Replaces every gradient by its mean over the processes."""
    if processes.count == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= processes.count
    for gradient, mean in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


@torch.no_grad()
def average_parameters(parameters: Iterable[nn.Parameter], processes: Processes) -> None:
    """Replaces every parameter by its mean over the processes."""
    if processes.count == 1:
        return
    chosen = list(parameters)
    flat = torch.cat([parameter.reshape(-1) for parameter in chosen])
    dist.all_reduce(flat)
    flat /= processes.count
    for parameter, mean in zip(chosen, torch.split(flat, [p.numel() for p in chosen]), strict=True):
        parameter.copy_(mean.view_as(parameter))


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to zero at `steps` (Loshchilov and Hutter 2017, eq. 5)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


class Average:
    """An exponential moving average of a module's parameters (Polyak averaging with decay)."""

    def __init__(self, modules: Iterable[nn.Module], decay: float) -> None:
        """Starts at the present values. `decay`: share of the old average kept at each update."""
        self._parameters = [parameter for module in modules for parameter in module.parameters()]
        self._decay = decay
        self.values = [parameter.detach().clone() for parameter in self._parameters]
        self._updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the present values; faster in the first updates."""
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        torch._foreach_lerp_(self.values, [p.detach() for p in self._parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the module's values and the average; call it again to swap back."""
        for parameter, value in zip(self._parameters, self.values, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"values": self.values, "updates": self._updates}

    def load(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        for value, stored in zip(self.values, state["values"], strict=True):
            value.copy_(stored)
        self._updates = state["updates"]


class Log:
    """A file of JSON lines, echoed to standard output; silent in processes that do not lead."""

    def __init__(self, path: Path, processes: Processes) -> None:
        """Appends to `path`."""
        self._path = path if processes.leads else None
        self._start = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, **fields: float | int | str) -> None:
        """One line; the seconds since this process started are added."""
        if self._path is None:
            return
        line = json.dumps({"seconds": round(time.monotonic() - self._start, 1), **fields})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint beside the old one and moves it over, so that one whole file is always there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".next"))
    path.with_suffix(".next").replace(path)


def load_state(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The checkpoint, or None when there is none."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return state
