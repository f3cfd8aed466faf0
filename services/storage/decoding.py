"""Has users' files decoded in a confined process, and outlives whatever happens to it.

Owns the process's deadlines and what a dead process means: the file it was at is skipped, and another process goes on
with the next. The work itself is in :mod:`services.storage.decode_child`.
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from services.adapters.child_process import ChildDied, ChildHung, ChildProcess
from services.domain.errors import BadInput, Unavailable
from services.storage.captions import Description, Source
from services.storage.decode_child import DecodeTask
from services.storage.images import RefusalKind

logger = logging.getLogger(__name__)

CHILD_MODULE = "services.storage.decode_child"


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """What one import may cost.

    Attributes:
        image_silence_s: longest time for one picture, by the clock on the wall.
        total_s: longest time for all of them.
        max_output_bytes: all PNGs together, on the disk of this service.
        max_deaths: so many files may kill the process; then the whole import is refused.
    """

    image_silence_s: float = 120.0
    total_s: float = 1800.0
    max_output_bytes: int = 16 << 30
    max_deaths: int = 3


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """One picture, as a PNG file.

    Attributes:
        id: path inside the archive.
        path: the PNG.
        digest: sha256 of the PNG, 64 hexadecimal digits; equal for equal pixels.
        type_name: type it was read from.
        description: what files beside it, or its name, say of it; None when that was not asked for.
        changes: what was changed beyond the ordinary, as sentence parts.
        faults: what in those files was not understood, likewise.
    """

    id: str
    path: Path
    digest: str
    size_bytes: int
    width_px: int
    height_px: int
    type_name: str
    description: Description | None = None
    changes: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()

    @property
    def caption(self) -> str | None:
        """The text that files give the picture; None without any: its name is not among them."""
        found = self.description
        return None if found is None or found.source in (None, Source.FILE_NAME) else found.caption


@dataclass(frozen=True, slots=True)
class SkippedFile:
    """One file that did not become a picture, and why, as a sentence part."""

    id: str
    kind: RefusalKind
    why: str


@dataclass(slots=True)
class Decoded:
    """What a source held, in the order of ids.

    Attributes:
        ignored: files that nobody meant as pictures.
        remarks: ids of files that speak of folders and were not wholly understood, with what was wrong.
    """

    images: list[DecodedImage] = field(default_factory=list)
    skipped: list[SkippedFile] = field(default_factory=list)
    ignored: int = 0
    remarks: list[tuple[str, str]] = field(default_factory=list)


class _Progress:
    """What is known of a task across the deaths of its processes."""

    def __init__(self) -> None:
        self.decoded = Decoded()
        self.current: tuple[int, str] | None = None
        self.next_index = 0
        self.output_bytes = 0
        self.ready = False
        self.listed = False

    def note(self, event: Mapping[str, Any], limits: DecodeLimits) -> None:
        """Takes in one event of the process."""
        match event["event"]:
            case "ready":
                self.ready = True
                if not event["confined"]:
                    logger.warning("the decoder's system calls cannot be filtered on this platform")
            case "refused":
                raise BadInput(event["why"])
            case "fault":
                raise Unavailable("pictures cannot be decoded at the moment")
            case "listed":
                self.listed = True
                self.decoded.ignored = event["ignored"]
                self.decoded.remarks = [(name, why) for name, why in event["remarks"]]
            case "start":
                self.current = (event["index"], event["id"])
            case "skip":
                self.skip(event["index"], event["id"], RefusalKind(event["kind"]), event["why"])
            case "image":
                self._take(event, limits)

    def skip(self, index: int, name: str, kind: RefusalKind, why: str) -> None:
        """Counts a file out."""
        self._done_with(index)
        self.decoded.skipped.append(SkippedFile(name, kind, why))

    def _done_with(self, index: int) -> None:
        self.current, self.next_index = None, index + 1

    def _take(self, event: Mapping[str, Any], limits: DecodeLimits) -> None:
        self._done_with(event["index"])
        self.output_bytes += event["size_bytes"]
        if self.output_bytes > limits.max_output_bytes:
            raise BadInput(f"the pictures take more than {limits.max_output_bytes} bytes")
        names = ("id", "digest", "size_bytes", "width_px", "height_px")
        said = event["description"]
        self.decoded.images.append(
            DecodedImage(
                **{name: event[name] for name in names},
                path=Path(event["path"]),
                type_name=event["type"],
                description=None if said is None else Description.from_message(said),
                changes=tuple(event["changes"]),
                faults=tuple(event["faults"]),
            )
        )


async def decode(task: DecodeTask, limits: DecodeLimits | None = None) -> Decoded:
    """Decodes all pictures of an archive, or of a list of files.

    Args:
        task: what to decode, and where the PNGs go.
        limits: what it may cost.

    Returns:
        Pictures and skipped files, each in the order of ids.

    Raises:
        BadInput: the archive is refused, or decoding takes too long or too much room.
        Unavailable: this service cannot decode at the moment, whatever the input.
    """
    limits = limits or DecodeLimits()
    progress = _Progress()
    try:
        async with asyncio.timeout(limits.total_s):
            for _ in range(limits.max_deaths + 1):
                if await _run_child(task, limits, progress):
                    return progress.decoded
                task = replace(task, start=_after_death(progress))
    except TimeoutError as error:
        raise BadInput(f"the pictures cannot be decoded within {limits.total_s:g} s") from error
    raise BadInput("too many of the pictures break the decoder")


async def _run_child(task: DecodeTask, limits: DecodeLimits, progress: _Progress) -> bool:
    """Runs one process; true when it came to the end of its task."""
    async with await ChildProcess.start(CHILD_MODULE, silence_s=limits.image_silence_s) as child:
        await child.send(task.to_message())
        try:
            async for event in child.events():
                progress.note(event, limits)
        except ChildDied as death:
            details = {"detail": str(death), "output": death.output, "hung": isinstance(death, ChildHung)}
            logger.warning("decoder died", extra=details)
            return False
    return True


def _after_death(progress: _Progress) -> int:
    """Blames the file the process was at, if it was at one, and returns the index to go on with."""
    if not progress.ready:
        raise Unavailable("pictures cannot be decoded at the moment")
    if not progress.listed:
        raise BadInput("the archive cannot be read")
    if progress.current is not None:
        progress.skip(*progress.current, RefusalKind.UNREADABLE, "breaks the decoder")
    return progress.next_index
