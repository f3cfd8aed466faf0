"""Which zip archives are taken, which entries count, and how hostile ones are refused."""

import io
import random
import stat
import zipfile
from pathlib import Path

import pytest

from services.storage.archives import (
    ArchiveLimits,
    ArchiveRefused,
    EntryRefused,
    list_entries,
    open_archive,
    read_entry,
)

LIMITS = ArchiveLimits()
ENCRYPTED_FLAG, STRONG_FLAG, MASKED_FLAG = 0x1, 0x40, 0x2000


def zipped(names: list[str], body: bytes = b"x", method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name in names:
            info = zipfile.ZipInfo("placeholder")
            info.filename = name
            info.compress_type = method
            archive.writestr(info, body)
    return buffer.getvalue()


def zipped_info(info: zipfile.ZipInfo, body: bytes = b"x") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(info, body)
    return buffer.getvalue()


def patched(data: bytes, field: int, size: int, value: int, local_field: int | None = None) -> bytes:
    """Changes one number in every record of the central directory, and in the local headers if asked."""
    changed = bytearray(data)
    for signature, offset in ((b"PK\x01\x02", field), (b"PK\x03\x04", local_field)):
        place = changed.find(signature)
        while place >= 0 and offset is not None:
            changed[place + offset : place + offset + size] = value.to_bytes(size, "little")
            place = changed.find(signature, place + 4)
    return bytes(changed)


@pytest.fixture
def at(tmp_path: Path) -> Path:
    return tmp_path / "a.zip"


def ids(at: Path, data: bytes, limits: ArchiveLimits = LIMITS) -> list[str]:
    at.write_bytes(data)
    with open_archive(at) as archive:
        return [entry.id for entry in list_entries(archive, limits).entries]


def refusal(at: Path, data: bytes, limits: ArchiveLimits = LIMITS) -> str:
    with pytest.raises(ArchiveRefused) as caught:
        ids(at, data, limits)
    return str(caught.value)


def test_entries_are_sorted_and_keep_their_folders(at: Path) -> None:
    names = ["b/1.jpg", "a/2.jpg", "a/1.jpg", "top.png", "a/"]
    assert ids(at, zipped(names)) == ["a/1.jpg", "a/2.jpg", "b/1.jpg", "top.png"]


def test_order_of_packing_does_not_matter(at: Path) -> None:
    names = [f"{folder}/{number}.jpg" for folder in "xyz" for number in range(12)]
    shuffled = random.Random(3).sample(names, len(names))
    assert ids(at, zipped(shuffled)) == ids(at, zipped(names)) == sorted(names)


@pytest.mark.parametrize(
    "name",
    [
        "__MACOSX/._a.jpg",
        "__macosx/a.jpg",
        "a/__MACOSX/b.jpg",
        "._a.jpg",
        "a/.DS_Store",
        ".hidden.jpg",
        ".git/a.jpg",
        "Thumbs.db",
        "a/THUMBS.DB",
        "desktop.ini",
        "nested.zip",
        "a/Nested.ZIP",
    ],
)
def test_what_nobody_put_there_on_purpose_is_ignored(name: str, at: Path) -> None:
    at.write_bytes(zipped([name, "a/1.jpg"]))
    with open_archive(at) as archive:
        listing = list_entries(archive, LIMITS)
    assert [entry.id for entry in listing.entries] == ["a/1.jpg"]
    assert listing.ignored == 1


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd.jpg",
        "//server/share.jpg",
        "../a.jpg",
        "a/../../b.jpg",
        "a/..",
        "..",
        "..\\a.jpg",
        "a\\..\\..\\b.jpg",
        "\\windows\\a.jpg",
        "\\\\server\\a.jpg",
        "C:\\a.jpg",
        "c:a.jpg",
        "C:/a.jpg",
    ],
)
def test_name_that_leads_outside_is_refused(name: str, at: Path) -> None:
    assert refusal(at, zipped([name, "ok.jpg"])) == "the archive holds a file name that leads outside of it"


