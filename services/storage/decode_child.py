"""The confined process that opens users' archives and decodes their pictures; run as a module, once per import.

Takes one command (:class:`DecodeTask`) and answers with events. PNGs go as numbered files into the folder it was
given. It has no network, no secrets and little memory: whatever a crafted file does to a decoder happens here, and
the parent (:mod:`services.storage.decoding`) only sees the end of a process.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from services.adapters.child_process import ParentLink
from services.storage.archives import (
    ArchiveLimits,
    ArchiveRefused,
    Entry,
    EntryRefused,
    list_entries,
    open_archive,
    read_entry,
)
from services.storage.caption_files import MAX_FILE_BYTES, CaptionFiles, DescriptionFault, is_sidecar
from services.storage.captions import Description
from services.storage.images import (
    MAX_PIXELS,
    MIN_SIDE_PX,
    WHITE,
    Colour,
    ImageRefused,
    Picture,
    RefusalKind,
    decode_image,
    is_named_like_a_picture,
    save_png,
)
from services.storage.sandbox import SandboxLimits, allow_cpu_seconds, confine

MAX_REMARKS = 1000
"""So many remarks on files of folders are passed on."""


@dataclass(frozen=True, slots=True)
class DecodeTask:
    """What the process is to do.

    Attributes:
        folder: where the PNGs go; it exists.
        archive: path of a zip archive; empty: `files` are pictures themselves.
        files: (id, path) of single pictures.
        start: index of the first item to decode; the ones before it were done by an earlier process.
        read_captions: also report what the files beside each picture say of it.
        image_cpu_s: computing time for one picture.
        max_pixels: pictures with more are skipped.
        min_side_px: pictures with a shorter side are skipped.
        background: what shows through transparent parts, 8-bit sRGB.
    """

    folder: str
    archive: str = ""
    files: tuple[tuple[str, str], ...] = ()
    start: int = 0
    read_captions: bool = False
    image_cpu_s: int = 60
    max_pixels: int = MAX_PIXELS
    min_side_px: int = MIN_SIDE_PX
    background: Colour = WHITE
    archive_limits: ArchiveLimits = field(default_factory=ArchiveLimits)
    sandbox_limits: SandboxLimits = field(default_factory=SandboxLimits)

    def to_message(self) -> dict[str, Any]:
        """The command that the process takes."""
        return asdict(self)

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> "DecodeTask":
        """Reads the command."""
        return cls(
            **message
            | {
                "files": tuple((name, path) for name, path in message["files"]),
                "background": tuple(message["background"]),
                "archive_limits": ArchiveLimits(**message["archive_limits"]),
                "sandbox_limits": SandboxLimits(**message["sandbox_limits"]),
            }
        )


class Source(Protocol):
    """Where the items come from: an archive's entries or single files."""

    ids: tuple[str, ...]
    ignored: int
    remarks: Sequence[tuple[str, str]]

    def read(self, index: int) -> bytes:
        """One item's bytes. Raises EntryRefused."""
        ...

    def describe(self, index: int) -> tuple[Description, list[str]]:
        """What is said of an item, and warnings about that."""
        ...


class ArchiveSource:
    """Pictures, and what lies beside them, in a zip archive."""

    def __init__(self, task: DecodeTask) -> None:
        self._limits = task.archive_limits
        self._archive = open_archive(Path(task.archive))
        listing = list_entries(self._archive, self._limits)
        self._sidecars = {entry.id: entry for entry in listing.entries if is_sidecar(entry.id)}
        self._entries = tuple(entry for entry in listing.entries if entry.id not in self._sidecars)
        self.ids = tuple(entry.id for entry in self._entries)
        self.ignored = listing.ignored + len(self._sidecars)
        self._captions = CaptionFiles(self._sidecars if task.read_captions else (), self._text)
        self.remarks: Sequence[tuple[str, str]] = self._captions.remarks

    def read(self, index: int) -> bytes:
        """One entry's bytes. Raises EntryRefused."""
        return self._read(self._entries[index])

    def describe(self, index: int) -> tuple[Description, list[str]]:
        """What the texts beside an entry, and its name, say of it, and warnings about them."""
        return self._captions.describe(self.ids[index])

    def _text(self, name: str) -> bytes:
        try:
            return read_entry(
                self._archive, self._sidecars[name], replace(self._limits, max_entry_bytes=MAX_FILE_BYTES)
            )
        except EntryRefused as error:
            raise DescriptionFault(str(error)) from error

    def _read(self, entry: Entry) -> bytes:
        return read_entry(self._archive, entry, self._limits)


