"""Real servers that the integration tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.nats_server import NatsServer
from tests.integration.s3_server import S3Server


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


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server for the whole session; see :func:`bucket_server`. Tests leave it running."""
    server = S3Server(tmp_path_factory.mktemp("s3")).start()
    yield server
    server.kill()


@pytest.fixture
def bucket_server(s3_server: S3Server) -> Iterator[S3Server]:
    """The S3 server of the session, with an empty bucket."""
    yield s3_server
    s3_server.empty_bucket()
