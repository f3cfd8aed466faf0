"""The confined process that opens models from users' addresses; run as a module, once per import.

It is told of one fetched file and of an empty folder, puts what counts of the file there, and says what it was:

    single      `model.safetensors`, the original layout; of a `.ckpt` its tensors alone
    folder      a diffusers folder out of a zip archive
    checkpoint  the state of a training as this service publishes it
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final

from services.adapters.child_process import ParentLink
from services.domain.artifacts import SINGLE_FILE_NAME
from services.domain.errors import BadInput
from services.storage import torch_files
from services.storage.archives import (
    ArchiveLimits,
    ArchiveRefused,
    Entry,
    EntryRefused,
    extract_entry,
    list_entries,
    open_archive,
)
from services.storage.model_files import TAKEN_SUFFIXES, read_header
from services.storage.sandbox import SandboxLimits, allow_cpu_seconds, confine

SINGLE, FOLDER, CHECKPOINT = "single", "folder", "checkpoint"
CHECKPOINT_FILES: Final = frozenset(
    {"average.safetensors", "manifest.json", "optimizer.safetensors", "state.json", "weights.safetensors"}
)
REQUIRED_FILES: Final = CHECKPOINT_FILES - {"average.safetensors"}
_ZIP: Final = b"PK\x03\x04"
_INDEX: Final = "model_index.json"


@dataclass(frozen=True, slots=True)
class OpenTask:
    """What the process is to do.

    Attributes:
        file: what was fetched.
        folder: where its contents go; empty.
        subfolder: folder inside an archive that holds the pipeline; empty: wherever its `model_index.json` is.
        cpu_s: computing time.
    """

    file: str
    folder: str
    subfolder: str = ""
    cpu_s: int = 900
    archive_limits: ArchiveLimits = field(default_factory=ArchiveLimits)
    sandbox_limits: SandboxLimits = field(default_factory=SandboxLimits)

    def to_message(self) -> dict[str, Any]:
        """The command that the process takes."""
        return asdict(self)

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> "OpenTask":
        """Reads the command."""
        limits = {
            "archive_limits": ArchiveLimits(**message["archive_limits"]),
            "sandbox_limits": SandboxLimits(**message["sandbox_limits"]),
        }
        return cls(**message | limits)


def run(task: OpenTask) -> str:
    """Does the task; returns what the file is.

    Raises:
        BadInput: nothing that is known, or refused.
    """
    file, folder = Path(task.file), Path(task.folder)
    with file.open("rb") as opened:
        is_zip = opened.read(len(_ZIP)) == _ZIP
    if is_zip:
        try:
            return _open_zip(task, file, folder)
        except (ArchiveRefused, EntryRefused) as error:
            raise BadInput(f"the archive cannot be used: {error}") from error
    try:
        read_header(file)
    except BadInput as error:
        raise BadInput(
            "the file is neither a .safetensors nor a zip archive, nor a .ckpt that torch 1.6 or later has written"
        ) from error
    file.rename(folder / SINGLE_FILE_NAME)
    return SINGLE


def _open_zip(task: OpenTask, file: Path, folder: Path) -> str:
    archive = open_archive(file)
    listing = list_entries(archive, task.archive_limits)
    if torch_files.is_torch_archive(archive):
        torch_files.convert(archive, folder / SINGLE_FILE_NAME)
        return SINGLE
    names = {entry.id for entry in listing.entries}
    if names >= REQUIRED_FILES:
        wanted = [entry for entry in listing.entries if entry.id in CHECKPOINT_FILES]
        root, kind = "", CHECKPOINT
    else:
        root, kind = _pipeline_root(names, task.subfolder), FOLDER
        wanted = [entry for entry in listing.entries if _counts(entry, root)]
    for entry in wanted:
        target = folder / entry.id.removeprefix(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        extract_entry(archive, entry, task.archive_limits, target)
    return kind


def _pipeline_root(names: set[str], subfolder: str) -> str:
    """The folder of the pipeline, with its slash."""
    if subfolder:
        root = subfolder.strip("/") + "/"
        if root + _INDEX not in names:
            raise BadInput(f"the archive has no {_INDEX} in the folder {subfolder}", "hub_subfolder")
        return root
    roots = sorted(
        (name.removesuffix(_INDEX) for name in names if PurePosixPath(name).name == _INDEX),
        key=lambda root: (root.count("/"), root),
    )
    if not roots:
        raise BadInput(f"the archive is no diffusers folder: it has no {_INDEX}")
    if len(roots) > 1 and roots[0].count("/") == roots[1].count("/"):
        raise BadInput(f"the archive has several pipelines: name one of the folders {', '.join(roots)}")
    return roots[0]


def _counts(entry: Entry, root: str) -> bool:
    return entry.id.startswith(root) and PurePosixPath(entry.id).suffix in TAKEN_SUFFIXES


def main() -> None:
    """Takes the task, confines itself, works, reports."""
    link = ParentLink.from_environ()
    task = OpenTask.from_message(next(link.commands()))
    link.emit({"event": "ready", "confined": confine(task.sandbox_limits)})
    allow_cpu_seconds(task.cpu_s)
    try:
        link.emit({"event": "opened", "kind": run(task)})
    except BadInput as error:
        violation = error.violations[0]
        link.emit({"event": "refused", "why": violation.rule, "field": violation.field})
    except MemoryError:
        link.emit({"event": "refused", "why": "opening the file takes too much memory", "field": ""})
    except OSError as error:  # the disk is full, or the folder is gone: not the file's fault
        link.emit({"event": "fault", "why": str(error)})


if __name__ == "__main__":
    main()
