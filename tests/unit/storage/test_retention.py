import asyncio

import pytest

from services.storage.retention import Retention


class Store:
    def __init__(self) -> None:
        self.sweeps = 0
        self.error: OSError | None = None

    async def sweep(self) -> int:
        self.sweeps += 1
        if self.error is not None:
            raise self.error
        return 2


async def test_a_sweep_says_how_much_went() -> None:
    assert await Retention(Store().sweep).sweep() == 2


async def test_sweeping_goes_on_after_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    store = Store()
    store.error = OSError(5, "Input/output error")
    task = asyncio.create_task(Retention(store.sweep, every_s=0.001).run())
    while store.sweeps < 3:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "sweep failed" in caplog.text
