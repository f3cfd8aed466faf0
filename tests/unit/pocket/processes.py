"""One of several processes that train together: `python -m tests.unit.pocket.processes FOLDER`.

Reads what torchrun would set from the environment; each process leaves its results in FOLDER as `<rank>.pt`.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from models.pocket.training import Processes, average_gradients, average_parameters, join_processes

ROWS = 8


def build() -> nn.Module:
    """The same small network in every process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(16, 2))


def batch(step: int) -> Tensor:
    """float32 [ROWS, 3, 4, 4]: what all processes together see in a step."""
    return torch.randn(ROWS, 3, 4, 4, generator=torch.Generator().manual_seed(step))


def train(processes: Processes, steps: int = 4) -> list[Tensor]:
    """Each process takes its share of every batch; clipped and stepped as both recipes do."""
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        rows = ROWS // processes.count
        part = batch(step)[processes.rank * rows : (processes.rank + 1) * rows]
        optimizer.zero_grad()
        model(part).square().mean().backward()
        average_gradients(model.parameters(), processes)
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def apart_then_averaged(processes: Processes) -> list[Tensor]:
    """Parameters that differ by rank, averaged."""
    parameters = [nn.Parameter(torch.full((2, 3), float(processes.rank))), nn.Parameter(torch.ones(4))]
    average_parameters(parameters, processes)
    return [parameter.detach() for parameter in parameters]


def main() -> None:
    processes = join_processes()
    results = {"trained": train(processes), "averaged": apart_then_averaged(processes)}
    torch.save(results, Path(sys.argv[1]) / f"{processes.rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
