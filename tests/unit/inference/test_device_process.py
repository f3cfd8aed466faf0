import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from services.adapters.child_process import ChildDied, ChildHung
from services.inference.device_process import DeviceProcess, Event

FAKE = "tests.unit.inference.fake_child"


@pytest.fixture
async def device() -> AsyncIterator[DeviceProcess]:
    async with DeviceProcess(module=FAKE, silence_s=1.0, loading_s=20.0) as running:
        await running.until_ready()
        yield running


def command(folder: Path, prompt: str, num_images: int = 2) -> dict[str, Any]:
    model = {"digest": "a" * 64, "folder": "unused", "parts": {}}
    spec = {"prompt": prompt, "num_images": num_images}
    added: dict[str, Any] = {"loras": [], "embeddings": [], "pictures": {}}
    return {"model": model, "spec": spec, "folder": str(folder)} | added


async def drawn(device: DeviceProcess, job: str, order: dict[str, Any]) -> list[Event]:
    return [event async for event in device.draw(job, order)]


async def test_device_is_known_when_ready(device: DeviceProcess) -> None:
    assert (device.is_ready, device.device, device.memory_bytes) == (True, "abacus", 7)


async def test_each_request_gets_its_own_events(device: DeviceProcess, tmp_path: Path) -> None:
    for job in ("one", "two"):
        (tmp_path / job).mkdir()
    one, two = await asyncio.gather(
        drawn(device, "one", command(tmp_path / "one", "x", 1)),
        drawn(device, "two", command(tmp_path / "two", "x", 3)),
    )
    assert [event["event"] for event in one] == ["progress", "drawn", "finished"]
    assert {event["job"] for event in two} == {"two"}
    assert len(two) == 7


async def test_models_held_by_the_child_are_known(device: DeviceProcess, tmp_path: Path) -> None:
    await drawn(device, "one", command(tmp_path, "x"))
    assert device.held == ("a" * 64,)


async def test_cancelled_request_ends(device: DeviceProcess, tmp_path: Path) -> None:
    drawing = asyncio.create_task(drawn(device, "one", command(tmp_path, "wait")))
    await asyncio.sleep(0.05)
    await device.cancel("one")
    assert (await drawing)[-1]["event"] == "cancelled"


async def test_death_of_the_child_ends_its_requests_and_another_draws_on(
    device: DeviceProcess, tmp_path: Path
) -> None:
    waiting = asyncio.create_task(drawn(device, "bystander", command(tmp_path, "wait")))
    await asyncio.sleep(0.05)
    with pytest.raises(ChildDied, match="SIGABRT"):
        await drawn(device, "culprit", command(tmp_path, "crash"))
    with pytest.raises(ChildDied):
        await waiting
    assert (device.is_ready, device.held) == (False, ())
    assert (await drawn(device, "next", command(tmp_path, "x")))[-1]["event"] == "finished"


async def test_child_without_a_sign_of_life_is_replaced(device: DeviceProcess, tmp_path: Path) -> None:
    with pytest.raises(ChildHung, match="no sign of life"):
        await drawn(device, "stuck", command(tmp_path, "hang"))
    assert (await drawn(device, "next", command(tmp_path, "x")))[-1]["event"] == "finished"


async def test_child_that_never_gets_ready_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.inference.device_process.FIRST_PAUSE_S", 0.01)
    async with DeviceProcess("--stillborn", module=FAKE) as device:
        with pytest.raises(ChildDied, match="status 3"):
            await device.until_ready()
        with pytest.raises(ChildDied, match="status 3"):
            await device.run()
