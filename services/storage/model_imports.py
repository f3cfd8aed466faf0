"""Models from users' addresses: fetched, opened in a confined process, checked, stored.

An address leads to a single file in the original layout, a zip of a diffusers folder, a checkpoint that this service
has published, or a repository of the model hub. Files come through :mod:`services.adapters.egress`; the hub's library
goes to the hub and nowhere else. What a file alone does not say (configs, tokenizer, scheduler) is taken from the base
model that the caller names.
"""

import asyncio
import contextlib
import json
import logging
import shutil
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from likeness.storage.v1.model_pb2 import (
    MODEL_FORMAT_DIFFUSERS,
    MODEL_FORMAT_SINGLE_FILE,
    Model,
    ModelComponent,
    ModelManifest,
)
from likeness.training.v1.training_job_pb2 import CheckpointRef

from services.adapters.child_process import ChildDied, ChildProcess
from services.adapters.egress import Egress, with_field
from services.domain.artifacts import SINGLE_FILE_CONFIG, SINGLE_FILE_NAME, media_type_of
from services.domain.errors import BadInput, InvalidSpec, Unavailable
from services.storage import hub
from services.storage.archives import ArchiveLimits
from services.storage.blobs import Blobs
from services.storage.model_child import CHECKPOINT, FOLDER, OpenTask
from services.storage.model_files import MAX_CONFIG_BYTES, WEIGHTS, ModelFiles, describe, list_files
from services.storage.registry import ModelRegistry
from services.storage.sandbox import SandboxLimits

logger = logging.getLogger(__name__)

CHILD_MODULE: Final = "services.storage.model_child"
FIELD: Final = "resume_checkpoint_url"
MAX_FILES: Final = 1000
MAX_TEXT_BYTES: Final = 64 << 20
"""A config, tokenizer or scheduler file of the base model."""


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What one import may cost.

    Attributes:
        max_bytes: a file as it is fetched, and all it unpacks to.
        fetch_timeout_s: for one file, redirects and retries included.
        open_timeout_s: for opening it.
    """

    max_bytes: int = 16 << 30
    fetch_timeout_s: float = 1500.0
    open_timeout_s: float = 900.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to import.

    Attributes:
        address: http or https, or a repository of the hub as `OWNER/NAME`.
        base: the model that has what a single file lacks; a checkpoint is one of a training of it.
        revision: of a repository; empty: its default.
        subfolder: in a repository or an archive; empty: its root.
    """

    address: str
    base: Model
    revision: str = ""
    subfolder: str = ""


@dataclass(frozen=True, slots=True)
class Imported:
    """What came of it: a model to begin with, and the state of a training to go on with, if that is what it was."""

    model: Model
    checkpoint: CheckpointRef | None = None


