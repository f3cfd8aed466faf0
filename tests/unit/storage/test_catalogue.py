import asyncio
from pathlib import Path

import pytest
from likeness.storage.v1.artifact_pb2 import Blob
from likeness.storage.v1.model_pb2 import (
    MODEL_FORMAT_DIFFUSERS,
    MODEL_FORMAT_EMBEDDING,
    MODEL_FORMAT_LORA,
    MODEL_FORMAT_SINGLE_FILE,
    ModelManifest,
)

from services.adapters.memory_artifacts import InMemoryArtifactStore
from services.domain.add_ons import embedding_fault, lora_fault
from services.domain.errors import BadInput, InvalidSpec, NotFound
from services.storage.blobs import Blobs
from services.storage.catalogue import (
    DEFAULT_CATALOGUE,
    EMBEDDED_WEIGHTS,
    Catalogue,
    CatalogueEntry,
    CataloguePlaces,
    read_catalogue,
)
from services.storage.documents import Documents
from services.storage.model_files import describe, list_files
from services.storage.registry import ModelRegistry
from tests.unit.storage.model_folders import write_model_folder, write_single_file


class CountingBlobs(Blobs):
    """Knows how many files were hashed and stored."""

    files = 0

    async def put_file(self, project: str, path: Path, media_type: str) -> Blob:
        self.files += 1
        return await super().put_file(project, path, media_type)


class World:
    """A store in memory, a home on disk."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.embedded = home / "shipped"
        self.store = InMemoryArtifactStore()
        self.blobs = CountingBlobs(self.store, home / "work")
        self.registry = ModelRegistry(self.blobs, Documents(self.store), lambda: 1_700_000_000_000, "pocket")

    def catalogue(self, **entries: CatalogueEntry) -> Catalogue:
        places = CataloguePlaces(self.home / "work", embedded=self.embedded)
        return Catalogue(
            entries or DEFAULT_CATALOGUE, self.registry, self.blobs, Documents(self.store), places
        )

    async def start(self, **entries: CatalogueEntry) -> int:
        """Runs a catalogue's start; returns how many files it stored."""
        before = self.blobs.files
        await self.catalogue(**entries).run()
        return self.blobs.files - before


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def entry_of(path: Path, **fields: object) -> CatalogueEntry:
    return CatalogueEntry(source=f"file:{path}", **fields)  # type: ignore[arg-type]


async def test_the_embedded_model_is_imported_by_default(world: World) -> None:
    write_model_folder(world.embedded)
    assert await world.start() == 10
    model = await world.registry.get("dev", "")
    assert (model.model, model.project_id, model.display_name) == ("pocket", "", "Pocket")
    assert (model.manifest.format, model.manifest.native_size_px) == (MODEL_FORMAT_DIFFUSERS, 512)
    assert model.manifest.training_defaults.full_learning_rate == 3e-4
    assert model.manifest.training_defaults.num_class_images == 48
    assert len(model.manifest.components) == 10
    for component in model.manifest.components:
        assert component.key.startswith("shared/blobs/sha256/")
        stored = await world.blobs.read_small(component.key, 10_000)
        assert stored == (world.embedded / component.path).read_bytes()


def test_the_model_that_ships_lies_beside_the_services() -> None:
    assert EMBEDDED_WEIGHTS.parts[-3:] == ("models", "pocket", "weights")
    assert (EMBEDDED_WEIGHTS.parents[2] / "services" / "storage" / "catalogue.py").is_file()
    traits = describe(list_files(EMBEDDED_WEIGHTS))
    assert traits.native_size_px == DEFAULT_CATALOGUE["pocket"].native_size_px


async def test_embedded_means_the_same_model_under_any_id(world: World) -> None:
    write_model_folder(world.embedded)
    await world.start(mine=CatalogueEntry(source="embedded"))
    assert len((await world.registry.get("", "mine")).manifest.components) == 10