@pytest.mark.parametrize("name", ["a\nb.jpg", "a\x1b[31m.jpg", "a\x7f.jpg", "x" * 2000 + ".jpg"])
def test_unusable_name_is_refused(name: str, at: Path) -> None:
    assert refusal(at, zipped([name])) == "the archive holds an unusable file name"


def test_name_with_a_nul_byte_is_refused(at: Path) -> None:
    data = zipped(["a.jpgXevil.jpg"]).replace(b"a.jpgX", b"a.jpg\0")
    assert refusal(at, data) == "the archive holds an unusable file name"


@pytest.mark.parametrize(
    "pair",
    [
        ("a.jpg", "A.JPG"),
        ("a/b.jpg", "A/b.jpg"),
        ("stra\u00dfe.jpg", "STRASSE.jpg"),
        ("\u00e9.jpg", "e\u0301.jpg"),
        ("\u00c9.jpg", "e\u0301.jpg"),
        ("a.jpg", "./a.jpg"),
        ("a/b.jpg", "a//b.jpg"),
        ("a/b.jpg", "a\\b.jpg"),
    ],
)
def test_names_that_collide_are_refused(pair: tuple[str, str], at: Path) -> None:
    assert refusal(at, zipped(list(pair))) == "the archive holds two files of the same name"


def test_equal_names_in_different_folders_are_different_samples(at: Path) -> None:
    assert ids(at, zipped(["a/1.jpg", "b/1.jpg"])) == ["a/1.jpg", "b/1.jpg"]


def test_names_are_read_as_utf8_or_cp437_and_composed(at: Path) -> None:
    assert ids(at, zipped(["e\u0301t\u00e9/\u5199\u771f.jpg"])) == ["\u00e9t\u00e9/\u5199\u771f.jpg"]
    as_cp437 = zipped(["nXt.jpg"]).replace(b"nXt", b"n\x82t")
    assert ids(at, as_cp437) == ["n\u00e9t.jpg"]
    utf8_without_the_mark = zipped(["nXXt.jpg"]).replace(b"nXXt", "n\u00e9t".encode())
    assert ids(at, utf8_without_the_mark) == ["n\u00e9t.jpg"]


@pytest.mark.parametrize("flag", [ENCRYPTED_FLAG, ENCRYPTED_FLAG | STRONG_FLAG, MASKED_FLAG])
def test_encrypted_entries_are_refused(flag: int, at: Path) -> None:
    data = patched(zipped(["a.jpg"]), field=8, size=2, value=flag, local_field=6)
    assert refusal(at, data) == "the archive holds encrypted entries"


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK])
def test_links_and_special_files_are_refused(kind: int, at: Path) -> None:
    info = zipfile.ZipInfo("a.jpg")
    info.external_attr = (kind | 0o777) << 16
    assert refusal(at, zipped_info(info, b"/etc/passwd")) == "the archive holds links or special files"


def test_too_many_files_are_refused(at: Path) -> None:
    data = zipped([f"{number}.jpg" for number in range(11)])
    assert refusal(at, data, ArchiveLimits(max_files=10)) == "the archive holds more than 10 files"
    assert len(ids(at, data, ArchiveLimits(max_files=11))) == 11


def test_declared_sizes_over_the_limit_are_refused(at: Path) -> None:
    data = zipped(["a.jpg", "b.jpg"], bytes(600))
    why = refusal(at, data, ArchiveLimits(max_unpacked_bytes=1000))
    assert why == "the archive unpacks to more than 1000 bytes"


def test_bomb_is_refused_by_its_ratio(at: Path) -> None:
    data = zipped(["a.jpg"], bytes(80 << 20))
    assert len(data) < 100_000
    assert refusal(at, data) == "the archive unpacks to more than 200 times its size"


def test_small_archive_may_have_any_ratio(at: Path) -> None:
    assert ids(at, zipped(["a.bmp"], bytes(1 << 20))) == ["a.bmp"]


