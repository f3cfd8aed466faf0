import re
import stat
from pathlib import Path

import pytest
from likeness.access.v1.access_service_pb2 import Limits, Project

from services.adapters.memory_artifacts import InMemoryArtifactStore
from services.domain.errors import AlreadyExists, InvalidSpec, NotFound, Unauthenticated
from services.storage.access import CACHE_S, Access, new_secret
from services.storage.bootstrap import bootstrap
from services.storage.documents import Documents

MINUTE_MS = 60_000


class World:
    """Access over memory, and clocks that stand still."""

    def __init__(self) -> None:
        self.store = InMemoryArtifactStore()
        self.ms = 1_700_000_000_000
        self.seconds = 0.0
        self.access = self.another()

    def another(self) -> Access:
        """A second replica over the same store."""
        return Access(Documents(self.store), lambda: self.ms, lambda: self.seconds)

    async def project(self, name: str = "dev") -> None:
        await self.access.create_project(Project(project_id=name))


@pytest.fixture
async def world() -> World:
    made = World()
    await made.project()
    return made


async def test_a_key_opens_its_project(world: World) -> None:
    key, secret = await world.access.create_key("dev", display_name="laptop", scopes=["run"])
    assert re.fullmatch(r"lk_[A-Za-z0-9_-]{43}", secret)
    found, project = await world.access.check_key(secret)
    assert (found.key_id, found.project_id, list(found.scopes)) == (key.key_id, "dev", ["run"])
    assert project.project_id == "dev"


async def test_the_secret_is_kept_nowhere(world: World) -> None:
    _, secret = await world.access.create_key("dev")
    await world.access.check_key(secret)
    await world.access.note_uses()
    stored = b"".join(name.encode() + data for name, (data, _) in world.store.objects.items())
    assert secret.encode() not in stored
    assert secret.removeprefix("lk_").encode() not in stored


@pytest.mark.parametrize(
    "secret", ["", "lk_", "x", "lk_" + "a" * 42, "lk_" + "a" * 43, "lk_" + "ä" * 43, "lk_" + "a" * 43 + "\n"]
)
async def test_an_unknown_key_is_refused(world: World, secret: str) -> None:
    with pytest.raises(Unauthenticated):
        await world.access.check_key(secret)


async def test_a_revoked_key_is_refused_at_once(world: World) -> None:
    key, secret = await world.access.create_key("dev")
    await world.access.check_key(secret)
    revoked = await world.access.revoke_key("dev", key.key_id)
    assert revoked.revoke_time.ToMilliseconds() == world.ms
    with pytest.raises(Unauthenticated):
        await world.access.check_key(secret)
    world.ms += 5
    assert await world.access.revoke_key("dev", key.key_id) == revoked


async def test_another_replica_learns_of_a_revocation_soon(world: World) -> None:
    key, secret = await world.access.create_key("dev")
    other = world.another()
    await other.check_key(secret)
    await world.access.revoke_key("dev", key.key_id)
    world.seconds += CACHE_S
    with pytest.raises(Unauthenticated):
        await other.check_key(secret)


async def test_noting_a_use_does_not_bring_a_revoked_key_back(world: World) -> None:
    key, secret = await world.access.create_key("dev")
    other = world.another()
    await other.check_key(secret)
    await world.access.revoke_key("dev", key.key_id)
    await other.note_uses()
    with pytest.raises(Unauthenticated):
        await world.another().check_key(secret)


async def test_an_expired_key_is_refused(world: World) -> None:
    _, secret = await world.access.create_key("dev", expire_ms=world.ms + 1000)
    await world.access.check_key(secret)
    world.ms += 1000
    with pytest.raises(Unauthenticated):
        await world.access.check_key(secret)
    with pytest.raises(InvalidSpec):
        await world.access.create_key("dev", expire_ms=world.ms)


async def test_a_known_key_costs_no_reading(world: World) -> None:
    _, secret = await world.access.create_key("dev")
    await world.access.check_key(secret)
    world.store.objects.clear()
    world.seconds += CACHE_S - 0.01
    await world.access.check_key(secret)
    world.seconds += 0.02
    with pytest.raises(Unauthenticated):
        await world.access.check_key(secret)


async def test_the_last_use_is_known_to_the_minute(world: World) -> None:
    key, secret = await world.access.create_key("dev")
    assert not (await world.access.key("dev", key.key_id)).HasField("last_use_time")
    world.ms += 90_000
    await world.access.check_key(secret)
    minute = world.ms // MINUTE_MS * MINUTE_MS
    assert (await world.access.key("dev", key.key_id)).last_use_time.ToMilliseconds() == minute
    assert await world.access.note_uses() == 1
    assert await world.access.note_uses() == 0
    assert (await world.another().key("dev", key.key_id)).last_use_time.ToMilliseconds() == minute


