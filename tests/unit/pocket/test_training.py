"""What both training programs share: rates, averages, checkpoints, logs, and several processes as one."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from models.pocket.training import (
    Average,
    Log,
    Processes,
    average_gradients,
    average_parameters,
    learning_rate,
    load_state,
    save_state,
)
from tests.unit.pocket import processes as worker

ROOT = Path(__file__).parents[3]
ALONE = Processes(0, 1, torch.device("cpu"))
ONE_OF_TWO = Processes(1, 2, torch.device("cpu"))


def test_the_rate_rises_evenly_then_falls_along_half_a_cosine() -> None:
    rates = [learning_rate(step, 110, 1.0, 10) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5)
    assert rates[35] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert rates[110] == pytest.approx(0.0)
    assert learning_rate(500, 110, 1.0, 10) == pytest.approx(0.0)


def moved(module: nn.Linear, value: float) -> None:
    with torch.no_grad():
        module.weight.fill_(value)


def test_the_average_follows_its_formula() -> None:
    module = nn.Linear(1, 1, bias=False)
    moved(module, 5.0)
    average = Average([module], decay=0.2)
    expected = 5.0
    for update, value in enumerate((1.0, 2.0, -3.0, 4.0), start=1):
        moved(module, value)
        average.update()
        decay = min(0.2, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * value
        assert float(average.values[0]) == pytest.approx(expected)


def test_the_average_swaps_in_and_out() -> None:
    module = nn.Linear(1, 1, bias=False)
    moved(module, 1.0)
    average = Average([module], decay=0.9)
    moved(module, 2.0)
    average.swap()
    assert (module.weight.item(), average.values[0].item()) == (1.0, 2.0)
    average.swap()
    assert (module.weight.item(), average.values[0].item()) == (2.0, 1.0)


def test_the_average_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    average = Average([module], decay=0.99)
    for value in (1.0, 2.0, 3.0):
        moved(module, value)
        average.update()
    save_state(tmp_path / "state.pt", average.state())
    state = load_state(tmp_path / "state.pt", torch.device("cpu"))
    assert state is not None
    other = Average([module], decay=0.99)
    other.load(state)
    moved(module, 7.0)
    for one in (average, other):
        one.update()
    assert all(torch.equal(a, b) for a, b in zip(average.values, other.values, strict=True))


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state.pt"
    save_state(path, {"step": 1})
    with pytest.raises(AttributeError, match="pickle"):
        save_state(path, {"step": lambda: 2})
    assert load_state(path, torch.device("cpu")) == {"step": 1}


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_state(tmp_path / "state.pt", torch.device("cpu")) is None


def test_the_log_grows_by_lines_of_the_leading_process_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run" / "log.jsonl"
    Log(path, ONE_OF_TWO).write(step=0)
    Log(path, ALONE).write(step=1, loss=0.5)
    Log(path, ALONE).write(event="start")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [{key: line[key] for key in line if key != "seconds"} for line in lines] == [
        {"step": 1, "loss": 0.5},
        {"event": "start"},
    ]
    assert capsys.readouterr().out.splitlines() == path.read_text().splitlines()


def test_one_process_averages_nothing() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), 3.0)
    average_gradients([parameter], ALONE)
    average_parameters([parameter], ALONE)
    assert parameter.grad.tolist() == [3.0, 3.0]
    assert parameter.tolist() == [1.0, 1.0]


def run_processes(count: int, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    shared |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.unit.pocket.processes", str(folder)]
    started = [
        subprocess.Popen(
            command, cwd=ROOT, env=shared | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(count)
    ]
    for process in started:
        _, errors = process.communicate(timeout=150)
        assert process.returncode == 0, errors


def test_two_processes_equal_one_with_the_doubled_batch(tmp_path: Path) -> None:
    run_processes(2, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    alone = worker.train(ALONE)
    begun = [parameter.detach() for parameter in worker.build().parameters()]
    for one, other, expected, start in zip(first["trained"], second["trained"], alone, begun, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(expected, start, atol=1e-3)
    for results in (first, second):
        assert [value.unique().tolist() for value in results["averaged"]] == [[0.5], [1.0]]
