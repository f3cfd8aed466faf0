"""Models of the hub, from a small hub on loopback that speaks as much of its HTTP as the library asks for."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from services.adapters.memory_artifacts import InMemoryArtifactStore
from services.domain.errors import BadInput, NotFound, Unavailable
from services.storage.blobs import Blobs
from services.storage.catalogue import Catalogue, CatalogueEntry, CataloguePlaces
from services.storage.documents import CATALOGUE, Documents
from services.storage.registry import ModelRegistry
from tests.unit.storage.model_folders import write_model_folder

REPO = "somebody/tiny-model"
COMMIT = "c0ffee" + "0" * 34


class Hub:
    """Serves the files of one folder as one repository."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fetched: list[str] = []
        self.broken = False
        app = web.Application()
        app.router.add_get("/api/models/{owner}/{name}", self._info)
        app.router.add_get("/api/models/{owner}/{name}/revision/{revision}", self._info)
        app.router.add_get("/api/models/{owner}/{name}/tree/{revision}", self._tree)
        app.router.add_get("/{owner}/{name}/resolve/{revision}/{path:.+}", self._file)
        self.server = TestServer(app)

    def _files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    async def _info(self, request: web.Request) -> web.Response:
        if self.broken:
            return web.Response(status=503)
        if f"{request.match_info['owner']}/{request.match_info['name']}" != REPO:
            return web.Response(status=404, headers={"X-Error-Code": "RepoNotFound"})
        if request.match_info.get("revision", COMMIT) not in (COMMIT, "main", "v1"):
            return web.Response(status=404, headers={"X-Error-Code": "RevisionNotFound"})
        names = [
            {"rfilename": path.relative_to(self.folder).as_posix(), "size": path.stat().st_size}
            for path in self._files()
        ]
        return web.json_response({"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": names})

    async def _tree(self, request: web.Request) -> web.Response:
        entries = [
            {
                "type": "file",
                "path": path.relative_to(self.folder).as_posix(),
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            }
            for path in self._files()
        ]
        return web.json_response(entries)

    async def _file(self, request: web.Request) -> web.Response:
        data = await asyncio.to_thread((self.folder / request.match_info["path"]).read_bytes)
        if request.method == "GET":
            self.fetched.append(request.match_info["path"])
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return web.Response(body=data, headers=headers)


@pytest.fixture
async def hub(tmp_path: Path) -> AsyncIterator[Hub]:
    folder = write_model_folder(tmp_path / "repository")
    for extra in ("v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.bin", "README.md"):
        (folder / extra).write_bytes(b"not wanted")
    (folder / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not wanted")
    made = Hub(folder)
    await made.server.start_server()
    yield made
    await made.server.close()


class World:
    def __init__(self, home: Path, hub: Hub, source: str) -> None:
        store = InMemoryArtifactStore()
        self.blobs = Blobs(store, home / "work")
        self.documents = Documents(store)
        self.registry = ModelRegistry(self.blobs, self.documents, lambda: 1_700_000_000_000, "m")
        self.catalogue = Catalogue(
            {"m": CatalogueEntry(source=source, license="mit", aliases=("tiny",))},
            self.registry,
            self.blobs,
            self.documents,
            CataloguePlaces(home / "work", str(hub.server.make_url("")).rstrip("/")),
        )


async def test_a_model_of_the_hub_is_fetched_when_it_is_asked_for(hub: Hub, tmp_path: Path) -> None:
    world = World(tmp_path, hub, f"hf:{REPO}@v1")
    await world.catalogue.run()
    assert hub.fetched == []
    with pytest.raises(NotFound):
        await world.registry.get("dev", "m")

    await asyncio.gather(*(world.catalogue.ensure(name) for name in ("m", "tiny", "m")))
    model = await world.registry.get("dev", "tiny")
    assert (model.model, model.manifest.license, model.manifest.native_size_px) == ("m", "mit", 64)
    wanted = {path.relative_to(hub.folder).as_posix() for path in hub.folder.rglob("*") if path.is_file()}
    wanted -= {"v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.bin", "README.md"}
    wanted -= {"unet/diffusion_pytorch_model.fp16.safetensors"}
    assert {component.path for component in model.manifest.components} == wanted
    assert sorted(hub.fetched) == sorted(wanted)
    for component in model.manifest.components:
        data = await world.blobs.read_small(component.key, 10_000)
        assert data == (hub.folder / component.path).read_bytes()
    known = await world.documents.get("", CATALOGUE, "m")
    assert known is not None
    assert known["source"] == f"hf:{REPO}@{COMMIT}"
    assert not any(path.is_dir() for path in (tmp_path / "work").iterdir())

    await world.catalogue.ensure("m")
    assert len(hub.fetched) == len(wanted)


async def test_a_model_in_half_precision_only_is_taken_under_plain_names(hub: Hub, tmp_path: Path) -> None:
    plain = "unet/diffusion_pytorch_model.safetensors"
    half = (hub.folder / plain).rename(hub.folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    world = World(tmp_path, hub, f"hf:{REPO}")
    await world.catalogue.ensure("m")
    components = {c.path: c.key for c in (await world.registry.get("dev", "m")).manifest.components}
    assert await world.blobs.read_small(components[plain], 10_000) == half.read_bytes()
    assert not any("fp16" in path for path in components)


@pytest.mark.parametrize("source", ["hf:somebody/else", f"hf:{REPO}@none"])
async def test_a_model_that_the_hub_does_not_have_is_bad_input(hub: Hub, tmp_path: Path, source: str) -> None:
    world = World(tmp_path, hub, source)
    await world.catalogue.run()
    with pytest.raises(BadInput, match="the hub has no model"):
        await world.catalogue.ensure("m")


async def test_a_hub_that_does_not_answer_is_unavailable(hub: Hub, tmp_path: Path) -> None:
    world = World(tmp_path, hub, f"hf:{REPO}")
    hub.broken = True
    with pytest.raises(Unavailable):
        await world.catalogue.ensure("m")
    hub.broken = False
    await world.catalogue.ensure("m")
    assert (await world.registry.get("dev", "m")).model == "m"
