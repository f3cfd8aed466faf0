import time
from typing import Any

import pytest
from likeness.access.v1.access_service_pb2 import (
    CheckKeyRequest,
    CreateKeyRequest,
    CreateProjectRequest,
    ListKeysRequest,
    ListProjectsRequest,
    Project,
    RevokeKeyRequest,
)
from likeness.access.v1.access_service_pb2_grpc import AccessServiceStub

from services.adapters.grpc_client import Channel
from services.domain.errors import NotFound, Unauthenticated


@pytest.fixture
async def access(channel: Channel) -> Any:
    stub = AccessServiceStub(channel)
    await stub.CreateProject(CreateProjectRequest(project=Project(project_id="dev")))
    return stub


async def test_a_key_lives_from_its_making_to_its_end(access: Any) -> None:
    made = await access.CreateKey(CreateKeyRequest(project_id="dev", display_name="laptop"))
    checked = await access.CheckKey(CheckKeyRequest(secret=made.secret))
    assert (checked.project.project_id, checked.key.key_id) == ("dev", made.key.key_id)
    listed = await access.ListKeys(ListKeysRequest(project_id="dev"))
    assert [key.display_name for key in listed.keys] == ["laptop"]
    assert listed.keys[0].HasField("last_use_time")
    revoked = await access.RevokeKey(RevokeKeyRequest(project_id="dev", key_id=made.key.key_id))
    assert revoked.key.HasField("revoke_time")
    with pytest.raises(Unauthenticated):
        await access.CheckKey(CheckKeyRequest(secret=made.secret))


async def test_unknown_keys_and_projects_are_refused(access: Any) -> None:
    with pytest.raises(Unauthenticated):
        await access.CheckKey(CheckKeyRequest(secret="lk_" + "a" * 43))
    with pytest.raises(NotFound):
        await access.CreateKey(CreateKeyRequest(project_id="none"))
    projects = await access.ListProjects(ListProjectsRequest())
    assert [project.project_id for project in projects.projects] == ["dev"]


async def test_checking_a_known_key_is_fast(access: Any) -> None:
    secret = (await access.CreateKey(CreateKeyRequest(project_id="dev"))).secret
    started = time.perf_counter()
    for _ in range(50):
        await access.CheckKey(CheckKeyRequest(secret=secret))
    assert (time.perf_counter() - started) / 50 < 0.02
