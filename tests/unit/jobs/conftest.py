import pytest

from services.adapters.memory import ManualClock, MemoryPlatform


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def platform(clock: ManualClock) -> MemoryPlatform:
    return MemoryPlatform(clock)
