from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.unit.trainer.harness import Bench


@pytest.fixture
def bench(tiny_model_dir: Path, tmp_path: Path) -> Bench:
    return Bench(tiny_model_dir, tmp_path)


@pytest.fixture(autouse=True)
def deterministic_single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