async def test_keys_are_listed_newest_first_without_secrets(world: World) -> None:
    made = []
    for _ in range(5):
        world.ms += 10
        made.append((await world.access.create_key("dev"))[0].key_id)
    await world.project("other")
    await world.access.create_key("other")
    first, token = await world.access.list_keys("dev", 3, "")
    rest, end = await world.access.list_keys("dev", 3, token)
    assert [key.key_id for key in first + rest] == made[::-1]
    assert end == ""


async def test_a_key_belongs_to_its_project(world: World) -> None:
    key, _ = await world.access.create_key("dev")
    await world.project("other")
    for project in ("other", "none"):
        with pytest.raises(NotFound):
            await world.access.revoke_key(project, key.key_id)
    with pytest.raises(NotFound):
        await world.access.revoke_key("dev", "../x")
    with pytest.raises(NotFound):
        await world.access.create_key("none")


async def test_a_project_is_made_once(world: World) -> None:
    first = await world.access.create_project(
        Project(project_id="p1", display_name="One", limits=Limits(max_active_jobs=3))
    )
    world.ms += 1
    again = await world.access.create_project(Project(project_id="p1", display_name="One"))
    assert again == first
    assert again.limits.max_active_jobs == 3
    with pytest.raises(AlreadyExists):
        await world.access.create_project(Project(project_id="p1", display_name="Two"))


@pytest.mark.parametrize("project", ["", "Upper", "a/b", "x" * 41, ".."])
async def test_a_malformed_project_is_refused(world: World, project: str) -> None:
    with pytest.raises(InvalidSpec):
        await world.access.create_project(Project(project_id=project))


async def test_a_name_that_is_too_long_is_refused(world: World) -> None:
    with pytest.raises(InvalidSpec):
        await world.access.create_project(Project(project_id="p", display_name="x" * 201))
    with pytest.raises(InvalidSpec):
        await world.access.create_key("dev", display_name="x" * 201)


async def test_projects_are_listed_by_id(world: World) -> None:
    for name in ("b", "a", "c"):
        await world.project(name)
    first, token = await world.access.list_projects(2, "")
    rest, end = await world.access.list_projects(2, token)
    assert [project.project_id for project in first + rest] == ["a", "b", "c", "dev"]
    assert end == ""
    with pytest.raises(InvalidSpec):
        await world.access.list_projects(-1, "")


async def test_bootstrap_takes_a_key_file_that_is_there_and_writes_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "api-key"
    path.write_text(f"{new_secret()}\n")
    before = tmp_path.stat().st_mtime_ns
    assert await bootstrap(World().access, path)
    assert tmp_path.stat().st_mtime_ns == before


async def test_bootstrap_writes_a_working_key_once(tmp_path: Path) -> None:
    world, path = World(), tmp_path / "home" / "api-key"
    assert await bootstrap(world.access, path)
    secret = path.read_text().strip()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (await world.access.check_key(secret))[1].project_id == "dev"
    assert not await bootstrap(world.another(), path)
    assert path.read_text().strip() == secret
    assert [entry.name for entry in path.parent.iterdir()] == ["api-key"]


async def test_a_key_on_file_survives_the_loss_of_the_store(tmp_path: Path) -> None:
    path = tmp_path / "api-key"
    await bootstrap(World().access, path)
    fresh = World()
    assert await bootstrap(fresh.access, path)
    assert (await fresh.access.check_key(path.read_text().strip()))[1].project_id == "dev"


async def test_bootstrap_leaves_a_revoked_key_revoked(tmp_path: Path) -> None:
    world, path = World(), tmp_path / "api-key"
    await bootstrap(world.access, path)
    secret = path.read_text().strip()
    key, _ = await world.access.check_key(secret)
    await world.access.revoke_key("dev", key.key_id)
    assert not await bootstrap(world.access, path)
    with pytest.raises(Unauthenticated):
        await world.access.check_key(secret)


async def test_a_file_that_holds_no_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "api-key"
    path.write_text("password\n")
    with pytest.raises(InvalidSpec, match="api-key"):
        await bootstrap(World().access, path)
    assert path.read_text() == "password\n"


def test_secrets_differ() -> None:
    assert len({new_secret() for _ in range(100)}) == 100