class FileSource:
    """Pictures that were fetched one by one."""

    ignored = 0
    remarks: Sequence[tuple[str, str]] = ()

    def __init__(self, task: DecodeTask) -> None:
        self._paths = [Path(path) for _, path in task.files]
        self._max_bytes = task.archive_limits.max_entry_bytes
        self.ids = tuple(name for name, _ in task.files)

    def read(self, index: int) -> bytes:
        """One file's bytes. Raises EntryRefused."""
        if self._paths[index].stat().st_size > self._max_bytes:
            raise EntryRefused(f"is larger than {self._max_bytes} bytes")
        return self._paths[index].read_bytes()

    def describe(self, index: int) -> tuple[Description, list[str]]:
        """Single pictures have nothing beside them, and their addresses are no captions."""
        return Description(), []


def run(task: DecodeTask) -> Iterator[dict[str, Any]]:
    """Does the task, yielding an event for each thing the parent must know.

    Args:
        task: what to do.

    Yields:
        ``refused`` (and nothing after it), or ``listed``, then ``start`` and ``image`` or ``skip`` for each item,
        then ``end``.
    """
    try:
        source: Source = ArchiveSource(task) if task.archive else FileSource(task)
    except ArchiveRefused as error:
        yield {"event": "refused", "why": str(error)}
        return
    remarks = list(source.remarks[:MAX_REMARKS])
    yield {"event": "listed", "total": len(source.ids), "ignored": source.ignored, "remarks": remarks}
    for index in range(task.start, len(source.ids)):
        yield {"event": "start", "index": index, "id": source.ids[index]}
        allow_cpu_seconds(task.image_cpu_s)
        yield _decode_one(task, source, index)
    yield {"event": "end"}


def _decode_one(task: DecodeTask, source: Source, index: int) -> dict[str, Any]:
    name = source.ids[index]
    common = {"index": index, "id": name}
    try:
        picture = decode_image(
            source.read(index),
            max_pixels=task.max_pixels,
            min_side_px=task.min_side_px,
            background=task.background,
        )
        description, faults = source.describe(index) if task.read_captions else (None, [])
        stored = _store(picture, Path(task.folder) / f"{index:06d}.png")
    except ImageRefused as error:
        kind = error.kind
        if kind is RefusalKind.OTHER and is_named_like_a_picture(name):
            kind = RefusalKind.UNREADABLE
        return {"event": "skip", **common, "kind": kind, "why": error.why}
    except EntryRefused as error:
        kind = RefusalKind.UNREADABLE if is_named_like_a_picture(name) else RefusalKind.OTHER
        return {"event": "skip", **common, "kind": kind, "why": str(error)}
    except MemoryError:
        return {"event": "skip", **common, "kind": RefusalKind.UNREADABLE, "why": "needs too much memory"}
    return {
        "event": "image",
        **common,
        **stored,
        "description": None if description is None else description.to_message(),
        "changes": list(picture.warnings),
        "faults": faults,
    }


def _store(picture: Picture, path: Path) -> dict[str, Any]:
    save_png(picture.image, path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "path": str(path),
        "digest": digest,
        "size_bytes": path.stat().st_size,
        "width_px": picture.image.width,
        "height_px": picture.image.height,
        "type": picture.type_name,
    }


def main() -> None:
    """Takes the task, confines itself, works, reports."""
    link = ParentLink.from_environ()
    task = DecodeTask.from_message(next(link.commands()))
    Image.preinit()
    link.emit({"event": "ready", "confined": confine(task.sandbox_limits)})
    allow_cpu_seconds(task.image_cpu_s)
    try:
        for event in run(task):
            link.emit(event)
    except OSError as error:  # the disk is full, or the folder is gone: not the files' fault
        link.emit({"event": "fault", "why": str(error)})


if __name__ == "__main__":
    main()
