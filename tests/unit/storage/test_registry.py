from collections.abc import Callable
from pathlib import Path

import pytest
from likeness.storage.v1.model_pb2 import (
    MODEL_FORMAT_DIFFUSERS,
    MODEL_FORMAT_UNSPECIFIED,
    Lineage,
    ModelComponent,
    ModelExport,
    ModelManifest,
)

from services.adapters.memory_artifacts import InMemoryArtifactStore
from services.domain.artifacts import blob_key
from services.domain.errors import AlreadyExists, InvalidSpec, NotFound
from services.storage.blobs import Blobs
from services.storage.documents import Documents
from services.storage.registry import ModelRegistry


class World:
    """A registry over memory, and a present that moves on at each look."""

    def __init__(self, work: Path) -> None:
        self.store = InMemoryArtifactStore()
        self.blobs = Blobs(self.store, work)
        self.ms = 1_700_000_000_000
        self.registry = self.reopened()

    def reopened(self) -> ModelRegistry:
        return ModelRegistry(self.blobs, Documents(self.store), self._now_ms, "pocket")

    def _now_ms(self) -> int:
        self.ms += 1
        return self.ms

    async def component(self, path: str, data: bytes = b"w", project: str = "dev") -> ModelComponent:
        blob = await self.blobs.put_bytes(project, data, "")
        return ModelComponent(path=path, key=blob.key, digest=blob.digest, size_bytes=blob.size_bytes)

    async def manifest(self, data: bytes = b"w", project: str = "dev") -> ModelManifest:
        return ModelManifest(
            format=MODEL_FORMAT_DIFFUSERS,
            family="sd1",
            components=[
                await self.component("unet/x.safetensors", data, project),
                await self.component("model_index.json", b"{}", ""),
            ],
        )


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_a_registered_model_is_found_by_id_and_by_digest(world: World) -> None:
    model = await world.registry.register("dev", "m1", await world.manifest(), display_name="Mine")
    assert model.model == "m1"
    assert model.display_name == "Mine"
    assert [component.path for component in model.manifest.components] == [
        "model_index.json",
        "unet/x.safetensors",
    ]
    assert model.manifest_key == blob_key("dev", model.manifest_digest)
    for registry in (world.registry, world.reopened()):
        assert await registry.get("dev", "m1") == model
        assert await registry.get("dev", model.manifest_digest) == model


async def test_registering_again_changes_nothing(world: World) -> None:
    first = await world.registry.register("dev", "m1", await world.manifest())
    shuffled = await world.manifest()
    shuffled.components.reverse()
    assert await world.registry.register("dev", "m1", shuffled) == first


async def test_an_id_stands_for_one_model(world: World) -> None:
    await world.registry.register("dev", "m1", await world.manifest())
    with pytest.raises(AlreadyExists):
        await world.registry.register("dev", "m1", await world.manifest(b"other"))


async def test_the_lineage_is_kept(world: World) -> None:
    base = await world.registry.register("", "base", await world.manifest(project=""))
    manifest = await world.manifest(b"tuned")
    manifest.base_manifest_key = base.manifest_key
    manifest.base_model = "base"
    manifest.lineage.CopyFrom(
        Lineage(job_id="j", dataset_keys=["k"], seed=2**63 + 1, steps=100, library_versions={"torch": "2"})
    )
    await world.registry.register("dev", "tuned", manifest)
    found = (await world.reopened().get("dev", "tuned")).manifest
    assert found.lineage == manifest.lineage
    assert (found.base_manifest_key, found.base_model) == (base.manifest_key, "base")


async def test_projects_see_their_own_models_and_the_catalogues(world: World) -> None:
    await world.registry.register("", "base", await world.manifest(project=""))
    await world.registry.register("dev", "m1", await world.manifest())
    assert (await world.registry.get("dev", "base")).project_id == ""
    assert (await world.registry.get("", "base")).model == "base"
    for project in ("other", ""):
        with pytest.raises(NotFound):
            await world.registry.get(project, "m1")


async def test_a_projects_own_model_goes_before_the_catalogues(world: World) -> None:
    await world.registry.register("", "m1", await world.manifest(project=""))
    await world.registry.register("dev", "m1", await world.manifest())
    assert (await world.registry.get("dev", "m1")).project_id == "dev"
    assert (await world.registry.get("other", "m1")).project_id == ""


async def test_an_empty_id_means_the_default_base(world: World) -> None:
    with pytest.raises(NotFound, match="pocket"):
        await world.registry.get("dev", "")
    await world.registry.register("", "pocket", await world.manifest(project=""))
    assert (await world.registry.get("dev", "")).model == "pocket"


async def test_an_alias_names_a_model(world: World) -> None:
    manifest = await world.manifest(project="")
    await world.registry.register("", "base", manifest, aliases=["first", "production"])
    found = await world.registry.get("dev", "production")
    assert (found.model, list(found.aliases)) == ("base", ["first", "production"])


async def test_a_replaced_model_is_still_found_by_its_old_digest(world: World) -> None:
    old = await world.registry.register("", "base", await world.manifest(b"1", ""), replace=True)
    new = await world.registry.register("", "base", await world.manifest(b"2", ""), replace=True)
    assert (await world.registry.get("", "base")).manifest_key == new.manifest_key
    assert (await world.registry.get("", old.manifest_digest)).manifest_key == old.manifest_key


@pytest.mark.parametrize("name", ["../x", "a/b", "x" * 129, ".x", "nothing"])
async def test_what_is_no_model_is_not_found(world: World, name: str) -> None:
    with pytest.raises(NotFound):
        await world.registry.get("dev", name)
    with pytest.raises(NotFound):
        await world.registry.delete("dev", name)


