"""Users' zip archives: which entries count, which archives are refused, and reading one entry within its limits.

Owns names, order and limits. Nothing is ever written to disk under a name from an archive, so names can only mislead
people, never the file system; they are checked all the same, as they become sample ids.
"""

import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MAX_NAME_CHARS: Final = 1024
CHUNK_BYTES: Final = 1 << 20
RATIO_FLOOR_BYTES: Final = 64 << 20
"""Archives that unpack to less than this are harmless at any ratio."""

_ENCRYPTED: Final = 0x1 | 0x40 | 0x2000
_UTF8: Final = 0x800
_LOCAL_HEADER_BYTES: Final = 30
_IGNORED_NAMES: Final = frozenset({"thumbs.db", "desktop.ini", "__macosx"})
_METHODS: Final = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})
_UNREADABLE: Final = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    RuntimeError,  # zipfile's word for unsupported methods and versions too, as NotImplementedError
    ValueError,  # names that are no text too, as UnicodeError
    IndexError,
    OverflowError,
)
"""What zipfile raises for archives that are broken or of a kind it does not know."""


class ArchiveRefused(Exception):
    """The whole archive is refused; the text is a sentence."""


class EntryRefused(Exception):
    """One entry cannot be read; the text is a sentence part."""


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """How much an archive may hold. Declared sizes and real bytes are both held to it.

    Attributes:
        max_files: entries, ignored ones included.
        max_unpacked_bytes: all entries together.
        max_entry_bytes: one entry.
        max_ratio: unpacked by packed size, looked at beyond 64 MiB unpacked.
    """

    max_files: int = 20_000
    max_unpacked_bytes: int = 8 << 30
    max_entry_bytes: int = 512 << 20
    max_ratio: float = 200.0


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of an archive that counts.

    Attributes:
        id: path inside the archive, slashes, NFC: the sample's id.
        info: what the archive's directory says of it.
    """

    id: str
    info: zipfile.ZipInfo


@dataclass(frozen=True, slots=True)
class Listing:
    """An archive's contents after all checks.

    Attributes:
        entries: sorted by id, so that the order of packing never matters.
        ignored: number of entries that nobody put there on purpose: hidden files, folders' metadata, nested zips.
    """

    entries: tuple[Entry, ...]
    ignored: int


def open_archive(path: Path) -> zipfile.ZipFile:
    """Opens an archive for reading.

    Raises:
        ArchiveRefused: the file is not a zip archive, or its directory is damaged.
    """
    try:
        return zipfile.ZipFile(path)
    except _UNREADABLE as error:
        raise ArchiveRefused("not a zip archive") from error
    except MemoryError as error:
        raise ArchiveRefused("the archive holds too many files") from error


def list_entries(archive: zipfile.ZipFile, limits: ArchiveLimits) -> Listing:
    """Checks an archive's directory and picks the entries that count.

    Args:
        archive: opened by :func:`open_archive`.
        limits: declared sizes are held to them.

    Returns:
        The entries, sorted.

    Raises:
        ArchiveRefused: encrypted entries, dangerous or colliding names, links, overlaps, or a limit is broken.
    """
    infos = archive.infolist()
    _check_amounts(infos, limits)
    _check_overlaps(infos)
    entries: list[Entry] = []
    ignored = 0
    for info in infos:
        name = _checked_name(info)
        if info.is_dir() or not name:
            continue
        if _is_ignored(name):
            ignored += 1
            continue
        entries.append(Entry(name, info))
    _check_collisions(entries)
    return Listing(tuple(sorted(entries, key=lambda entry: entry.id)), ignored)


def read_entry(archive: zipfile.ZipFile, entry: Entry, limits: ArchiveLimits) -> bytes:
    """Unpacks one entry, counting real bytes.

    Raises:
        EntryRefused: the entry is damaged, too large, or packed by a method that is not read.
    """
    return b"".join(_parts(archive, entry, limits))


def extract_entry(archive: zipfile.ZipFile, entry: Entry, limits: ArchiveLimits, path: Path) -> None:
    """Unpacks one entry to a file under a name that the caller answers for; raises as :func:`read_entry`."""
    with path.open("wb") as file:
        for part in _parts(archive, entry, limits):
            file.write(part)


def _parts(archive: zipfile.ZipFile, entry: Entry, limits: ArchiveLimits) -> Iterator[bytes]:
    if entry.info.compress_type not in _METHODS:
        raise EntryRefused("its compression method is not supported")
    if entry.info.file_size > limits.max_entry_bytes:
        raise EntryRefused(f"is larger than {limits.max_entry_bytes} bytes")
    size_bytes = 0
    try:
        with archive.open(entry.info) as stream:
            while part := stream.read(CHUNK_BYTES):
                size_bytes += len(part)
                if size_bytes > min(entry.info.file_size, limits.max_entry_bytes):
                    raise EntryRefused("is larger than it says")
                yield part
    except _UNREADABLE as error:
        raise EntryRefused("is damaged inside the archive") from error
    if size_bytes != entry.info.file_size:
        raise EntryRefused("is truncated inside the archive")


def _check_amounts(infos: Sequence[zipfile.ZipInfo], limits: ArchiveLimits) -> None:
    if len(infos) > limits.max_files:
        raise ArchiveRefused(f"the archive holds more than {limits.max_files} files")
    unpacked = sum(info.file_size for info in infos)
    packed = sum(info.compress_size for info in infos)
    if unpacked > limits.max_unpacked_bytes:
        raise ArchiveRefused(f"the archive unpacks to more than {limits.max_unpacked_bytes} bytes")
    if unpacked > RATIO_FLOOR_BYTES and unpacked > limits.max_ratio * packed:
        raise ArchiveRefused(f"the archive unpacks to more than {limits.max_ratio:g} times its size")


def _check_overlaps(infos: Sequence[zipfile.ZipInfo]) -> None:
    """Refuses entries that share packed bytes: the way to a huge ratio without nesting (Fifield 2019)."""
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < end:
            raise ArchiveRefused("the archive holds overlapping entries")
        end = info.header_offset + _LOCAL_HEADER_BYTES + info.compress_size


def _checked_name(info: zipfile.ZipInfo) -> str:
    """The entry's normalized path; empty for the top folder itself."""
    if info.flag_bits & _ENCRYPTED:
        raise ArchiveRefused("the archive holds encrypted entries")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ArchiveRefused("the archive holds links or special files")
    name = unicodedata.normalize("NFC", _decoded_name(info).replace("\\", "/"))
    if len(name) > MAX_NAME_CHARS or any(unicodedata.category(char) in ("Cc", "Cs") for char in name):
        raise ArchiveRefused("the archive holds an unusable file name")
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or (len(name) > 1 and name[1] == ":"):
        raise ArchiveRefused("the archive holds a file name that leads outside of it")
    return "/".join(part for part in parts if part not in ("", "."))


def _decoded_name(info: zipfile.ZipInfo) -> str:
    """Names without the UTF-8 mark are CP437 by the format, and UTF-8 by the habit of some systems."""
    name = info.orig_filename
    if info.flag_bits & _UTF8:
        return name
    try:
        return name.encode("cp437").decode("utf-8")
    except UnicodeError:
        return name


def _is_ignored(name: str) -> bool:
    parts = name.split("/")
    if any(part.startswith(".") or part.casefold() in _IGNORED_NAMES for part in parts):
        return True
    return parts[-1].casefold().endswith(".zip")


def _check_collisions(entries: Sequence[Entry]) -> None:
    seen: set[str] = set()
    for entry in entries:
        folded = unicodedata.normalize("NFC", entry.id.casefold())
        if folded in seen:
            raise ArchiveRefused("the archive holds two files of the same name")
        seen.add(folded)