class ModelImporter:
    """Imports models from addresses.

    Args:
        blobs: where files go.
        registry: where models go.
        egress: the way to users' addresses.
        work: folder for files on their way, on the store's file system where that can be.
        hub_endpoint: address of the model hub; None: its own.
        limits: what one import may cost.
    """

    def __init__(
        self,
        blobs: Blobs,
        registry: ModelRegistry,
        egress: Egress,
        work: Path,
        hub_endpoint: str | None = None,
        limits: ModelLimits = ModelLimits(),
    ) -> None:
        self._blobs = blobs
        self._registry = registry
        self._egress = egress
        self._work = work
        self._hub_endpoint = hub_endpoint
        self._limits = limits
        self._turn = asyncio.Semaphore(1)

    async def import_model(self, project: str, wanted: Wanted) -> Imported:
        """Imports one model; the same contents give the same model.

        Raises:
            BadInput, EgressRefused: the address, or what it leads to, cannot be used; they name the field.
            Unavailable: the hub, or this service's reader, does not answer at the moment.
        """
        try:
            async with self._turn, self._folder() as folder:
                return await self._imported(project, wanted, folder)
        except InvalidSpec as error:
            raise error if error.violations[0].field else with_field(error, FIELD) from error
        except RecursionError as error:
            raise BadInput("a configuration is nested too deeply", FIELD) from error

    async def _imported(self, project: str, wanted: Wanted, folder: Path) -> Imported:
        repository = await asyncio.to_thread(hub.repository_of, wanted.address, self._hub_endpoint)
        if repository is not None:
            name, revision = repository
            files = await self._from_hub(name, wanted.revision or revision, wanted.subfolder, folder / "hub")
            return Imported(await self._stored_model(project, files, wanted))
        if wanted.revision:
            raise BadInput("only a repository of the model hub has revisions", "revision")
        opened = folder / "opened"
        opened.mkdir()
        kind = await self._fetched(wanted, folder / "fetched", opened)
        if kind == CHECKPOINT:
            return Imported(wanted.base, await self._stored_checkpoint(project, opened))
        if kind == FOLDER:
            return Imported(await self._stored_model(project, list_files(opened), wanted))
        config = folder / "config"
        await self._write_config(wanted.base, config)
        files = list_files(opened / SINGLE_FILE_NAME, config)
        return Imported(await self._stored_model(project, files, wanted))

    @contextlib.asynccontextmanager
    async def _folder(self) -> AsyncIterator[Path]:
        await asyncio.to_thread(self._work.mkdir, parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="model-", dir=self._work))
        try:
            yield folder
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _from_hub(self, name: str, revision: str, subfolder: str, folder: Path) -> ModelFiles:
        full = f"{name}@{revision}" if revision else name
        source = await hub.download(
            full, folder, self._hub_endpoint, subfolder=subfolder, max_bytes=self._limits.max_bytes
        )
        logger.info("model downloaded", extra={"source": source})
        root = folder / subfolder.strip("/")
        if not (root / "model_index.json").is_file():
            where = f"in the folder {subfolder}" if subfolder else "at its root"
            raise BadInput(f"the repository {name} has no model_index.json {where}", "hub_subfolder")
        return await asyncio.to_thread(list_files, root)

    async def _fetched(self, wanted: Wanted, file: Path, opened: Path) -> str:
        """Fetches the address's file and has it opened; returns what it is."""
        limits = self._limits
        await self._egress.fetch_to_file(
            wanted.address, file, max_bytes=limits.max_bytes, total_timeout_s=limits.fetch_timeout_s
        )
        task = OpenTask(
            str(file),
            str(opened),
            wanted.subfolder,
            archive_limits=ArchiveLimits(
                max_files=MAX_FILES, max_unpacked_bytes=limits.max_bytes, max_entry_bytes=limits.max_bytes
            ),
            sandbox_limits=SandboxLimits(file_bytes=limits.max_bytes),
        )
        return await _opened(task, limits.open_timeout_s)

    async def _write_config(self, base: Model, folder: Path) -> None:
        """Writes configs, tokenizer and scheduler of the base model as a diffusers folder without weights."""
        for component in base.manifest.components:
            name = component.path.removeprefix(f"{SINGLE_FILE_CONFIG}/")
            if name.endswith(WEIGHTS) or component.size_bytes > MAX_TEXT_BYTES:
                continue
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            data = await self._blobs.read_small(component.key, MAX_TEXT_BYTES)
            await asyncio.to_thread(target.write_bytes, data)

    async def _stored_model(self, project: str, files: ModelFiles, wanted: Wanted) -> Model:
        traits = await asyncio.to_thread(describe, files)
        components = []
        for name, path in files.paths.items():
            blob = await self._blobs.put_file(project, path, media_type_of(name))
            components.append(
                ModelComponent(path=name, key=blob.key, digest=blob.digest, size_bytes=blob.size_bytes)
            )
        manifest = ModelManifest(
            format=MODEL_FORMAT_SINGLE_FILE if files.is_single else MODEL_FORMAT_DIFFUSERS,
            family=traits.family,
            components=components,
            native_size_px=traits.native_size_px,
            note="imported from an address",
        )
        digest = self._registry.digest_of(manifest)
        return await self._registry.register(project, f"imported-{digest[:24]}", manifest)

    async def _stored_checkpoint(self, project: str, folder: Path) -> CheckpointRef:
        """Stores a checkpoint as the trainer's workers store theirs."""
        try:
            manifest = folder / "manifest.json"
            if manifest.stat().st_size > MAX_CONFIG_BYTES:
                raise BadInput("the checkpoint's manifest is too long")
            step = int(json.loads(manifest.read_bytes())["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput("the checkpoint's manifest cannot be read") from error
        files = []
        for path in await asyncio.to_thread(_files_in, folder):
            blob = await self._blobs.put_file(project, path, media_type_of(path.name))
            files.append({"name": path.name, "key": blob.key, "size_bytes": blob.size_bytes})
        document = {"job": "", "step": step, "folder": "start", "files": files, "before": ""}
        data = json.dumps(document, sort_keys=True).encode()
        stored = await self._blobs.put_bytes(project, data, "application/json")
        return CheckpointRef(manifest_key=stored.key, step=step)


def _files_in(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


async def _opened(task: OpenTask, timeout_s: float) -> str:
    try:
        async with (
            asyncio.timeout(timeout_s),
            await ChildProcess.start(CHILD_MODULE, silence_s=timeout_s) as child,
        ):
            await child.send(task.to_message())
            async for event in child.events():
                match event["event"]:
                    case "ready" if not event["confined"]:
                        logger.warning("the reader's system calls cannot be filtered on this platform")
                    case "refused":
                        raise BadInput(event["why"], event["field"])
                    case "fault":
                        raise Unavailable("models cannot be opened at the moment")
                    case "opened":
                        return str(event["kind"])
    except TimeoutError as error:
        raise BadInput(f"the file cannot be opened within {timeout_s:g} s") from error
    except ChildDied as death:
        logger.warning("reader died", extra={"detail": str(death), "output": death.output})
        raise BadInput("the file breaks the reader") from death
    raise BadInput("the file breaks the reader")