async def test_a_deleted_model_is_gone_under_all_names_and_its_blobs_stay(world: World) -> None:
    model = await world.registry.register("dev", "m1", await world.manifest(), aliases=["best"])
    await world.registry.delete("dev", "m1")
    for name in ("m1", "best", model.manifest_digest):
        with pytest.raises(NotFound):
            await world.registry.get("dev", name)
    assert await world.store.stat(model.manifest_key) is not None
    assert [key for key in world.store.objects if "/refs/" in key] == []
    with pytest.raises(NotFound):
        await world.registry.delete("dev", "m1")
    assert (await world.registry.register("dev", "m1", await world.manifest())).manifest == model.manifest


async def test_deleting_one_of_two_equal_models_leaves_the_other(world: World) -> None:
    await world.registry.register("dev", "m1", await world.manifest())
    other = await world.registry.register("dev", "m2", await world.manifest())
    await world.registry.delete("dev", "m1")
    assert (await world.registry.get("dev", "m2")) == other
    assert (await world.registry.get("dev", other.manifest_digest)) == other


async def test_the_catalogue_is_not_deleted_by_callers(world: World) -> None:
    await world.registry.register("", "base", await world.manifest(project=""))
    with pytest.raises(InvalidSpec, match="project_id"):
        await world.registry.delete("", "base")


def _no_format(manifest: ModelManifest) -> None:
    manifest.format = MODEL_FORMAT_UNSPECIFIED


def _no_components(manifest: ModelManifest) -> None:
    del manifest.components[:]


def _missing_blob(manifest: ModelManifest) -> None:
    manifest.components[0].digest = "0" * 64
    manifest.components[0].key = blob_key("dev", "0" * 64)


def _foreign_blob(manifest: ModelManifest) -> None:
    manifest.components[0].key = manifest.components[0].key.replace("projects/dev", "projects/other")


def _other_digest(manifest: ModelManifest) -> None:
    manifest.components[0].digest = "0" * 64


def _other_size(manifest: ModelManifest) -> None:
    manifest.components[0].size_bytes = 99


def _outside(manifest: ModelManifest) -> None:
    manifest.components[0].path = "../x"


def _absolute(manifest: ModelManifest) -> None:
    manifest.components[0].path = "/etc/passwd"


def _twice(manifest: ModelManifest) -> None:
    manifest.components[0].path = manifest.components[1].path


def _missing_base(manifest: ModelManifest) -> None:
    manifest.base_manifest_key = blob_key("", "0" * 64)


def _missing_export(manifest: ModelManifest) -> None:
    manifest.exports.append(ModelExport(format="single_file", key=blob_key("dev", "0" * 64)))


@pytest.mark.parametrize(
    ("spoil", "field"),
    [
        (_no_format, "manifest.format"),
        (_no_components, "manifest.components"),
        (_missing_blob, "manifest.components[0].key"),
        (_foreign_blob, "manifest.components[0].key"),
        (_other_digest, "manifest.components[0].digest"),
        (_other_size, "manifest.components[0].size_bytes"),
        (_outside, "manifest.components[0].path"),
        (_absolute, "manifest.components[0].path"),
        (_twice, "manifest.components[0].path"),
        (_missing_base, "manifest.base_manifest_key"),
        (_missing_export, "manifest.exports[0].key"),
    ],
)
async def test_a_wrong_manifest_is_refused(
    world: World, spoil: Callable[[ModelManifest], None], field: str
) -> None:
    manifest = await world.manifest()
    spoil(manifest)
    with pytest.raises(InvalidSpec) as refusal:
        await world.registry.register("dev", "m1", manifest)
    assert field in [violation.field for violation in refusal.value.violations]
    with pytest.raises(NotFound):
        await world.registry.get("dev", "m1")


async def test_all_faults_are_reported_together(world: World) -> None:
    manifest = await world.manifest()
    _no_format(manifest)
    _other_size(manifest)
    with pytest.raises(InvalidSpec) as refusal:
        await world.registry.register("dev", "../x", manifest)
    assert {violation.field for violation in refusal.value.violations} == {
        "model",
        "manifest.format",
        "manifest.components[0].size_bytes",
    }


async def test_a_shared_model_cannot_be_made_of_a_projects_files(world: World) -> None:
    with pytest.raises(InvalidSpec, match="catalogue"):
        await world.registry.register("", "base", await world.manifest(project="dev"))


async def test_a_listing_has_the_projects_models_newest_first_then_the_catalogue(world: World) -> None:
    for name in ("b", "a"):
        await world.registry.register("", name, await world.manifest(project=""))
    for number in range(5):
        await world.registry.register("dev", f"m{number}", await world.manifest(b"%d" % number))
    await world.registry.register("other", "foreign", await world.manifest(project=""))
    wanted = ["m4", "m3", "m2", "m1", "m0", "a", "b"]
    for page_size in (1, 2, 3, 7, 0, 200):
        seen: list[str] = []
        token = ""
        while True:
            models, token = await world.registry.list_page("dev", page_size, token)
            seen += [model.model for model in models]
            if not token:
                break
        assert seen == wanted
    assert [model.model for model in (await world.registry.list_page("", 0, ""))[0]] == ["a", "b"]


@pytest.mark.parametrize(("page_size", "token"), [(-1, ""), (201, ""), (1, "x"), (1, "bm9uZQ=="), (1, "ä")])
async def test_a_wrong_page_is_refused(world: World, page_size: int, token: str) -> None:
    with pytest.raises(InvalidSpec):
        await world.registry.list_page("dev", page_size, token)
