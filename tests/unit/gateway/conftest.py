"""The gateway's world, one a test."""

from collections.abc import AsyncIterator

import pytest

from tests.unit.gateway.harness import World, gateway


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with gateway() as made:
        yield made