def test_entries_that_share_their_packed_bytes_are_refused(at: Path) -> None:
    data = zipped(["a.jpg", "b.jpg"], random.Random(1).randbytes(5000), zipfile.ZIP_STORED)
    assert refusal(at, patched(data, field=42, size=4, value=0)) == "the archive holds overlapping entries"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK",
        b"<html>not found</html>",
        b"Rar!\x1a\x07\x00" + bytes(100),
        b"\x1f\x8b\x08" + bytes(100),
        b"PK\x03\x04" + bytes(200),
        b"PK\x05\x06" + b"\xff" * 18,
        b"x" * 70_000,
    ],
)
def test_other_files_are_no_zip_archives(data: bytes, at: Path) -> None:
    assert refusal(at, data) == "not a zip archive"


def test_truncated_archive_is_no_archive(at: Path) -> None:
    data = zipped(["a.jpg", "b.jpg"], random.Random(1).randbytes(3000))
    for size in (30, 1000, len(data) - 60, len(data) - 23):
        assert refusal(at, data[:size]) == "not a zip archive"


def test_empty_archive_has_no_entries(at: Path) -> None:
    assert ids(at, zipped([])) == []


def read(at: Path, data: bytes, limits: ArchiveLimits = LIMITS) -> bytes:
    at.write_bytes(data)
    with open_archive(at) as archive:
        (entry,) = list_entries(archive, limits).entries
        return read_entry(archive, entry, limits)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_entry_is_read_whole(method: int, at: Path) -> None:
    body = random.Random(1).randbytes(3_000_000)
    assert read(at, zipped(["a.jpg"], body, method)) == body


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_rare_compression_is_refused_by_entry(method: int, at: Path) -> None:
    with pytest.raises(EntryRefused, match="compression method is not supported"):
        read(at, zipped(["a.jpg"], b"x", method))


def test_entry_that_unpacks_to_more_than_it_declares_is_refused(at: Path) -> None:
    data = patched(zipped(["a.jpg"], bytes(1 << 20)), field=24, size=4, value=1000, local_field=22)
    with pytest.raises(EntryRefused):
        read(at, data)


def test_entry_that_unpacks_to_less_than_it_declares_is_refused(at: Path) -> None:
    data = patched(zipped(["a.jpg"], bytes(1000)), field=24, size=4, value=5000, local_field=22)
    with pytest.raises(EntryRefused):
        read(at, data)


def test_entry_over_the_limit_is_refused_before_it_is_unpacked(at: Path) -> None:
    with pytest.raises(EntryRefused, match="larger than 999 bytes"):
        read(at, zipped(["a.jpg"], bytes(1000)), ArchiveLimits(max_entry_bytes=999))


def test_entry_with_changed_bytes_is_refused(at: Path) -> None:
    data = bytearray(zipped(["a.jpg"], random.Random(1).randbytes(3000), zipfile.ZIP_STORED))
    data[500] ^= 1
    with pytest.raises(EntryRefused, match="damaged"):
        read(at, bytes(data))


def test_entry_whose_own_header_names_another_file_is_refused(at: Path) -> None:
    data = zipped(["a.jpg"]).replace(b"a.jpg", b"b.jpg", 1)
    with pytest.raises(EntryRefused, match="damaged"):
        read(at, data)


def test_mutated_archives_are_listed_or_refused_but_never_fail_otherwise(at: Path) -> None:
    original = zipped(["a/1.jpg", "b/2.jpg", "c.txt"], b"pixels" * 50)
    chance = random.Random(5)
    outcomes = set()
    for _ in range(400):
        data = bytearray(original)
        for _ in range(chance.randint(1, 6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        at.write_bytes(data)
        try:
            with open_archive(at) as archive:
                for entry in list_entries(archive, LIMITS).entries:
                    read_entry(archive, entry, LIMITS)
            outcomes.add("read")
        except (ArchiveRefused, EntryRefused) as error:
            outcomes.add(type(error).__name__)
    assert outcomes == {"read", "ArchiveRefused", "EntryRefused"}


def test_zip64_sizes_are_honoured(at: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, archive.open("a.jpg", "w", force_zip64=True) as entry:
        entry.write(b"pixels")
    assert read(at, buffer.getvalue()) == b"pixels"
