"""Models from addresses: each form loads to the same tensors; what is none of them is refused by a clear sentence."""

import json
import shutil
import zipfile
from collections.abc import AsyncIterator, Callable, Iterable
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestServer
from likeness.storage.v1.model_pb2 import MODEL_FORMAT_DIFFUSERS, Model, ModelComponent, ModelManifest

from services.adapters.egress import Egress, EgressPolicy
from services.adapters.memory_artifacts import InMemoryArtifactStore
from services.diffusion.loading import load_components
from services.diffusion.single_file import save_checkpoint, save_single_file
from services.domain.errors import BadInput, EgressRefused
from services.storage.blobs import Blobs
from services.storage.documents import Documents
from services.storage.model_imports import Imported, ModelImporter, ModelLimits, Wanted
from services.storage.registry import ModelRegistry
from services.trainer import checkpoint as checkpoints
from tests.integration.storage.test_hub import REPO, Hub

PROJECT = "studio"
PARTS = ("unet", "vae", "text_encoder")


class World:
    """An importer, a web server with files, and a hub."""

    def __init__(self, folder: Path, origin: str, hub: Hub, limits: ModelLimits, allow: str) -> None:
        self.folder = folder
        self.origin = origin
        self.hub_page = str(hub.server.make_url("")).rstrip("/")
        self.blobs = Blobs(InMemoryArtifactStore(), folder / "work")
        self.registry = ModelRegistry(
            self.blobs, Documents(self.blobs.store), lambda: 1_700_000_000_000, "base"
        )
        egress = Egress(EgressPolicy(allow=(ip_network(allow),), retry_pause_s=0.01, attempts=1))
        self.importer = ModelImporter(
            self.blobs, self.registry, egress, folder / "work", self.hub_page, limits
        )

    async def add_base(self, model: Path) -> Model:
        components = []
        for path in sorted(path for path in model.rglob("*") if path.is_file()):
            blob = await self.blobs.put_file("", path, "application/octet-stream")
            name = path.relative_to(model).as_posix()
            components.append(
                ModelComponent(path=name, key=blob.key, digest=blob.digest, size_bytes=blob.size_bytes)
            )
        manifest = ModelManifest(format=MODEL_FORMAT_DIFFUSERS, family="sd1", components=components)
        return await self.registry.register("", "base", manifest)

    async def import_file(self, name: str, **wanted: Any) -> Imported:
        return await self.import_address(f"{self.origin}/{name}", **wanted)

    async def import_address(self, address: str, **wanted: Any) -> Imported:
        base = await self.registry.get("", "base")
        return await self.importer.import_model(PROJECT, Wanted(address, base, **wanted))

    async def state(self, model: Model) -> dict[str, torch.Tensor]:
        """Every tensor of a model, loaded as workers load it."""
        folder = self.folder / model.manifest_digest
        for component in model.manifest.components:
            path = folder / component.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(await self.blobs.read_small(component.key, 1 << 30))
        return state_of(folder)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    components = load_components(folder)
    return {
        f"{part}.{name}": tensor
        for part in PARTS
        for name, tensor in getattr(components, part).state_dict().items()
    }


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    return folder


@pytest.fixture
def limits() -> ModelLimits:
    return ModelLimits(max_bytes=1 << 28)


@pytest.fixture
async def hub(sd1_model_dir: Path, tmp_path: Path) -> AsyncIterator[Hub]:
    repository = tmp_path / "repository"
    shutil.copytree(sd1_model_dir, repository / "pipeline")
    shutil.copytree(sd1_model_dir, repository, dirs_exist_ok=True)
    (repository / "pipeline" / "model_index.json").write_text('{"_class_name": "Another"}')
    made = Hub(repository)
    await made.server.start_server()
    yield made
    await made.server.close()


@pytest.fixture
async def world(
    site: Path, hub: Hub, limits: ModelLimits, sd1_model_dir: Path, tmp_path: Path
) -> AsyncIterator[World]:
    app = web.Application()
    app.router.add_static("/", site)
    async with TestServer(app, host="127.0.0.1") as server:
        made = World(tmp_path, f"http://127.0.0.1:{server.port}", hub, limits, "127.0.0.1")
        await made.add_base(sd1_model_dir)
        yield made