async def test_an_installation_without_the_embedded_model_says_what_to_do(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    catalogue = world.catalogue()
    await catalogue.run()
    assert "not imported: the embedded model is missing" in caplog.text
    with pytest.raises(BadInput, match=r"models/pocket/weights .* LIKENESS_MODELS and LIKENESS_BASE_MODEL"):
        await catalogue.ensure("pocket")


async def test_a_home_with_an_earlier_embedded_model_gets_the_one_that_ships(world: World) -> None:
    random = write_model_folder(world.home / "models/pocket")
    await world.start(pocket=CatalogueEntry(source=f"file:{random}", note="random weights"))
    write_model_folder(world.embedded, fill=b"\1")
    assert await world.start() == 10
    model = await world.registry.get("dev", "")
    unet = next(c for c in model.manifest.components if c.path == "unet/diffusion_pytorch_model.safetensors")
    assert await world.blobs.read_small(unet.key, 10_000) == (world.embedded / unet.path).read_bytes()
    assert "random" not in model.manifest.note


async def test_an_unchanged_model_is_not_read_again(world: World) -> None:
    write_model_folder(world.embedded)
    await world.start()
    before = await world.registry.get("", "pocket")
    assert await world.start() == 0
    assert await world.registry.get("", "pocket") == before


async def test_a_changed_model_is_imported_again(world: World) -> None:
    write_model_folder(world.embedded)
    await world.start()
    before = await world.registry.get("", "pocket")
    write_model_folder(world.embedded, fill=b"\1")
    assert await world.start() == 10
    after = await world.registry.get("", "pocket")
    changed = {c.path for c in after.manifest.components} - {
        c.path for c in after.manifest.components if c in before.manifest.components
    }
    assert changed == {"unet/diffusion_pytorch_model.safetensors"}
    assert (await world.registry.get("", before.manifest_digest)).manifest == before.manifest


async def test_what_an_entry_says_goes_into_the_manifest(world: World) -> None:
    toml = world.home / "models.toml"
    toml.write_text(
        f"""
        ["sd-1.5"]
        source = "file:{write_model_folder(world.home / "sd")}"
        display_name = "Stable Diffusion"
        family = "sd1"
        license = "openrail"
        trigger_words = ["sks"]
        aliases = ["sd15"]
        native_size_px = 512
        clip_skip = 1
        note = "a remark"
        ["sd-1.5".training_defaults]
        full_learning_rate = 2e-6
        lora_rank = 8
        """
    )
    await world.start(**read_catalogue(toml))
    model = await world.registry.get("dev", "sd15")
    manifest = model.manifest
    assert (model.model, model.display_name, list(model.aliases)) == ("sd-1.5", "Stable Diffusion", ["sd15"])
    assert (manifest.family, manifest.license, manifest.native_size_px) == ("sd1", "openrail", 512)
    assert (manifest.clip_skip, manifest.note, list(manifest.trigger_words)) == (1, "a remark", ["sks"])
    assert manifest.training_defaults.full_learning_rate == 2e-6
    assert manifest.training_defaults.lora_rank == 8


async def test_a_changed_entry_is_imported_again(world: World) -> None:
    folder = write_model_folder(world.home / "m")
    await world.start(m=entry_of(folder))
    await world.start(m=entry_of(folder, note="new"))
    assert (await world.registry.get("", "m")).manifest.note == "new"


async def test_a_changed_alias_alone_takes_effect(world: World) -> None:
    folder = write_model_folder(world.home / "m")
    await world.start(m=entry_of(folder))
    await world.start(m=entry_of(folder, aliases=("n",)))
    assert (await world.registry.get("", "n")).model == "m"


async def test_a_single_file_is_a_model_together_with_its_config(world: World) -> None:
    path = write_single_file(world.home / "x.safetensors")
    config = write_model_folder(world.home / "configs")
    assert await world.start(x=entry_of(path, config=f"file:{config}")) == 8
    manifest = (await world.registry.get("", "x")).manifest
    assert (manifest.format, manifest.native_size_px) == (MODEL_FORMAT_SINGLE_FILE, 64)
    paths = [component.path for component in manifest.components]
    assert paths[-1] == "model.safetensors"
    assert "config/tokenizer/vocab.json" in paths
    assert not any(name.startswith("config/") and name.endswith(".safetensors") for name in paths)


async def test_a_changed_config_of_a_single_file_is_imported_again(world: World) -> None:
    path = write_single_file(world.home / "x.safetensors")
    config = write_model_folder(world.home / "configs")
    entry = entry_of(path, config=f"file:{config}")
    await world.start(x=entry)
    assert await world.start(x=entry) == 0
    (config / "scheduler/scheduler_config.json").write_text('{"beta_start": 0.25}')
    assert await world.start(x=entry) == 8


async def test_loras_and_embeddings_are_files_of_their_own(world: World) -> None:
    files = [world.home / "grain.safetensors", world.home / "rex.pt"]
    for file in files:
        file.write_bytes(file.name.encode())
    lora = entry_of(files[0], kind="lora", family="sd1")
    await world.start(grain=lora, rex=entry_of(files[1], kind="embedding", trigger_words=["<rex>"]))
    found = [(await world.registry.get("dev", name)).manifest for name in ("grain", "rex")]
    assert [manifest.format for manifest in found] == [MODEL_FORMAT_LORA, MODEL_FORMAT_EMBEDDING]
    assert [component.path for manifest in found for component in manifest.components] == [
        "lora-000.safetensors",
        "embedding.pt",
    ]
    assert lora_fault(found[0], ModelManifest(family="sd1")) == ""
    assert embedding_fault(found[1], ModelManifest(family="sd1")) == ""


async def test_a_lora_that_is_no_safetensors_file_is_not_imported(world: World) -> None:
    (world.home / "grain.ckpt").write_bytes(b"x")
    catalogue = world.catalogue(grain=entry_of(world.home / "grain.ckpt", kind="lora"))
    await catalogue.run()
    with pytest.raises(BadInput, match=r"no lora at grain\.ckpt"):
        await catalogue.ensure("grain")


async def test_a_model_that_left_the_catalogue_is_unlisted(world: World) -> None:
    folder = write_model_folder(world.home / "m")
    await world.start(m=entry_of(folder), n=entry_of(folder))
    await world.start(n=entry_of(folder))
    with pytest.raises(NotFound):
        await world.registry.get("", "m")
    assert (await world.registry.get("", "n")).model == "n"


async def test_a_missing_model_does_not_keep_the_others_out(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_model_folder(world.home / "m")
    await world.start(gone=entry_of(world.home / "gone"), m=entry_of(folder))
    assert (await world.registry.get("", "m")).model == "m"
    assert "model not imported" in caplog.text


async def test_a_missing_model_is_looked_for_again_when_asked_for(world: World) -> None:
    catalogue = world.catalogue(m=entry_of(world.home / "m"))
    await catalogue.run()
    with pytest.raises(BadInput, match="no model at m"):
        await catalogue.ensure("m")
    write_model_folder(world.home / "m")
    await catalogue.ensure("m")
    assert (await world.registry.get("", "m")).model == "m"


async def test_a_model_whose_folder_went_away_is_kept(world: World) -> None:
    folder = write_model_folder(world.home / "m")
    await world.start(m=entry_of(folder))
    folder.rename(world.home / "elsewhere")
    await world.start(m=entry_of(folder))
    assert (await world.registry.get("", "m")).model == "m"


async def test_callers_wait_for_one_import(world: World) -> None:
    write_model_folder(world.embedded)
    catalogue = world.catalogue()
    await asyncio.gather(catalogue.run(), *(catalogue.ensure("pocket") for _ in range(5)))
    assert world.blobs.files == 10


async def test_names_that_are_not_the_catalogues_are_left_alone(world: World) -> None:
    await world.catalogue().ensure("somebody-elses")
    assert world.blobs.files == 0


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('[m]\nsource = "ftp:x"', "m.source"),
        ("[m]\n", "m.source"),
        ('[m]\nsource = "embedded"\nlicence = "x"', "m.licence"),
        ('[m]\nsource = "embedded"\nnative_size_px = -1', "m.native_size_px"),
        ('["a/b"]\nsource = "embedded"', "a/b"),
        ('[m]\nsource = "embedded"\naliases = ["a/b"]', "m"),
        ('[m]\nsource = "embedded"\n[m.training_defaults]\nrank = 1', "m.training_defaults.rank"),
        ('[m]\nsource = "file:/x.safetensors"', "m"),
        ('[m]\nsource = "file:/x.safetensors"\nconfig = "/y"', "m.config"),
        ('[m]\nsource = "file:/x"\nconfig = "file:/y"', "m"),
        ("m = 1", "m"),
        ("[m", ""),
    ],
)
def test_a_wrong_catalogue_is_refused_naming_the_place(tmp_path: Path, text: str, field: str) -> None:
    path = tmp_path / "models.toml"
    path.write_text(text)
    with pytest.raises(InvalidSpec) as refusal:
        read_catalogue(path)
    assert refusal.value.violations[0].field == field


def test_a_single_file_without_config_is_refused_saying_what_to_add(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text('[m]\nsource = "file:/x.safetensors"')
    with pytest.raises(InvalidSpec, match="`config` must name a diffusers folder"):
        read_catalogue(tmp_path / "models.toml")


def test_a_catalogue_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match=r"models\.toml"):
        read_catalogue(tmp_path / "models.toml")
