"""Real servers that the integration tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.nats_server import NatsServer


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A nats-server for the whole session. Tests keep apart by their own project ids, and leave it running."""
    server = NatsServer(tmp_path_factory.mktemp("nats")).start()
    yield server
    server.stop()


@pytest.fixture
def own_nats_server(tmp_path: Path) -> Iterator[NatsServer]:
    """A nats-server of the test's own, to kill and restart."""
    server = NatsServer(tmp_path / "nats").start()
    yield server
    server.kill()
