"""One platform for all tests that do not hurt it; its archive of pictures, served on loopback."""

from collections.abc import Iterator

import pytest

from tests.e2e import running


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[running.Platform]:
    started = running.start(tmp_path_factory.mktemp("home"), **running.QUICK)
    yield started
    started.stop()


@pytest.fixture(scope="session")
def archive() -> Iterator[str]:
    with running.served({"robot.zip": (running.ROOT / "examples" / "robot.zip").read_bytes()}) as url:
        yield f"{url}/robot.zip"
