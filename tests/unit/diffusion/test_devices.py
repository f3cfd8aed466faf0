import pytest
import torch

from services.diffusion.devices import as_device_memory_error, inference_dtype, pick_device
from services.domain.errors import InvalidSpec


def test_device_can_be_named() -> None:
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:99", "abacus"])
def test_device_that_this_machine_lacks_is_refused(name: str) -> None:
    with pytest.raises(InvalidSpec, match=f"{name} is not a device of this machine"):
        pick_device(name)


def test_pictures_are_drawn_in_single_precision_on_the_cpu_only() -> None:
    assert inference_dtype(torch.device("cpu")) == torch.float32
    assert inference_dtype(torch.device("cuda")) == torch.float16


def test_request_for_more_memory_than_there_is_counts_as_lack_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert as_device_memory_error(caught.value) is not None


def test_other_faults_are_no_lack_of_memory() -> None:
    assert as_device_memory_error(RuntimeError("shape mismatch")) is None
