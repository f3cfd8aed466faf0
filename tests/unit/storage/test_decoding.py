"""The confined decoder as its parent sees it: results, refusals, deaths."""

import io
import os
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from services.domain.errors import BadInput, Unavailable
from services.storage import decoding
from services.storage.archives import ArchiveLimits
from services.storage.decode_child import DecodeTask
from services.storage.decoding import DecodeLimits, decode
from services.storage.images import RefusalKind
from services.storage.sandbox import SandboxLimits


def picture(colour: str = "red", size: tuple[int, int] = (80, 72), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def archived(folder: Path, files: dict[str, bytes]) -> str:
    path = folder / "archive"
    with zipfile.ZipFile(path, "w") as archive:
        for name, body in files.items():
            archive.writestr(name, body)
    return str(path)


async def test_archive_becomes_png_files_in_order_with_reasons_for_the_rest(tmp_path: Path) -> None:
    files = {
        "b.jpg": picture("blue", kind="JPEG"),
        "a.gif": picture("green", kind="GIF"),
        "cut.jpg": picture(size=(300, 300), kind="JPEG")[:-400],
        "notes.pdf": b"%PDF-1.7",
        "tiny.png": picture(size=(10, 90)),
        "b.txt": b"a blue wall",
        "named.jpg": b"<html>",
        ".DS_Store": b"x",
    }
    decoded = await decode(DecodeTask(str(tmp_path), archive=archived(tmp_path, files), read_captions=True))
    assert [(image.id, image.type_name, image.caption) for image in decoded.images] == [
        ("a.gif", "GIF", None),
        ("b.jpg", "JPEG", "a blue wall"),
    ]
    assert [(file.id, file.kind) for file in decoded.skipped] == [
        ("cut.jpg", RefusalKind.UNREADABLE),
        ("named.jpg", RefusalKind.UNREADABLE),
        ("notes.pdf", RefusalKind.OTHER),
        ("tiny.png", RefusalKind.TOO_SMALL),
    ]
    assert decoded.ignored == 2
    with Image.open(decoded.images[0].path) as reopened:
        assert (reopened.format, reopened.size, reopened.mode) == ("PNG", (80, 72), "RGB")


async def test_captions_are_read_only_when_asked_for(tmp_path: Path) -> None:
    files = {"b.png": picture(), "b.caption": b"text"}
    decoded = await decode(DecodeTask(str(tmp_path), archive=archived(tmp_path, files)))
    assert decoded.images[0].caption is None


async def test_single_files_are_decoded_under_their_given_ids(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(picture("blue"))
    decoded = await decode(DecodeTask(str(tmp_path), files=(("one", str(tmp_path / "in")),)))
    assert [(image.id, image.width_px, image.height_px) for image in decoded.images] == [("one", 80, 72)]


async def test_refused_archive_is_bad_input(tmp_path: Path) -> None:
    task = DecodeTask(str(tmp_path), archive=archived(tmp_path, {"../a.png": picture()}))
    with pytest.raises(BadInput, match="leads outside"):
        await decode(task)


async def test_bomb_costs_neither_this_process_nor_the_other_pictures(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("1", (9_900, 9_900)).save(buffer, "PNG")
    files = {"a.png": picture(), "bomb.png": buffer.getvalue(), "c.png": picture()}
    limits = SandboxLimits(memory_bytes=512 << 20)
    task = DecodeTask(str(tmp_path), archive=archived(tmp_path, files), sandbox_limits=limits)
    decoded = await decode(task)
    assert [image.id for image in decoded.images] == ["a.png", "c.png"]
    assert [(file.id, file.why) for file in decoded.skipped] == [("bomb.png", "needs too much memory")]


async def test_file_that_hangs_the_decoder_is_skipped_and_the_next_ones_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "hanging")
    (tmp_path / "good").write_bytes(picture())
    files = tuple((name, str(tmp_path / name)) for name in ("hanging", "good"))
    decoded = await decode(DecodeTask(str(tmp_path), files=files), DecodeLimits(image_silence_s=2.0))
    assert [image.id for image in decoded.images] == ["good"]
    assert [(file.id, file.why) for file in decoded.skipped] == [("hanging", "breaks the decoder")]


async def test_import_with_too_many_deaths_is_given_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "hanging")
    task = DecodeTask(str(tmp_path), files=(("hanging", str(tmp_path / "hanging")),))
    with pytest.raises(BadInput, match="break the decoder"):
        await decode(task, DecodeLimits(image_silence_s=2.0, max_deaths=0))


async def test_whole_import_has_a_deadline(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "hanging")
    task = DecodeTask(str(tmp_path), files=(("hanging", str(tmp_path / "hanging")),))
    with pytest.raises(BadInput, match="within 1 s"):
        await decode(task, DecodeLimits(total_s=1.0))


async def test_output_is_limited(tmp_path: Path) -> None:
    task = DecodeTask(str(tmp_path), archive=archived(tmp_path, {"a.png": picture()}))
    with pytest.raises(BadInput, match="take more than 10 bytes"):
        await decode(task, DecodeLimits(max_output_bytes=10))


async def test_fault_of_this_service_is_not_blamed_on_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = DecodeTask(str(tmp_path / "gone"), archive=archived(tmp_path, {"a.png": picture()}))
    with pytest.raises(Unavailable):
        await decode(task)
    monkeypatch.setattr(decoding, "CHILD_MODULE", "services.storage.no_such_module")
    with pytest.raises(Unavailable):
        await decode(task)


def test_task_survives_its_way_to_the_process() -> None:
    task = DecodeTask("/f", files=(("a", "/a"),), archive_limits=ArchiveLimits(max_files=3))
    assert DecodeTask.from_message(task.to_message()) == task
