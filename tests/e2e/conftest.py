"""One platform for all tests that do not hurt it; its archive of pictures, served on loopback."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import running

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "robot.zip"


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[running.Platform]:
    started = running.Platform(tmp_path_factory.mktemp("home"))
    started.start()
    yield started
    started.stop_and_check()


@pytest.fixture(scope="session")
def archive() -> Iterator[str]:
    with running.served({"robot.zip": EXAMPLE.read_bytes()}) as url:
        yield f"{url}/robot.zip"