def zipped(path: Path, folder: Path, top: str = "", leave: Iterable[str] = ()) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in leave):
            archive.write(file, top + file.relative_to(folder).as_posix())


def other_weights(model: Path, folder: Path) -> Path:
    """A model folder whose weights are all a little larger."""
    components = load_components(model)
    with torch.no_grad():
        for part in PARTS:
            for parameter in getattr(components, part).parameters():
                parameter.mul_(1.25)
    shutil.copytree(model, folder)
    components.unet.save_pretrained(folder / "unet")
    components.vae.save_pretrained(folder / "vae")
    components.text_encoder.save_pretrained(folder / "text_encoder")
    return folder


FORMS: dict[str, Callable[[Path, Path], None]] = {
    "a.safetensors": lambda model, path: save_single_file(load_components(model), path),
    "a.ckpt": lambda model, path: save_checkpoint(load_components(model), path),
    "a.zip": lambda model, path: zipped(path, model),
    "nested.zip": lambda model, path: zipped(path, model, "my model/"),
}


@pytest.mark.parametrize("form", FORMS)
async def test_every_form_of_file_loads_to_the_same_tensors(
    form: str, world: World, site: Path, sd1_model_dir: Path, tmp_path: Path
) -> None:
    model = other_weights(sd1_model_dir, tmp_path / "other")
    FORMS[form](model, site / form)
    imported = await world.import_file(form)
    assert imported.checkpoint is None
    found, expected = await world.state(imported.model), state_of(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    base = state_of(sd1_model_dir)
    assert not torch.equal(found["unet.conv_in.weight"], base["unet.conv_in.weight"])
    assert imported.model.project_id == PROJECT
    again = await world.import_file(form)
    assert again.model.manifest_digest == imported.model.manifest_digest
    assert not list((tmp_path / "work").iterdir()), "nothing is left on the way"


@pytest.mark.parametrize("page", ["{name}", "{hub}/{name}", "{hub}/{name}/tree/v1"])
async def test_a_repository_of_the_hub_loads_to_the_same_tensors(
    page: str, world: World, sd1_model_dir: Path
) -> None:
    imported = await world.import_address(page.format(name=REPO, hub=world.hub_page))
    found, expected = await world.state(imported.model), state_of(sd1_model_dir)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


async def test_a_folder_and_a_revision_of_a_repository_are_obeyed(world: World, hub: Hub) -> None:
    imported = await world.import_address(REPO, revision="v1", subfolder="pipeline")
    [index] = [c for c in imported.model.manifest.components if c.path == "model_index.json"]
    assert b"Another" in await world.blobs.read_small(index.key, 1000)
    assert all(path.startswith("pipeline/") for path in hub.fetched)
    with pytest.raises(BadInput, match=r"hub_subfolder: the repository .* in the folder elsewhere"):
        await world.import_address(REPO, subfolder="elsewhere")
    with pytest.raises(BadInput, match="resume_checkpoint_url: the hub has no model"):
        await world.import_address(REPO, revision="none")


async def test_a_folder_of_an_archive_is_obeyed(world: World, site: Path, sd1_model_dir: Path) -> None:
    with zipfile.ZipFile(site / "two.zip", "w") as archive:
        for top in ("one", "two"):
            for file in sorted(file for file in sd1_model_dir.rglob("*") if file.is_file()):
                archive.write(file, f"{top}/{file.relative_to(sd1_model_dir).as_posix()}")
    with pytest.raises(BadInput, match="several pipelines: name one of the folders one/, two/"):
        await world.import_file("two.zip")
    assert (await world.import_file("two.zip", subfolder="two")).model.manifest.components
    with pytest.raises(BadInput, match=r"hub_subfolder: the archive has no model_index.json in the folder x"):
        await world.import_file("two.zip", subfolder="x")


async def test_a_published_checkpoint_is_stored_as_it_was_written(
    world: World, site: Path, tmp_path: Path
) -> None:
    weight = torch.nn.Parameter(torch.randn(8))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.randn(8)
    optimizer.step()
    captured = checkpoints.capture({"w": weight}, optimizer, step=5, state={"configuration": {}})
    checkpoints.pack(checkpoints.write(tmp_path / "kept", captured), site / "checkpoint.zip")
    imported = await world.import_file("checkpoint.zip")
    assert imported.model.model == "base"
    assert imported.checkpoint is not None
    assert imported.checkpoint.step == 5
    document = json.loads(await world.blobs.read_small(imported.checkpoint.manifest_key, 10_000))
    (tmp_path / "back").mkdir()
    for file in document["files"]:
        (tmp_path / "back" / file["name"]).write_bytes(await world.blobs.read_small(file["key"], 1 << 20))
    back = checkpoints.read(tmp_path / "back")
    assert torch.equal(back.weights["w"], weight)
    assert back.optimizer.keys() == captured.optimizer.keys()


class Program:
    """Pickles as a call."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self._mark,)


async def test_a_pickle_with_a_call_is_refused_and_nothing_is_called(
    world: World, site: Path, tmp_path: Path
) -> None:
    torch.save({"state_dict": {"model.diffusion_model.x": Program(tmp_path / "mark")}}, site / "a.ckpt")
    with pytest.raises(BadInput, match=r"resume_checkpoint_url: .* only tensors are read"):
        await world.import_file("a.ckpt")
    assert not (tmp_path / "mark").exists()


async def test_what_is_no_model_is_refused_by_a_sentence_that_says_what_is_wrong(
    world: World, site: Path, sd1_model_dir: Path
) -> None:
    (site / "text").write_text("<html>not found</html>")
    torch.save({"a": 1}, site / "old.ckpt", _use_new_zipfile_serialization=False)
    zipped(site / "pictures.zip", site)
    zipped(site / "bare.zip", sd1_model_dir, leave=["diffusion_pytorch_model.safetensors"])
    with zipfile.ZipFile(site / "outside.zip", "w") as archive:
        archive.writestr("../model_index.json", "{}")
    wrong = {
        "text": "neither a .safetensors nor a zip",
        "old.ckpt": "torch 1.6 or later",
        "pictures.zip": "no diffusers folder: it has no model_index.json",
        "bare.zip": "no weights in safetensors for its unet",
        "outside.zip": "leads outside",
        "absent": "404",
    }
    for name, sentence in wrong.items():
        with pytest.raises(BadInput, match=f"resume_checkpoint_url: .*{sentence}"):
            await world.import_file(name)
    with pytest.raises(BadInput, match="revision: only a repository"):
        await world.import_file("text", revision="main")


async def test_a_single_file_of_another_architecture_than_the_base_is_refused(
    world: World, site: Path, sd1_model_dir: Path
) -> None:
    save_single_file(load_components(sd1_model_dir), site / "a.safetensors")
    base = await world.registry.get("", "base")
    config = [c for c in base.manifest.components if c.path != "unet/config.json"]
    text = json.loads((sd1_model_dir / "unet" / "config.json").read_text())
    blob = await world.blobs.put_bytes(
        "", json.dumps({**text, "cross_attention_dim": 999}).encode(), "application/json"
    )
    config.append(
        ModelComponent(path="unet/config.json", key=blob.key, digest=blob.digest, size_bytes=blob.size_bytes)
    )
    other_base = await world.registry.register(
        "", "wide", ModelManifest(format=MODEL_FORMAT_DIFFUSERS, components=config)
    )
    with pytest.raises(BadInput, match="the file and its config are of different models"):
        await world.importer.import_model(PROJECT, Wanted(f"{world.origin}/a.safetensors", other_base))


@pytest.mark.parametrize("limits", [ModelLimits(max_bytes=1000)], ids=[""])
async def test_more_than_the_operator_allows_is_not_fetched(
    world: World, site: Path, sd1_model_dir: Path
) -> None:
    save_single_file(load_components(sd1_model_dir), site / "a.safetensors")
    with pytest.raises(BadInput, match="1000 bytes"):
        await world.import_file("a.safetensors")
    with pytest.raises(BadInput, match="take more than 1000 bytes"):
        await world.import_address(REPO)


async def test_addresses_on_private_networks_are_not_gone_to(hub: Hub, tmp_path: Path, world: World) -> None:
    closed = World(tmp_path / "closed", world.origin, hub, ModelLimits(), "192.0.2.0/24")
    base = await world.registry.get("", "base")
    with pytest.raises(EgressRefused, match="resume_checkpoint_url"):
        await closed.importer.import_model(PROJECT, Wanted(f"{world.origin}/a.zip", base))
