"""Storage as it runs, on a free port, over a folder."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.adapters.grpc_client import Channel
from services.adapters.settings import StorageSettings
from services.adapters.storage_client import StorageClient
from services.storage.server import Storage, running
from tests.unit.storage.model_folders import write_catalogue


@pytest.fixture
def settings(tmp_path: Path) -> StorageSettings:
    home = tmp_path / "home"
    catalogue = write_catalogue(home / "models.toml")
    return StorageSettings(home=home, models=catalogue, storage_addr="127.0.0.1:0", grace_s=1.0)


@pytest.fixture
async def storage(settings: StorageSettings) -> AsyncIterator[Storage]:
    async with running(settings) as made:
        await made.catalogue.run()
        yield made


@pytest.fixture
async def channel(storage: Storage) -> AsyncIterator[Channel]:
    async with Channel(storage.server.address) as made:
        yield made


@pytest.fixture
def client(channel: Channel) -> StorageClient:
    return StorageClient(channel)
